//! Imports go down: each module uses only modules that stand below it.

use std::{fs, path::Path};

/// From the top to the bottom; modules on one line do not use each other.
const ORDER: &[&[&str]] = &[
    &["main"],
    &["commands", "failure", "print", "signals"],
    &["fuzzing"],
    &["doctor", "server", "export", "erase", "migrate", "healthcheck"],
    &["http", "registry"],
    &["connection"],
    &["router"],
    &["handlers"],
    &["audit", "cluster"],
    &["store", "limits", "hub"],
    &["auth", "redis"],
    &["breaker"],
    &["metrics"],
    &["protocol"],
    &["telemetry"],
    &["traces"],
    &["files"],
    &["config", "machine", "objects", "outbound", "sync", "task"],
];

#[test]
fn imports_go_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    for (rank, names) in ORDER.iter().enumerate() {
        for name in *names {
            for text in sources(&src, name) {
                checked += 1;
                let binary = ["main", "commands", "failure", "print", "signals"].contains(name);
                for used in modules_used(&text, if binary { "switchboard::" } else { "crate::" }) {
                    let target = ORDER.iter().position(|names| names.contains(&used.as_str()));
                    let target = target.unwrap_or_else(|| panic!("{used} is not in the order"));
                    assert!(target > rank || used == **name, "{name} must not use {used}");
                }
            }
        }
    }
    assert!(checked > 20, "only {checked} files were found");
}

#[test]
fn every_module_has_a_place_in_the_order() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for entry in fs::read_dir(src).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let name = name.trim_end_matches(".rs");
        let known = name == "lib" || ORDER.iter().any(|names| names.contains(&name));
        assert!(known, "{name} is not in the order");
    }
}

#[test]
fn no_file_is_longer_than_500_lines() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["src", "tests", "load", "fuzz"] {
        for (file, text) in files(&root.join(folder)) {
            let lines = text.lines().count();
            assert!(lines <= 500, "{file} has {lines} lines: split it along its thoughts");
        }
    }
}

fn sources(src: &Path, module: &str) -> Vec<String> {
    let mut texts: Vec<_> =
        fs::read_to_string(src.join(format!("{module}.rs"))).into_iter().collect();
    texts.extend(files(&src.join(module)).into_iter().map(|(_, text)| text));
    texts
}

/// Every Rust file below a folder, by name.
fn files(folder: &Path) -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| {
            if path.is_dir() {
                return files(&path);
            }
            let rust = path.extension().is_some_and(|ending| ending == "rs");
            let text = rust.then(|| fs::read_to_string(&path).unwrap());
            text.map(|text| (path.display().to_string(), text)).into_iter().collect()
        })
        .collect()
}

/// The top-level modules named in `crate::a` and `crate::{a, b::c}`; the binary calls the crate by name.
fn modules_used(text: &str, root: &str) -> Vec<String> {
    let mut used = Vec::new();
    for start in text.match_indices(root) {
        let rest = &text[start.0 + start.1.len()..];
        match rest.strip_prefix('{') {
            None => used.push(identifier(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut at_item = true;
                for (i, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => at_item = true,
                        c if at_item && c.is_alphabetic() => {
                            used.push(identifier(&group[i..]));
                            at_item = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    used.retain(|name| !name.is_empty());
    used
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}
