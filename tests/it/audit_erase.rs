//! `switchboard audit erase`: a person is gone from the trail, and what was done is still there.

use std::collections::HashSet;

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    Database,
    audit::{own_rows, rows},
    database::Place,
    on_both,
    process::{Ran, run},
};

const PERSON: [&str; 6] = ["--subject", "7a1f", "--username", "Zoë Z", "--username", "zoe"];

async fn trail(database: Database, rows: &[Value]) -> Place {
    let place = database.place().await;
    let settings = [&place.settings()[..], &[("AUDIT_ENABLED", "false")]].concat();
    assert_eq!(run(&["migrate"], &settings).code, Some(0));
    place.audit(rows).await;
    place
}

fn erase(place: &Place, flags: &[&str]) -> Ran {
    run(&[&["audit", "erase"], flags].concat(), &place.settings())
}

/// The pseudonym that a run printed.
fn pseudonym(text: &str) -> String {
    let found = text.split_whitespace().map(|word| word.trim_matches(|c: char| ":;,.".contains(c)));
    found.into_iter().find(|word| word.starts_with("erased-")).expect(text).to_owned()
}

/// Has the database refuse to write a row.
async fn refuse(database: Database, place: &Place, when: &str, condition: &str) {
    let sql = match database {
        Database::Postgres => format!(
            "CREATE FUNCTION refuse() RETURNS TRIGGER LANGUAGE plpgsql AS
             $$ BEGIN RAISE 'refused'; END $$;
             CREATE TRIGGER refused BEFORE {when} ON user_actions FOR EACH ROW WHEN ({condition})
             EXECUTE FUNCTION refuse()"
        ),
        Database::Sqlite => format!(
            "CREATE TRIGGER refused BEFORE {when} ON user_actions WHEN {condition}
             BEGIN SELECT RAISE(ABORT, 'refused'); END"
        ),
    };
    place.execute(&sql).await;
}

