//! Slow and locked statements of packages leave connections to all others.

use std::{path::Path, sync::Arc, time::Duration};

use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};
use tokio::{task::JoinSet, time::timeout};

use crate::support::{Database, TestServer, database::Place, on_both, rest::add_author};

/// In which requests are answered that need no connection of the slow ones.
const PROMPT: Duration = Duration::from_secs(2);

on_both!(
    changes_that_wait_for_a_lock_leave_reads_the_audit_trail_and_probes,
    reads_that_are_slow_leave_the_audit_trail_and_probes,
);

/// Asserts that a path is answered with 200, and soon.
async fn prompt(server: &TestServer, path: &str) {
    let answer = timeout(PROMPT, server.rest(Method::GET, path).send()).await;
    let answer = answer.unwrap_or_else(|_| panic!("no answer of {path} within {PROMPT:?}"));
    assert_eq!(answer.unwrap().status(), 200, "{path}");
}

/// Requests that nobody waits for; they end with the set.
fn ask(server: &Arc<TestServer>, method: &Method, path: &str, times: usize) -> JoinSet<()> {
    let mut asked = JoinSet::new();
    for i in 0..times {
        let request = server.rest(method.clone(), path).json(&json!({ "name": format!("a{i}") }));
        asked.spawn(async move { drop(request.send().await) });
    }
    asked
}

/// Waits until so many requests for authors are being answered.
async fn in_progress(server: &TestServer, method: &str, requests: f64) {
    let series = format!(r#"http_requests_in_progress{{endpoint="/authors",method="{method}"}}"#);
    server.until_metric(&series, requests).await;
}

/// Makes each list of authors on Postgres wait for advisory lock 7; changes do not read that far.
async fn lists_wait(url: &str) {
    let mut database = PgConnection::connect(url).await.unwrap();
    let view = "ALTER TABLE author RENAME TO people;
        CREATE FUNCTION waits() RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN true; END $$;
        CREATE VIEW author AS SELECT id, name, name_folded, name_search, name_search_of
            FROM people WHERE waits()";
    database.execute(sqlx::raw_sql(view)).await.unwrap();
}

/// Makes each list of authors on SQLite compute for seconds. The first row alone, which probes read, is there at once.
async fn lists_compute(file: &Path) {
    let mut database = SqliteConnection::connect(file.to_str().unwrap()).await.unwrap();
    let view = "ALTER TABLE author RENAME TO people;
        CREATE VIEW author AS SELECT id, name, name_folded, name_search, name_search_of
        FROM people WHERE id = 1 OR
        (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 8000000)
         SELECT count(*) FROM n) > 0";
    database.execute(sqlx::raw_sql(view)).await.unwrap();
}

fn file(place: &Place) -> std::path::PathBuf {
    place.data.path().join("switchboard.db")
}

async fn changes_that_wait_for_a_lock_leave_reads_the_audit_trail_and_probes(database: Database) {
    let place = database.place().await;
    let server = Arc::new(place.server(&[("DB_POOL_SIZE", "4")]).await);
    let most = match database {
        Database::Sqlite => 1.0,
        Database::Postgres => 3.0,
    };
    let mut client = server.client("ann").await;
    let (mut postgres, mut sqlite) = (None, None);
    match database {
        Database::Sqlite => {
            let file = file(&place);
            let other = SqliteConnection::connect(file.to_str().unwrap()).await.unwrap();
            sqlite.insert(other).execute("BEGIN IMMEDIATE").await.unwrap();
        }
        Database::Postgres => {
            let other = PgConnection::connect(&place.url).await.unwrap();
            let lock = "BEGIN; LOCK TABLE author IN EXCLUSIVE MODE";
            postgres.insert(other).execute(lock).await.unwrap();
        }
    }
    let _waiting = ask(&server, &Method::POST, "/authors", 8);
    client.request(3, json!({ "name": "Ann" })).await;
    in_progress(&server, "POST", 8.0).await;
    for path in ["/audit-logs", "/health/ready", "/authors"] {
        prompt(&server, path).await;
    }
    server.until_metric(r#"db_share_active{share="changes"}"#, most).await;
    assert_eq!(server.metric(r#"db_share_max{share="changes"}"#).await, most);
    drop((postgres, sqlite));
}

async fn reads_that_are_slow_leave_the_audit_trail_and_probes(database: Database) {
    let place = database.place().await;
    let server = Arc::new(place.server(&[("DB_POOL_SIZE", "2")]).await);
    for name in ["Ann", "Bea"] {
        add_author(&server, name).await;
    }
    let mut other = None;
    match database {
        Database::Sqlite => lists_compute(&file(&place)).await,
        Database::Postgres => {
            lists_wait(&place.url).await;
            let connection = PgConnection::connect(&place.url).await.unwrap();
            other.insert(connection).execute("SELECT pg_advisory_lock(7)").await.unwrap();
        }
    }
    let _slow = ask(&server, &Method::GET, "/authors", 8);
    in_progress(&server, "GET", 8.0).await;
    for path in ["/audit-logs", "/health/ready", "/audit-logs?per_page=1"] {
        prompt(&server, path).await;
    }
}

#[tokio::test]
async fn slow_reads_leave_connections_of_postgres_to_changes_also_when_nobody_waits_for_them() {
    let place = Database::Postgres.place().await;
    let settings = [("DB_POOL_SIZE", "4"), ("WS_HANDLER_TIMEOUT", "300ms")];
    let server = Arc::new(place.server(&settings).await);
    let mut client = server.client("ann").await;
    add_author(&server, "Ann").await;
    assert_eq!(client.receive().await["pkg_id"], 3, "the push of it");
    lists_wait(&place.url).await;
    let mut other = PgConnection::connect(&place.url).await.unwrap();
    other.execute("SELECT pg_advisory_lock(7)").await.unwrap();
    let taken = r#"db_share_active{share="reads"}"#;
    for name in ["Bea", "Cid", "Dan"] {
        for _ in 0..8 {
            client.request(1, json!({})).await;
        }
        for _ in 0..8 {
            assert_eq!(client.receive().await["data"]["code"], "timeout");
        }
        // The database goes on with what it was asked.
        let added = timeout(PROMPT, add_author(&server, name)).await;
        added.expect("a change waits for reads");
        assert_eq!(client.receive().await["pkg_id"], 3, "the push of it");
        assert_eq!(server.metric(taken).await, 3.0);
    }
    other.execute("SELECT pg_advisory_unlock(7)").await.unwrap();
    server.until_metric(taken, 0.0).await;
    prompt(&server, "/authors").await;
}

#[tokio::test]
async fn a_backlog_of_changes_on_sqlite_delays_the_audit_trail_by_one_change() {
    let place = Database::Sqlite.place().await;
    // Half a second for a statement of the audit trail: many times that of one change, a part of the backlog's.
    let server = Arc::new(place.server(&[("AUDIT_BATCH_TIMEOUT", "2s")]).await);
    let mut other = SqliteConnection::connect(file(&place).to_str().unwrap()).await.unwrap();
    let slow = "CREATE TRIGGER slow BEFORE INSERT ON author BEGIN
        SELECT count(*) FROM (WITH RECURSIVE n(i) AS
        (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150000) SELECT i FROM n); END";
    other.execute(sqlx::raw_sql(slow)).await.unwrap();
    let mut changes = ask(&server, &Method::POST, "/authors", 100);
    while changes.join_next().await.is_some() {}
    server.until_metric("audit_logs_written_total", 100.0).await;
    assert_eq!(server.metric("audit_logs_spooled_total").await, 0.0);
}
