//! Postgres fails over: a primary stops or moves, its standby is promoted, the old one comes back read only.

use std::{
    net::{SocketAddr, TcpListener},
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;
use tokio::{task::block_in_place, time::sleep};

use crate::{
    doctor::{doctor, entry, healthy, names},
    support::{
        TestServer,
        address::Address,
        audit::rows,
        load::{Load, compare},
        postgres::Cluster,
        process::{Process, finish, run},
        programs::free_port,
        rest::{add_author, refused},
    },
};

/// Within which changes work again after a promotion.
const SOON: Duration = Duration::from_secs(3);
/// Within which an address that moved is noticed while the old server still answers.
const NOTICED: Duration = Duration::from_secs(10);

/// A primary, and a standby that follows it.
fn pair() -> (Cluster, Cluster) {
    block_in_place(|| {
        let first = Cluster::start();
        let second = first.standby();
        (first, second)
    })
}

/// The URL of a database at one of these servers.
fn url(servers: &[SocketAddr]) -> String {
    let servers: Vec<_> = servers.iter().map(ToString::to_string).collect();
    format!("postgres://switchboard@{}/postgres", servers.join(","))
}

async fn server(url: &str) -> TestServer {
    // Clients do not expect pushes.
    let quiet = ("WS_BROADCAST_CHANGES", "false");
    let settings = [("DATABASE_URL", url), ("AUDIT_BATCH_TIMEOUT", "200ms"), quiet];
    TestServer::start(&settings).await
}

async fn status(server: &TestServer, path: &str) -> u16 {
    server.rest(Method::GET, path).send().await.unwrap().status().as_u16()
}

async fn until_ready_is(server: &TestServer, expected: u16, limit: Duration) {
    let begun = Instant::now();
    while status(server, "/health/ready").await != expected {
        assert!(begun.elapsed() < limit, "/health/ready does not become {expected}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn is_refused(server: &TestServer, name: &str) {
    let create = server.rest(Method::POST, "/authors").json(&json!({ "name": name }));
    refused(create.send().await.unwrap(), 503, "unavailable").await;
}

async fn authors(cluster: &Cluster) -> Vec<String> {
    let mut connection = PgConnection::connect(&cluster.url("postgres")).await.unwrap();
    sqlx::query_scalar("SELECT name FROM author").fetch_all(&mut connection).await.unwrap()
}

/// How many authors each of the two loads has made.
async fn made(cluster: &Cluster) -> [usize; 2] {
    let names = authors(cluster).await;
    ["m", "l"].map(|load| names.iter().filter(|name| name.starts_with(load)).count())
}

/// Waits until both loads have made more.
async fn until_more(cluster: &Cluster, before: [usize; 2]) {
    let begun = Instant::now();
    loop {
        let now = made(cluster).await;
        if now[0] > before[0] && now[1] > before[1] {
            return;
        }
        assert!(begun.elapsed() < NOTICED, "{now:?} after {before:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a server has no client any more.
async fn until_left(cluster: &Cluster) {
    let mut connection = PgConnection::connect(&cluster.url("postgres")).await.unwrap();
    let clients = "SELECT count(*) FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    let begun = Instant::now();
    loop {
        let clients: i64 = sqlx::query_scalar(clients).fetch_one(&mut connection).await.unwrap();
        if clients == 0 {
            return;
        }
        assert!(begun.elapsed() < NOTICED, "{clients} clients are left");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failover_is_followed_by_address_and_by_list_and_loses_no_row() {
    let (first, second) = pair();
    let address = Address::of(first.addr()).await;
    let moved = server(&url(&[address.addr])).await;
    let listed = server(&url(&[first.addr(), second.addr()])).await;
    let loads = [
        Load::start(moved.addr, &moved.token("ann"), "m", 4),
        Load::start(listed.addr, &listed.token("ann"), "l", 4),
    ];
    until_more(&first, [0, 0]).await;
    block_in_place(|| first.stop("fast"));
    for server in [&moved, &listed] {
        until_ready_is(server, 503, SOON).await;
    }
    block_in_place(|| second.promote());
    until_ready_is(&listed, 200, SOON).await;
    // The address still leads to the old primary, which only takes reads now.
    block_in_place(|| first.start_behind(&second));
    sleep(Duration::from_millis(700)).await;
    assert_eq!(status(&moved, "/health/ready").await, 503, "it counts as healthy");
    assert_eq!((moved.metric("db_up").await, listed.metric("db_up").await), (0.0, 1.0));
    is_refused(&moved, "unrecorded").await;
    address.move_to(second.addr());
    until_ready_is(&moved, 200, SOON).await;
    until_more(&second, made(&second).await).await;
    let mut answered = Vec::new();
    for load in loads {
        let part = load.stop().await;
        assert!(part.iter().any(|answered| answered.made));
        assert!(part.iter().any(|answered| !answered.made));
        answered.extend(part);
    }
    // One row for each answer, and one for the change that was refused above.
    let begun = Instant::now();
    let mut trail = rows(&moved.database()).await;
    while trail.len() <= answered.len() && begun.elapsed() < NOTICED {
        sleep(Duration::from_millis(50)).await;
        trail = rows(&moved.database()).await;
    }
    for server in [&moved, &listed] {
        server.until_metric("audit_spool_rows", 0.0).await;
    }
    trail.retain(|row| row["request_data"]["name"] != "unrecorded");
    compare(&answered, &trail, &authors(&second).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_address_that_leaves_a_server_that_still_takes_changes_is_followed() {
    let (first, second) = pair();
    let address = Address::of(first.addr()).await;
    let server = server(&url(&[address.addr])).await;
    add_author(&server, "before").await;
    // Nothing ends: only new connections see that the address has moved.
    address.move_to(second.addr());
    until_ready_is(&server, 503, NOTICED).await;
    is_refused(&server, "between").await;
    block_in_place(|| second.promote());
    until_ready_is(&server, 200, SOON).await;
    add_author(&server, "after").await;
    assert_eq!(authors(&second).await, ["before", "after"]);
    assert_eq!(authors(&first).await, ["before"]);
    until_left(&first).await;
    // And back, while both take changes.
    address.move_to(first.addr());
    until_left(&second).await;
    add_author(&server, "back").await;
    assert_eq!(authors(&first).await, ["before", "back"]);
    assert_eq!(status(&server, "/health/ready").await, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_empty_server_that_comes_first_in_the_list_is_never_used() {
    let (first, empty) = block_in_place(|| (Cluster::start(), Cluster::start()));
    let address = Address::of(SocketAddr::from(([127, 0, 0, 1], free_port()))).await;
    let server = server(&url(&[address.addr, first.addr()])).await;
    add_author(&server, "before").await;
    // As a server that is made anew after it was lost.
    address.move_to(empty.addr());
    block_in_place(|| first.stop("fast"));
    until_ready_is(&server, 503, SOON).await;
    sleep(Duration::from_millis(700)).await;
    is_refused(&server, "between").await;
    block_in_place(|| first.start_again());
    until_ready_is(&server, 200, SOON).await;
    add_author(&server, "after").await;
    assert_eq!(authors(&first).await, ["before", "after"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_database_that_is_set_to_be_read_only_counts_as_down_until_it_takes_changes() {
    let cluster = block_in_place(Cluster::start);
    let server = server(&cluster.url("postgres")).await;
    let mut client = server.client("ann").await;
    add_author(&server, "before").await;
    let mut other = PgConnection::connect(&cluster.url("postgres")).await.unwrap();
    other.execute("ALTER SYSTEM SET default_transaction_read_only = on").await.unwrap();
    other.execute("SELECT pg_reload_conf()").await.unwrap();
    until_ready_is(&server, 503, SOON).await;
    is_refused(&server, "between").await;
    assert_eq!(client.call(1, json!({})).await["data"]["code"], "unavailable");
    server.until_metric("db_up", 0.0).await;
    other.execute("ALTER SYSTEM RESET default_transaction_read_only").await.unwrap();
    other.execute("SELECT pg_reload_conf()").await.unwrap();
    until_ready_is(&server, 200, SOON).await;
    add_author(&server, "after").await;
    server.until_metric("db_up", 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_standby_is_refused_with_the_reason_and_passed_over_in_a_list() {
    let (first, second) = pair();
    let data = TempDir::new().unwrap();
    let standby = url(&[second.addr()]);
    let settings = [
        ("DATABASE_URL", &*standby),
        ("DB_START_TIMEOUT", "500ms"),
        ("DATA_DIR", data.path().to_str().unwrap()),
    ];
    let refusal = format!("{} only takes reads: it is a standby", second.addr());
    let ran = finish(Process::spawn(data.path(), &settings));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    for word in [&*refusal, "500ms (DB_START_TIMEOUT)", "HOST:PORT,HOST:PORT"] {
        assert!(ran.stderr.contains(word), "no {word} in: {}", ran.stderr);
    }
    for args in [&["migrate"][..], &["audit", "export"]] {
        let ran = run(args, &settings);
        assert!(ran.code == Some(1) && ran.stderr.contains(&refusal), "{args:?}: {ran:?}");
    }
    let looked = doctor(&[("DATABASE_URL", &*standby)], &[]);
    names(&looked, "database", &[&*refusal, "primary", "HOST:PORT"]);

    // A server that never answers holds nobody up.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let all = url(&[silent.local_addr().unwrap(), second.addr(), first.addr()]);
    let all = format!("{all}?target_session_attrs=read-write");
    let process = Process::start(data.path(), &[("DATABASE_URL", &all)]);
    assert!(process.took < Duration::from_secs(5), "{:?}", process.took);
    process.signal("-TERM");
    assert_eq!(process.end().code, Some(0));
    let list = url(&[second.addr(), first.addr()]);
    let looked = doctor(&[("DATABASE_URL", &*list)], &[]);
    healthy(&looked, &["ok database"]);
    for word in [format!("{} takes changes", first.addr()), refusal] {
        assert!(looked.stdout.contains(&word), "no {word} in: {}", looked.stdout);
    }
    let gone = url(&[silent.local_addr().unwrap(), first.addr()]);
    let limit = ("DB_CONNECT_TIMEOUT", "500ms");
    let looked = doctor(&[("DATABASE_URL", &*gone), limit], &[]);
    let warning = entry(&looked, "warning servers");
    for word in ["of no help after a failover", "no answer within 500ms"] {
        assert!(warning.contains(word), "no {word} in: {warning}");
    }
}
