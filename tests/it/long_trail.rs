//! A trail of a million rows gets its integer key: how long it takes, and how long a writer waits at most.
//!
//! Ignored, as it takes minutes: `cargo test --test it -- --ignored --nocapture long_trail`.

use std::{
    sync::atomic::{AtomicBool, AtomicI64, Ordering},
    time::{Duration, Instant},
};

use sqlx::{Connection, SqliteConnection};
use tokio::time::sleep;

use crate::{
    integer_key::{fill, is_whole, number, old, write_as_before},
    support::{Database, database::Place, process::switchboard},
};

const ROWS: i64 = 1_000_000;

/// Runs `migrate`; killed after a while, where that is given.
async fn migrate(place: &Place, killed_after: Option<Duration>) -> bool {
    let mut child = switchboard(&["migrate"], &place.settings()).spawn().unwrap();
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if killed_after.is_some_and(|limit| started.elapsed() > limit) {
            child.kill().unwrap();
            child.wait().unwrap();
            return false;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes"]
async fn a_million_rows_of_postgres_are_numbered_beside_a_writer() {
    let place = old(Database::Postgres).await;
    fill(&place, ROWS).await;
    let stop = AtomicBool::new(false);
    let upgrade = async {
        let started = Instant::now();
        for seconds in [0, 5, 10, 20] {
            assert!(!migrate(&place, Some(Duration::from_secs(seconds))).await, "it was too quick");
        }
        assert!(migrate(&place, None).await);
        let took = started.elapsed();
        sleep(Duration::from_secs(1)).await;
        stop.store(true, Ordering::Relaxed);
        took
    };
    let ((written, longest), took) = tokio::join!(write_as_before(&place.url, &stop), upgrade);
    println!(
        "postgres: {took:?} with four kills, {} rows beside, {longest:?} at most",
        written.len()
    );
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    is_whole(&place, ROWS + i64::try_from(written.len()).unwrap(), &written).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes"]
async fn a_million_rows_of_sqlite_are_numbered_beside_a_writer() {
    let place = old(Database::Sqlite).await;
    place
        .execute(&format!(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})
             INSERT INTO user_actions (id, timestamp, username, user_roles, action_type, resource, outcome, request_data)
             SELECT printf('%08x-0000-7000-8000-%012x', i, i), strftime('%Y-%m-%dT%H:%M:%S.000000Z', i, 'unixepoch'),
                 'u' || i % 100, '[]', 'POST', '/authors/' || i % 1000, 'success', '{{\"name\":\"Ann\"}}' FROM n"
        ))
        .await;
    let mut connection = SqliteConnection::connect(&place.url).await.unwrap();
    let (stop, written) = (AtomicBool::new(false), AtomicI64::new(0));
    let write = async {
        let mut longest = Duration::ZERO;
        while !stop.load(Ordering::Relaxed) {
            let insert = "INSERT OR IGNORE INTO user_actions
                (id, timestamp, user_roles, action_type, resource, outcome)
                VALUES ($1, '2026-11-22T10:00:00.000000Z', '[]', 'POST', '/old', 'success')";
            let started = Instant::now();
            let uid = uuid::Uuid::now_v7().to_string();
            match sqlx::query(insert).bind(uid).execute(&mut connection).await {
                Ok(_) => drop(written.fetch_add(1, Ordering::Relaxed)),
                // It is numbered: the previous release keeps its rows from here on.
                Err(error) => {
                    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("1"));
                }
            }
            longest = longest.max(started.elapsed());
            sleep(Duration::from_millis(1)).await;
        }
        longest
    };
    let upgrade = async {
        while written.load(Ordering::Relaxed) < 20 {
            sleep(Duration::from_millis(5)).await;
        }
        for milliseconds in [0, 10, 20] {
            migrate(&place, Some(Duration::from_millis(milliseconds))).await;
        }
        let started = Instant::now();
        assert!(migrate(&place, None).await);
        let took = started.elapsed();
        stop.store(true, Ordering::Relaxed);
        took
    };
    let (longest, took) = tokio::join!(write, upgrade);
    let written = written.into_inner();
    println!("sqlite: {took:?}, {written} rows beside, {longest:?} at most");
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    // `migrate` records itself, if it was not killed before.
    let rows = "FROM user_actions WHERE action_type = 'POST'";
    for key in ["uid", "id"] {
        let keys = number(&place, &format!("SELECT count(DISTINCT {key}) {rows}")).await;
        assert_eq!(keys, ROWS + written, "{key}");
    }
    assert_eq!(place.execute("PRAGMA integrity_check").await, ["ok"]);
}
