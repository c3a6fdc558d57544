//! Clocks that are wrong: those that step under a running server, and those of nodes that differ.

use std::time::{Duration, Instant};

use reqwest::{Method, Response};
use serde_json::{Value, json};
use switchboard::{auth::DevIssuer, handlers::roles};
use tempfile::TempDir;

use crate::support::{
    Client, Closed,
    faketime::WallClock,
    issuer::Issuer,
    process::Process,
    redis::{self, Redis},
};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// A server process with a wall clock of its own.
struct Node {
    process: Process,
    clock: WallClock,
    issuer: DevIssuer,
    http: reqwest::Client,
    _data: TempDir,
}

impl Node {
    fn start(ahead: i64, settings: &[(&str, &str)]) -> Self {
        let (data, clock) = (TempDir::new().unwrap(), WallClock::ahead(ahead));
        let key = data.path().join("key.pem").display().to_string();
        let faked = clock.settings();
        let mut all: Vec<_> = faked.iter().map(|(name, value)| (*name, &**value)).collect();
        all.push(("DEV_KEY_FILE", &key));
        all.extend(settings);
        // One that is set later wins, also in the environment.
        let key = settings.iter().rev().find(|(name, _)| *name == "DEV_KEY_FILE");
        let key = key.map_or(data.path().join("key.pem"), |(_, key)| key.into());
        let issuer = DevIssuer::open(&key, "switchboard").unwrap();
        let process = Process::start(data.path(), &all);
        Self { process, clock, issuer, http: reqwest::Client::new(), _data: data }
    }

    /// A token with every role, good for so many seconds from now on.
    fn token(&self, user: &str, seconds: i64) -> String {
        let now = jiff::Timestamp::now().as_second();
        self.issuer.sign(&json!({
            "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": user,
            "preferred_username": user, "iat": now - 10 * DAY, "exp": now + seconds,
            "resource_access": { "switchboard": { "roles": roles::ALL } },
        }))
    }

    async fn client(&self, token: &str) -> Client {
        let mut client = Client::open(self.process.addr, "/web").await;
        client.authenticate(token).await;
        client
    }

    async fn ask(&self, method: Method, path: &str, token: &str) -> Response {
        let url = format!("http://{}{path}", self.process.addr);
        self.http.request(method, url).bearer_auth(token).send().await.unwrap()
    }
}

