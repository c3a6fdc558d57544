//! Users are known by `sub`. Some providers let users choose their names, also one that is another user's
//! name or `sub`: what is meant for one never reaches the other.

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tokio::task::block_in_place;

use crate::{
    backchannel::is_open,
    cluster::{Settings, heard},
    support::{
        Client, Closed, TestServer,
        redis::{Redis, shared},
        rest::refused,
    },
};

const QUIET: Duration = Duration::from_millis(150);

/// A connection of a user.
async fn user(server: &TestServer, sub: &str, name: &str) -> Client {
    let mut client = Client::open(server.addr, "/web").await;
    let claims = json!({
        "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": sub,
        "preferred_username": name, "exp": jiff::Timestamp::now().as_second() + 600,
        "resource_access": { "switchboard": { "roles": roles::ALL } },
    });
    client.authenticate(&server.issuer.sign(&claims)).await;
    client
}

async fn push(server: &TestServer, n: u32, to: Value) -> Response {
    let mut body = json!({ "pkg_id": 150, "data": { "n": n } });
    body.as_object_mut().unwrap().extend(to.as_object().unwrap().clone());
    server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap()
}

/// How many connections a push reaches.
async fn reached(server: &TestServer, n: u32, to: Value) -> Value {
    let answer = push(server, n, to).await;
    assert_eq!(answer.status(), 202);
    answer.json::<Value>().await.unwrap()["connections"].clone()
}

async fn disconnect(server: &TestServer, user: &str) -> Response {
    let path = format!("/admin/users/{user}");
    server.rest(Method::DELETE, &path).send().await.unwrap()
}

async fn list(server: &TestServer, query: &str) -> Response {
    let path = format!("/admin/connections?user={query}");
    server.rest(Method::GET, &path).send().await.unwrap()
}

/// The `sub` of each connection that is listed.
async fn listed(server: &TestServer, query: &str) -> Vec<String> {
    let page: Value = list(server, query).await.json().await.unwrap();
    let items = page["items"].as_array().unwrap().iter();
    items.map(|item| item["subject"].as_str().unwrap().to_owned()).collect()
}

/// Every door refuses a text that may mean two users, and says which.
async fn is_ambiguous(server: &TestServer, text: &str, subjects: [&str; 2]) {
    for answer in [
        push(server, 0, json!({ "user": text })).await,
        disconnect(server, &format!("{text}/connections")).await,
        list(server, text).await,
    ] {
        let details = refused(answer, 409, "conflict").await;
        assert_eq!(details["subjects"], json!(subjects), "{text}");
    }
}

/// Ann, and two who chose her name and her `sub` for theirs. All is asked of one node, they are on another.
async fn are_told_apart(asked: &TestServer, node: &TestServer) {
    let mut ann = user(node, "s-ann", "ann").await;
    let mut same_name = user(node, "s-bob", "ann").await;
    let mut name_is_sub = user(node, "s-eve", "s-ann").await;
    is_ambiguous(asked, "ann", ["s-ann", "s-bob"]).await;
    is_ambiguous(asked, "s-ann", ["s-ann", "s-eve"]).await;
    for (n, to) in [
        (1, json!({ "user": "s-ann", "by": "sub" })),
        (2, json!({ "user": "s-bob" })),
        (3, json!({ "user": "s-eve" })),
    ] {
        assert_eq!(reached(asked, n, to).await, 1);
    }
    for (n, client) in [(1, &mut ann), (2, &mut same_name), (3, &mut name_is_sub)] {
        assert_eq!(heard(client).await, n);
        client.silent_for(QUIET).await;
    }
    assert_eq!(listed(asked, "s-ann&by=sub").await, ["s-ann"]);
    assert_eq!(listed(asked, "s-bob").await, ["s-bob"]);
    assert_eq!(disconnect(asked, "s-ann/connections?by=sub").await.status(), 204);
    assert_eq!(ann.until_closed().await.1, Closed::Code(4004));
    is_open(&mut same_name).await;
    is_open(&mut name_is_sub).await;
}

#[tokio::test]
async fn who_takes_anothers_name_or_sub_for_a_name_is_not_taken_for_the_other() {
    let server = TestServer::start(&[]).await;
    are_told_apart(&server, &server).await;
}

#[tokio::test]
async fn who_takes_anothers_name_or_sub_is_not_taken_for_the_other_on_other_nodes_either() {
    let settings = Settings::new(shared());
    let (asked, node) = (settings.node().await, settings.node().await);
    are_told_apart(&asked, &node).await;
}

#[tokio::test]
async fn users_of_one_name_on_two_nodes_are_told_apart() {
    let settings = Settings::new(shared());
    let (here, there) = (settings.node().await, settings.node().await);
    let mut ann = user(&here, "s-ann", "ann").await;
    let mut other = user(&there, "s-bob", "ann").await;
    is_ambiguous(&here, "ann", ["s-ann", "s-bob"]).await;
    assert_eq!(disconnect(&here, "s-ann/connections").await.status(), 204);
    assert_eq!(ann.until_closed().await.1, Closed::Code(4004));
    is_open(&mut other).await;
}

