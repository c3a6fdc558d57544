//! A cluster at work while its Redis hangs, dies or cannot be reached: with limits that fail open no
//! connection drops and no request fails, limits hold again soon after, and no lease is left behind.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde_json::json;
use tokio::{task::block_in_place, time::sleep};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::{
    cluster_leases::Nodes,
    cluster_limits::{echo, get},
    support::{
        Client, TestServer,
        redis::{Network, Proxy},
    },
};

/// A node may owe twelve messages and pays sixteen ahead: less than what a visitor sends at once.
const SETTINGS: [(&str, &str); 4] = [
    ("RATE_LIMIT_FAIL_MODE", "open"),
    ("RATE_LIMIT_PER_MINUTE", "30"),
    ("RATE_LIMIT_BURST", "0"),
    ("WS_MESSAGE_RATE_LIMIT", "600"),
];
/// Requests of a connection at once.
const TOGETHER: usize = 16;
/// From the return of Redis until limits hold again.
const RECOVERY: Duration = Duration::from_secs(5);

/// Sends as much at once as a connection may; how many are over the limit. Nothing else goes wrong.
async fn sixteen(client: &mut Client) -> usize {
    let asked = Instant::now();
    let request = || json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": {} });
    client.send_together((0..TOGETHER).map(|_| Message::text(request().to_string()))).await;
    let mut refused = 0;
    for _ in 0..TOGETHER {
        let answer = client.receive().await;
        if answer["status_code"] != 0 {
            assert_eq!(answer["data"]["code"], "rate_limit_exceeded", "{answer}");

            refused += 1;
        }
    }
    assert!(asked.elapsed() < Duration::from_secs(1), "somebody waited: {:?}", asked.elapsed());
    refused
}

/// New users one after the other, each on all nodes at once and within all limits; how many there were.
async fn visitors(nodes: &[TestServer], name: String, stop: &AtomicBool) -> usize {
    let mut visits = 0;
    while !stop.load(Relaxed) {
        let user = format!("{name}{visits}");
        let at = (0..3).map(|n| &nodes[n % nodes.len()]);
        let mut clients = join_all(at.map(|node| node.client(&user))).await;
        for _ in 0..4 {
            let refused = join_all(clients.iter_mut().map(sixteen)).await;
            assert_eq!(refused, [0; 3], "{user} is within the limit");
            let token = nodes[0].token(&user);
            for answer in join_all(nodes.iter().map(|node| get(node, &token))).await {
                assert_eq!(answer.status(), 200, "{user}");
            }
        }
        join_all(clients.into_iter().map(Client::close)).await;
        visits += 1;
    }
    visits
}

/// Stays on all nodes, and asks now and then.
async fn stay(clients: &mut [Client], stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        for client in &mut *clients {
            let answer = echo(client).await;
            assert_eq!(answer["status_code"], 0, "{answer}");
        }
        sleep(Duration::from_millis(250)).await;
    }
}

/// Waits until both limits are those of all nodes again: what is spent on one is gone on the other.
async fn until_shared(nodes: &[TestServer], since: Instant) {
    for round in 0.. {
        let user = format!("spender{round}");
        let (token, started) = (nodes[0].token(&user), Instant::now());
        let mut clients = join_all(nodes.iter().map(|node| node.client(&user))).await;
        let mut messages = 0;
        for client in &mut clients {
            let mut refused = 0;
            while refused == 0 {
                refused = sixteen(client).await;
                messages += TOGETHER - refused;
                assert!(messages < 3000, "nobody limits {user}");
            }
        }
        let mut rest = 0;
        for n in 0..36 {
            rest += u32::from(get(&nodes[n % nodes.len()], &token).await.status() == 200);
        }
        let back = started.elapsed().as_secs_f64();
        let most = ((600.0 + 10.0 * back) * 1.1, (30.0 + 0.5 * back).ceil());
        let seen = format!("{messages} messages and {rest} requests of {most:?}");
        // The round itself may take its time, where others use the machine.
        assert!(started.duration_since(since) < RECOVERY, "{seen}");
        // Of their own, nodes would let through twice as many.
        if messages as f64 <= most.0 && f64::from(rest) <= most.1 {
            assert!(messages >= 570 && rest >= 30, "{seen}");
            return;
        }
    }
}

async fn connected(nodes: &[TestServer], value: f64) {
    for node in nodes {
        node.until_metric("redis_connected", value).await;
    }
}

/// Two nodes at work, which a fault befalls. It returns as soon as Redis can be reached again.
async fn at_work(fault: impl AsyncFnOnce(&Nodes, &Proxy)) {
    let mut all = Nodes::start(0, &[]).await;
    let proxy = Proxy::to(all.redis.addr()).await;
    let url = proxy.url();
    for _ in 0..2 {
        let settings = [&SETTINGS[..], &[("REDIS_URL", &url)]].concat();
        all.nodes.push(all.node(&settings).await);
    }
    let mut inside = join_all(all.nodes.iter().map(|node| node.client("ann"))).await;
    let stop = AtomicBool::new(false);
    let visits = ["bob", "eve"].map(|name| visitors(&all.nodes, name.to_owned(), &stop));
    let outage = async {
        sleep(Duration::from_millis(300)).await;
        fault(&all, &proxy).await;
        until_shared(&all.nodes, Instant::now()).await;
        connected(&all.nodes, 1.0).await;
        stop.store(true, Relaxed);
    };
    let (visits, (), ()) = tokio::join!(join_all(visits), stay(&mut inside, &stop), outage);
    println!("{visits:?} visits");
    assert!(visits.iter().all(|visits| *visits > 5), "{visits:?} visits are no load");
    all.until_known(&[("ann", inside.len())]).await;
    join_all(inside.into_iter().map(Client::close)).await;
    all.until_known(&[("ann", 0)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pause_of_five_seconds_fails_no_request() {
    at_work(async |all, _| {
        let since = Instant::now();
        block_in_place(|| all.redis.command("CLIENT PAUSE 5000 ALL"));
        connected(&all.nodes, 0.0).await;
        sleep(Duration::from_secs(5).saturating_sub(since.elapsed())).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_stands_still_fails_no_request() {
    at_work(async |all, _| {
        block_in_place(|| all.redis.signal("-STOP"));
        connected(&all.nodes, 0.0).await;
        sleep(Duration::from_secs(2)).await;
        block_in_place(|| all.redis.signal("-CONT"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_network_that_is_cut_fails_no_request() {
    at_work(async |all, proxy| {
        for network in [Network::Cut, Network::Silent] {
            proxy.set(network);
            connected(&all.nodes, 0.0).await;
            sleep(Duration::from_secs(1)).await;
            proxy.set(Network::Open);
            connected(&all.nodes, 1.0).await;
        }
        // So short that nobody gives up the connection.
        proxy.set(Network::Silent);
        sleep(Duration::from_millis(700)).await;
        proxy.set(Network::Open);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_is_killed_fails_no_request() {
    at_work(async |all, _| {
        block_in_place(|| all.redis.kill());
        sleep(Duration::from_secs(1)).await;
        block_in_place(|| all.redis.start_again());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_is_away_for_ten_seconds_fails_no_request() {
    at_work(async |all, _| {
        block_in_place(|| all.redis.kill());
        connected(&all.nodes, 0.0).await;
        sleep(Duration::from_secs(10)).await;
        block_in_place(|| all.redis.start_again());
    })
    .await;
}
