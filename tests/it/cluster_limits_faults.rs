//! Limits while Redis is away, hangs or comes back: each node's own with `open`, a refusal with
//! `closed`, and never a wait.

use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use serde_json::json;
use tokio::task::block_in_place;

use crate::{
    cluster::Settings,
    cluster_limits::{echo, get, header, nodes},
    support::{
        Client, TestServer,
        redis::{Network, Proxy, Redis},
    },
};

const MESSAGES: &str = r#"rate_limit_hits_total{limit_type="websocket_message"}"#;

/// Twenty of each a minute.
const LIMITS: [(&str, &str); 3] =
    [("RATE_LIMIT_PER_MINUTE", "20"), ("RATE_LIMIT_BURST", "0"), ("WS_MESSAGE_RATE_LIMIT", "20")];

/// Asks for one of each. Whether both were let through; no wait, and no other failure.
async fn is_served(node: &TestServer, token: &str, client: &mut Client) -> bool {
    let asked = Instant::now();
    let answer = get(node, token).await;
    let message = echo(client).await;
    assert!(asked.elapsed() < Duration::from_millis(400), "{:?}", asked.elapsed());
    match (answer.status().as_u16(), message["status_code"].as_i64()) {
        (200, Some(0)) => true,
        (429, _) => false,
        (200, _) if message["data"]["code"] == "rate_limit_exceeded" => false,
        other => panic!("{other:?}: {message}"),
    }
}

