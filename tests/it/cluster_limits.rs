//! Limits that several servers share over one Redis: they count together, also in a hurry.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::task::block_in_place;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::{
    cluster::{Settings, broadcast, heard},
    support::{
        Client, TestServer,
        redis::{Redis, shared},
    },
};

/// Nodes of one cluster, with more settings.
pub(crate) async fn nodes(
    count: usize,
    settings: &Settings,
    more: &[(&str, &str)],
) -> Vec<TestServer> {
    let all = [&settings.all(), more].concat();
    let mut nodes = Vec::new();
    for _ in 0..count {
        let node = TestServer::start(&all).await;
        node.until_metric("redis_connected", 1.0).await;
        nodes.push(node);
    }
    nodes
}

/// A REST request of a user.
pub(crate) async fn get(node: &TestServer, token: &str) -> Response {
    node.request(Method::GET, "/authors").bearer_auth(token).send().await.unwrap()
}

pub(crate) async fn echo(client: &mut Client) -> Value {
    client.call(100, json!({})).await
}

pub(crate) fn header(answer: &Response, name: &str) -> u64 {
    answer.headers()[name].to_str().unwrap().parse().unwrap()
}

/// Sends sixteen requests at once; how many were let through. Others are over the limit, as far as anybody
/// can say.
async fn sixteen(client: &mut Client) -> u32 {
    let request = || json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": {} });
    client.send_together((0..16).map(|_| Message::text(request().to_string()))).await;
    let mut passed = 0;
    for _ in 0..16 {
        let answer = client.receive().await;
        match answer["status_code"].as_i64() {
            Some(0) => passed += 1,
            _ if answer["data"]["code"] == "unavailable" => {}
            _ => assert_eq!(answer["data"]["code"], "rate_limit_exceeded", "{answer}"),
        }
    }
    passed
}

