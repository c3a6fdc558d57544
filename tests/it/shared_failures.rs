//! Failed authentications over one Redis: nodes count them together, nobody waits for it, and without Redis each
//! node goes by its own.

use std::time::{Duration, Instant};

use reqwest::{Method, Response};
use tokio::time::{sleep, timeout};

use crate::{
    cluster::Settings,
    cluster_limits::nodes,
    support::{
        Client, TestServer,
        redis::{Network, Proxy, Redis, shared},
    },
};

const FROM: &str = "x-forwarded-for";
/// How long a node waits for Redis at most.
const COMMAND: Duration = Duration::from_millis(100);
const SIX: [(&str, &str); 2] =
    [("AUTH_FAILURES_PER_MINUTE", "6"), ("TRUSTED_PROXIES", "127.0.0.1")];

async fn get(node: &TestServer, from: &str, token: &str) -> Response {
    let request = node.request(Method::GET, "/authors").header(FROM, from);
    request.bearer_auth(token).send().await.unwrap()
}

/// Presents a bad token; the status of the answer.
async fn fail(node: &TestServer, from: &str) -> u16 {
    get(node, from, "garbage").await.status().as_u16()
}

/// Waits until a node refuses even a good token of an address: a good token counts no failure. It is a new
/// token each time, since the node lets in a token that it knows.
async fn until_refused(node: &TestServer, from: &str) {
    let refused = async {
        while get(node, from, &node.token("ann")).await.status() != 429 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(3), refused).await.expect("failures on other nodes count here");
}

#[tokio::test]
async fn failures_of_an_address_count_on_all_nodes_together() {
    let settings = Settings::new(shared());
    let all = nodes(3, &settings, &SIX).await;
    let (bad, other) = ("203.0.113.1", "203.0.113.2");
    for n in 0..6 {
        assert_eq!(fail(&all[n % 2], bad).await, 401, "{n}");
    }
    // The third has seen none of them.
    for node in &all {
        until_refused(node, bad).await;
        let good = node.token("ann");
        let bearer = format!("Bearer {good}");
        let upgrade = [(FROM, bad), ("authorization", &*bearer)];
        assert!(Client::try_open(node.addr, "/web", &upgrade).await.is_err());
        assert_eq!(get(node, other, &good).await.status(), 200);
    }
    // One that starts now learns it with the first failure.
    let late = nodes(1, &settings, &SIX).await.remove(0);
    assert_eq!(fail(&late, bad).await, 401);
    until_refused(&late, bad).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_failures_count_on_their_node_and_nobody_waits() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let settings = Settings::new((proxy.url(), "alone".into()));
    // Only what is limited would fail closed.
    let more = [
        ("RATE_LIMIT_FAIL_MODE", "closed"),
        ("RATE_LIMIT_PER_MINUTE", "0"),
        ("WS_MAX_CONNECTIONS_PER_USER", "0"),
    ];
    let node = nodes(1, &settings, &[&SIX[..], &more].concat()).await.remove(0);
    for (network, from) in [(Network::Silent, "203.0.113.1"), (Network::Cut, "203.0.113.2")] {
        proxy.set(network);
        let mut slow = 0;
        for n in 0..6 {
            let asked = Instant::now();
            assert_eq!(get(&node, from, &node.token("ann")).await.status(), 200, "{network:?}");
            assert_eq!(fail(&node, from).await, 401, "{network:?}: {n}");
            slow += u32::from(asked.elapsed() > COMMAND);
        }
        // Five would wait, then the circuit breaker is open.
        assert!(slow < 5, "{network:?}: {slow}");
        assert_eq!(fail(&node, from).await, 429, "{network:?}");
    }
}
