//! A reader of Rust sources: which file imports which.

use std::collections::{BTreeMap, BTreeSet};

/// The sources of a crate: text by path below `src`, for example `operator/cpu.rs`.
pub struct Sources {
    /// Code by module path, without comments and unit tests.
    code: BTreeMap<Vec<String>, String>,
}

/// One import: the file that holds the name, and the name; `None` for a module.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Import {
    pub file: Vec<String>,
    pub name: Option<String>,
    /// Whether all modules on the way are public or the way is a public re-export.
    pub is_public: bool,
}

impl Sources {
    pub fn new<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let code = files.into_iter().map(|(p, text)| (module(p), code(text)));
        Self { code: code.collect() }
    }

    pub fn modules(&self) -> impl Iterator<Item = &Vec<String>> {
        self.code.keys()
    }

    pub fn code(&self, module: &[String]) -> &str {
        &self.code[module]
    }

    /// What the file of `module` imports. The re-exports of a file are not imports of that file.
    pub fn imports(&self, module: &[String]) -> BTreeSet<Import> {
        let code = without_reexports(self.code(module));
        let mut found = BTreeSet::new();
        for path in paths(&code, &self.children(module)) {
            if let Some(import) = self.absolute(module, &path).and_then(|p| self.resolve(&p)) {
                found.insert(import);
            }
        }
        found.retain(|import| import.file != module);
        found
    }

    /// Circles of files, each as the modules that reach one another.
    pub fn circles(&self) -> Vec<Vec<String>> {
        let edges: BTreeMap<&Vec<String>, BTreeSet<Vec<String>>> = self
            .modules()
            .map(|m| (m, self.imports(m).into_iter().map(|i| i.file).collect()))
            .collect();
        let reachable = |from: &Vec<String>| {
            let mut seen = BTreeSet::new();
            let mut open = vec![from.clone()];
            while let Some(at) = open.pop() {
                for next in edges.get(&at).into_iter().flatten() {
                    if seen.insert(next.clone()) {
                        open.push(next.clone());
                    }
                }
            }
            seen
        };
        let reach: BTreeMap<_, _> = self.modules().map(|m| (m, reachable(m))).collect();
        let mut circles = BTreeSet::new();
        for m in self.modules().filter(|m| reach[m].contains(*m)) {
            let back = |o: &&Vec<String>| reach[m].contains(*o) && reach[o].contains(m);
            let members = self.modules().filter(back).map(|m| m.join("::"));
            circles.insert(members.collect::<Vec<_>>());
        }
        circles.into_iter().collect()
    }

    /// The modules that the file of `module` declares.
    fn children(&self, module: &[String]) -> Vec<String> {
        let below = |m: &&Vec<String>| m.len() == module.len() + 1 && m.starts_with(module);
        let last = |m: &Vec<String>| m[module.len()].clone();
        self.modules().filter(below).map(last).collect()
    }

    /// The path from the root of the crate; `None` for a path that starts elsewhere.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Vec<String>> {
        let mut base = match path[0].as_str() {
            "crate" => Vec::new(),
            "self" | "super" => module.to_vec(),
            _ => return Some([module, path].concat()),
        };
        let mut rest = path;
        while let Some(head @ ("crate" | "self" | "super")) = rest.first().map(String::as_str) {
            if head == "super" {
                base.pop()?;
            }
            rest = &rest[1..];
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    /// The file that declares what `path` names, through re-exports.
    fn resolve(&self, path: &[String]) -> Option<Import> {
        let depth = (0..=path.len()).rev().find(|&d| self.code.contains_key(&path[..d]))?;
        let (file, rest) = (path[..depth].to_vec(), &path[depth..]);
        let open = |d: usize| {
            let declaration = format!("pub mod {};", path[d]);
            self.code(&path[..d]).contains(&declaration)
        };
        let is_public = (0..depth).all(open);
        let Some(name) = rest.first() else {
            return Some(Import { file, name: None, is_public });
        };
        for (alias, target) in reexports(self.code(&file)) {
            if alias == *name {
                let target = self.absolute(&file, &target)?;
                let mut import = self.resolve(&target)?;
                import.is_public = is_public;
                return Some(import);
            }
        }
        Some(Import { file, name: Some(name.clone()), is_public })
    }

    /// Whether the file declares `name` as a public item.
    pub fn declares_public(&self, module: &[String], name: &str) -> bool {
        let kinds = ["fn", "const fn", "struct", "enum", "trait", "type", "const", "use", "mod"];
        let code = self.code(module);
        kinds.iter().any(|kind| {
            let start = format!("pub {kind} {name}");
            let mut found = code.match_indices(&start);
            found.any(|(i, _)| !code[i + start.len()..].starts_with(is_word))
        })
    }
}