#[tokio::test]
async fn users_of_a_node_that_drains_are_found_there_though_redis_lists_them_no_more() {
    let settings = Settings::new(shared());
    let slow = [("DRAIN_SPREAD", "0"), ("DRAIN_GRACE", "8s"), ("DRAIN_TIMEOUT", "9s")];
    let mut draining = TestServer::start(&[&settings.all()[..], &slow].concat()).await;
    draining.until_metric("redis_connected", 1.0).await;
    let asked = settings.node().await;
    let mut clients = Vec::new();
    for n in 0..3 {
        clients.push(user(&draining, &format!("s-{n}"), &format!("ann{n}")).await);
    }
    draining.begin_shutdown();
    for client in &mut clients {
        assert_eq!(client.receive().await["type"], "drain");
    }
    assert_eq!(listed(&asked, "s-0&by=sub").await, [""; 0]);
    for (client, text) in clients.iter_mut().zip(["s-0", "ann1", "s-2"]) {
        assert_eq!(reached(&asked, 1, json!({ "user": text })).await, 0);
        assert_eq!(heard(client).await, 1);
        let by = if text == "s-2" { "?by=sub" } else { "" };
        let answer = disconnect(&asked, &format!("{text}/connections{by}")).await;
        assert_eq!(answer.status(), 204);
        assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    }
}

#[tokio::test]
async fn one_user_is_found_by_sub_and_by_each_name_that_was_used() {
    let server = TestServer::start(&[]).await;
    let mut before = user(&server, "s-ann", "ann").await;
    let mut after = user(&server, "s-ann", "ann lee").await;
    let mut unnamed = user(&server, "s-bob", "").await;
    for (n, text) in [(1, "s-ann"), (2, "ann"), (3, "ann lee")] {
        assert_eq!(reached(&server, n, json!({ "user": text })).await, 2, "{text}");
        assert_eq!((heard(&mut before).await, heard(&mut after).await), (n.into(), n.into()));
    }
    assert_eq!(reached(&server, 4, json!({ "user": "s-bob" })).await, 1);
    assert_eq!(heard(&mut unnamed).await, 4);
    // A name goes with its last connection, a user with hers.
    before.close().await;
    server.until_metric("ws_connections_active", 2.0).await;
    assert_eq!(reached(&server, 5, json!({ "user": "ann" })).await, 0);
    assert_eq!(reached(&server, 6, json!({ "user": "ann lee" })).await, 1);
    for client in [after, unnamed] {
        drop(client);
    }
    for table in ["users", "names"] {
        server.until_metric(&format!("table_entries{{table=\"{table}\"}}"), 0.0).await;
    }
}

#[tokio::test]
async fn a_user_who_is_named_in_a_wrong_way_is_refused() {
    let server = TestServer::start(&[]).await;
    let long = "x".repeat(256);
    for (answer, path) in [
        (push(&server, 0, json!({ "user": long })).await, "user"),
        (push(&server, 0, json!({ "user": "" })).await, "user"),
        (push(&server, 0, json!({ "user": "ann", "by": "name" })).await, "by"),
        (disconnect(&server, &format!("{long}/connections")).await, "user"),
        (disconnect(&server, "ann/connections?by=name").await, "by"),
        (list(&server, &long).await, "user"),
        (list(&server, "ann&by=name").await, "by"),
    ] {
        let details = refused(answer, 422, "invalid_data").await;
        assert_eq!(details["errors"][0]["path"], path, "{details}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_from_an_older_node_is_for_the_only_user_here_who_has_it() {
    let redis = block_in_place(Redis::start);
    let node = Settings::new((redis.url(), "old".into())).node().await;
    let mut ann = user(&node, "s-ann", "ann").await;
    let mut same_name = user(&node, "s-bob", "ann").await;
    let mut cat = user(&node, "s-cat", "cat").await;
    let send = |events: Value| {
        let text = json!({ "node": "older", "events": events });
        let sent = block_in_place(|| redis.command(&format!("PUBLISH old:events '{text}'")));
        assert_eq!(sent, ":1");
    };
    let push =
        |user: &str, n: u32| json!({ "push": { "pkg_id": 150, "user": user, "data": { "n": n } } });
    let at = jiff::Timestamp::now().as_millisecond();
    let end = |user: &str| json!({ "logout": { "user": { "name": user, "at": at } }, "until": at / 1000 + 60 });
    send(json!([push("ann", 1), push("cat", 2), { "log_out": [end("ann"), end("cat")] }]));
    assert_eq!(heard(&mut cat).await, 2);
    assert_eq!(cat.until_closed().await.1, Closed::Code(4004));
    for client in [&mut ann, &mut same_name] {
        client.silent_for(QUIET).await;
        is_open(client).await;
    }
    assert_eq!(node.metric("ws_broadcast_errors_total").await, 2.0);
}
