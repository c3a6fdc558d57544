//! The connections of a user over three nodes: never more than allowed, whoever asks where, and nothing is
//! left in Redis of those that have ended.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::{
    backchannel::is_open,
    cluster::Settings,
    support::{Client, Closed, TestServer, redis::Redis},
};

/// Where a busy machine, on which Redis is late once, must not let in one too many.
pub(crate) const CLOSED: (&str, &str) = ("RATE_LIMIT_FAIL_MODE", "closed");

/// Nodes on a Redis of their own, whose limit is five.
pub(crate) struct Nodes {
    pub(crate) redis: Redis,
    pub(crate) settings: Settings,
    pub(crate) nodes: Vec<TestServer>,
}

impl Nodes {
    pub(crate) async fn start(nodes: usize, more: &[(&str, &str)]) -> Self {
        let redis = Redis::start();
        let settings = Settings::new((redis.url(), "leases".into()));
        let mut all = Self { redis, settings, nodes: Vec::new() };
        for _ in 0..nodes {
            let node = all.node(more).await;
            all.nodes.push(node);
        }
        all
    }

    /// Starts one more.
    pub(crate) async fn node(&self, more: &[(&str, &str)]) -> TestServer {
        let limit = [("WS_MAX_CONNECTIONS_PER_USER", "5")];
        let settings = [&self.settings.all()[..], &limit, more].concat();
        let server = TestServer::start(&settings).await;
        server.until_metric("redis_connected", 1.0).await;
        server
    }

    fn number(&self, command: &str) -> usize {
        let said = self.redis.command(command);
        said[1..].parse().unwrap_or_else(|_| panic!("{command}: {said}"))
    }

