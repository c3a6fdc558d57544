//! Three processes as one server: what happens on one reaches the clients of all, and one that dies
//! takes nobody along.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::json;
use tokio::task::block_in_place;

use crate::{
    backchannel::{is_closed, is_open, logout_token},
    cluster::heard,
    cluster_leases::{CLOSED, subject},
    support::{Client, fleet::Fleet, issuer::Issuer, redis::Redis},
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
async fn a_process_that_gets_no_time_for_a_while_loses_no_broadcast() {
    let fleet = Fleet::start(2, &[]).await;
    let mut client = fleet.client(1, "ann").await;
    let over = AtomicBool::new(false);
    let held_up = async {
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            fleet.hold_up(0, Duration::from_millis(150)).await;
        }
        over.store(true, Relaxed);
    };
    let busy = async {
        for round in 0.. {
            let some = 50 * round..50 * (round + 1);
            for n in some.clone() {
                fleet.broadcast(0, n).await;
            }
            for n in some {
                assert_eq!(heard(&mut client).await, n);
            }
            if over.load(Relaxed) {
                break;
            }
        }
    };
    tokio::join!(held_up, busy);
    fleet.until_metric(0, "ws_broadcast_errors_total", "0").await;
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
        fleet.is_one_too_many(node, "ann").await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_leaves_its_leases_to_others_within_thirty_seconds() {
    let redis = block_in_place(Redis::start);
    let (url, limit) = (redis.url(), ("WS_MAX_CONNECTIONS_PER_USER", "5"));
    let own = [("REDIS_URL", &*url), ("REDIS_KEY_PREFIX", "leases"), limit];
    let mut fleet = Fleet::start(3, &[&own[..], &[CLOSED]].concat()).await;
    let known = |command: &str, name: &str| {
        block_in_place(|| redis.command(&format!(r#"{command} "leases:{{connections}}:{name}""#)))
    };
    let user = format!("user:{}", subject("ann"));
    let mut lost = [fleet.client(0, "ann").await, fleet.client(0, "ann").await];
    let mut inside = Vec::new();
    for node in [1, 1, 2] {
        inside.push(fleet.client(node, "ann").await);
    }
    let dead = fleet.listed(1, None).await[4]["node"].clone();
    fleet.kill(0);
    let since = Instant::now();
    for client in &mut lost {
        client.until_closed().await;
    }
    fleet.is_one_too_many(1, "ann").await;
    while inside.len() < 5 && since.elapsed() < Duration::from_secs(30) {
        inside.extend(fleet.attempt(1 + inside.len() % 2, "ann").await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("the places of a node that was killed are free after {:?}", since.elapsed());
    assert_eq!(inside.len(), 5, "after {:?}", since.elapsed());
    for node in [1, 2] {
        fleet.is_one_too_many(node, "ann").await;
        let listed = fleet.listed(node, None).await;
        assert_eq!(listed.len(), 5);
        assert!(listed.iter().all(|connection| connection["node"] != dead), "{listed:?}");
    }
    for (command, name) in [("ZCARD", &*user), ("ZCARD", "all"), ("HLEN", "details")] {
        assert_eq!(known(command, name), ":5", "{name}");
    }
    for client in &mut inside {
        is_open(client).await;
    }
}
