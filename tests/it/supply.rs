//! What the project says of vulnerabilities, and what its releases are made of.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn the_project_says_how_to_report_a_vulnerability_and_checks_advisories() {
    let policy = text("SECURITY.md");
    for part in
        ["## Report a vulnerability", "## Supported versions", "tests/deny.sh", ".ci/release"]
    {
        assert!(policy.contains(part), "SECURITY.md has no {part}");
    }
    let deny: toml::Table = text("deny.toml").parse().unwrap();
    for part in ["advisories", "licenses", "bans", "sources"] {
        assert!(deny.contains_key(part), "deny.toml has no [{part}]");
    }
    assert!(text(".ci/run").contains("tests/deny.sh"));
    // Every advisory that is passed over has its reason.
    let ignored = deny["advisories"].get("ignore").and_then(toml::Value::as_array);
    for entry in ignored.into_iter().flatten() {
        assert!(entry.get("reason").is_some(), "{entry:?} has no reason");
    }
}

/// Runs the recipe where its tool is there.
#[test]
fn a_release_has_a_bill_of_materials_of_the_lock_file() {
    let recipe = text(".ci/release");
    assert!(recipe.contains("cargo cyclonedx") && recipe.contains("--locked"), "{recipe}");
    let there = Command::new("cargo").args(["cyclonedx", "--version"]).output();
    if !there.is_ok_and(|ran| ran.status.success()) {
        eprintln!(
            "NOT CHECKED: cargo-cyclonedx is not there (cargo install cargo-cyclonedx --locked)"
        );
        return;
    }
    let target = tempfile::tempdir().unwrap();
    let mut recipe = Command::new(root().join(".ci/release"));
    let ran = recipe.arg("--sbom-only").env("CARGO_TARGET_DIR", target.path()).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let bill = fs::read(target.path().join("dist/switchboard.cdx.json")).unwrap();
    let bill: Value = serde_json::from_slice(&bill).unwrap();
    assert_eq!(bill["bomFormat"], "CycloneDX");
    let lock: toml::Table = text("Cargo.lock").parse().unwrap();
    let version = |name: &str| {
        let packages = lock["package"].as_array().unwrap();
        let package = packages.iter().find(|package| package["name"].as_str() == Some(name));
        package.unwrap()["version"].as_str().unwrap()
    };
    for name in ["tokio", "hyper", "sqlx", "aws-lc-rs"] {
        let components = bill["components"].as_array().unwrap();
        let found = components.iter().find(|component| component["name"] == name);
        assert_eq!(found.unwrap()["version"], version(name), "{name}");
    }
}
