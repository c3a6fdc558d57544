//! A Postgres that stops, hangs or refuses: what clients see, and that all recovers by itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tokio::{
    task::{JoinHandle, block_in_place},
    time::sleep,
};

use crate::support::{
    TestServer,
    postgres::{Cluster, database},
    rest::{add_author, refused},
};

/// Clients of these tests do not expect pushes.
const QUIET: (&str, &str) = ("WS_BROADCAST_CHANGES", "false");

/// In which requests are answered, whatever happens to the database.
const PROMPT: Duration = Duration::from_secs(1);

async fn server(url: &str, settings: &[(&str, &str)]) -> TestServer {
    TestServer::start(&[settings, &[("DATABASE_URL", url)]].concat()).await
}

async fn status(server: &TestServer, path: &str) -> u16 {
    server.rest(Method::GET, path).send().await.unwrap().status().as_u16()
}

async fn until(server: &TestServer, path: &str, expected: u16) {
    let started = Instant::now();
    while status(server, path).await != expected {
        assert!(started.elapsed() < Duration::from_secs(10), "{path} does not become {expected}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Adds authors until it is told to stop; the names that were answered 201.
fn write(
    server: &Arc<TestServer>,
    writer: usize,
    stop: &Arc<AtomicBool>,
) -> JoinHandle<Vec<String>> {
    let (server, stop) = (Arc::clone(server), Arc::clone(stop));
    tokio::spawn(async move {
        let mut added = Vec::new();
        for i in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let name = format!("{writer}-{i}");
            let started = Instant::now();
            let create = server.rest(Method::POST, "/authors").json(&json!({ "name": name }));
            let answer = create.send().await.unwrap();
            assert!(started.elapsed() < PROMPT, "{:?}", started.elapsed());
            if answer.status() == 201 {
                added.push(name);
            } else {
                refused(answer, 503, "unavailable").await;
                sleep(Duration::from_millis(5)).await;
            }
        }
        added
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_postgres_that_stops_under_load_loses_nothing_that_was_acknowledged() {
    let cluster = Cluster::start();
    let server = Arc::new(server(&cluster.url("postgres"), &[QUIET]).await);
    let mut client = server.client("ann").await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4).map(|writer| write(&server, writer, &stop)).collect();
    for mode in ["fast", "immediate"] {
        sleep(Duration::from_millis(500)).await;
        block_in_place(|| cluster.stop(mode));
        until(&server, "/health/ready", 503).await;
        let health = server.request(Method::GET, "/health").send().await.unwrap();
        assert_eq!(health.json::<Value>().await.unwrap()["database"], "unhealthy");
        assert_eq!(status(&server, "/health/live").await, 200);
        let answer = client.call(1, json!({})).await;
        assert_eq!(answer["data"]["code"], "unavailable", "{answer}");
        sleep(Duration::from_secs(2)).await;
        block_in_place(|| cluster.start_again());
        until(&server, "/health/ready", 200).await;
        assert_eq!(client.call(1, json!({})).await["status_code"], 0);
    }
    sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    assert!(acknowledged.len() > 20, "only {}", acknowledged.len());
    let kept = server.rest(Method::GET, "/authors").send().await.unwrap();
    let kept: Vec<Value> = kept.json().await.unwrap();
    for name in acknowledged {
        assert_eq!(kept.iter().filter(|author| author["name"] == name).count(), 1, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_postgres_that_does_not_answer_is_given_up_within_a_second() {
    let cluster = Cluster::start();
    let server = server(&cluster.url("postgres"), &[]).await;
    add_author(&server, "Ann").await;
    block_in_place(|| cluster.signal("-STOP"));
    let started = Instant::now();
    let hanging = server.rest(Method::GET, "/authors").send().await.unwrap();
    refused(hanging, 503, "unavailable").await;
    assert!(started.elapsed() < PROMPT + PROMPT / 4, "{:?}", started.elapsed());
    // From now on nothing waits.
    let started = Instant::now();
    for _ in 0..10 {
        assert_eq!(status(&server, "/authors").await, 503);
    }
    assert!(started.elapsed() < PROMPT, "{:?}", started.elapsed());
    assert_eq!(status(&server, "/health/ready").await, 503);
    block_in_place(|| cluster.signal("-CONT"));
    until(&server, "/authors", 200).await;
    assert_eq!(status(&server, "/health/ready").await, 200);
    // Both pools are new, and so are the places of their shares.
    assert_eq!(status(&server, "/audit-logs").await, 200);
    for share in ["reads", "audit_reads"] {
        server.until_metric(&format!(r#"db_share_active{{share="{share}"}}"#), 0.0).await;
    }
}

#[tokio::test]
async fn connections_that_an_administrator_ends_are_replaced() {
    let url = database().await;
    let server = server(&url, &[]).await;
    add_author(&server, "Ann").await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    let ended: i64 = sqlx::query_scalar(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    .fetch_one(&mut other)
    .await
    .unwrap();
    assert!(ended >= 2, "the pool and the watcher have connections, not {ended}");
    until(&server, "/authors", 200).await;
    // The watcher's own connection was among them, and is no sign of an outage.
    for _ in 0..30 {
        assert_eq!(status(&server, "/health/ready").await, 200);
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_ended_counted_and_unavailable() {
    let url = database().await;
    let settings = [("DB_STATEMENT_TIMEOUT", "300ms"), ("DB_SLOW_QUERY_MS", "200")];
    let server = server(&url, &settings).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE author").await.unwrap();
    let locked = server.rest(Method::GET, "/authors").send().await.unwrap();
    refused(locked, 503, "unavailable").await;
    assert_eq!(status(&server, "/health/ready").await, 200, "the database is not down");
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(status(&server, "/authors").await, 200);
    for (series, value) in [
        (r#"db_errors_total{error_type="timeout",operation="select"}"#, 1.0),
        (r#"db_slow_queries_total{operation="select"}"#, 1.0),
        (r#"db_slow_queries_total{operation="insert"}"#, 0.0),
        ("db_connections_max", 23.0),
        ("db_connections_active", 0.0),
    ] {
        server.until_metric(series, value).await;
    }
    assert!(server.metric("db_connections_idle").await >= 1.0);
}

#[tokio::test]
async fn a_statement_that_nobody_waits_for_any_more_is_measured_and_slow() {
    let url = database().await;
    let settings = [("WS_HANDLER_TIMEOUT", "300ms"), ("DB_SLOW_QUERY_MS", "200")];
    let server = server(&url, &settings).await;
    let mut client = server.client("ann").await;
    let measured = r#"db_query_duration_seconds_count{operation="select"}"#;
    let before = server.metric(measured).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE author").await.unwrap();
    assert_eq!(client.call(1, json!({})).await["data"]["code"], "timeout");
    server.until_metric(measured, before + 1.0).await;
    server.until_metric(r#"db_slow_queries_total{operation="select"}"#, 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_started_first_waits_for_postgres() {
    let cluster = Cluster::start();
    block_in_place(|| cluster.stop("fast"));
    let url = cluster.url("postgres");
    let starting = tokio::spawn(async move { server(&url, &[]).await });
    sleep(Duration::from_millis(700)).await;
    assert!(!starting.is_finished());
    block_in_place(|| cluster.start_again());
    let server = starting.await.unwrap();
    add_author(&server, "Ann").await;
}