/// `operator/cpu.rs` is `operator::cpu`; `operator/mod.rs` is `operator`; `lib.rs` is the root.
fn module(path: &str) -> Vec<String> {
    let path = path.trim_end_matches(".rs");
    let parts = path.split('/').filter(|p| !matches!(*p, "mod" | "lib"));
    parts.map(str::to_string).collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The text without comments and without unit tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let line = |l: &str| l.split(" // ").next().unwrap().to_string();
    let lines = text.lines().filter(|l| !l.trim_start().starts_with("//"));
    lines.map(line).collect::<Vec<_>>().join("\n")
}

/// The statements `pub use ..;`, of any visibility.
fn reexport_statements(code: &str) -> Vec<(usize, &str)> {
    let starts = code.match_indices("pub").filter(|&(i, _)| i == 0 || code[..i].ends_with('\n'));
    let statement = |(i, _): (usize, &str)| {
        let end = i + code[i..].find(';')?;
        let words = &code[i..end];
        let is_use = words.starts_with("pub use ")
            || words.starts_with("pub(crate) use ")
            || words.starts_with("pub(super) use ");
        is_use.then_some((i, &code[i..=end]))
    };
    starts.filter_map(statement).collect()
}

fn without_reexports(code: &str) -> String {
    let statements = reexport_statements(code);
    let mut out = code.to_string();
    for (i, statement) in statements.into_iter().rev() {
        out.replace_range(i..i + statement.len(), "");
    }
    out
}

/// Names that the file re-exports, each with the path it comes from.
fn reexports(code: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    for (_, statement) in reexport_statements(code) {
        let tree = statement.split_once(" use ").unwrap().1;
        for mut path in read(tree) {
            if path.last().is_some_and(|l| l == "self") {
                path.pop();
            }
            found.extend(path.last().cloned().map(|name| (name, path)));
        }
    }
    found
}

/// All paths in the code that start with `crate`, `self`, `super` or one of `children`.
fn paths(code: &str, children: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let heads = ["crate", "self", "super"].into_iter().map(str::to_string);
    for head in heads.chain(children.iter().cloned()) {
        for (i, _) in code.match_indices(&format!("{head}::")) {
            let before = code[..i].trim_end();
            // Part of a longer word or path.
            if code[..i].ends_with(is_word) || before.ends_with("::") {
                continue;
            }
            found.extend(read(&code[i..]));
        }
    }
    found
}

/// The paths of a use tree, or of a path in an expression.
fn read(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    tree(text, &[], &mut found);
    found
}

/// Reads one tree, and returns the rest of the text.
fn tree<'a>(text: &'a str, prefix: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    let mut text = text.trim_start();
    if let Some(list) = text.strip_prefix('{') {
        text = list.trim_start();
        while !text.is_empty() && !text.starts_with('}') {
            let rest = tree(text, prefix, found).trim_start();
            // `as name`, or what is no tree.
            let end = rest.find([',', '}']).unwrap_or(rest.len());
            text = rest[end..].trim_start_matches(',').trim_start();
        }
        return text.strip_prefix('}').unwrap_or(text);
    }
    let end = text.find(|c| !is_word(c)).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    let mut path = prefix.to_vec();
    if !word.is_empty() {
        path.push(word.to_string());
    }
    match rest.strip_prefix("::") {
        Some(next) if next.starts_with(|c: char| is_word(c) || c == '{') => {
            tree(next, &path, found)
        }
        _ => {
            if !path.is_empty() {
                found.push(path);
            }
            rest
        }
    }
}