    /// What Redis knows: the leases of each user; all connections, and their descriptions.
    fn known(&self, users: &[&str]) -> (Vec<usize>, usize, usize) {
        let count = |command: &str, name: &str| {
            self.number(&format!(r#"{command} "leases:{{connections}}:{name}""#))
        };
        let leases = |user: &&str| count("ZCARD", &format!("user:{}", subject(user)));
        (users.iter().map(leases).collect(), count("ZCARD", "all"), count("HLEN", "details"))
    }

    /// Waits until Redis knows so many connections of each user, and no others.
    pub(crate) async fn until_known(&self, users: &[(&str, usize)]) {
        let names: Vec<_> = users.iter().map(|(name, _)| *name).collect();
        let each: Vec<_> = users.iter().map(|(_, connections)| *connections).collect();
        let sum = each.iter().sum();
        let wanted = (each, sum, sum);
        let mut known = self.known(&names);
        for _ in 0..250 {
            if known == wanted {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            known = self.known(&names);
        }
        assert_eq!(known, wanted, "{users:?}");
        if sum == 0 {
            let keys = self.number("KEYS leases:{connections}:*");
            assert_eq!(keys, self.number("EXISTS leases:{connections}:nodes"), "something is left");
        }
    }
}

/// The development issuer's `sub` of a user.
pub(crate) fn subject(user: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_DNS, user.as_bytes())
}

/// Opens a connection, or says how it was refused.
pub(crate) async fn attempt(server: &TestServer, user: &str) -> Result<Client, (String, Closed)> {
    Client::attempt(server.addr, &server.token(user)).await
}

/// The same from a node that can say: on a busy machine Redis may be late once.
async fn decided(server: &TestServer, user: &str) -> Result<Client, (String, Closed)> {
    for _ in 0..100 {
        match attempt(server, user).await {
            Err((code, _)) if code == "unavailable" => {}
            decided => return decided,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the limit of {user} cannot be checked");
}

pub(crate) async fn is_one_too_many(server: &TestServer, user: &str) {
    let refused = decided(server, user).await.err().expect("a sixth was let in");
    assert_eq!(refused, ("connection_limit".into(), Closed::Code(1008)));
}

/// One connection is let in, as soon as another is taken off.
pub(crate) async fn until_let_in(server: &TestServer, user: &str) -> Client {
    for _ in 0..100 {
        if let Ok(client) = attempt(server, user).await {
            return client;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{user} is not let in");
}

/// Opens five connections over three nodes.
pub(crate) async fn five(nodes: &[TestServer], user: &str) -> Vec<Client> {
    let mut five = Vec::new();
    for i in [0, 1, 2, 0, 1] {
        five.push(until_let_in(&nodes[i % nodes.len()], user).await);
    }
    five
}

#[tokio::test(flavor = "multi_thread")]
async fn five_connections_over_three_nodes_are_let_in_and_a_sixth_is_not_wherever_it_comes() {
    let all = Nodes::start(3, &[CLOSED]).await;
    let mut inside = five(&all.nodes, "ann").await;
    for node in &all.nodes {
        is_one_too_many(node, "ann").await;
        node.until_metric(r#"ws_connections_total{status="rejected_limit"}"#, 1.0).await;
        node.until_metric(r#"rate_limit_hits_total{limit_type="websocket_connection"}"#, 1.0).await;
    }
    let other = all.nodes[2].client("bob").await;
    all.until_known(&[("ann", 5), ("bob", 1)]).await;
    inside.remove(0).close().await;
    inside.push(until_let_in(&all.nodes[2], "ann").await);
    is_one_too_many(&all.nodes[0], "ann").await;
    for client in &mut inside {
        is_open(client).await;
    }
    for client in inside.into_iter().chain([other]) {
        client.close().await;
    }
    all.until_known(&[("ann", 0), ("bob", 0)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_at_once_five_are_let_in() {
    let all = Nodes::start(3, &[CLOSED]).await;
    for round in 0..3 {
        let attempts = (0..30).map(|i| decided(&all.nodes[i % 3], "ann"));
        let inside: Vec<_> = join_all(attempts).await.into_iter().flatten().collect();
        assert_eq!(inside.len(), 5, "round {round}");
        all.until_known(&[("ann", 5)]).await;
        for client in inside {
            client.close().await;
        }
        all.until_known(&[("ann", 0)]).await;
    }
}

const KICK: (&str, &str) = ("WS_CONNECTION_POLICY", "kick_oldest");

#[tokio::test(flavor = "multi_thread")]
async fn a_sixth_connection_takes_the_place_of_the_oldest_on_whichever_node_that_is() {
    let all = Nodes::start(3, &[CLOSED, KICK]).await;
    let mut inside = five(&all.nodes, "ann").await;
    let mut other = all.nodes[0].client("bob").await;
    for i in 0..5 {
        let mut oldest = inside.remove(0);
        inside.push(until_let_in(&all.nodes[(i + 2) % 3], "ann").await);
        assert_eq!(oldest.until_closed().await.1, Closed::Code(1008), "connection {i}");
    }
    for client in inside.iter_mut().chain([&mut other]) {
        is_open(client).await;
    }
    all.until_known(&[("ann", 5), ("bob", 1)]).await;
}

/// Those of many that were let in at once and are still open when all is quiet.
async fn survivors(nodes: &[TestServer], user: &str, attempts: usize) -> Vec<Client> {
    let attempts = (0..attempts).map(|i| until_let_in(&nodes[i % nodes.len()], user));
    let clients = join_all(attempts).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut open = Vec::new();
    for mut client in clients {
        if client.try_call(100, json!({})).await.is_some() {
            open.push(client);
        }
    }
    open
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_at_once_the_newest_five_stay_where_the_oldest_go() {
    let all = Nodes::start(3, &[CLOSED, KICK]).await;
    assert_eq!(survivors(&all.nodes, "ann", 20).await.len(), 5);
    all.until_known(&[("ann", 0)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_alone_closes_the_oldest_too() {
    let limit = ("WS_MAX_CONNECTIONS_PER_USER", "5");
    let server = TestServer::start(&[KICK, limit]).await;
    let mut other = server.client("bob").await;
    let mut inside = five(std::slice::from_ref(&server), "ann").await;
    for i in 0..3 {
        let mut oldest = inside.remove(0);
        inside.push(server.client("ann").await);
        assert_eq!(oldest.until_closed().await.1, Closed::Code(1008), "connection {i}");
    }
    for client in inside.iter_mut().chain([&mut other]) {
        is_open(client).await;
    }
    server.until_metric("ws_connections_active", 6.0).await;
    drop(inside);
    assert_eq!(survivors(std::slice::from_ref(&server), "eve", 20).await.len(), 5);
    server.until_metric(r#"ws_connections_total{status="rejected_limit"}"#, 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_given_back_however_its_connection_ends() {
    let mut all = Nodes::start(2, &[("WS_MAX_STRIKES", "1"), ("WS_AUTH_TIMEOUT", "300ms")]).await;
    let node = &all.nodes[0];
    node.client("ann").await.close().await;
    drop(node.client("ann").await);
    let mut struck = node.client("ann").await;
    struck.send_frame(Message::text("nonsense")).await;
    assert_eq!(struck.until_closed().await.1, Closed::Code(1008));
    let mut revoked = node.client("ann").await;
    let answer = all.nodes[1].rest(Method::DELETE, "/admin/users/ann/connections").send().await;
    assert_eq!(answer.unwrap().status(), 204);
    assert_eq!(revoked.until_closed().await.1, Closed::Code(4004));
    // Refused before there was a lease, and while there was one.
    let mut silent = Client::open(node.addr, "/web").await;
    assert_eq!(silent.until_closed().await.1, Closed::Code(4002));
    let inside = five(&all.nodes, "ann").await;
    is_one_too_many(node, "ann").await;
    drop(inside);
    all.until_known(&[("ann", 0)]).await;

    let clients = five(&all.nodes, "ann").await;
    all.until_known(&[("ann", 5)]).await;
    for node in all.nodes.drain(..) {
        node.stop().await.unwrap();
    }
    drop(clients);
    all.until_known(&[("ann", 0)]).await;
}

/// The drain of a node is told to all of a user's connections; each is replaced on another node at once.
async fn moves(policy: (&str, &str)) {
    let drain =
        [("DRAIN_DELAY", "0s"), ("DRAIN_SPREAD", "0s"), ("DRAIN_GRACE", "2s"), CLOSED, policy];
    let mut all = Nodes::start(2, &drain).await;
    let mut old = five(&all.nodes[..1], "ann").await;
    let mut bob = all.nodes[1].client("bob").await;
    all.nodes[0].begin_shutdown();
    for client in &mut old {
        assert_eq!(client.receive().await["type"], "drain");
    }
    let mut new = Vec::new();
    for moved in join_all((0..5).map(|_| decided(&all.nodes[1], "ann"))).await {
        new.push(moved.unwrap_or_else(|refused| panic!("{refused:?}")));
    }
    is_limited(&all.nodes[1], &mut new, policy).await;
    bob.call(3, json!({ "name": "x" })).await;
    for client in &mut new {
        assert_eq!(client.receive().await["data"]["name"], "x");
    }
    // They were not ended for the new ones.
    for client in &mut old {
        let (seen, closed) = client.until_closed().await;
        assert_eq!((seen.len(), &seen[0]["data"]["name"]), (1, &json!("x")));
        assert_eq!(closed, Closed::Code(1001));
    }
    all.nodes.remove(0).stop().await.unwrap();
    all.until_known(&[("ann", 5), ("bob", 1)]).await;
}

/// A sixth is refused, or takes the place of the first.
async fn is_limited(node: &TestServer, five: &mut Vec<Client>, policy: (&str, &str)) {
    if policy.1 == "reject_new" {
        return is_one_too_many(node, "ann").await;
    }
    five.push(until_let_in(node, "ann").await);
    // The first hears of it a moment later.
    for _ in 0..100 {
        let mut left = Vec::new();
        for mut client in five.drain(..) {
            if client.try_call(100, json!({})).await.is_some() {
                left.push(client);
            }
        }
        *five = left;
        if five.len() < 6 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(five.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_a_node_that_drains_leave_their_places_to_those_that_replace_them() {
    moves(("WS_CONNECTION_POLICY", "reject_new")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_a_node_that_drains_are_not_kicked_by_those_that_replace_them() {
    moves(KICK).await;
}

async fn list(server: &TestServer, query: &str) -> Value {
    let path = format!("/admin/connections{query}");
    let answer = server.rest(Method::GET, &path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

fn ids(page: &Value) -> Vec<&str> {
    page["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap()).collect()
}

/// Opens a connection; its id.
async fn named(server: &TestServer, user: &str, format: &str) -> (Client, String) {
    let mut client = Client::open(server.addr, &format!("/web?format={format}")).await;
    let id = client.authenticate(&server.token(user)).await["connection_id"].clone();
    // Milliseconds order them.
    tokio::time::sleep(Duration::from_millis(5)).await;
    (client, id.as_str().unwrap().to_owned())
}

/// The list is the same wherever it is asked for.
async fn lists_connections(nodes: &[TestServer]) {
    let last = nodes.len() - 1;
    let (mut ann, first) = named(&nodes[0], "ann lee", "json").await;
    let (_bob, second) = named(&nodes[last], "bob", "protobuf").await;
    let (_more, third) = named(&nodes[last], "ann lee", "json").await;
    for _ in 0..3 {
        ann.call(100, json!({})).await;
    }
    ann.send(&json!({ "type": "ping" })).await;
    assert_eq!(ann.receive().await["type"], "pong");
    for node in nodes {
        let page = list(node, "").await;
        assert_eq!(ids(&page), [&*third, &*second, &*first]);
        assert_eq!((&page["meta"]["total"], &page["meta"]["has_more"]), (&json!(3), &json!(false)));
        let bob = &page["items"][1];
        assert_eq!((&bob["user"], &bob["subject"]), (&json!("bob"), &json!(subject("bob"))));
        assert_eq!((&bob["format"], &bob["messages"]), (&json!("protobuf"), &json!(0)));
        assert_eq!(bob["queues"], json!({ "replies": 0, "pushes": 0 }));
        let since: jiff::Timestamp = bob["since"].as_str().unwrap().parse().unwrap();
        assert!(since.duration_until(jiff::Timestamp::now()).as_secs() < 10, "{since}");
        assert_eq!(page["items"][0]["node"], bob["node"]);
        assert_eq!(page["items"][2]["node"] == bob["node"], last == 0);

        assert_eq!(ids(&list(node, "?user=ann%20lee").await), [&*third, &*first]);
        assert_eq!(list(node, "?user=nobody").await["meta"]["total"], 0);
        let page = list(node, "?per_page=1&page=2").await;
        assert_eq!((ids(&page), &page["meta"]["pages"]), (vec![&*second], &json!(3)));
        assert_eq!(ids(&list(node, "?per_page=2&page=9").await), [""; 0]);
    }
    let counted = async || list(&nodes[last], "?user=ann%20lee").await["items"][1]["messages"] == 3;
    for _ in 0..250 {
        if counted().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the messages are not counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_see_the_connections_of_all_nodes() {
    let all = Nodes::start(3, &[("NODE_ID", "blue")]).await;
    lists_connections(&all.nodes).await;
    let client = all.nodes[0].client("eve").await;
    let node = list(&all.nodes[1], "?user=eve").await["items"][0]["node"].clone();
    let node = node.as_str().unwrap();
    assert!(node.starts_with("blue-") && node.len() == 13, "{node}");
    client.close().await;
    // Rows are taken off at once.
    all.until_known(&[("ann lee", 0), ("bob", 0), ("eve", 0)]).await;
    assert_eq!(list(&all.nodes[1], "").await["meta"]["total"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_see_the_connections_of_a_node_alone() {
    lists_connections(&[TestServer::start(&[]).await]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_is_asked_for_in_a_wrong_way_is_refused() {
    let server = TestServer::start(&[]).await;
    for query in ["?page=0", "?per_page=101", "?page=x", "?user=%00"] {
        let path = format!("/admin/connections{query}");
        let answer = server.rest(Method::GET, &path).send().await.unwrap();
        assert_eq!(answer.status(), 422, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_no_node_has_is_not_found_on_any() {
    let all = Nodes::start(2, &[CLOSED]).await;
    let (mut client, id) = named(&all.nodes[0], "ann", "json").await;
    let end = async |id: &str| {
        let path = format!("/admin/connections/{id}");
        all.nodes[1].rest(Method::DELETE, &path).send().await.unwrap().status()
    };
    assert_eq!(end("4f1b1cf8-07bb-4a0b-9c5d-4bd6c2b4f4a1").await, 404);
    assert_eq!(end(&id).await, 204);
    assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    all.until_known(&[("ann", 0)]).await;
    assert_eq!(end(&id).await, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_waits_for_its_node_to_drain_is_ended_by_its_id_on_another() {
    let drain = [("DRAIN_SPREAD", "0s"), ("DRAIN_GRACE", "9s"), CLOSED];
    let mut all = Nodes::start(2, &drain).await;
    let (mut client, id) = named(&all.nodes[0], "ann", "json").await;
    all.nodes[0].begin_shutdown();
    assert_eq!(client.receive().await["type"], "drain");
    all.until_known(&[("ann", 0)]).await;
    let path = format!("/admin/connections/{id}");
    let answer = all.nodes[1].rest(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(answer.status(), 404, "it is not listed");
    assert_eq!(client.until_closed().await.1, Closed::Code(4004));
}
