//! Three servers on one Redis: what is pushed or ended on one reaches clients on all.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::{
    backchannel::{is_closed, is_open, is_refused, log_out, logout_token, socket},
    oidc::trusting,
    support::{
        Client, Closed, TestServer,
        issuer::{Issuer, now},
        redis::{Redis, shared},
    },
};

/// The settings that nodes of a cluster share, and what they trust the same tokens by.
pub(crate) struct Settings {
    url: String,
    prefix: String,
    key: String,
    _folder: TempDir,
}

impl Settings {
    pub(crate) fn new((url, prefix): (String, String)) -> Self {
        let folder = TempDir::new().unwrap();
        let key = folder.path().join("key.pem").display().to_string();
        Self { url, prefix, key, _folder: folder }
    }

    pub(crate) fn all(&self) -> [(&str, &str); 3] {
        [("REDIS_URL", &self.url), ("REDIS_KEY_PREFIX", &self.prefix), ("DEV_KEY_FILE", &self.key)]
    }

    /// Starts a node, and waits until it hears the others.
    pub(crate) async fn node(&self) -> TestServer {
        let server = TestServer::start(&self.all()).await;
        server.until_metric("redis_connected", 1.0).await;
        server
    }
}

async fn three(settings: &Settings) -> [TestServer; 3] {
    [settings.node().await, settings.node().await, settings.node().await]
}

/// Broadcasts; what the server says of it.
pub(crate) async fn broadcast(server: &TestServer, n: u32, user: Option<&str>) -> Value {
    let body = json!({ "pkg_id": 150, "data": { "n": n }, "user": user });
    let answer = server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    answer.json().await.unwrap()
}

/// The number of the next broadcast that a client gets.
pub(crate) async fn heard(client: &mut Client) -> u64 {
    let push = client.receive().await;
    assert_eq!(push["pkg_id"], 150, "{push}");
    push["data"]["n"].as_u64().unwrap()
}

const QUIET: Duration = Duration::from_millis(150);

#[tokio::test]
async fn a_broadcast_reaches_clients_of_all_nodes_once_and_in_order() {
    let nodes = three(&Settings::new(shared())).await;
    let mut clients = Vec::new();
    for node in &nodes {
        clients.push(node.client("ann").await);
    }
    let mut binary = nodes[2].client_with("bob", &[], "protobuf").await;
    for n in 1..=200 {
        broadcast(&nodes[0], n, None).await;
    }
    for client in &mut clients {
        for n in 1..=200 {
            assert_eq!(heard(client).await, n);
        }
        client.silent_for(QUIET).await;
    }
    for n in 1..=200 {
        assert_eq!(binary.receive_protobuf().await.data(), json!({ "n": n }));
    }
    let reached = broadcast(&nodes[0], 0, None).await;
    assert_eq!(reached, json!({ "nodes": 3, "connections": 4 }));
    let published = r#"redis_operations_total{operation="publish",status="success"}"#;
    assert_eq!(nodes[1].metric(published).await, 0.0, "nobody passes it on");
}

#[tokio::test]
async fn a_push_to_a_user_reaches_that_user_on_all_nodes_and_nobody_else() {
    let nodes = three(&Settings::new(shared())).await;
    let (mut here, mut there) = (nodes[0].client("ann").await, nodes[1].client("ann").await);
    let mut other = nodes[2].client("bob").await;
    broadcast(&nodes[2], 7, Some("ann")).await;
    assert_eq!((heard(&mut here).await, heard(&mut there).await), (7, 7));
    other.silent_for(QUIET).await;
}

#[tokio::test]
async fn a_change_is_pushed_on_all_nodes_and_not_to_its_author() {
    let nodes = three(&Settings::new(shared())).await;
    let mut author = nodes[0].client("ann").await;
    let mut others = [
        nodes[0].client("ann").await,
        nodes[1].client("ann").await,
        nodes[2].client_with("bob", &[roles::GET_AUTHORS], "json").await,
    ];
    for i in 1..=50 {
        let name = format!("a{i}");
        assert_eq!(author.call(3, json!({ "name": name })).await["status_code"], 0);
    }
    for other in &mut others {
        for i in 1..=50 {
            let push = other.receive().await;
            assert_eq!(push["data"], json!({ "id": i, "name": format!("a{i}") }), "{push}");
        }
    }
    let body = json!({ "name": "of nobody's connection" });
    nodes[1].rest(Method::POST, "/authors").json(&body).send().await.unwrap();
    for client in others.iter_mut().chain([&mut author]) {
        assert_eq!(client.receive().await["data"]["name"], body["name"]);
        client.silent_for(QUIET).await;
    }
}

#[tokio::test]
async fn an_administrator_ends_connections_on_whichever_node_they_are() {
    let nodes = three(&Settings::new(shared())).await;
    let mut gone = Client::open(nodes[0].addr, "/web").await;
    let id = gone.authenticate(&nodes[0].token("ann")).await["connection_id"].clone();
    let mut users = [nodes[0].client("ann lee").await, nodes[1].client("ann lee").await];
    let mut kept = nodes[0].client("bob").await;
    let since = Instant::now();
    for path in [
        format!("/admin/connections/{}", id.as_str().unwrap()),
        "/admin/users/ann%20lee/connections".into(),
    ] {
        let answer = nodes[2].rest(Method::DELETE, &path).send().await.unwrap();
        assert_eq!(answer.status(), 204, "{path}");
    }
    for client in [&mut gone].into_iter().chain(&mut users) {
        assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    }
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    is_open(&mut kept).await;
}

