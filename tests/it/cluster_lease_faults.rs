//! Leases while Redis is away, loses all or cannot be reached: no connection drops, limits hold again soon
//! after, and nothing is left of connections that have ended meanwhile.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::{
    backchannel::is_open,
    cluster_leases::{CLOSED, Nodes, attempt, five, is_one_too_many, until_let_in},
    support::{
        Client, Closed, TestServer,
        process::{Process, token},
        redis::{Network, Proxy},
    },
};

/// From the return of Redis until limits hold again.
const RECOVERY: Duration = Duration::from_secs(5);

async fn connected(nodes: &[TestServer], value: f64) {
    for node in nodes {
        node.until_metric("redis_connected", value).await;
    }
}

/// What ended meanwhile has no lease, what is open has, and a sixth is refused on every node.
async fn all_is_well_again(all: &Nodes, mut inside: Vec<Client>, since: Instant) {
    connected(&all.nodes, 1.0).await;
    for node in &all.nodes {
        // Nobody asks Redis before the circuit breaker lets them.
        loop {
            match attempt(node, "ann").await {
                Ok(client) => client.close().await,
                Err((code, _)) if code == "connection_limit" => break,
                Err(_) => {}
            }
            assert!(since.elapsed() < RECOVERY, "a sixth is let in, or nobody");
        }
    }
    all.until_known(&[("ann", 5)]).await;
    assert!(since.elapsed() < RECOVERY, "{:?}", since.elapsed());
    for client in &mut inside {
        is_open(client).await;
    }
    let bob = all.nodes[0].client("bob").await;
    for client in inside.into_iter().chain([bob]) {
        client.close().await;
    }
    all.until_known(&[("ann", 0), ("bob", 0)]).await;
}

