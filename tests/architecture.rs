//! Imports run one way: between rooms, and between the files of a room.

mod sources;

use std::{fs, path::Path};

use sources::Sources;

/// The rooms, lowest layer first. Rooms of one layer do not import each other.
const LAYERS: [&[&str]; 11] = [
    &["error", "guide"],
    &["check", "storage"],
    &["grid"],
    &["group"],
    &["operator", "partition", "schedule", "tap", "ema"],
    &["fibre"],
    &["view", "loss", "projector", "grad", "metric"],
    &["ser"],
    &["regularizer"],
    &["contrib"],
    &["testing"],
];

/// The longest file, in lines.
const LONGEST: usize = 400;

fn files(dir: &Path, prefix: &str, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        if path.is_dir() {
            files(&path, &format!("{name}/"), found);
        } else if name.ends_with(".rs") {
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

fn src() -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut found);
    assert!(found.len() > 15, "only {} files found", found.len());
    found
}

fn sources(files: &[(String, String)]) -> Sources {
    Sources::new(files.iter().map(|(p, t)| (p.as_str(), t.as_str())))
}

/// Imports that do not run downwards, and rooms without a layer.
fn upward(sources: &Sources, layers: &[&[&str]]) -> Vec<String> {
    let layer = |room: &str| layers.iter().position(|l| l.contains(&room));
    let mut wrong = Vec::new();
    for module in sources.modules().filter(|m| !m.is_empty()) {
        let Some(own) = layer(&module[0]) else {
            wrong.push(format!("{} belongs to no layer", module.join("::")));
            continue;
        };
        for import in sources.imports(module) {
            let room = import.file.first().map_or("the root", String::as_str);
            if room != module[0] && layer(room).is_none_or(|below| below >= own) {
                let name = import.name.unwrap_or_default();
                wrong.push(format!("{} imports {room} ({name})", module.join("::")));
            }
        }
    }
    wrong
}

/// Imports of `room` from other rooms that a user of the crate could not write.
fn hidden(sources: &Sources, room: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for module in sources.modules().filter(|m| m.first().is_some_and(|r| r == room)) {
        for import in sources.imports(module) {
            let is_own = import.file.first().is_some_and(|r| r == room);
            let declared = import.name.as_ref();
            let is_declared = declared.is_none_or(|n| sources.declares_public(&import.file, n));
            let is_hidden = !import.is_public || !is_declared;
            if !is_own && is_hidden {
                let name = import.name.unwrap_or_default();
                let file = import.file.join("::");
                wrong.push(format!("{}: {file}::{name} is not public", module.join("::")));
            }
        }
    }
    wrong
}

