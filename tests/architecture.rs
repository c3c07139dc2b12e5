//! Imports run one way: a module uses modules of lower layers and of its own folder only.

use std::{fs, path::Path};

/// The layers, lowest first. Modules of one layer do not know each other.
const LAYERS: [&[&str]; 9] = [
    &["error"],
    &["grid"],
    &["group"],
    &["operator", "partition", "schedule", "tap", "grad"],
    &["fibre"],
    &["view", "loss", "projector", "metric"],
    &["ser", "addon", "companion"],
    &["cost"],
    &["testing"],
];

/// What the crate root re-exports, by the module that it comes from.
const ROOT: [(&str, &str); 11] = [
    ("Error", "error"),
    ("Result", "error"),
    ("Channels", "grid"),
    ("Layout", "grid"),
    ("TokenGrid", "grid"),
    ("GroupAction", "group"),
    ("Filter", "operator"),
    ("GridOperator", "operator"),
    ("Padding", "operator"),
    ("Resample", "operator"),
    ("Partition", "partition"),
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|l| l.contains(&module))
}

/// The text without comment lines.
fn code(text: &str) -> String {
    let lines = text.lines().filter(|l| !l.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules that `text` names by `crate::…`, through the root's re-exports, doc comments left out.
fn imports(text: &str) -> Vec<String> {
    let code = code(text);
    let mut found = Vec::new();
    for part in code.split("crate::").skip(1) {
        let names = match part.strip_prefix('{') {
            Some(list) => {
                // the first segment of each item at depth one
                let mut depth = 1;
                let mut items = vec![String::new()];
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 1 => items.push(String::new()),
                        c if depth == 1 => items.last_mut().unwrap().push(c),
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                }
                items
            }
            None => vec![part.to_string()],
        };
        for name in names {
            let name: String = name
                .trim()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            if !name.is_empty() {
                let module = ROOT
                    .iter()
                    .find(|(n, _)| *n == name)
                    .map_or(name.as_str(), |(_, m)| m);
                found.push(module.to_string());
            }
        }
    }
    found
}

fn check(dir: &Path, module: Option<&str>, seen: &mut usize) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            check(&path, Some(module.unwrap_or(&stem)), seen);
            continue;
        }
        let module = module.unwrap_or(&stem);
        if module == "lib" {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let own = layer(module).unwrap_or_else(|| panic!("{} belongs to no layer", path.display()));
        for used in imports(&text) {
            let below = layer(&used)
                .unwrap_or_else(|| panic!("{}: crate::{used} is no module", path.display()));
            assert!(
                used == module || below < own,
                "{}: imports crate::{used}, which is not below {module}",
                path.display()
            );
        }
        if matches!(module, "group") {
            assert!(
                !code(&text).contains("candle"),
                "{}: the algebra knows no tensors",
                path.display()
            );
        }
        *seen += 1;
    }
}

#[test]
fn imports_run_downwards() {
    let mut seen = 0;
    check(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        None,
        &mut seen,
    );
    assert!(seen > 15, "only {seen} files found");
}

#[test]
fn the_reader_of_imports_sees_them() {
    let text = "use crate::{Error, group::{A, B}, view::X};\nfn f() -> crate::Result<()> { crate::ser::g() }\n// crate::no";
    assert_eq!(imports(text), ["error", "group", "view", "error", "ser"]);
}