#[tokio::test]
async fn a_socket_whose_token_expired_by_a_step_of_the_clock_changes_nothing() {
    let node = Node::start(0, &[]);
    let (token, later) = (node.token("ann", 600), node.token("ann", 2 * HOUR));
    let mut client = node.client(&token).await;
    assert_eq!(client.call(3, json!({ "name": "Before" })).await["status_code"], 0);
    node.clock.set(HOUR);
    assert_eq!(node.ask(Method::GET, "/authors", &token).await.status(), 401);
    let answer = client.call(3, json!({ "name": "After" })).await;
    assert_eq!(
        (&answer["status_code"], &answer["data"]["code"]),
        (&json!(1), &json!("token_expired"))
    );
    assert_eq!(client.until_closed().await.1, Closed::Code(4003));
    let authors = node.ask(Method::GET, "/authors", &later).await.json::<Value>().await.unwrap();
    assert_eq!(authors.as_array().unwrap().len(), 1, "{authors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_step_of_the_clock_makes_too_old_are_fetched_at_once() {
    let issuer = Issuer::start().await;
    let url = issuer.url();
    let node = Node::start(0, &[("OIDC_ISSUER", &url), ("OIDC_JWKS_LIFETIME", "5m")]);
    let ready = async || node.ask(Method::GET, "/health/ready", "").await.status().as_u16();
    until(async || ready().await == 200).await;
    let before = issuer.key_sets();
    node.clock.set(HOUR);
    // Whoever asks whether the node is ready has it fetch them.
    until(async || ready().await == 200 && issuer.key_sets() > before).await;
}

async fn until(happened: impl AsyncFn() -> bool) {
    let since = Instant::now();
    while !happened().await {
        assert!(since.elapsed() < Duration::from_secs(20), "it does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_idle_socket_whose_token_expired_by_a_step_of_the_clock_ends_at_the_next_tick() {
    let node = Node::start(0, &[("WS_PING_INTERVAL", "500ms")]);
    let (mut ends, mut stays) = (
        node.client(&node.token("ann", 600)).await,
        node.client(&node.token("bob", 2 * HOUR)).await,
    );
    node.clock.set(HOUR);
    assert_eq!(ends.until_closed().await.1, Closed::Code(4003));
    assert_eq!(stays.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn a_clock_that_is_set_back_ends_no_socket_whose_token_is_good_by_it() {
    let node = Node::start(0, &[]);
    let token = node.token("ann", 3);
    let mut client = node.client(&token).await;
    assert_eq!(client.receive().await["type"], "auth_expiring");
    node.clock.set(-HOUR);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(node.ask(Method::GET, "/authors", &token).await.status(), 200);
    assert_eq!(client.try_call(100, json!({})).await.unwrap()["status_code"], 0);
}

/// Nodes that share a Redis and the key of the issuer, each with a clock that is so far ahead.
fn nodes<const N: usize>(redis: &str, prefix: &str, data: &TempDir, ahead: [i64; N]) -> [Node; N] {
    let key = data.path().join("key.pem").display().to_string();
    let settings = [("REDIS_URL", redis), ("REDIS_KEY_PREFIX", prefix), ("DEV_KEY_FILE", &*key)];
    ahead.map(|ahead| Node::start(ahead, &settings))
}

#[tokio::test]
async fn an_administrator_at_a_node_with_a_wrong_clock_ends_what_was_there_and_nothing_that_comes()
{
    let ((redis, prefix), data) = (redis::shared(), TempDir::new().unwrap());
    let [ahead, right, behind] = nodes(&redis, &prefix, &data, [DAY, 0, -DAY]);
    let token = right.token("ann", 5 * DAY);
    for node in [&ahead, &behind] {
        let mut gone = [right.client(&token).await, node.client(&token).await];
        let ended = node.ask(Method::DELETE, "/admin/users/ann/connections?by=sub", &token).await;
        assert_eq!(ended.status(), 204);
        for client in &mut gone {
            assert_eq!(client.until_closed().await.1, Closed::Code(4004));
        }
        for node in [&ahead, &right, &behind] {
            let mut again = node.client(&token).await;
            assert_eq!(again.call(100, json!({})).await["status_code"], 0);
            // Also once the node has heard of it a second time.
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(again.try_call(100, json!({})).await.unwrap()["status_code"], 0);
            again.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_clock_is_ahead_or_whose_lifetime_is_short_takes_no_logout_from_the_others() {
    let (redis, data) = (Redis::start(), TempDir::new().unwrap());
    let key = data.path().join("key.pem").display().to_string();
    let url = redis.url();
    let settings = [("REDIS_URL", &*url), ("REDIS_KEY_PREFIX", "kept"), ("DEV_KEY_FILE", &*key)];
    let right = Node::start(0, &settings);
    let wrong = Node::start(3 * DAY, &[&settings[..], &[("REVOCATION_LIFETIME", "10s")]].concat());
    let token = right.token("rest", 9 * DAY);
    for (node, user) in [(&right, "ann"), (&wrong, "bob")] {
        let path = format!("/admin/users/{user}/connections?by=sub");
        assert_eq!(node.ask(Method::DELETE, &path, &token).await.status(), 204);
        redis.until_said("ZRANGE kept:revocations 0 -1", user);
    }
    let kept = redis.said("ZRANGE kept:revocations 0 -1");
    assert!(kept.contains("ann") && kept.contains("bob"), "{kept}");
    let seconds: i64 = redis.command("TTL kept:revocations")[1..].parse().unwrap();
    assert!(seconds > DAY - 60, "{seconds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_of_a_nodes_clock_makes_none_of_its_connections_older() {
    let (redis, data) = (Redis::start(), TempDir::new().unwrap());
    let [right, steps] = nodes(&redis.url(), "older", &data, [0, 0]);
    let token = |user| right.token(user, DAY);
    let _first = right.client(&token("first")).await;
    // Nodes know Redis' time but for the way there.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let _second = steps.client(&token("second")).await;
    steps.clock.set(HOUR);
    // Both enter their connections again.
    assert_eq!(redis.command("FLUSHALL"), "+OK");
    let since = Instant::now();
    let newest_first = loop {
        let answer = right.ask(Method::GET, "/admin/connections", &token("rest")).await;
        let items = answer.json::<Value>().await.unwrap()["items"].clone();
        let subjects: Vec<_> = items.as_array().into_iter().flatten().collect();
        if subjects.len() == 2 {
            break subjects.iter().map(|item| item["subject"].to_string()).collect::<Vec<_>>();
        }
        assert!(since.elapsed() < Duration::from_secs(15), "{items}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(newest_first, ["\"second\"", "\"first\""]);
}
