//! The previous release beside this one on one Redis, as in every rolling update: pushes, what
//! administrators end, and logouts, both ways.
//!
//! Ignored, as it needs a binary of the previous release:
//! `SWITCHBOARD_PREVIOUS=/path/to/switchboard cargo test --test it -- --ignored mixed`.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use reqwest::{Method, Response};
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::{
    backchannel::logout_token,
    cluster::heard,
    support::{
        Client, Closed,
        issuer::{CLIENT, Issuer},
        process::Process,
        redis::Redis,
    },
};

const QUIET: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

/// A node of each version, and what they share.
struct Pair {
    previous: Process,
    this: Process,
    issuer: Issuer,
    redis: Redis,
    _data: [TempDir; 2],
}

impl Pair {
    async fn start() -> Self {
        let previous = std::env::var("SWITCHBOARD_PREVIOUS")
            .expect("SWITCHBOARD_PREVIOUS names a binary of the previous release");
        let (issuer, redis) = (Issuer::start().await, block_in_place(Redis::start));
        let data = [TempDir::new().unwrap(), TempDir::new().unwrap()];
        let (url, provider) = (redis.url(), issuer.url());
        let settings = [
            ("REDIS_URL", &*url),
            ("OIDC_ISSUER", &*provider),
            ("RATE_LIMIT_PER_MINUTE", "100000"),
            ("WS_MAX_CONNECTIONS_PER_USER", "100"),
        ];
        let (previous, this) = block_in_place(|| {
            let since = Instant::now();
            let previous = Process::spawn_of(&previous, data[0].path(), &settings);
            let this = Process::spawn(data[1].path(), &settings);
            (Process::ready(previous, since), Process::ready(this, since))
        });
        let pair = Self { previous, this, issuer, redis, _data: data };
        pair.know_each_other().await;
        pair
    }