/// Waits until both limits are those of all nodes again: what is spent on one is gone on the other.
async fn until_shared(nodes: &[TestServer], since: Instant) {
    for round in 0.. {
        let user = format!("u{round}");
        let token = nodes[0].token(&user);
        let mut clients = join_all(nodes.iter().map(|node| node.client(&user))).await;
        let (mut rest, mut messages) = (0, 0);
        for n in 0..44 {
            let at = n % nodes.len();
            rest += u32::from(get(&nodes[at], &token).await.status() == 200);
            messages += u32::from(echo(&mut clients[at]).await["status_code"] == 0);
        }
        assert!(since.elapsed() < Duration::from_secs(5), "{rest} and {messages} of 20");
        // Of their own, nodes would let through twice as much.
        if (20..=22).contains(&rest) && (20..=28).contains(&messages) {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_redis_an_open_node_limits_by_itself_and_shares_again_soon() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let settings = Settings::new((proxy.url(), "open".into()));
    let more = [&LIMITS[..], &[("RATE_LIMIT_FAIL_MODE", "open"), ("WS_MAX_STRIKES", "0")]].concat();
    let nodes = nodes(2, &settings, &more).await;
    until_shared(&nodes, Instant::now()).await;
    type Fault<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn());
    let faults: [Fault<'_>; 4] = [
        ("cut", &|| proxy.set(Network::Cut), &|| proxy.set(Network::Open)),
        ("silent", &|| proxy.set(Network::Silent), &|| proxy.set(Network::Open)),
        ("killed", &|| redis.kill(), &|| redis.start_again()),
        // Over by itself.
        ("paused", &|| drop(redis.command("CLIENT PAUSE 2000 ALL")), &|| ()),
    ];
    for (name, begin, end) in faults {
        let token = nodes[0].token(name);
        let mut client = nodes[0].client(name).await;
        assert!(is_served(&nodes[0], &token, &mut client).await, "{name}");
        block_in_place(begin);
        for n in 0..15 {
            assert!(is_served(&nodes[0], &token, &mut client).await, "{name}: {n}");
        }
        let refused = async { while is_served(&nodes[0], &token, &mut client).await {} };
        tokio::time::timeout(Duration::from_secs(2), refused).await.expect("a limit");
        block_in_place(end);
        until_shared(&nodes, Instant::now()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_redis_a_closed_node_refuses_and_strikes_nobody() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "closed".into()));
    let more =
        [&LIMITS[..], &[("RATE_LIMIT_FAIL_MODE", "closed"), ("WS_MAX_STRIKES", "1")]].concat();
    let node = nodes(1, &settings, &more).await.remove(0);
    let token = node.token("ann");
    let mut client = node.client("ann").await;
    assert!(is_served(&node, &token, &mut client).await);
    block_in_place(|| redis.kill());
    node.until_metric("redis_connected", 0.0).await;
    for _ in 0..3 {
        let asked = Instant::now();
        let answer = get(&node, &token).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "retry-after")), (503, 5));
        let body: serde_json::Value = answer.json().await.unwrap();
        assert_eq!(body["error"]["code"], "unavailable");
        let answer = echo(&mut client).await;
        assert_eq!(
            (&answer["status_code"], &answer["data"]["code"]),
            (&json!(1), &json!("unavailable"))
        );
        assert!(asked.elapsed() < Duration::from_millis(300), "{:?}", asked.elapsed());
    }
    assert_eq!(node.metric(MESSAGES).await, 0.0);
    let health = node.request(reqwest::Method::GET, "/health/ready").send().await.unwrap();
    assert_eq!(health.status(), 200, "it is not away for READY_AFTER yet");
    let since = Instant::now();
    block_in_place(|| redis.start_again());
    node.until_metric("redis_connected", 1.0).await;
    while get(&node, &token).await.status() != 200 {}
    assert_eq!(echo(&mut client).await["status_code"], 0);
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_hangs_opens_the_circuit_breaker_and_nobody_waits_for_long() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "hangs".into()));
    let node = nodes(1, &settings, &[("RATE_LIMIT_FAIL_MODE", "closed")]).await.remove(0);
    let token = node.token("ann");
    assert_eq!(get(&node, &token).await.status(), 200);
    block_in_place(|| redis.command("CLIENT PAUSE 3000 ALL"));
    let started = Instant::now();
    for _ in 0..20 {
        let asked = Instant::now();
        assert_eq!(get(&node, &token).await.status(), 503);
        assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
    }
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    let service = |name| format!(r#"{name}{{service="redis"}}"#);
    assert!(node.metric(&service("circuit_breaker_state")).await > 0.0);
    assert!(node.metric(&service("circuit_breaker_failures_total")).await >= 5.0);
    let failed = r#"redis_operations_total{operation="http_limit",status="error"}"#;
    assert!((1.0..=5.0).contains(&node.metric(failed).await), "nobody asks any more");
    node.until_metric(&service("circuit_breaker_state"), 0.0).await;
    assert_eq!(get(&node, &token).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_let_through_without_redis_while_a_payment_is_on_its_way_is_not_forgotten() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let settings = Settings::new((proxy.url(), "meanwhile".into()));
    let more = [
        ("RATE_LIMIT_FAIL_MODE", "open"),
        ("WS_MESSAGE_RATE_LIMIT", "120"),
        ("WS_MAX_STRIKES", "0"),
    ];
    let node = nodes(1, &settings, &more).await.remove(0);
    let until_closed = || node.until_metric(r#"circuit_breaker_state{service="redis"}"#, 0.0);
    let (token, started) = (node.token("bob"), Instant::now());
    let mut client = node.client("ann").await;
    let mut passed = 0;
    // The second begins with a payment that tells of what was let through in the first.
    for _ in 0..2 {
        until_closed().await;
        proxy.set(Network::Silent);
        // It goes out before these open the circuit breaker, and is answered after that.
        let requests = join_all((0..5).map(|_| get(&node, &token)));
        let payment = async {
            tokio::time::sleep(Duration::from_millis(70)).await;
            for _ in 0..12 {
                assert_eq!(echo(&mut client).await["status_code"], 0);
            }
        };
        join(requests, payment).await;
        for _ in 0..24 {
            assert_eq!(echo(&mut client).await["status_code"], 0);
        }
        proxy.set(Network::Open);
        passed += 36;
    }
    until_closed().await;
    while echo(&mut client).await["status_code"] == 0 {
        passed += 1;
    }
    let refilled = 2 * started.elapsed().as_secs();
    assert!(passed <= 120 + refilled + 8, "{passed} of 120 and {refilled}");
}

/// Sends four hundred requests while Redis hangs, more than a node may owe; how many were let through, and
/// the code that the others were answered with.
async fn much(node: &TestServer, client: &mut Client, redis: &Redis) -> (usize, Option<String>) {
    const SENT: usize = 400;
    assert_eq!(echo(client).await["status_code"], 0);
    block_in_place(|| redis.command("CLIENT PAUSE 2000 ALL"));
    let started = Instant::now();
    let (mut passed, mut code) = (0, None);
    for _ in 0..SENT {
        client.request(100, json!({})).await;
    }
    for _ in 0..SENT {
        let answer = client.receive().await;
        match answer["status_code"].as_i64() {
            Some(0) => passed += 1,
            _ => code = answer["data"]["code"].as_str().map(str::to_owned),
        }
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(node.metric(MESSAGES).await, 0.0, "the limit was not reached");
    node.until_metric(r#"circuit_breaker_state{service="redis"}"#, 0.0).await;
    assert_eq!(echo(client).await["status_code"], 0, "and the connection stays");
    (passed, code)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_that_sends_much_while_redis_hangs_waits_a_moment_and_is_answered() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "much".into()));
    let more = |mode| {
        let drain = [("DRAIN_DELAY", "0"), ("DRAIN_GRACE", "20s")];
        [("RATE_LIMIT_FAIL_MODE", mode), ("WS_MESSAGE_RATE_LIMIT", "600"), drain[0], drain[1]]
    };
    let open = nodes(1, &settings, &more("open")).await.remove(0);
    assert_eq!(much(&open, &mut open.client("ann").await, &redis).await, (400, None));
    let mut closed = nodes(1, &settings, &more("closed")).await.remove(0);
    for (user, drained) in [("bob", false), ("eve", true)] {
        let mut client = closed.client(user).await;
        if drained {
            closed.begin_shutdown();
            assert_eq!(client.receive().await["type"], "drain");
        }
        let (passed, code) = much(&closed, &mut client, &redis).await;
        // Sixteen that were paid ahead, and twelve owed for each of five payments and one more.
        let seen = format!("{user}: {passed}, {code:?}");
        assert!(passed <= 16 + 6 * 12 && code.as_deref() == Some("unavailable"), "{seen}");
    }
}
