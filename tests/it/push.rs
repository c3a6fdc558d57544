//! Messages that nobody asked for: changes of authors, and broadcasts of administrators.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use switchboard::handlers::roles;

use crate::support::{Client, TestServer, on_both_runtimes};

on_both_runtimes!(
    a_change_is_pushed_to_all_other_connections_and_not_to_its_author,
    only_users_who_may_read_authors_are_pushed_their_changes,
    a_refresh_decides_which_changes_are_pushed_from_then_on,
    what_changed_nothing_pushes_nothing,
    changes_are_not_pushed_where_it_is_switched_off,
    pushes_keep_their_order,
    a_change_over_rest_is_pushed_to_everyone,
    an_administrator_broadcasts_to_all_or_to_one_user,
    only_an_administrator_broadcasts,
    a_closed_connection_is_no_longer_pushed_to,
);

const NIL: &str = "00000000-0000-0000-0000-000000000000";

fn assert_push(frame: &Value, pkg_id: i32, data: &Value) {
    assert_eq!(frame, &json!({ "pkg_id": pkg_id, "req_id": NIL, "data": data }));
}

async fn a_change_is_pushed_to_all_other_connections_and_not_to_its_author() {
    let server = TestServer::start(&[]).await;
    let mut author = server.client("ann").await;
    // The author's second tab is another connection.
    let mut others = vec![server.client("ann").await, server.client("bob").await];
    let mut binary = server.client_with("cat", &[roles::GET_AUTHORS], "protobuf").await;
    for (pkg_id, data, pushed) in [
        (3, json!({ "name": "x" }), json!({ "id": 1, "name": "x" })),
        (4, json!({ "id": 1, "name": "y" }), json!({ "id": 1, "name": "y" })),
        (5, json!({ "id": 1 }), json!({ "id": 1 })),
    ] {
        assert_eq!(author.call(i64::from(pkg_id), data).await["status_code"], 0);
        for other in &mut others {
            assert_push(&other.receive().await, pkg_id, &pushed);
        }
        let push = binary.receive_protobuf().await;
        assert_eq!((push.pkg_id, &*push.req_id, push.status_code), (pkg_id, NIL, 0));
        assert_eq!((push.data(), push.meta), (pushed, None));
    }
    author.silent_for(Duration::from_millis(100)).await;
}

/// Creates, renames and deletes an author over WebSocket, then over REST.
async fn change(server: &TestServer, author: &mut Client, id: i32) {
    for (pkg_id, data) in [
        (3, json!({ "name": "x" })),
        (4, json!({ "id": id, "name": "y" })),
        (5, json!({ "id": id })),
    ] {
        assert_eq!(author.call(pkg_id, data).await["status_code"], 0);
    }
    let request = |method, path: &str| server.rest(method, path).json(&json!({ "name": "z" }));
    let author = format!("/authors/{}", id + 1);
    for (method, path) in
        [(Method::POST, "/authors"), (Method::PUT, &*author), (Method::DELETE, &*author)]
    {
        assert!(request(method, path).send().await.unwrap().status().is_success(), "{path}");
    }
}

async fn sees_changes(client: &mut Client) {
    for pkg_id in [3, 4, 5, 3, 4, 5] {
        assert_eq!(client.receive().await["pkg_id"], pkg_id);
    }
}

async fn only_users_who_may_read_authors_are_pushed_their_changes() {
    let server = TestServer::start(&[]).await;
    // Who may change authors may not read them yet.
    let writer = [roles::CREATE_AUTHOR, roles::UPDATE_AUTHOR, roles::DELETE_AUTHOR, roles::ADMIN];
    let mut author = server.client_with("ann", &writer, "json").await;
    let mut blind = [
        server.client_with("bob", &[], "json").await,
        server.client_with("cat", &writer, "json").await,
    ];
    let mut reader = server.client_with("eve", &[roles::GET_AUTHORS], "json").await;
    change(&server, &mut author, 1).await;
    sees_changes(&mut reader).await;
    // A broadcast is for everybody, whatever its id, and comes after what was pushed before.
    let body = json!({ "pkg_id": 3, "data": { "n": 1 } });
    let answer = server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap()["connections"], 4);
    for client in blind.iter_mut().chain([&mut reader]) {
        assert_push(&client.receive().await, 3, &json!({ "n": 1 }));
    }
    assert_eq!(server.metric("ws_send_queue_dropped_total{reason=\"slow_consumer\"}").await, 0.0);
}

async fn refresh(server: &TestServer, client: &mut Client, user: &str, roles: &[&str]) {
    let token = format!("Bearer {}", server.token_with(user, roles));
    client.send(&json!({ "type": "refresh", "token": token })).await;
    assert_eq!(client.receive().await["type"], "refresh_ok");
}

async fn a_refresh_decides_which_changes_are_pushed_from_then_on() {
    let server = TestServer::start(&[]).await;
    let mut author = server.client("ann").await;
    let mut gains = server.client_with("bob", &[], "json").await;
    let mut loses = server.client_with("cat", &[roles::GET_AUTHORS], "json").await;
    change(&server, &mut author, 1).await;
    for pkg_id in [3, 4, 5] {
        // Those over REST reach their author's connection too.
        assert_eq!(author.receive().await["pkg_id"], pkg_id);
    }
    sees_changes(&mut loses).await;
    refresh(&server, &mut gains, "bob", &[roles::GET_AUTHORS]).await;
    refresh(&server, &mut loses, "cat", &[]).await;
    change(&server, &mut author, 3).await;
    sees_changes(&mut gains).await;
    loses.silent_for(Duration::from_millis(100)).await;
}