    async fn know_each_other(&self) {
        for node in [self.previous.addr, self.this.addr] {
            let since = Instant::now();
            while self.broadcast(node, json!({})).await["nodes"] != 2 {
                assert!(since.elapsed() < PATIENCE, "{node} is alone");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Each version, and the one that it tells.
    fn both_ways(&self) -> [(SocketAddr, SocketAddr); 2] {
        let (previous, this) = (self.previous.addr, self.this.addr);
        [(previous, this), (this, previous)]
    }

    fn token(&self, name: &str, roles: &[&str]) -> String {
        self.issuer.token(json!({
            "sub": format!("s-{name}"), "preferred_username": name, "sid": format!("session-{name}"),
            "iat": jiff::Timestamp::now().as_second() - 9,
            "resource_access": { CLIENT: { "roles": roles } },
        }))
    }

    /// A connection of a user, whose `sub` is not the name.
    async fn client(&self, node: SocketAddr, name: &str, roles: &[&str]) -> Client {
        Client::attempt(node, &self.token(name, roles)).await.expect("it is let in")
    }

    async fn ask(&self, node: SocketAddr, method: Method, path: &str, body: &Value) -> Response {
        let request = reqwest::Client::new().request(method, format!("http://{node}{path}"));
        let request = request.bearer_auth(self.token("admin", &roles::ALL)).json(body);
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        answer
    }

    async fn broadcast(&self, node: SocketAddr, more: Value) -> Value {
        let mut body = json!({ "pkg_id": 150, "data": { "n": 1 } });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = self.ask(node, Method::POST, "/admin/broadcast", &body).await;
        answer.json().await.unwrap()
    }

    async fn log_out(&self, node: SocketAddr, changes: Value) {
        let token = logout_token(&self.issuer, &changes);
        let mut form = form_urlencoded::Serializer::new(String::new());
        let request = reqwest::Client::new().post(format!("http://{node}/auth/backchannel-logout"));
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let body = form.append_pair("logout_token", &token).finish();
        assert_eq!(request.body(body).send().await.unwrap().status(), 200);
    }

    /// Stops both; neither met anything that it did not understand.
    fn end(self) {
        for node in [self.previous, self.this] {
            node.signal("-TERM");
            let ran = block_in_place(|| node.end());
            assert_eq!(ran.code, Some(0));
            assert!(!ran.stdout.contains("not understood"), "{}", ran.stdout);
        }
    }
}

async fn is_closed(client: &mut Client) {
    assert_eq!(client.until_closed().await.1, Closed::Code(4004));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn pushes_reach_clients_of_both_versions() {
    let pair = Pair::start().await;
    for (asked, other) in pair.both_ways() {
        let mut ann = pair.client(other, "ann", &[roles::GET_AUTHORS]).await;
        let mut bob = pair.client(other, "bob", &[]).await;
        pair.broadcast(asked, json!({})).await;
        assert_eq!((heard(&mut ann).await, heard(&mut bob).await), (1, 1));
        pair.broadcast(asked, json!({ "user": "ann", "data": { "n": 2 } })).await;
        assert_eq!(heard(&mut ann).await, 2);
        bob.silent_for(QUIET).await;
        pair.ask(asked, Method::POST, "/authors", &json!({ "name": "x" })).await;
        assert_eq!(ann.receive().await["data"]["name"], "x");
        // The previous release tells everybody.
        if other == pair.this.addr {
            bob.silent_for(QUIET).await;
        } else {
            // It knows users by name alone, and is told the name of a user whom this one knows by `sub`.
            pair.broadcast(asked, json!({ "user": "s-ann", "data": { "n": 3 } })).await;
            assert_eq!(heard(&mut ann).await, 3);
        }
        ann.close().await;
        bob.close().await;
    }
    pair.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn administrators_end_connections_of_both_versions() {
    let pair = Pair::start().await;
    let connections = |user: &str| format!("/admin/users/{user}/connections");
    for (asked, other) in pair.both_ways() {
        let mut kept = pair.client(other, "bob", &[]).await;
        let mut texts = vec!["ann"];
        if asked == pair.this.addr {
            texts.push("s-ann");
        }
        for text in texts {
            let mut here = pair.client(asked, "ann", &[]).await;
            let mut there = pair.client(other, "ann", &[]).await;
            pair.ask(asked, Method::DELETE, &connections(text), &json!({})).await;
            is_closed(&mut here).await;
            is_closed(&mut there).await;
        }
        let mut one = Client::open(other, "/web").await;
        let id = one.authenticate(&pair.token("ann", &[])).await["connection_id"].clone();
        let path = format!("/admin/connections/{}", id.as_str().unwrap());
        pair.ask(asked, Method::DELETE, &path, &json!({})).await;
        is_closed(&mut one).await;
        kept.silent_for(QUIET).await;
        kept.close().await;
    }
    pair.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn logouts_end_the_sessions_of_both_versions() {
    let pair = Pair::start().await;
    for (n, (asked, other)) in pair.both_ways().into_iter().enumerate() {
        let (ann, bob) = (format!("ann{n}"), format!("bob{n}"));
        let mut closing =
            [pair.client(other, &ann, &[]).await, pair.client(other, &bob, &[]).await];
        let mut kept = pair.client(other, "eve", &[]).await;
        pair.log_out(asked, json!({ "sid": format!("session-{ann}") })).await;
        pair.log_out(asked, json!({ "sub": format!("s-{bob}"), "sid": null })).await;
        for client in &mut closing {
            is_closed(client).await;
        }
        for name in [&ann, &bob] {
            let refused = Client::attempt(other, &pair.token(name, &[])).await.err();
            assert_eq!(refused, Some(("unauthorized".into(), Closed::Code(4001))));
        }
        kept.silent_for(QUIET).await;
        kept.close().await;
    }
    pair.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn users_of_one_name_are_passed_over_by_the_previous_version_and_told_apart_by_this_one() {
    let pair = Pair::start().await;
    let named = |sub: &str| {
        let claims = json!({ "sub": sub, "preferred_username": "ann", "sid": sub });
        pair.issuer.token(claims)
    };
    let open = async |node, sub: &str| Client::attempt(node, &named(sub)).await.ok().unwrap();
    let (previous, this) = (pair.previous.addr, pair.this.addr);
    let mut here = open(this, "s-ann").await;
    let mut there = [open(previous, "s-ann").await, open(previous, "s-bob").await];
    pair.broadcast(this, json!({ "user": "s-ann" })).await;
    assert_eq!(heard(&mut here).await, 1);
    pair.ask(this, Method::DELETE, "/admin/users/s-ann/connections", &json!({})).await;
    is_closed(&mut here).await;
    for client in &mut there {
        client.silent_for(QUIET).await;
    }
    // All of it is kept in Redis for nodes that come later.
    let kept = pair.redis.said("ZRANGE switchboard:revocations 0 -1");
    assert!(kept.contains(r#"{"user":{"name":"","at":"#), "{kept}");
    assert!(kept.contains(r#""subject":"s-ann""#), "{kept}");
    pair.end();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn failed_authentications_are_shared_and_the_previous_version_does_not_notice() {
    let pair = Pair::start().await;
    let good = pair.token("ann", &[roles::GET_AUTHORS]);
    let get = async |node, token: &str| {
        let request = reqwest::Client::new().get(format!("http://{node}/authors"));
        request.bearer_auth(token).send().await.unwrap().status().as_u16()
    };
    for _ in 0..30 {
        assert_eq!(get(pair.this.addr, "garbage").await, 401);
    }
    assert_eq!(get(pair.this.addr, &good).await, 429);
    // They are in Redis, where nodes of this version find them.
    block_in_place(|| pair.redis.until_said("KEYS *", "switchboard:limit:failures:127.0.0.1"));
    assert_eq!(get(pair.previous.addr, "garbage").await, 401);
    assert_eq!(get(pair.previous.addr, &good).await, 200);
    pair.end();
}