#[tokio::test]
async fn a_logout_closes_its_sockets_on_all_nodes_and_is_refused_there_and_on_later_ones() {
    let (url, prefix) = shared();
    let redis = [("REDIS_URL", url.as_str()), ("REDIS_KEY_PREFIX", prefix.as_str())];
    let issuer = Issuer::start().await;
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let node = trusting(&issuer, &redis).await;
        node.until_metric("redis_connected", 1.0).await;
        nodes.push(node);
    }
    let token =
        |sub: &str, sid: &str| issuer.token(json!({ "sub": sub, "sid": sid, "iat": now() - 9 }));
    let (session, subject, other) = (token("ann", "s1"), token("bob", "s2"), token("eve", "s3"));
    let (mut closing, mut open) = (Vec::new(), Vec::new());
    for node in &nodes[..2] {
        closing.extend([socket(node, &session).await, socket(node, &subject).await]);
        open.push(socket(node, &other).await);
    }
    let since = log_out(&nodes[2], &logout_token(&issuer, &json!({ "sid": "s1" }))).await;
    let whole = json!({ "sub": "bob", "sid": null });
    log_out(&nodes[2], &logout_token(&issuer, &whole)).await;
    for client in &mut closing {
        is_closed(client, since).await;
    }
    for client in &mut open {
        is_open(client).await;
    }
    // One that was not there learns it before it lets anybody in.
    let late = trusting(&issuer, &redis).await;
    for node in nodes.iter().chain([&late]) {
        is_refused(node, &session).await;
        is_refused(node, &subject).await;
    }
}

#[tokio::test]
async fn two_clusters_on_one_redis_do_not_meet() {
    let (first, second) = (Settings::new(shared()), Settings::new(shared()));
    let nodes = [first.node().await, second.node().await];
    let (mut ann, mut bob) = (nodes[0].client("ann").await, nodes[1].client("bob").await);
    assert_eq!(broadcast(&nodes[0], 1, None).await["nodes"], 1);
    assert_eq!(heard(&mut ann).await, 1);
    bob.silent_for(QUIET).await;
}

#[tokio::test]
async fn what_was_accepted_before_a_node_stops_still_reaches_the_others() {
    let settings = Settings::new(shared());
    let (leaving, staying) = (settings.node().await, settings.node().await);
    let mut client = staying.client("ann").await;
    for n in 1..=50 {
        broadcast(&leaving, n, None).await;
    }
    leaving.stop().await.unwrap();
    for n in 1..=50 {
        assert_eq!(heard(&mut client).await, n);
    }
}

/// Waits until a node has carried out what others sent before.
async fn has_heard(from: &TestServer, client: &mut Client) {
    broadcast(from, 99, None).await;
    assert_eq!(heard(client).await, 99);
}

#[tokio::test]
async fn changes_are_pushed_on_other_nodes_to_those_alone_who_may_read_them_then() {
    let settings = Settings::new(shared());
    let (here, there) = (settings.node().await, settings.node().await);
    let mut author = here.client("ann").await;
    let mut blind = there.client_with("bob", &[], "json").await;
    let mut reader = there.client_with("cat", &[roles::GET_AUTHORS], "json").await;
    author.call(3, json!({ "name": "x" })).await;
    assert_eq!(reader.receive().await["data"]["name"], "x");
    has_heard(&here, &mut blind).await;
    assert_eq!(heard(&mut reader).await, 99);

    for (client, user, roles) in
        [(&mut blind, "bob", &[roles::GET_AUTHORS][..]), (&mut reader, "cat", &[])]
    {
        let token = format!("Bearer {}", there.token_with(user, roles));
        client.send(&json!({ "type": "refresh", "token": token })).await;
        assert_eq!(client.receive().await["type"], "refresh_ok");
    }
    let body = json!({ "name": "y" });
    here.rest(Method::PUT, "/authors/1").json(&body).send().await.unwrap();
    assert_eq!(blind.receive().await["data"]["name"], "y");
    has_heard(&here, &mut reader).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_from_an_older_node_are_for_whom_this_nodes_packages_say_and_the_rest_is_for_all() {
    let redis = block_in_place(Redis::start);
    let node = Settings::new((redis.url(), "old".into())).node().await;
    let mut blind = node.client_with("bob", &[], "json").await;
    let mut reader = node.client_with("cat", &[roles::GET_AUTHORS], "json").await;
    // As the release before wrote them; the last as this one writes what an administrator sends to all.
    let events = [
        json!({ "pkg_id": 3, "data": { "id": 1, "name": "x" } }),
        json!({ "pkg_id": 150, "data": { "n": 1 } }),
        json!({ "pkg_id": 5, "data": { "id": 1 } }),
        json!({ "pkg_id": 5, "roles": [], "data": { "n": 2 } }),
    ];
    let events: Vec<_> = events.into_iter().map(|push| json!({ "push": push })).collect();
    let text = json!({ "node": "older", "events": events });
    let sent = block_in_place(|| redis.command(&format!("PUBLISH old:events '{text}'")));
    assert_eq!(sent, ":1");
    for (client, pushes) in [(&mut blind, &[150, 5][..]), (&mut reader, &[3, 150, 5, 5])] {
        for pkg_id in pushes {
            assert_eq!(client.receive().await["pkg_id"], *pkg_id);
        }
        client.silent_for(QUIET).await;
    }
}