async fn what_changed_nothing_pushes_nothing() {
    let server = TestServer::start(&[]).await;
    let mut author = server.client("ann").await;
    author.call(3, json!({ "name": "x" })).await;
    let mut other = server.client("bob").await;
    assert_eq!(author.call(3, json!({ "name": "x" })).await["data"]["code"], "conflict");
    assert_eq!(author.call(4, json!({ "id": 7, "name": "z" })).await["data"]["code"], "not_found");
    assert_eq!(author.call(5, json!({ "id": 7 })).await["data"]["code"], "not_found");
    author.call(1, json!({})).await;
    other.silent_for(Duration::from_millis(100)).await;
}

async fn changes_are_not_pushed_where_it_is_switched_off() {
    let server = TestServer::start(&[("WS_BROADCAST_CHANGES", "false")]).await;
    let (mut author, mut other) = (server.client("ann").await, server.client("bob").await);
    author.call(3, json!({ "name": "x" })).await;
    other.silent_for(Duration::from_millis(100)).await;
    // Broadcasts are not changes.
    let body = json!({ "pkg_id": 150, "data": {} });
    server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    assert_push(&other.receive().await, 150, &json!({}));
}

async fn pushes_keep_their_order() {
    let server = TestServer::start(&[]).await;
    let (mut author, mut other) = (server.client("ann").await, server.client("bob").await);
    for i in 1..=60 {
        author.request(3, json!({ "name": format!("a{i}") })).await;
    }
    let mut last = 0;
    for _ in 1..=60 {
        author.receive().await;
    }
    author.call(1, json!({})).await;
    for i in 1..=60 {
        let body = json!({ "pkg_id": 150, "data": { "n": i } });
        server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    }
    for _ in 0..60 {
        assert_eq!(other.receive().await["pkg_id"], 3);
    }
    for _ in 0..60 {
        let push = other.receive().await;
        let n = push["data"]["n"].as_i64().unwrap();
        assert_eq!(n, last + 1);
        last = n;
    }
}

async fn a_change_over_rest_is_pushed_to_everyone() {
    let server = TestServer::start(&[]).await;
    let mut clients = vec![server.client("rest").await, server.client("bob").await];
    let body = json!({ "name": "x" });
    let answer = server.rest(Method::POST, "/authors").json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 201);
    let body = json!({ "name": "y" });
    server.rest(Method::PUT, "/authors/1").json(&body).send().await.unwrap();
    server.rest(Method::DELETE, "/authors/1").send().await.unwrap();
    for client in &mut clients {
        assert_push(&client.receive().await, 3, &json!({ "id": 1, "name": "x" }));
        assert_push(&client.receive().await, 4, &json!({ "id": 1, "name": "y" }));
        assert_push(&client.receive().await, 5, &json!({ "id": 1 }));
    }
}

async fn an_administrator_broadcasts_to_all_or_to_one_user() {
    let server = TestServer::start(&[]).await;
    let mut ann = server.client("ann").await;
    let mut bobs = vec![server.client("bob").await, server.client_with("bob", &[], "json").await];
    for (body, connections) in [
        (json!({ "pkg_id": 150, "data": { "n": 1 } }), 3),
        (json!({ "pkg_id": 150, "data": { "n": 2 }, "user": "bob" }), 2),
        (json!({ "pkg_id": 150, "data": { "n": 3 }, "user": "nobody" }), 0),
    ] {
        let answer =
            server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 202);
        let reached: Value = answer.json().await.unwrap();
        assert_eq!(reached, json!({ "nodes": 1, "connections": connections }));
    }
    for bob in &mut bobs {
        assert_push(&bob.receive().await, 150, &json!({ "n": 1 }));
        assert_push(&bob.receive().await, 150, &json!({ "n": 2 }));
        bob.silent_for(Duration::from_millis(50)).await;
    }
    assert_push(&ann.receive().await, 150, &json!({ "n": 1 }));
    ann.silent_for(Duration::from_millis(50)).await;
}

async fn only_an_administrator_broadcasts() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    let body = json!({ "pkg_id": 150, "data": {} });
    let post = || server.request(Method::POST, "/admin/broadcast").json(&body);
    assert_eq!(post().send().await.unwrap().status(), 401);
    let token = server.token_with("bob", &[roles::CREATE_AUTHOR]);
    assert_eq!(post().bearer_auth(token).send().await.unwrap().status(), 403);
    client.silent_for(Duration::from_millis(50)).await;
}

async fn a_closed_connection_is_no_longer_pushed_to() {
    let server = TestServer::start(&[]).await;
    let (mut first, second) = (server.client("ann").await, server.client("ann").await);
    second.close().await;
    drop(server.client("bob").await);
    server.until_metric("ws_connections_active", 1.0).await;
    for (body, connections) in [
        (json!({ "pkg_id": 150, "data": {} }), 1),
        (json!({ "pkg_id": 150, "data": {}, "user": "ann" }), 1),
        (json!({ "pkg_id": 150, "data": {}, "user": "bob" }), 0),
    ] {
        let answer =
            server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
        assert_eq!(answer.json::<Value>().await.unwrap()["connections"], connections, "{body}");
    }
    assert_push(&first.receive().await, 150, &json!({}));
}
