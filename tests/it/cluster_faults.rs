//! A Redis that is away, dies, hangs or cannot be reached: every node serves its own clients meanwhile,
//! and knows what it missed when it is back.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::block_in_place;

use crate::{
    backchannel::{is_closed, is_open, is_refused, log_out, logout_token, socket},
    cluster::{Settings, broadcast, heard},
    oidc::trusting,
    support::{
        Client, Closed, TestServer,
        issuer::Issuer,
        redis::{Network, Proxy, Redis},
    },
};

/// From the return of Redis until all is as before.
const RECOVERY: Duration = Duration::from_secs(5);

async fn health(server: &TestServer) -> (u16, Value) {
    let answer = server.request(Method::GET, "/health").send().await.unwrap();
    (answer.status().as_u16(), answer.json::<Value>().await.unwrap()["redis"].clone())
}

async fn is_ready(server: &TestServer) -> bool {
    server.request(Method::GET, "/health/ready").send().await.unwrap().status() == 200
}

async fn connected(server: &TestServer, value: f64) {
    server.until_metric("redis_connected", value).await;
}

/// A node without a cluster's connection is a server as any other.
async fn serves_its_own(server: &TestServer) {
    let (mut ann, mut bob) = (server.client("ann").await, server.client("bob").await);
    let started = Instant::now();
    assert_eq!(ann.call(100, json!({ "x": 1 })).await["status_code"], 0);
    assert_eq!(broadcast(server, 5, Some("bob")).await, json!({ "nodes": 1, "connections": 1 }));
    assert_eq!(heard(&mut bob).await, 5);
    let answer = server.rest(Method::DELETE, "/admin/users/bob/connections").send().await.unwrap();
    assert_eq!(answer.status(), 204);
    bob.until_closed().await;
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    assert!(is_ready(server).await);
    ann.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_started_before_redis_serves_and_connects_later() {
    let redis = Redis::stopped();
    let settings = Settings::new((redis.url(), "early".into()));
    let servers =
        [TestServer::start(&settings.all()).await, TestServer::start(&settings.all()).await];
    for server in &servers {
        assert_eq!(server.metric("redis_connected").await, 0.0);
        assert_eq!(health(server).await, (200, json!("unhealthy")));
        serves_its_own(server).await;
    }
    let mut client = servers[1].client("ann").await;
    block_in_place(|| redis.start_again());
    for server in &servers {
        connected(server, 1.0).await;
        assert_eq!(health(server).await, (200, json!("healthy")));
    }
    broadcast(&servers[0], 9, None).await;
    // What was queued before comes first, to those that are back in time.
    while heard(&mut client).await != 9 {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_was_killed_and_lost_all_is_told_of_logouts_again() {
    let redis = Redis::start();
    let issuer = Issuer::start().await;
    let url = redis.url();
    let settings = [("REDIS_URL", url.as_str())];
    let node = || trusting(&issuer, &settings);
    let nodes = [node().await, node().await];
    for node in &nodes {
        connected(node, 1.0).await;
    }
    let token = |sid: &str| issuer.token(json!({ "sub": "ann", "sid": sid }));
    let (before, during) = (token("s1"), token("s2"));
    let mut gone = socket(&nodes[1], &before).await;
    let mut other = socket(&nodes[1], &during).await;
    let since = log_out(&nodes[0], &logout_token(&issuer, &json!({ "sid": "s1" }))).await;
    is_closed(&mut gone, since).await;
    is_refused(&nodes[1], &before).await;

    block_in_place(|| redis.kill());
    for node in &nodes {
        connected(node, 0.0).await;
    }
    let mut here = socket(&nodes[0], &during).await;
    let since = log_out(&nodes[0], &logout_token(&issuer, &json!({ "sid": "s2" }))).await;
    is_closed(&mut here, since).await;
    is_refused(&nodes[0], &during).await;
    is_open(&mut other).await;

    block_in_place(|| redis.start_again());
    let since = Instant::now();
    is_closed(&mut other, since).await;
    for node in &nodes {
        connected(node, 1.0).await;
    }
    assert!(since.elapsed() < RECOVERY, "{:?}", since.elapsed());
    let late = node().await;
    connected(&late, 1.0).await;
    for node in nodes.iter().chain([&late]) {
        is_refused(node, &before).await;
        is_refused(node, &during).await;
    }
    assert_eq!(redis.command("ZCARD switchboard:revocations"), ":2");
    let ttl: u64 = redis.command("TTL switchboard:revocations")[1..].parse().unwrap();
    assert!((86_300..=86_401).contains(&ttl), "{ttl}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_was_cut_off_serves_its_own_and_learns_a_logout_when_it_is_back() {
    let redis = Redis::start();
    let issuer = Issuer::start().await;
    let (proxy, url) = (Proxy::to(redis.addr()).await, redis.url());
    let far = trusting(&issuer, &[("REDIS_URL", &proxy.url())]).await;
    let near = trusting(&issuer, &[("REDIS_URL", &url)]).await;
    connected(&far, 1.0).await;
    connected(&near, 1.0).await;
    for (i, network) in [Network::Cut, Network::Silent].into_iter().enumerate() {
        let (sid, other) = (format!("s{i}"), format!("t{i}"));
        let token = |sid: &str| issuer.token(json!({ "sub": "ann", "sid": sid }));
        let (there, here) = (token(&sid), token(&other));
        let mut left_behind = socket(&far, &there).await;
        let mut elsewhere = socket(&near, &here).await;
        proxy.set(network);
        connected(&far, 0.0).await;
        assert_eq!(health(&far).await, (200, json!("unhealthy")), "{network:?}");
        assert_eq!(health(&near).await, (200, json!("healthy")));
        log_out(&near, &logout_token(&issuer, &json!({ "sid": sid }))).await;
        log_out(&far, &logout_token(&issuer, &json!({ "sid": other }))).await;
        is_open(&mut left_behind).await;
        assert!(is_ready(&far).await);

        let since = Instant::now();
        proxy.set(Network::Open);
        assert_eq!(left_behind.until_closed().await.1, Closed::Code(4004));
        assert_eq!(elsewhere.until_closed().await.1, Closed::Code(4004));
        connected(&far, 1.0).await;
        assert!(since.elapsed() < RECOVERY, "{network:?}: {:?}", since.elapsed());
        is_refused(&far, &there).await;
        is_refused(&near, &here).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_was_emptied_under_its_node_is_told_of_logouts_again() {
    let redis = Redis::start();
    let issuer = Issuer::start().await;
    let url = redis.url();
    let node = trusting(&issuer, &[("REDIS_URL", &url)]).await;
    connected(&node, 1.0).await;
    let token = |sid: &str| issuer.token(json!({ "sub": "ann", "sid": sid }));
    log_out(&node, &logout_token(&issuer, &json!({ "sid": "s1" }))).await;
    for a_client_comes in [false, true] {
        block_in_place(|| redis.until_said("ZCARD switchboard:revocations", ":1"));
        block_in_place(|| redis.command("FLUSHALL"));
        let since = Instant::now();
        if a_client_comes {
            socket(&node, &token("s2")).await;
        }
        block_in_place(|| redis.until_said("ZCARD switchboard:revocations", ":1"));
        assert!(since.elapsed() < RECOVERY, "{:?}", since.elapsed());
    }
    let late = trusting(&issuer, &[("REDIS_URL", &url)]).await;
    connected(&late, 1.0).await;
    is_refused(&late, &token("s1")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_logout_reaches_all_nodes_if_the_connection_is_lost_once_it_is_kept() {
    let redis = Redis::start();
    let issuer = Issuer::start().await;
    let (proxy, url) = (Proxy::to(redis.addr()).await, redis.url());
    let far = trusting(&issuer, &[("REDIS_URL", &proxy.url())]).await;
    let near = trusting(&issuer, &[("REDIS_URL", &url)]).await;
    connected(&far, 1.0).await;
    connected(&near, 1.0).await;
    // With the first, Redis learns how to keep them.
    for (sid, network) in [("first", Network::Open), ("second", Network::CutAfter("second"))] {
        proxy.set(network);
        let token = issuer.token(json!({ "sub": "ann", "sid": sid }));
        let mut client = socket(&near, &token).await;
        let since = log_out(&far, &logout_token(&issuer, &json!({ "sid": sid }))).await;
        is_closed(&mut client, since).await;
        is_refused(&near, &token).await;
    }
    far.until_metric(r#"redis_operations_total{operation="connect",status="success"}"#, 2.0).await;
    connected(&far, 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_was_cut_off_learns_what_administrators_ended_meanwhile() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let node = async |url| Settings::new((url, "ended".into())).node().await;
    let (far, near) = (node(proxy.url()).await, node(redis.url()).await);
    let mut gone = Client::open(far.addr, "/web").await;
    let id = gone.authenticate(&far.token("ann")).await["connection_id"].clone();
    let mut users = [far.client("bob").await, far.client("bob").await];
    let mut kept = [far.client("ann").await, far.client("eve").await];
    proxy.set(Network::Cut);
    connected(&far, 0.0).await;
    let path = format!("/admin/connections/{}", id.as_str().unwrap());
    for path in [path, "/admin/users/bob/connections".into()] {
        let answer = near.rest(Method::DELETE, &path).send().await.unwrap();
        assert_eq!(answer.status(), 204, "{path}");
    }
    // Who comes again stays.
    let mut again = far.client("bob").await;
    is_open(&mut gone).await;
    near.stop().await.unwrap();

    let since = Instant::now();
    proxy.set(Network::Open);
    connected(&far, 1.0).await;
    for client in [&mut gone].into_iter().chain(&mut users) {
        assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    }
    assert!(since.elapsed() < RECOVERY, "{:?}", since.elapsed());
    for client in kept.iter_mut().chain([&mut again]) {
        is_open(client).await;
    }
    is_open(&mut far.client("bob").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_hangs_holds_up_nobody_and_what_waited_arrives_in_order() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "hangs".into()));
    let nodes = [settings.node().await, settings.node().await];
    let (mut here, mut there) = (nodes[0].client("ann").await, nodes[1].client("ann").await);
    assert_eq!(block_in_place(|| redis.command("CLIENT PAUSE 1000 ALL")), "+OK");
    let started = Instant::now();
    for n in 1..=20 {
        broadcast(&nodes[0], n, None).await;
        assert_eq!(heard(&mut here).await, u64::from(n));
    }
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    for n in 1..=20 {
        assert_eq!(heard(&mut there).await, n);
    }
    there.silent_for(Duration::from_millis(200)).await;
    assert_eq!(nodes[0].metric("ws_broadcast_errors_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pause_of_five_seconds_drops_no_connection_and_is_over_soon() {
    let redis = Redis::start();
    let settings = Settings::new((redis.url(), "pause".into()));
    let nodes = [settings.node().await, settings.node().await];
    let mut clients = [nodes[0].client("ann").await, nodes[1].client("ann").await];
    block_in_place(|| redis.command("CLIENT PAUSE 5000 ALL"));
    for node in &nodes {
        connected(node, 0.0).await;
        serves_its_own(node).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    for node in &nodes {
        connected(node, 1.0).await;
    }
    for client in &mut clients {
        is_open(client).await;
    }
    broadcast(&nodes[1], 3, None).await;
    for client in &mut clients {
        assert_eq!(heard(client).await, 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_happens_to_redis_nothing_arrives_twice_or_out_of_order() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let settings = Settings::new((proxy.url(), "order".into()));
    let (near, far) = (settings.node().await, settings.node().await);
    let (mut here, mut there) = (near.client("ann").await, far.client("ann").await);
    let sent = Cell::new(0);
    let faults = async {
        let mut before = 0;
        // Until the other node's client hears what is sent from now on.
        let mut caught_up = async || {
            let now = u64::from(sent.get());
            while before <= now {
                let n = heard(&mut there).await;
                assert!(n > before, "{n} after {before}");
                before = n;
            }
        };
        for network in [Network::Cut, Network::Silent] {
            caught_up().await;
            proxy.set(network);
            tokio::time::sleep(Duration::from_millis(600)).await;
            proxy.set(Network::Open);
        }
        caught_up().await;
        block_in_place(|| redis.kill());
        block_in_place(|| redis.start_again());
        block_in_place(|| redis.command("CLIENT PAUSE 400 ALL"));
        caught_up().await;
    };
    tokio::pin!(faults);
    while futures_util::poll!(&mut faults).is_pending() {
        sent.set(sent.get() + 1);
        broadcast(&near, sent.get(), None).await;
        assert_eq!(heard(&mut here).await, u64::from(sent.get()), "its own clients miss nothing");
    }
}

#[tokio::test]
async fn what_waits_while_a_node_is_briefly_cut_off_arrives_if_it_stops_meanwhile() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let node = async |url| Settings::new((url, "stops".into())).node().await;
    let (near, far) = (node(proxy.url()).await, node(redis.url()).await);
    let mut client = far.client("ann").await;
    proxy.set(Network::Cut);
    connected(&near, 0.0).await;
    for n in 1..=5 {
        broadcast(&near, n, None).await;
    }
    let back = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.set(Network::Open);
    };
    tokio::join!(near.stop(), back).0.unwrap();
    for n in 1..=5 {
        assert_eq!(heard(&mut client).await, n);
    }
}

#[tokio::test]
async fn what_waited_while_a_node_was_cut_off_arrives_whole_and_closes_nobody() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.addr()).await;
    let node = async |url| {
        let settings = Settings::new((url, "waits".into()));
        settings.node().await
    };
    let (near, far) = (node(proxy.url()).await, node(redis.url()).await);
    let mut client = far.client("ann").await;
    proxy.set(Network::Cut);
    connected(&near, 0.0).await;
    // More than the lane of a client holds.
    for n in 1..=600 {
        broadcast(&near, n, None).await;
    }
    proxy.set(Network::Open);
    for n in 1..=600 {
        assert_eq!(heard(&mut client).await, n);
    }
    client.silent_for(Duration::from_millis(100)).await;
    assert_eq!(near.metric("ws_broadcast_errors_total").await, 0.0);
}