/// One ends while Redis does not hear of it, and another is let in for it.
async fn one_for_another(node: &TestServer, inside: &mut Vec<Client>) {
    inside.remove(0).close().await;
    inside.push(until_let_in(node, "ann").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_was_killed_and_lost_all_learns_the_leases_again() {
    let all = Nodes::start(3, &[]).await;
    let mut inside = five(&all.nodes, "ann").await;
    block_in_place(|| all.redis.kill());
    connected(&all.nodes, 0.0).await;
    one_for_another(&all.nodes[2], &mut inside).await;
    // Each node limits by itself now.
    let mut more = Vec::new();
    while let Ok(client) = attempt(&all.nodes[2], "eve").await {
        more.push(client);
    }
    assert_eq!(more.len(), 5);
    is_one_too_many(&all.nodes[2], "eve").await;
    drop(more);
    block_in_place(|| all.redis.start_again());
    all_is_well_again(&all, inside, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_was_emptied_under_its_nodes_learns_the_leases_again() {
    let all = Nodes::start(3, &[]).await;
    let inside = five(&all.nodes, "ann").await;
    assert_eq!(all.redis.command("FLUSHALL"), "+OK");
    all_is_well_again(&all, inside, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_hangs_for_five_seconds_drops_nobody_and_leaves_nothing() {
    let all = Nodes::start(3, &[]).await;
    let mut inside = five(&all.nodes, "ann").await;
    block_in_place(|| all.redis.command("CLIENT PAUSE 5000 ALL"));
    let since = Instant::now();
    one_for_another(&all.nodes[2], &mut inside).await;
    drop(all.nodes[1].client("eve").await);
    for client in &mut inside {
        is_open(client).await;
    }
    assert!(since.elapsed() < Duration::from_secs(3), "somebody waited: {:?}", since.elapsed());
    connected(&all.nodes, 0.0).await;
    tokio::time::sleep(Duration::from_secs(5).saturating_sub(since.elapsed())).await;
    all_is_well_again(&all, inside, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pause_that_is_over_before_the_connection_is_given_up_leaves_nothing_either() {
    let all = Nodes::start(3, &[]).await;
    let mut inside = five(&all.nodes, "ann").await;
    block_in_place(|| all.redis.command("CLIENT PAUSE 700 ALL"));
    one_for_another(&all.nodes[2], &mut inside).await;
    drop(all.nodes[1].client("eve").await);
    tokio::time::sleep(Duration::from_millis(700)).await;
    all_is_well_again(&all, inside, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_was_cut_off_drops_nobody_and_leaves_nothing() {
    let mut all = Nodes::start(2, &[]).await;
    let proxy = Proxy::to(all.redis.addr()).await;
    let url = proxy.url();
    all.nodes.push(all.node(&[("REDIS_URL", &url)]).await);
    for network in [Network::Cut, Network::Silent] {
        let mut inside = five(&all.nodes, "ann").await;
        proxy.set(network);
        // Taken while nobody knows yet that Redis does not hear it: what comes late must not count.
        drop(all.nodes[2].client("eve").await);
        connected(&all.nodes[2..], 0.0).await;
        inside.remove(2).close().await;
        drop(all.nodes[2].client("eve").await);
        inside.push(all.nodes[2].client("ann").await);
        proxy.set(Network::Open);
        all_is_well_again(&all, inside, Instant::now()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_seemed_dead_enters_its_leases_again_and_throws_nobody_out() {
    let mut all = Nodes::start(1, &[CLOSED]).await;
    let proxy = Proxy::to(all.redis.addr()).await;
    let url = proxy.url();
    all.nodes.push(all.node(&[("REDIS_URL", &url)]).await);
    let mut inside = Vec::new();
    for _ in 0..5 {
        inside.push(all.nodes[1].client("ann").await);
    }
    proxy.set(Network::Cut);
    is_one_too_many(&all.nodes[0], "ann").await;
    // Its places are free for the others within thirty seconds.
    let since = Instant::now();
    while attempt(&all.nodes[0], "ann").await.map(|client| inside.push(client)).is_err() {
        assert!(since.elapsed() < Duration::from_secs(30), "its leases are not freed");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    all.until_known(&[("ann", 1)]).await;
    proxy.set(Network::Open);
    connected(&all.nodes, 1.0).await;
    all.until_known(&[("ann", 6)]).await;
    for client in &mut inside {
        is_open(client).await;
    }
    is_one_too_many(&all.nodes[1], "ann").await;
    inside.pop().unwrap().close().await;
    all.until_known(&[("ann", 5)]).await;
    is_one_too_many(&all.nodes[0], "ann").await;
    drop(inside);
    all.until_known(&[("ann", 0)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_was_cut_off_learns_which_of_its_connections_were_replaced() {
    let kick = ("WS_CONNECTION_POLICY", "kick_oldest");
    let mut all = Nodes::start(1, &[kick]).await;
    let proxy = Proxy::to(all.redis.addr()).await;
    let url = proxy.url();
    all.nodes.push(all.node(&[kick, ("REDIS_URL", &url)]).await);
    let mut oldest = all.nodes[1].client("ann").await;
    proxy.set(Network::Cut);
    connected(&all.nodes[1..], 0.0).await;
    let mut inside = five(&all.nodes[..1], "ann").await;
    is_open(&mut oldest).await;
    proxy.set(Network::Open);
    assert_eq!(oldest.until_closed().await.1, Closed::Code(1008));
    for client in &mut inside {
        is_open(client).await;
    }
    all.until_known(&[("ann", 5)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn limits_that_fail_closed_refuse_who_is_new_and_keep_who_is_there() {
    let all = Nodes::start(2, &[CLOSED]).await;
    let mut inside = five(&all.nodes, "ann").await;
    block_in_place(|| all.redis.kill());
    connected(&all.nodes, 0.0).await;
    let refused = attempt(&all.nodes[0], "bob").await.err();
    assert_eq!(refused, Some(("unavailable".into(), Closed::Code(1011))));
    let seen = r#"ws_connections_total{status="rejected_limit"}"#;
    all.nodes[0].until_metric(seen, 1.0).await;
    let path = "/admin/connections";
    for (method, path) in [
        (Method::GET, path.to_owned()),
        (Method::DELETE, format!("{path}/4f1b1cf8-07bb-4a0b-9c5d-4bd6c2b4f4a1")),
    ] {
        let answer = all.nodes[0].rest(method, &path).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), answer.headers().contains_key("retry-after")),
            (503, true)
        );
    }
    // Requests may be refused by now, for a limit that nobody can look up.
    for client in &mut inside {
        client.send(&json!({ "type": "ping" })).await;
        assert_eq!(client.receive().await["type"], "pong");
    }
    block_in_place(|| all.redis.start_again());
    all_is_well_again(&all, inside, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_leases_of_a_process_that_is_killed_are_free_within_thirty_seconds() {
    let all = Nodes::start(1, &[CLOSED]).await;
    let data = TempDir::new().unwrap();
    let url = all.redis.url();
    let settings = [("REDIS_URL", &*url), ("REDIS_KEY_PREFIX", "leases")];
    let process = block_in_place(|| Process::start(data.path(), &settings));
    let token = block_in_place(|| token(data.path(), &["--user", "ann"]));
    let mut lost = Vec::new();
    for _ in 0..5 {
        let mut client = Client::open(process.addr, "/web").await;
        client.authenticate(&token).await;
        lost.push(client);
    }
    all.until_known(&[("ann", 5)]).await;
    process.signal("-KILL");
    block_in_place(|| process.end());
    let since = Instant::now();
    let mut client = loop {
        if let Ok(client) = attempt(&all.nodes[0], "ann").await {
            break client;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "they are not freed");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    is_open(&mut client).await;
    all.until_known(&[("ann", 1)]).await;
    client.close().await;
    all.until_known(&[("ann", 0)]).await;
}
