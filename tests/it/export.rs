//! `switchboard audit export`: what it writes, where it ends, and what it makes of odd flags.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    Database,
    database::Place,
    on_both,
    process::{Ran, finish, run, switchboard},
};

async fn trail(database: Database, rows: &[Value]) -> Place {
    let place = database.place().await;
    let settings = [&place.settings()[..], &[("AUDIT_ENABLED", "false")]].concat();
    assert_eq!(run(&["migrate"], &settings).code, Some(0));
    place.audit(rows).await;
    place
}

fn export(place: &Place, flags: &[&str]) -> Ran {
    run(&[&["audit", "export"], flags].concat(), &place.settings())
}

fn exported(place: &Place, flags: &[&str]) -> String {
    let ran = export(place, flags);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{flags:?}");
    without_exports(&ran.stdout)
}

/// Lines without the rows of the exports before.
fn without_exports(lines: &str) -> String {
    lines.split_inclusive('\n').filter(|line| !line.contains("AUDIT:EXPORT")).collect()
}

/// The `request_id`s in the lines of an export.
fn found(place: &Place, flags: &[&str]) -> Vec<String> {
    let lines = exported(place, flags);
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["request_id"].clone();
    lines.lines().map(|line| id(line).as_str().unwrap().to_owned()).collect()
}

async fn rows_of_any_content_come_out_whole(database: Database) {
    let odd = [
        json!({ "username": "plain", "request_data": null, "error_message": null,
                "ip_address": null, "user_roles": [], "duration_ms": 12.5 }),
        json!({ "username": "Zoë, \"Z\" 🖋 李白", "user_agent": "a,b;c\t'd'\\",
                "error_message": "line 1\nline 2\r\nline \"3\"\u{2028}",
                "request_data": { "name": "x\ny", "deep": { "a": [1.5, "é", null] } } }),
        json!({ "username": "", "resource": " /spaces ", "user_id": "=1+1", "response_status": 1001 }),
    ];
    let place = trail(database, &odd).await;
    let lines = exported(&place, &["--format", "jsonl"]);
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), odd.len());
    for (row, odd) in rows.iter().zip(&odd) {
        assert_eq!(row.as_object().unwrap().len(), 16);
        for (name, value) in odd.as_object().unwrap() {
            assert_eq!(&row[name], value, "{name}");
        }
    }
    assert_eq!(exported(&place, &[]), lines, "jsonl is the default");

    let text = exported(&place, &["--format", "csv"]);
    let mut csv = csv::Reader::from_reader(text.as_bytes());
    let head: Vec<String> = csv.headers().unwrap().iter().map(str::to_owned).collect();
    assert_eq!(head, switchboard::store::StoredAction::COLUMNS);
    let records: Vec<csv::StringRecord> = csv.records().map(Result::unwrap).collect();
    assert_eq!(records.len(), odd.len());
    for (record, row) in records.iter().zip(&rows) {
        for (name, cell) in head.iter().zip(record) {
            match &row[name] {
                Value::Null => assert_eq!(cell, "", "{name}"),
                Value::String(text) => assert_eq!(cell, text, "{name}"),
                other => assert_eq!(&serde_json::from_str::<Value>(cell).unwrap(), other, "{name}"),
            }
        }
    }
}

async fn a_long_trail_is_written_oldest_first_and_each_row_once(database: Database) {
    // Of 1,250 rows, 1,100 are of one moment: more than one part has.
    let rows: Vec<_> = (0..1250)
        .map(|i| match i {
            100..1200 => json!({ "request_id": i.to_string(), "timestamp": "2026-11-22T01:00:00.000000Z" }),
            0..100 => json!({ "request_id": i.to_string() }),
            _ => json!({ "request_id": i.to_string(), "timestamp": format!("2026-11-22T02:{:02}:00.000000Z", i - 1200) }),
        })
        .collect();
    let place = trail(database, &rows).await;
    let expected: Vec<_> = (0..1250).map(|i| i.to_string()).collect();
    assert_eq!(found(&place, &[]), expected);
    assert_eq!(found(&place, &["--since", "2026-11-22T01:00:00Z"]), expected[100..]);
    let until = ["--since", "2026-11-22T00:00:00Z", "--until", "2026-11-22T01:00:00Z"];
    assert_eq!(found(&place, &until), expected[..1200]);

    let file = place.data.path().join("trail.jsonl");
    let name = file.to_str().unwrap();
    assert_eq!(exported(&place, &["--output", name]), "");
    let written = without_exports(&fs::read_to_string(&file).unwrap());
    assert_eq!(written.lines().count(), 1250);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(exported(&place, &["--output", name, "--until", "2026-11-21"]), "");
    assert_eq!(fs::read_to_string(&file).unwrap(), "", "the file is replaced");
}

