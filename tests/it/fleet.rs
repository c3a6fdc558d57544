//! Three processes as one server: what happens on one reaches the clients of all, and one that dies
//! takes nobody along.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use crate::{
    backchannel::{is_closed, is_open, logout_token},
    cluster::heard,
    support::{Client, Closed, fleet::Fleet, issuer::Issuer},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_on_one_process_reaches_the_clients_of_all_once() {
    let fleet = Fleet::start(3, &[]).await;
    let mut clients = Vec::new();
    for node in 0..3 {
        clients.push(fleet.client(node, "ann").await);
    }
    for n in 1..=100 {
        assert_eq!(fleet.broadcast(0, n).await["connections"], 3);
    }
    for client in &mut clients {
        for n in 1..=100 {
            assert_eq!(heard(client).await, n);
        }
        client.silent_for(Duration::from_millis(150)).await;
    }
    // Redis has answered by now, and said how many there are.
    assert_eq!(fleet.broadcast(0, 0).await, json!({ "nodes": 3, "connections": 3 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn five_connections_over_three_processes_are_let_in_and_a_sixth_is_not() {
    let limits = [("WS_MAX_CONNECTIONS_PER_USER", "5"), ("RATE_LIMIT_FAIL_MODE", "closed")];
    let fleet = Fleet::start(3, &limits).await;
    let mut inside = Vec::new();
    for i in 0..5 {
        inside.push(fleet.client(i % 3, "ann").await);
    }
    for node in 0..3 {
        let mut sixth = Client::open(fleet.addr(node), "/web").await;
        sixth
            .send(&json!({ "type": "auth", "token": format!("Bearer {}", fleet.token("ann")) }))
            .await;
        assert_eq!(sixth.receive().await["code"], "connection_limit");
        assert_eq!(sixth.until_closed().await.1, Closed::Code(1008));
    }
    for client in &mut inside {
        is_open(client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_at_one_process_closes_the_sockets_of_the_others() {
    let issuer = Issuer::start().await;
    let settings = issuer.settings();
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, &**value)).collect();
    let fleet = Fleet::start(3, &settings).await;
    let (mut closing, mut staying) = (Vec::new(), Vec::new());
    for node in 0..2 {
        for (sid, clients) in [("s1", &mut closing), ("s2", &mut staying)] {
            let mut client = Client::open(fleet.addr(node), "/web").await;
            client.authenticate(&issuer.token(json!({ "sid": sid }))).await;
            clients.push(client);
        }
    }
    let token = logout_token(&issuer, &json!({ "sid": "s1" }));
    let logout = fleet.request(2, Method::POST, "/auth/backchannel-logout");
    let form = logout.header("content-type", "application/x-www-form-urlencoded");
    let since = Instant::now();
    let answer = form.body(format!("logout_token={token}")).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    for client in &mut closing {
        is_closed(client, since).await;
    }
    for client in &mut staying {
        is_open(client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_leaves_the_others_serving_and_may_come_back() {
    let mut fleet = Fleet::start(3, &[]).await;
    let mut lost = fleet.client(0, "ann").await;
    let mut left = [fleet.client(1, "bob").await, fleet.client(2, "eve").await];
    fleet.kill(0);
    lost.until_closed().await;
    for node in [1, 2] {
        let ready = fleet.request(node, Method::GET, "/health/ready").send().await.unwrap();
        assert_eq!(ready.status(), 200);
    }
    for client in &mut left {
        is_open(client).await;
    }
    fleet.broadcast(1, 1).await;
    // Nodes know how many they are with their next sign of life.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(fleet.broadcast(2, 2).await["nodes"], 2);
    for client in &mut left {
        assert_eq!((heard(client).await, heard(client).await), (1, 2));
    }

    fleet.start_again(&[0]).await;
    let mut back = fleet.client(0, "ann").await;
    fleet.broadcast(2, 3).await;
    for client in left.iter_mut().chain([&mut back]) {
        assert_eq!(heard(client).await, 3);
    }
}
