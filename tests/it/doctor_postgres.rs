//! `switchboard doctor` and `serve` before a Postgres that is as it should be, and one that is not.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;

use crate::{
    doctor::{doctor, healthy, names},
    support::{
        postgres::database,
        process::{Process, finish},
    },
};

async fn execute(url: &str, sql: &'static str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    connection.execute(sql).await.unwrap();
}

fn serve_once(url: &str) {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[("DATABASE_URL", url)]);
    process.signal("-TERM");
    assert_eq!(process.end().code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_is_looked_at_and_left_as_it_was() {
    let url = database().await;
    let look = || doctor(&[("DATABASE_URL", &url)], &[]);
    for _ in 0..2 {
        let ran = look();
        healthy(&ran, &["ok database"]);
        assert!(
            ran.stdout
                .contains("versions are server 0, authors 0, and will be server 3, authors 2"),
            "{}",
            ran.stdout
        );
    }
    serve_once(&url);
    let ran = look();
    assert!(
        ran.stdout.contains("versions are server 3, authors 2, which are the newest"),
        "{}",
        ran.stdout
    );
    // A second start finds nothing to migrate.
    serve_once(&url);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_cannot_be_used_is_a_fault() {
    let url = database().await;
    serve_once(&url);
    let look = |url: &str| doctor(&[("DATABASE_URL", url)], &[]);
    execute(
        &url,
        "CREATE ROLE reader LOGIN; GRANT SELECT ON author, _switchboard_migrations,
         _authors_migrations TO reader",
    )
    .await;
    let reader = url.replace("switchboard@", "reader:hush-hush@");
    let ran = look(&reader);
    names(&ran, "database", &["reader:***@", "lacks the right to read and change", "OWNER TO"]);
    assert!(!ran.stdout.contains("hush-hush"), "{}", ran.stdout);
    let read_only = format!("{url}?options=-c%20default_transaction_read_only%3Don");
    names(&look(&read_only), "database", &["only takes reads", "primary"]);
    names(&look(&format!("{url}x")), "database", &["does not exist", "createdb"]);
    execute(&url, "UPDATE _authors_migrations SET checksum = ''").await;
    names(
        &look(&url),
        "database",
        &["authors migration 1 is not the one of this program", "backup"],
    );
}

#[test]
fn a_postgres_that_is_not_there_is_named_without_its_password() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = taken.local_addr().unwrap();
    drop(taken);
    let url = format!("postgres://ann:hush-hush@{nobody}/x");
    let ran = doctor(&[("DATABASE_URL", &url)], &[]);
    names(&ran, "database", &["no server answers", "ann:***@", "start Postgres"]);

    let data = TempDir::new().unwrap();
    let settings = [
        ("DATABASE_URL", &*url),
        ("DB_START_TIMEOUT", "1s"),
        ("LOG_LEVEL", "trace"),
        ("LOG_FORMAT", "json"),
    ];
    let started = Instant::now();
    let ran = finish(Process::spawn(data.path(), &settings));
    let took = started.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(5)).contains(&took), "{took:?}");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.matches("no answer from the database yet").count() >= 2, "{ran:?}");
    let said = ran.stdout + &ran.stderr;
    for word in ["no answer from the database", "ann:***@", "within 1s (DB_START_TIMEOUT)"] {
        assert!(said.contains(word), "no {word} in: {said}");
    }
    assert!(!said.contains("hush-hush"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_database_is_not_waited_for() {
    let url = format!("{}x", database().await);
    let data = TempDir::new().unwrap();
    let started = Instant::now();
    let ran = finish(Process::spawn(data.path(), &[("DATABASE_URL", &url)]));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("does not exist"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_password_nor_a_parameter_is_logged() {
    let url = database().await.replace("switchboard@", "switchboard:hush-hush@");
    let data = TempDir::new().unwrap();
    let settings = [
        ("DATABASE_URL", &*url),
        ("LOG_LEVEL", "trace"),
        ("LOG_FORMAT", "json"),
        ("DB_STATEMENT_TIMEOUT", "400ms"),
        ("DB_SLOW_QUERY_MS", "100"),
    ];
    let process = Process::start(data.path(), &settings);
    let token = crate::support::process::token(data.path(), &["--user", "ann"]);
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE author").await.unwrap();
    let create = reqwest::Client::new()
        .post(format!("http://{}/authors", process.addr))
        .bearer_auth(token)
        .json(&serde_json::json!({ "name": "Confidential" }));
    assert_eq!(create.send().await.unwrap().status(), 503);
    process.signal("-TERM");
    let ran = process.end();
    // Others may be slow too, on a busy machine.
    let is_ours = |line: &&str| line.contains("slow query") && line.contains("INTO author");
    let line = ran.stdout.lines().find(is_ours);
    let line: serde_json::Value = serde_json::from_str(line.unwrap()).unwrap();
    assert!(line["duration_ms"].as_f64().is_some_and(|took| took >= 400.0), "{line}");
    assert!(line["statement"].as_str().unwrap().starts_with("INSERT INTO author"), "{line}");
    let said = ran.stdout + &ran.stderr;
    for secret in ["hush-hush", "Confidential"] {
        assert!(!said.contains(secret), "{said}");
    }
}