async fn a_range_includes_both_of_its_ends(database: Database) {
    let at = |name: &str, time: &str| json!({ "request_id": name, "timestamp": time });
    let rows = [
        at("eve", "2026-11-21T23:59:59.999999Z"),
        at("first", "2026-11-22T00:00:00.000000Z"),
        at("last", "2026-11-22T23:59:59.999999Z"),
        at("next", "2026-11-23T00:00:00.000000Z"),
    ];
    let place = trail(database, &rows).await;
    for (flags, expected) in [
        (&[][..], &["eve", "first", "last", "next"][..]),
        (&["--since", "2026-11-22", "--until", "2026-11-22"], &["first", "last"]),
        (&["--until", "2026-11-22T00:00:00Z"], &["eve", "first"]),
        (&["--since", "2026-11-23T01:00:00+01:00"], &["next"]),
        (&["--since", "2026-11-24"], &[]),
    ] {
        assert_eq!(found(&place, flags), expected, "{flags:?}");
    }
}

async fn a_reader_that_has_had_enough_ends_it_quietly(database: Database) {
    let data = "x".repeat(2000);
    let rows: Vec<_> = (0..1500).map(|_| json!({ "request_data": { "x": data } })).collect();
    let place = trail(database, &rows).await;
    for format in ["csv", "jsonl"] {
        let args = ["audit", "export", "--format", format];
        let mut child = switchboard(&args, &place.settings()).spawn().unwrap();
        let mut line = String::new();
        // As `head -1` does.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("request_id"), "{line}");
        child.stdout = Some(nothing());
        let ran = finish(child);
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{format}");
    }
}

/// The output of a process that says nothing, in place of one that was closed.
fn nothing() -> std::process::ChildStdout {
    let mut said = std::process::Command::new("true");
    let mut said = said.stdout(std::process::Stdio::piped()).spawn().unwrap();
    said.wait().unwrap();
    said.stdout.take().unwrap()
}

async fn an_old_schema_is_named_and_nothing_is_migrated(database: Database) {
    let place = database.place().await;
    let file = place.data.path().join("trail.csv");
    fs::write(&file, "before").unwrap();
    if matches!(database, Database::Sqlite) {
        fs::write(place.data.path().join("switchboard.db"), "").unwrap();
    }
    let ran = export(&place, &["--output", file.to_str().unwrap()]);
    assert_eq!((ran.code, &*ran.stdout), (Some(1), ""), "{ran:?}");
    assert!(
        ran.stderr.contains("schema versions server 0, authors 0")
            && ran.stderr.contains("switchboard migrate")
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "before");
    if matches!(database, Database::Sqlite) {
        assert!(place.execute("SELECT name FROM sqlite_master").await.is_empty());
    }
}

on_both![
    rows_of_any_content_come_out_whole,
    a_long_trail_is_written_oldest_first_and_each_row_once,
    a_range_includes_both_of_its_ends,
    a_reader_that_has_had_enough_ends_it_quietly,
    an_old_schema_is_named_and_nothing_is_migrated,
];

#[test]
fn bad_values_are_named_with_what_is_allowed() {
    let data = TempDir::new().unwrap();
    let folder = data.path().join("data");
    let file = data.path().join("trail");
    let settings = [("DATA_DIR", folder.to_str().unwrap())];
    for (flags, words) in [
        (&["--since", "yesterday"][..], &["--since", "\"yesterday\"", "allowed", "2026-11-22"][..]),
        (&["--until", "2026-11-22T10:00:00"], &["--until", "2026-11-22T10:00:00", "offset"]),
        (&["--since=-1"], &["--since", "\"-1\"", "allowed"]),
        (&["--format", "xml"], &["--format", "\"xml\"", "allowed: csv or jsonl"]),
        (&["--since", "2026-11-23", "--until", "2026-11-22"], &["--since", "after --until"]),
        (&["--db-pool-size", "0"], &["DB_POOL_SIZE", "\"0\"", "allowed"]),
    ] {
        let args = [&["audit", "export", "--output", file.to_str().unwrap()], flags].concat();
        let ran = run(&args, &settings);
        assert_eq!((ran.code, &*ran.stdout), (Some(64), ""), "{ran:?}");
        for word in words {
            assert!(ran.stderr.contains(word), "no {word} in {ran:?}");
        }
    }
    assert!(!folder.exists() && !file.exists(), "nothing was made");
    let ran = run(&["audit"], &settings);
    assert!(ran.code != Some(0) && ran.stderr.contains("export"), "{ran:?}");
}
