//! The server and the authors have separate histories of migrations. A database with the one history of
//! earlier releases is taken over, and stays as those releases need it.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    doctor::{doctor, entry},
    support::{
        Database,
        database::Place,
        on_both,
        process::{Ran, finish, run, switchboard},
    },
};

/// Where the migrations of the one history are now, and the checksums that earlier releases know them by.
const SQLITE: [(&str, &str); 2] = [
    (
        "authors/sqlite/0001_author.sql",
        "6969345ddb91fa829121dedb335214712b028aa68f22f569fab7fb4bb6f30818b5d3814086ce14e3bc11d939996f2b6e",
    ),
    (
        "server/sqlite/0001_user_actions.sql",
        "3c90fba4aa7b5764934880a6a69444fef3d154417a59c2bdfbcc4756793dc5d5085bd1a1a15f972261e4bec5bcbfe545",
    ),
];
const POSTGRES: [(&str, &str); 2] = [
    (
        "authors/postgres/0001_author.sql",
        "174248c0c0b804dc06f75a2d72944774d4e452f60d4658c3b74d59f890088d4f9e8a107d990b32dd251ff9bf4c568732",
    ),
    (
        "server/postgres/0001_user_actions.sql",
        "6400438cdc930b5116943631168099f58e755044517db3c7eb55e1446cb6c705bb2ec99de059a90577bcaad8c56dc8da",
    ),
];

/// Makes the schema of the releases with one history, or its first so many migrations.
pub(crate) async fn make_shared(database: Database, place: &Place, migrations: usize) {
    let (files, blob) = match database {
        Database::Sqlite => (SQLITE, "BLOB"),
        Database::Postgres => (POSTGRES, "BYTEA"),
    };
    let mut sql = format!(
        "CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, description TEXT NOT NULL,
             installed_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP, success BOOLEAN NOT NULL,
             checksum {blob} NOT NULL, execution_time BIGINT NOT NULL);"
    );
    for (i, (file, checksum)) in files.iter().take(migrations).enumerate() {
        let path = format!("{}/migrations/{file}", env!("CARGO_MANIFEST_DIR"));
        let checksum = match database {
            Database::Sqlite => format!("x'{checksum}'"),
            Database::Postgres => format!(r"'\x{checksum}'"),
        };
        sql += &fs::read_to_string(path).unwrap();
        sql += &format!(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES ({}, 'x', true, {checksum}, 1);",
            i + 1
        );
    }
    if let Database::Sqlite = database {
        sql.insert_str(0, "PRAGMA journal_mode = WAL; ");
        fs::File::create(place.data.path().join("switchboard.db")).unwrap();
    }
    place.execute(&sql).await;
}

fn migrate(place: &Place) -> Ran {
    let ran = run(&["migrate"], &place.settings());
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
    ran
}

/// What a table says was run: the first migration, and how it got there.
async fn first(place: &Place, table: &str) -> Vec<String> {
    let sql = format!("SELECT CAST(execution_time AS TEXT) FROM {table} WHERE version = 1");
    place.execute(&sql).await
}

async fn a_database_of_one_history_is_taken_over_and_stays_as_older_nodes_need_it(
    database: Database,
) {
    let place = database.place().await;
    make_shared(database, &place, 2).await;
    place.execute("INSERT INTO author (name, name_folded) VALUES ('Ann', 'ann')").await;
    place.audit(&[json!({})]).await;
    let before = "SELECT version || ' ' || success || ' ' || execution_time FROM _sqlx_migrations
                  ORDER BY version";
    let shared = place.execute(before).await;
    assert_eq!(shared.len(), 2);
    let ran = doctor(&[("DATABASE_URL", &*place.url)], &[]);
    let said = entry(&ran, "ok database");
    assert!(said.contains("schema versions are server 1, authors 1"), "{said}");

    // Nothing of what was run is run again: it would fail on tables that are there.
    let ran = migrate(&place);
    assert!(!ran.stdout.contains("migration 1 was run"), "{ran:?}");
    let server = place.server(&[("AUDIT_ENABLED", "false")]).await;
    for (path, rows, name) in [("/authors", "", "Ann"), ("/audit-logs", "/items", "ann")] {
        let answer = server.rest(Method::GET, path).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        let rows = answer.pointer(rows).unwrap().as_array().unwrap();
        let is_there = |row: &Value| row["name"] == name || row["username"] == name;
        assert!(rows.iter().any(is_there), "{answer}");
    }
    assert_eq!(place.execute(before).await, shared);
    assert!(migrate(&place).stdout.starts_with("nothing to do"));
}

async fn a_database_with_half_of_the_one_history_gets_the_rest(database: Database) {
    let place = database.place().await;
    make_shared(database, &place, 1).await;
    let ran = migrate(&place);
    assert!(ran.stdout.starts_with("server migration 1 was run\n"), "{ran:?}");
    assert!(!ran.stdout.contains("authors migration 1 was run"), "{ran:?}");
    // Entered, not run: no time was taken.
    assert_eq!(first(&place, "_authors_migrations").await, ["-1"]);
    place.server(&[]).await;
}

async fn a_table_of_migrations_of_another_program_is_left_alone(database: Database) {
    let place = database.place().await;
    make_shared(database, &place, 0).await;
    place
        .execute(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES (1, 'x', true, '', 1), (2, 'x', false, '', 1)",
        )
        .await;
    let ran = migrate(&place);
    for migration in ["server migration 1", "authors migration 1"] {
        assert!(ran.stdout.contains(&format!("{migration} was run")), "{ran:?}");
    }
    place.server(&[]).await;
}

async fn processes_that_take_a_database_over_at_once_do_it_once(database: Database) {
    let place = database.place().await;
    make_shared(database, &place, 1).await;
    let settings = place.settings();
    let started: Vec<_> =
        (0..4).map(|_| switchboard(&["migrate"], &settings).spawn().unwrap()).collect();
    let mut all = String::new();
    for ran in started.into_iter().map(finish) {
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
        all += &ran.stdout;
    }
    assert_eq!(all.matches("server migration 1 was run").count(), 1, "{all}");
    assert!(!all.contains("authors migration 1 was run"), "{all}");
}

on_both![
    a_database_of_one_history_is_taken_over_and_stays_as_older_nodes_need_it,
    a_database_with_half_of_the_one_history_gets_the_rest,
    a_table_of_migrations_of_another_program_is_left_alone,
    processes_that_take_a_database_over_at_once_do_it_once,
];
