//! When a node asks to be left out by balancers because limits fail closed without Redis, and what operators can
//! still do there.

use std::{
    future::Future,
    net::SocketAddr,
    time::{Duration, Instant},
};

use reqwest::{Client as Http, Method, Response};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    task::block_in_place,
    time::{sleep, timeout},
};

use crate::{
    cluster::Settings,
    cluster_limits::{get, header, nodes},
    support::{
        TestServer,
        process::Process,
        programs::free_port,
        redis::{Network, Proxy, Redis},
        rest::refused,
    },
};

const CLOSED: (&str, &str) = ("RATE_LIMIT_FAIL_MODE", "closed");
const REASON: &str = "Redis does not answer, and RATE_LIMIT_FAIL_MODE is closed";

async fn ready(addr: SocketAddr) -> (u16, Value) {
    let answer = Http::new().get(format!("http://{addr}/health/ready")).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

fn unready() -> (u16, Value) {
    (503, json!({ "status": "unhealthy", "reason": REASON }))
}

async fn until_ready(addr: SocketAddr, expected: bool) {
    let status = if expected { 200 } else { 503 };
    within("readiness", async {
        while ready(addr).await.0 != status {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

async fn within(what: &str, event: impl Future<Output = ()>) {
    timeout(Duration::from_secs(5), event).await.unwrap_or_else(|_| panic!("no {what}"));
}

/// What an operator asks of a node, at either address.
async fn ask(node: &TestServer, addr: SocketAddr, method: Method, path: &str) -> Response {
    let request = Http::new().request(method, format!("http://{addr}{path}"));
    let request = request.bearer_auth(node.token("op"));
    request.json(&json!({ "pkg_id": 150, "data": {} })).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_node_cut_off_from_redis_is_not_ready_until_it_has_redis_again() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let settings = Settings::new((proxy.url(), "cut".into()));
    let node = nodes(1, &settings, &[CLOSED, ("READY_AFTER", "500ms")]).await.remove(0);
    assert_eq!(ready(node.addr).await, (200, json!({ "status": "healthy" })));

    let since = Instant::now();
    proxy.set(Network::Cut);
    until_ready(node.addr, false).await;
    assert!(since.elapsed() >= Duration::from_millis(500), "{:?}", since.elapsed());
    assert_eq!(ready(node.addr).await, unready());

    proxy.set(Network::Open);
    until_ready(node.addr, true).await;
    assert_eq!(get(&node, &node.token("ann")).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_are_served_while_limits_fail_closed_and_have_a_limit_of_the_nodes_own() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "operators".into()));
    let limit = [("RATE_LIMIT_PER_MINUTE", "20"), ("RATE_LIMIT_BURST", "0")];
    let more = [&[CLOSED, ("OPS_ADDR", "127.0.0.1:0")][..], &limit].concat();
    let node = nodes(1, &settings, &more).await.remove(0);
    let ops = node.ops_addr.unwrap();
    block_in_place(|| redis.kill());
    node.until_metric("redis_connected", 0.0).await;
    refused(get(&node, &node.token("ann")).await, 503, "unavailable").await;
    for (addr, method, path, expected) in [
        (ops, Method::POST, "/admin/broadcast", 202),
        (ops, Method::DELETE, "/admin/users/nobody/connections", 204),
        (ops, Method::GET, "/audit-logs", 200),
        (node.addr, Method::GET, "/audit-logs", 200),
        (ops, Method::GET, "/metrics", 200),
        (ops, Method::GET, "/health", 200),
    ] {
        let answer = ask(&node, addr, method, path).await;
        assert_eq!(answer.status(), expected, "{path}");
    }
    // Twenty, of which four are spent.
    let mut served = 0;
    let over = loop {
        let answer = ask(&node, ops, Method::GET, "/audit-logs").await;
        assert_eq!(header(&answer, "x-ratelimit-limit"), 20);
        if answer.status() != 200 {
            break answer;
        }
        served += 1;
    };
    refused(over, 429, "rate_limit_exceeded").await;
    assert!((16..=20).contains(&served), "{served}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_answers_and_takes_no_writes_is_away() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "readonly".into()));
    // Longer than the time from one thing that a node asks Redis by itself to the next.
    let node = nodes(1, &settings, &[CLOSED, ("READY_AFTER", "1500ms")]).await.remove(0);
    let token = node.token("ann");
    // As a master without its replicas, or one that a failover has made a replica.
    block_in_place(|| redis.command("CONFIG SET min-replicas-to-write 1"));
    refused(get(&node, &token).await, 503, "unavailable").await;
    within("outage", async {
        while ready(node.addr).await.0 != 503 {
            // What only reads is answered all the while.
            assert_eq!(
                ask(&node, node.addr, Method::GET, "/admin/connections").await.status(),
                200
            );
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    assert_eq!(node.metric("redis_connected").await, 1.0);
    block_in_place(|| redis.command("CONFIG SET min-replicas-to-write 0"));
    within("answer", async { while get(&node, &token).await.status() != 200 {} }).await;
    assert_eq!(ready(node.addr).await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_serves_without_redis_stays_ready() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "stays".into()));
    let at_once = ("READY_AFTER", "0");
    let unlimited = [
        CLOSED,
        at_once,
        ("RATE_LIMIT_PER_MINUTE", "0"),
        ("WS_MESSAGE_RATE_LIMIT", "0"),
        ("WS_MAX_CONNECTIONS_PER_USER", "0"),
    ];
    let open = nodes(1, &settings, &[("RATE_LIMIT_FAIL_MODE", "open"), at_once]).await.remove(0);
    let unlimited = nodes(1, &settings, &unlimited).await.remove(0);
    let closed = nodes(1, &settings, &[CLOSED, at_once]).await.remove(0);
    block_in_place(|| redis.kill());
    until_ready(closed.addr, false).await;
    for node in [&open, &unlimited] {
        node.until_metric("redis_connected", 0.0).await;
        assert_eq!(ready(node.addr).await.0, 200);
        assert_eq!(get(node, &node.token("ann")).await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_node_that_never_had_redis_is_not_ready_from_the_start() {
    let data = TempDir::new().unwrap();
    let redis = format!("redis://127.0.0.1:{}", free_port());
    let settings = [CLOSED, ("REDIS_URL", &*redis), ("READY_AFTER", "60s")];
    let node = block_in_place(|| Process::start(data.path(), &settings));
    assert_eq!(ready(node.addr).await, unready());
}