fn none(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_run_downwards() {
    none(upward(&sources(&src()), &LAYERS));
}

#[test]
fn no_files_import_each_other() {
    let circles = sources(&src()).circles();
    none(circles.iter().map(|c| format!("a circle: {}", c.join(", "))).collect());
}

#[test]
fn contrib_uses_public_paths_only() {
    none(hidden(&sources(&src()), "contrib"));
}

#[test]
fn the_algebra_has_no_tensors() {
    let sources = sources(&src());
    let group = sources.modules().filter(|m| m.first().is_some_and(|r| r == "group"));
    for module in group {
        assert!(!sources.code(module).contains("candle"), "{}", module.join("::"));
    }
}

#[test]
fn files_are_short() {
    let lines = |text: &str| text.lines().count();
    let long = src().into_iter().filter(|(_, text)| lines(text) > LONGEST);
    none(long.map(|(p, text)| format!("{p} has {} lines", lines(&text))).collect());
}

// ---- the reader sees what it must ---------------------------------------------------------------

const LIB: &str = "mod low;\npub mod high;\npub mod contrib;\npub use low::{Low, self};";
const LOW: &str = "pub struct Low;\npub(crate) struct Own;";

fn small(more: &[(&'static str, &'static str)]) -> Sources {
    let base = [("lib.rs", LIB), ("low.rs", LOW)];
    Sources::new(base.into_iter().chain(more.iter().copied()))
}

const SMALL: [&[&str]; 3] = [&["low"], &["high"], &["contrib"]];

#[test]
fn the_reader_finds_imports_through_the_root() {
    let high =
        "use crate::{Low as L, low::{Own, Other}};\nfn f() -> crate::Low { crate::low::g::<u8>() }";
    let sources = small(&[("high.rs", high)]);
    let found = sources.imports(&["high".to_string()]);
    let names: Vec<_> = found.iter().map(|i| i.name.as_deref().unwrap()).collect();
    assert_eq!(names, ["Low", "Other", "Own", "g"]);
    assert!(found.iter().all(|i| i.file == ["low"]));
    assert!(upward(&sources, &SMALL).is_empty());
    // Comments and unit tests import nothing.
    let free = "//! crate::high\n/// [`f`](crate::high::f)\nfn f() {} // crate::high\n#[cfg(test)]\nmod tests { use crate::high::f; }";
    let sources = Sources::new([("lib.rs", LIB), ("low.rs", free), ("high.rs", "pub fn f() {}")]);
    assert!(upward(&sources, &SMALL).is_empty());
}

#[test]
fn the_reader_sees_imports_upwards() {
    let low = "use crate::high::f;\npub struct Low;";
    let sources = Sources::new([("lib.rs", LIB), ("low.rs", low), ("high.rs", "pub fn f() {}")]);
    assert_eq!(upward(&sources, &SMALL), ["low imports high (f)"]);
    let other = small(&[("other.rs", "use crate::nothing;")]);
    assert_eq!(upward(&other, &SMALL), ["other belongs to no layer"]);
}

#[test]
fn the_reader_sees_circles_in_a_folder() {
    let circle = |files: &[(&'static str, &'static str)]| small(files).circles();
    let root = ("high/mod.rs", "mod a;\nmod b;\npub use a::{A, A2};\npub use self::b::B;");
    let of = |a: &'static str, b: &'static str| circle(&[root, ("high/a.rs", a), ("high/b.rs", b)]);
    // Through the file, through the re-export, and both through `crate`.
    for a in ["use super::b::B;", "use super::{B, x};", "fn f() -> crate::high::B { }"] {
        for b in ["use super::a::A;", "use crate::high::{A2};", "fn f(a: super::A) {}"] {
            assert_eq!(of(a, b), [["high::a", "high::b"]], "{a} {b}");
        }
        assert!(of(a, "fn f() {}\n// super::a::A").is_empty());
    }
    // A folder's own file counts where it imports its files and they import its items.
    for root in ["mod a;\nuse self::a::A;", "mod a;\nfn f() { a::g() }"] {
        let found = circle(&[("high/mod.rs", root), ("high/a.rs", "use super::Item;")]);
        assert_eq!(found, [["high", "high::a"]]);
        assert!(circle(&[("high/mod.rs", root), ("high/a.rs", "pub fn g() {}")]).is_empty());
    }
}

#[test]
fn the_reader_sees_what_is_not_public() {
    let of = |contrib: &'static str| {
        let high = ("high.rs", "pub struct High;\npub(crate) fn hidden() {}\nfn private() {}");
        hidden(&small(&[("contrib/mod.rs", contrib), high]), "contrib")
    };
    let none: [String; 0] = [];
    assert_eq!(of("use crate::{Low, high::High};"), none);
    assert_eq!(of("use crate::high::hidden;"), ["contrib: high::hidden is not public"]);
    assert_eq!(of("use crate::high::Hi;"), ["contrib: high::Hi is not public"]);
    // A public name in a private module.
    assert_eq!(of("use crate::low::Low;"), ["contrib: low::Low is not public"]);
}

/// The names of the functions of `text` whose documentation has a section on errors of their own.
fn fallible(text: &str) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut found = Vec::new();
    for at in (0..lines.len()).filter(|&at| lines[at] == "/// # Errors") {
        let said = lines[at + 1];
        let signature = lines[at..].iter().position(|l| !l.starts_with("///")).unwrap();
        let after = &lines[at + signature..];
        let is_hidden = after[0] == "#[doc(hidden)]";
        let line = after.iter().find(|l| l.contains("fn ")).unwrap();
        let name = line.split("fn ").nth(1).unwrap().split(['<', '(']).next().unwrap();
        if !is_hidden && !said.contains("Those of candle") && !said.contains("None today") {
            found.push(name);
        }
    }
    found
}

/// docs/bad-input.md knows every public function that can refuse its input.
#[test]
fn the_table_of_bad_input_is_complete() {
    let table = include_str!("../docs/bad-input.md");
    let mut count = 0;
    let mut missing = Vec::new();
    for (file, text) in src() {
        for name in fallible(&text) {
            count += 1;
            if !table.contains(&format!("{name}` |")) {
                missing.push(format!("{file}: {name}"));
            }
        }
    }
    assert!(count > 100, "only {count} functions found");
    none(missing);
}