#[tokio::test]
async fn rest_requests_count_on_all_nodes_together_and_to_the_last_one() {
    let settings = Settings::new(shared());
    let limits = [("RATE_LIMIT_PER_MINUTE", "6"), ("RATE_LIMIT_BURST", "2")];
    let nodes = nodes(3, &settings, &limits).await;
    let token = nodes[0].token("ann");
    for (n, left) in [5, 4, 3, 2, 1, 0, 0, 0].into_iter().enumerate() {
        let answer = get(&nodes[n % 3], &token).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "x-ratelimit-limit")), (200, 6));
        assert_eq!(header(&answer, "x-ratelimit-remaining"), left, "request {n}");
        let reset = (n as u64 + 1) * 10;
        assert!((reset - 1..=reset).contains(&header(&answer, "x-ratelimit-reset")));
    }
    for node in &nodes {
        let answer = get(node, &token).await;
        assert_eq!(
            (answer.status(), header(&answer, "x-ratelimit-remaining")),
            (429.try_into().unwrap(), 0)
        );
        assert!((8..=10).contains(&header(&answer, "retry-after")));
        assert_eq!(node.metric(r#"rate_limit_hits_total{limit_type="http"}"#).await, 1.0);
    }
    assert_eq!(get(&nodes[1], &nodes[0].token("bob")).await.status(), 200);
    // Without a user it is the address's.
    for n in 0..9 {
        let answer = nodes[n % 3].request(Method::GET, "/authors").send().await.unwrap();
        assert_eq!(answer.status(), if n < 8 { 401 } else { 429 });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_come_at_once_on_all_nodes_get_what_the_limit_says() {
    let settings = Settings::new(shared());
    // Closed: a request for which Redis was too slow is none that a node let through by itself.
    let limits = [
        ("RATE_LIMIT_PER_MINUTE", "20"),
        ("RATE_LIMIT_BURST", "0"),
        ("RATE_LIMIT_FAIL_MODE", "closed"),
    ];
    let nodes = nodes(3, &settings, &limits).await;
    let token = nodes[0].token("ann");
    let started = Instant::now();
    let answers = join_all((0..60).map(|n| get(&nodes[n % 3], &token))).await;
    let count = |status| answers.iter().filter(|answer| answer.status() == status).count();
    let (passed, slow) = (count(200), count(503));
    let refilled = started.elapsed().as_secs() as usize / 3;
    let seen = format!("{passed} of 20, {slow} without an answer, in {:?}", started.elapsed());
    assert!(passed <= 20 + refilled && passed + slow >= 20 && slow < 10, "{seen}");
}

#[tokio::test]
async fn a_budget_that_is_full_again_leaves_nothing_in_redis() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "full".into()));
    let limits = [("RATE_LIMIT_PER_MINUTE", "20"), ("WS_MESSAGE_RATE_LIMIT", "60")];
    let node = nodes(1, &settings, &limits).await.remove(0);
    assert_eq!(get(&node, &node.token("ann")).await.status(), 200);
    let mut client = node.client("bob").await;
    assert_eq!(echo(&mut client).await["status_code"], 0);
    let left = |limit: &str, user: &str| -> i64 {
        let subject = Uuid::new_v5(&Uuid::NAMESPACE_DNS, user.as_bytes());
        redis.command(&format!("PTTL full:limit:{limit}:{subject}"))[1..].parse().unwrap()
    };
    let (http, messages) = (left("http:user", "ann"), left("messages", "bob"));
    assert!((1..=3000).contains(&http), "{http}");
    // With what was paid ahead, which is given back after a second.
    assert!((1000..=18_000).contains(&messages), "{messages}");
    tokio::time::sleep(Duration::from_millis(3000)).await;
    assert_eq!(redis.command("KEYS full:limit:*"), "*0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_in_a_hurry_on_four_nodes_gets_the_limit_and_at_most_a_tenth_on_top() {
    let settings = Settings::new(shared());
    let limits = [("WS_MESSAGE_RATE_LIMIT", "1200"), ("WS_MAX_STRIKES", "0")];
    let nodes = nodes(4, &settings, &limits).await;
    let mut clients = join_all(nodes.iter().map(|node| node.client("ann"))).await;
    let started = Instant::now();
    let hurry = async |client: &mut Client| {
        let mut passed = 0;
        while started.elapsed() < Duration::from_secs(4) {
            passed += sixteen(client).await;
        }
        passed
    };
    let passed: u32 = join_all(clients.iter_mut().map(hurry)).await.into_iter().sum();
    let promised = 1200.0 + 20.0 * started.elapsed().as_secs_f64();
    let share = f64::from(passed) / promised;
    println!("four nodes: {passed} of {promised:.0}");
    assert!((0.95..=1.1).contains(&share), "{passed} of {promised}");
    let mut asked = 0.0;
    for node in &nodes {
        let series = r#"redis_operations_total{operation="message_limit",status="success"}"#;
        asked += node.metric(series).await;
    }
    println!("{asked} payments");
    assert!(asked < f64::from(passed) / 5.0, "{asked} payments for {passed} messages");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_takes_its_time_lets_a_user_in_a_hurry_have_no_more() {
    let redis = Redis::start();
    for limit in [1200, 60] {
        let settings = Settings::new((redis.url(), format!("slow{limit}")));
        let limit_setting = limit.to_string();
        // Closed: a payment that is too late lets nothing through.
        let limits = [
            ("WS_MESSAGE_RATE_LIMIT", limit_setting.as_str()),
            ("WS_MAX_STRIKES", "0"),
            ("RATE_LIMIT_FAIL_MODE", "closed"),
        ];
        let nodes = nodes(4, &settings, &limits).await;
        let twice = nodes.iter().chain(&nodes).map(|node| node.client("ann"));
        let mut clients = join_all(twice).await;
        let started = Instant::now();
        let is_over = || started.elapsed() > Duration::from_secs(3);
        let hurry = async |client: &mut Client| {
            let mut passed = 0;
            while !is_over() {
                passed += sixteen(client).await;
            }
            passed
        };
        let slow = async {
            while !is_over() {
                assert_eq!(block_in_place(|| redis.command("CLIENT PAUSE 40 ALL")), "+OK");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let (passed, ()) = tokio::join!(join_all(clients.iter_mut().map(hurry)), slow);
        let passed: u32 = passed.into_iter().sum();
        let limit = f64::from(limit);
        let promised = limit + limit / 60.0 * started.elapsed().as_secs_f64();
        println!("four nodes on a slow Redis: {passed} of {promised:.0}");
        assert!((0.7..=1.1).contains(&(f64::from(passed) / promised)), "{passed} of {promised}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_on_one_of_four_nodes_gets_what_the_limit_promises() {
    let settings = Settings::new(shared());
    let limits = [("WS_MESSAGE_RATE_LIMIT", "1200"), ("WS_MAX_STRIKES", "0")];
    let nodes = nodes(4, &settings, &limits).await;
    let mut idle = join_all(nodes[1..].iter().map(|node| node.client("ann"))).await;
    for client in &mut idle {
        assert_eq!(echo(client).await["status_code"], 0);
    }
    let mut client = nodes[0].client("ann").await;
    let (started, mut passed) = (Instant::now(), 0);
    while started.elapsed() < Duration::from_secs(3) {
        passed += sixteen(&mut client).await;
    }
    let promised = 1200.0 + 20.0 * started.elapsed().as_secs_f64();
    println!("one node: {passed} of {promised:.0}");
    assert!((0.95..=1.01).contains(&(f64::from(passed) / promised)), "{passed} of {promised}");
}

#[tokio::test]
async fn who_used_up_the_message_limit_gets_no_fresh_one_on_another_node() {
    let settings = Settings::new(shared());
    // One comes back every three seconds.
    let nodes = nodes(2, &settings, &[("WS_MESSAGE_RATE_LIMIT", "20")]).await;
    let mut client = nodes[0].client("ann").await;
    let mut passed = 0;
    let refused = loop {
        let answer = echo(&mut client).await;
        if answer["status_code"] != 0 {
            break answer;
        }
        passed += 1;
    };
    assert!((20..=21).contains(&passed), "{passed}");
    assert_eq!(refused["data"]["code"], "rate_limit_exceeded");
    let mut other = nodes[1].client("ann").await;
    let (mut more, mut refused) = (0u64, echo(&mut other).await);
    while refused["status_code"] == 0 {
        more += 1;
        refused = echo(&mut other).await;
    }
    // What a node may owe, if Redis was too slow to say at once what is left.
    assert!(more <= 8, "{more} more on another node");
    assert_eq!(refused["data"]["code"], "rate_limit_exceeded", "{refused}");
    let wait = refused["data"]["details"]["retry_after_ms"].as_u64().unwrap();
    assert!((1..=3000 * (more + 1)).contains(&wait), "{wait}");
    tokio::time::sleep(Duration::from_millis(wait)).await;
    assert_eq!(echo(&mut other).await["status_code"], 0);
    assert_eq!(echo(&mut other).await["data"]["code"], "rate_limit_exceeded");
    assert_eq!(
        nodes[1].metric(r#"rate_limit_hits_total{limit_type="websocket_message"}"#).await,
        2.0
    );
    assert_eq!(echo(&mut nodes[1].client("bob").await).await["status_code"], 0);
}

#[tokio::test]
async fn the_access_list_of_the_documentation_is_enough() {
    let docs = include_str!("../../docs/cluster.md");
    let list = docs.split("access list needs `").nth(1).unwrap().split('`').next().unwrap();
    let list = list.split_whitespace().collect::<Vec<_>>().join(" ");
    let redis = Redis::start();
    let user = format!("ACL SETUSER node on >secret resetchannels ~acl:* &acl:* {list}");
    assert_eq!(redis.command(&user), "+OK");
    let url = redis.url().replace("redis://", "redis://node:secret@") + "/1";
    let settings = Settings::new((url, "acl".into()));
    let nodes = nodes(2, &settings, &[]).await;
    let mut client = nodes[0].client("ann").await;
    assert_eq!(get(&nodes[0], &nodes[0].token("ann")).await.status(), 200);
    assert_eq!(echo(&mut client).await["status_code"], 0);
    broadcast(&nodes[1], 7, None).await;
    assert_eq!(heard(&mut client).await, 7);
    for node in &nodes {
        let metrics = node.metrics().await;
        let failed = |line: &&str| {
            line.starts_with("redis_operations_total")
                && line.contains(r#"status="error""#)
                && !line.ends_with(" 0")
        };
        assert_eq!(metrics.lines().find(failed), None);
    }
}