async fn a_person_is_gone_from_every_row_and_what_was_done_stays(database: Database) {
    let own = json!({ "user_id": "7a1f", "username": "Zoë Z" });
    let with = |row: &Value, more: Value| {
        let mut row = row.clone();
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    let other = json!({ "user_id": "b0b", "username": "zoe", "request_data": { "name": "zoe" } });
    let all = [
        with(
            &own,
            json!({ "request_data": { "id": 7, "name": "Zoë", "a": { "id": "x" }, "sid": "s-7" } }),
        ),
        with(
            &own,
            json!({ "action_type": "WS:DISCONNECT", "error_message": "the user 7a1f left",
                           "resource": "0fc33a29-b0eb-4ebe-ac58-19e6c5461346" }),
        ),
        // By name alone, and summed up.
        json!({ "user_id": null, "username": "zoe", "resource": "/auth/login", "outcome": "error",
                "request_data": { "username": "zoe" }, "error_message": "wrong" }),
        json!({ "user_id": null, "username": null, "action_type": "other", "request_data":
                { "times": 3, "usernames": ["eve", "zoe"], "first": "2026-11-22T00:00:00.000000Z" } }),
        // What others did.
        json!({ "user_id": "op", "username": "op", "action_type": "DELETE", "request_data": null,
                "resource": "/admin/users/7a1f/connections" }),
        json!({ "user_id": "op", "username": "op", "action_type": "DELETE", "request_data": null,
                "resource": "/admin/users/Zo%C3%AB%20Z/connections", "error_message": "no Zoë Z" }),
        json!({ "user_id": "op", "username": "op", "resource": "/admin/broadcast",
                "request_data": { "pkg_id": 3, "user": "7a1f", "data": { "name": "zoe" } } }),
        json!({ "user_id": "op", "username": "op", "action_type": "GET", "resource": "/audit-logs",
                "request_data": { "user_id": "7a1f" } }),
        // A logout that named a session alone.
        json!({ "user_id": null, "username": null, "resource": "/auth/backchannel-logout",
                "request_data": { "sid": "s-7" } }),
        // Data of another program, no object.
        json!({ "user_id": "op", "username": "op", "resource": "/admin/users/7a1f/connections",
                "request_data": "a text" }),
        // Somebody else of the same name, and rows that are about nobody.
        other.clone(),
        json!({ "user_id": null, "username": "zoe2", "resource": "/auth/login/7a1f0" }),
        json!({ "user_id": "7a1f0", "error_message": "no 7a1f9 here" }),
    ];
    let place = trail(database, &all).await;
    let before = rows(&place.place()).await;

    let ran = erase(&place, &[&PERSON[..], &["--dry-run"]].concat());
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
    assert!(ran.stdout.starts_with("would change 10 of 13 rows"), "{ran:?}");
    assert_eq!(rows(&place.place()).await, before);
    assert!(own_rows(&place.place()).await.is_empty());

    let ran = erase(&place, &PERSON);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    // At once, whatever ends it in the middle.
    assert_eq!(pseudonym(&ran.stderr), pseudonym(&ran.stdout));
    let all_of = "10 of 14 rows: 2 of the subject, 1 by name alone, 7 of others";
    assert!(ran.stdout.contains(all_of), "{ran:?}");
    let stands = pseudonym(&ran.stdout);
    let after = rows(&place.place()).await;
    assert_eq!((after.len(), &after[10..]), (before.len(), &before[10..]));
    for (row, old) in after.iter().zip(&before).take(10) {
        let text = row.to_string();
        for name in ["7a1f", "Zoë Z", "Zo%C3", "\"username\":\"zoe\"", "s-7"] {
            assert!(!text.contains(name), "{name} in {text}");
        }
        assert!(text.contains(&stands), "{text}");
        for column in ["id", "timestamp", "user_roles", "action_type", "outcome", "response_status"]
        {
            assert_eq!(row[column], old[column], "{column}");
        }
    }
    for row in &after[..3] {
        for column in ["ip_address", "user_agent", "request_id"] {
            assert_eq!(row[column], Value::Null, "{column} of {row}");
        }
        assert_eq!(row["username"], stands);
    }
    assert_eq!((&after[0]["user_id"], &after[2]["user_id"]), (&json!(stands), &Value::Null));
    // What was changed, and who did it to the person, is still known.
    assert_eq!(after[0]["request_data"], json!({ "id": 7, "_erased": true }));
    assert_eq!(after[3]["request_data"]["usernames"], json!(["eve", stands]));
    assert_eq!(after[3]["request_data"]["times"], 3);
    assert_eq!(after[4]["resource"], format!("/admin/users/{stands}/connections"));
    assert_eq!(
        (&after[4]["user_id"], &after[4]["ip_address"]),
        (&json!("op"), &json!("192.0.2.7"))
    );
    assert_eq!(after[5]["error_message"], Value::Null);
    let data = json!({ "pkg_id": 3, "user": stands, "data": { "name": "zoe" } });
    assert_eq!(after[6]["request_data"], data);
    assert_eq!(after[9]["request_data"], "a text");

    let own = own_rows(&place.place()).await;
    let said: Vec<_> = own.iter().map(|row| row["request_data"].clone()).collect();
    assert_eq!(said[0], json!({ "pseudonym": stands, "erasure": "begun" }));
    assert_eq!(
        said[1],
        json!({ "pseudonym": stands, "erasure": "done", "rows": 10, "unreadable": 0 })
    );
    for row in &own {
        assert_eq!((&row["action_type"], &row["user_id"]), (&json!("AUDIT:ERASE"), &Value::Null));
        assert!(row["username"].as_str().is_some_and(|name| !name.is_empty()), "{row}");
        assert!(!row.to_string().contains("7a1f\""), "{row}");
    }
    // Another erasure of the same person finds nobody.
    let again = erase(&place, &PERSON);
    assert!(again.stdout.starts_with("changed 0 of "), "{again:?}");
    assert_ne!(pseudonym(&again.stdout), stands);
}

async fn an_erasure_that_was_interrupted_goes_on_with_its_pseudonym(database: Database) {
    // More than are written with one statement.
    let all: Vec<_> = (0..1200).map(|i| json!({ "error_message": i.to_string() })).collect();
    let place = trail(database, &all).await;
    let old = "OLD.error_message = '700'";
    refuse(database, &place, "UPDATE", old).await;
    let ran = erase(&place, &["--subject", "7a1f"]);
    assert_eq!((ran.code, &*ran.stdout), (Some(1), ""), "{ran:?}");
    assert!(ran.stderr.contains("interrupted after 500 rows"), "{ran:?}");
    let stands = pseudonym(&ran.stderr);
    place
        .execute(match database {
            Database::Postgres => "DROP TRIGGER refused ON user_actions",
            Database::Sqlite => "DROP TRIGGER refused",
        })
        .await;
    let ran = erase(&place, &["--subject", "7a1f", "--pseudonym", &stands]);
    assert_eq!((ran.code, pseudonym(&ran.stderr)), (Some(0), stands.clone()), "{ran:?}");
    assert!(ran.stdout.starts_with("changed 700 of "), "{ran:?}");
    let after = rows(&place.place()).await;
    let users: HashSet<_> = after.iter().map(|row| row["user_id"].as_str().unwrap()).collect();
    assert_eq!((after.len(), users), (1200, HashSet::from([&*stands])));
    let said = own_rows(&place.place()).await;
    let said: Vec<_> = said.iter().map(|row| row["request_data"]["erasure"].clone()).collect();
    assert_eq!(json!(said), json!(["begun", "begun", "done"]));
}

async fn an_erasure_that_cannot_be_recorded_changes_nothing(database: Database) {
    let place = trail(database, &[json!({}), json!({})]).await;
    let before = rows(&place.place()).await;
    refuse(database, &place, "INSERT", "NEW.action_type = 'AUDIT:ERASE'").await;
    let ran = erase(&place, &["--subject", "7a1f"]);
    assert_eq!((ran.code, &*ran.stdout), (Some(1), ""), "{ran:?}");
    assert!(ran.stderr.contains("nothing was erased"), "{ran:?}");
    assert_eq!(rows(&place.place()).await, before);
}

async fn long_names_are_found_that_stand_in_rows_cut(database: Database) {
    let (subject, name) = ("s".repeat(600), "n".repeat(600));
    let all = [
        json!({ "user_id": subject[..512], "username": name[..512] }),
        json!({ "user_id": null, "username": null, "action_type": "other",
                "request_data": { "times": 2, "usernames": [name[..128], "eve"] } }),
    ];
    let place = trail(database, &all).await;
    let server = place.server(&[("AUDIT_ENABLED", "false")]).await;
    for path in [format!("/audit-logs/user/{subject}"), format!("/audit-logs?username={name}")] {
        let answer = server.rest(Method::GET, &path).send().await.unwrap();
        let page = answer.json::<Value>().await.unwrap();
        assert_eq!(page["items"].as_array().unwrap().len(), 1, "{page}");
    }
    let ran = erase(&place, &["--subject", &subject, "--username", &name]);
    assert!(ran.stdout.starts_with("changed 2 of "), "{ran:?}");
    let text = json!(rows(&place.place()).await).to_string();
    assert!(!text.contains("sss") && !text.contains("nnn"), "{text}");
}

on_both![
    long_names_are_found_that_stand_in_rows_cut,
    a_person_is_gone_from_every_row_and_what_was_done_stays,
    an_erasure_that_was_interrupted_goes_on_with_its_pseudonym,
    an_erasure_that_cannot_be_recorded_changes_nothing,
];

#[tokio::test]
async fn nothing_of_a_person_stays_in_the_files_of_sqlite() {
    let row = json!({ "user_id": "subject-to-go", "username": "Somebody Special" });
    let place = trail(Database::Sqlite, &vec![row; 300]).await;
    let ran = erase(&place, &["--subject", "subject-to-go", "--vacuum"]);
    assert!(ran.stdout.starts_with("changed 300 of "), "{ran:?}");
    for file in place.data.path().read_dir().unwrap() {
        let path = file.unwrap().path();
        let Ok(bytes) = std::fs::read(&path) else { continue };
        for name in ["subject-to-go", "Somebody Special"] {
            let found = bytes.windows(name.len()).any(|part| part == name.as_bytes());
            assert!(!found, "{name} in {}", path.display());
        }
    }
}

#[test]
fn bad_values_are_named_with_what_is_allowed() {
    let data = TempDir::new().unwrap();
    let folder = data.path().join("data");
    let settings = [("DATA_DIR", folder.to_str().unwrap())];
    for (flags, words) in [
        (&["--subject="][..], &["--subject", "\"\"", "allowed", "not empty"][..]),
        (&["--subject", "a", "--username="], &["--username", "\"\"", "not empty"]),
        (&["--subject", "a", "--pseudonym", "bob"], &["--pseudonym", "\"bob\"", "erased-"]),
    ] {
        let ran = run(&[&["audit", "erase"], flags].concat(), &settings);
        assert_eq!((ran.code, &*ran.stdout), (Some(64), ""), "{ran:?}");
        for word in words {
            assert!(ran.stderr.contains(word), "no {word} in {ran:?}");
        }
    }
    let ran = run(&["audit", "erase"], &settings);
    assert!(ran.code != Some(0) && ran.stderr.contains("--subject"), "{ran:?}");
    assert!(!folder.exists(), "nothing was made");
}
