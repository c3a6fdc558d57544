//! What the documents say of the settings is true.

use std::collections::BTreeMap;

use switchboard::config::SETTINGS;

const README: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"));
const SETTINGS_DOCUMENT: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/settings.md"));
const PROTOCOL: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/protocol.md"));

/// Names and defaults in the rows ``| `NAME` | `default` | meaning |`` of a section. A row may have more
/// settings than one, with commas between the names and between the defaults.
fn documented(text: &'static str, section: &str) -> BTreeMap<&'static str, &'static str> {
    let heading = format!("\n## {section}\n");
    let (_, rest) = text.split_once(&heading).expect("the document has the section");
    let body = rest.split("\n## ").next().unwrap_or_default();
    let mut settings = BTreeMap::new();
    for row in body.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = row.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
        let [name, default, meaning] = cells[..] else { panic!("{row} has not three cells") };
        assert!(!meaning.is_empty(), "{row} says nothing");
        let (names, defaults) = (name.split(", "), default.split(", "));
        assert_eq!(names.clone().count(), defaults.clone().count(), "{row}");
        for (name, default) in names.zip(defaults) {
            let default = match default {
                "empty" => "",
                written => written.trim_matches('`'),
            };
            let twice = settings.insert(name.trim_matches('`'), default);
            assert!(twice.is_none(), "{name} stands twice");
        }
    }
    settings
}

#[test]
fn the_document_of_the_settings_lists_each_with_its_default() {
    let defaults: BTreeMap<_, _> = SETTINGS.iter().map(|s| (s.name, s.default)).collect();
    assert_eq!(documented(SETTINGS_DOCUMENT, "All settings"), defaults);
}

#[test]
fn the_protocol_document_gives_the_defaults_of_the_server() {
    let limits = documented(PROTOCOL, "Limits");
    assert!(limits.len() > 10, "{limits:?}");
    for (name, default) in limits {
        let setting = SETTINGS.iter().find(|setting| setting.name == name);
        let setting = setting.unwrap_or_else(|| panic!("{name} is not a setting"));
        assert_eq!(setting.default, default, "{name}");
    }
}

#[test]
fn the_readme_is_short_enough_to_be_read() {
    let lines = README.lines().count();
    assert!(lines < 200, "{lines} lines");
}

#[test]
fn the_files_of_the_code_tour_exist() {
    let (_, tour) = README.split_once("\n## Code tour\n").expect("the README has a code tour");
    let tour = tour.split("\n## ").next().unwrap_or_default();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let files: Vec<_> = tour
        .split('`')
        .filter(|name| name.starts_with("src/") || name.starts_with("tests/"))
        .collect();
    assert!(files.len() > 10, "{files:?}");
    for file in files {
        assert!(root.join(file).exists(), "{file} does not exist");
    }
}
