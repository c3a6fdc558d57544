//! Two processes on each kind of Redis that there is: what they do together they do on all of them, and on
//! those that have a spare also after a failover.

use std::{fs, time::Duration};

use reqwest::Method;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::{
    backchannel::is_open,
    cluster::heard,
    cluster_leases::CLOSED,
    support::{
        Client, Closed,
        fleet::Fleet,
        process::Process,
        redis::{Redis, certify, cluster, sentinel},
    },
};

const LIMITS: [(&str, &str); 4] = [
    ("REDIS_KEY_PREFIX", "kinds"),
    ("WS_MAX_CONNECTIONS_PER_USER", "2"),
    ("RATE_LIMIT_PER_MINUTE", "100"),
    CLOSED,
];

async fn two(url: &str, more: &[(&str, &str)]) -> Fleet {
    let fleet = Fleet::start(2, &[&LIMITS, more, &[("REDIS_URL", url)]].concat()).await;
    know_each_other(&fleet).await;
    fleet
}

/// Waits until each node knows that they are two.
async fn know_each_other(fleet: &Fleet) {
    for node in [0, 1] {
        let mut said = Value::Null;
        for _ in 0..100 {
            said = fleet.broadcast(node, 7).await;
            if said["nodes"] == 2 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(said["nodes"], 2, "node {node}");
    }
}

/// A user's two connections, one on each node; a third is refused on both.
async fn pair(fleet: &Fleet, user: &str) -> [Client; 2] {
    let pair = [fleet.until_let_in(0, user).await, fleet.until_let_in(1, user).await];
    for node in [0, 1] {
        fleet.is_one_too_many(node, user).await;
    }
    pair
}

async fn are_one_server(fleet: &Fleet, user: &str) {
    let [mut ann, mut bob] = pair(fleet, user).await;
    for node in [0, 1] {
        let said = fleet.broadcast(node, node as u64).await;
        assert_eq!(said["nodes"], 2, "{said}");
        assert_eq!((heard(&mut ann).await, heard(&mut bob).await), (node as u64, node as u64));
    }
    let mut left = 100;
    for n in 0..10 {
        let answer = fleet.answer(n % 2, Method::GET, "/authors", (user, None)).await;
        assert_eq!(answer.status(), 200);
        left = answer.headers()["x-ratelimit-remaining"].to_str().unwrap().parse().unwrap();
    }
    // Counted by each, they would be 95.
    assert!((90..94).contains(&left), "{left}");
    let listed = [fleet.listed(0, Some(user)).await, fleet.listed(1, Some(user)).await];
    let ids = |listed: &[Value]| {
        listed.iter().map(|connection| connection["id"].clone()).collect::<Vec<_>>()
    };
    assert_eq!((ids(&listed[0]).len(), ids(&listed[0])), (2, ids(&listed[1])));
    assert_ne!(listed[0][0]["node"], listed[0][1]["node"]);
    // The newest comes first, and is on the other node.
    let path = format!("/admin/connections/{}", listed[0][0]["id"].as_str().unwrap());
    assert_eq!(fleet.answer(0, Method::DELETE, &path, ("rest", None)).await.status(), 204);
    assert_eq!(bob.until_closed().await.1, Closed::Code(4004));
    is_open(&mut ann).await;
}

/// They go on after a failover with what they had before.
async fn go_on(fleet: &Fleet, before: &mut [Client], (old, new): (&str, &str)) {
    // One was open the whole time, in vain.
    for node in [0, 1] {
        fleet.until_metric(node, "redis_connected", "1").await;
        // What the last master did not hand on, both nodes tell the new one.
        for _ in 0..250 {
            if fleet.listed(node, Some(old)).await.len() == 2 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        fleet.is_one_too_many(node, old).await;
    }
    know_each_other(fleet).await;
    fleet.broadcast(1, 8).await;
    for client in before {
        while heard(client).await != 8 {}
    }
    are_one_server(fleet, new).await;
}

/// The access list that the documents ask for.
fn access_list() -> String {
    let document = fs::read_to_string("docs/cluster.md").unwrap();
    let (_, rest) = document.split_once("with an access list needs `").unwrap();
    rest.split_once('`').unwrap().0.replace('\n', " ")
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_share_a_redis_behind_tls_as_a_user_who_may_do_what_is_documented() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let redis = block_in_place(|| {
        certify(folder.path());
        Redis::with(&[
            "port 0",
            "tls-port PORT",
            "tls-auth-clients no",
            &format!("tls-cert-file {}", path("cert.pem")),
            &format!("tls-key-file {}", path("key.pem")),
            "user default off",
            &format!("user ann on >hush-hush ~kinds:* &kinds:* {}", access_list()),
        ])
    });
    let url = format!("rediss://ann:hush-hush@{}", redis.addr());
    let fleet = two(&url, &[("SSL_CERT_FILE", &path("ca.pem"))]).await;
    are_one_server(&fleet, "ann").await;

    let ran = block_in_place(|| {
        let distrustful = Process::start(folder.path(), &[("REDIS_URL", &url)]);
        distrustful.signal("-TERM");
        distrustful.end()
    });
    assert!(ran.stdout.contains("InvalidCertificate"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("hush-hush"), "{}", ran.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_find_the_new_master_that_a_sentinel_names() {
    let (master, replica, sentinel) = block_in_place(|| {
        let secret = ["requirepass hush-hush", "masterauth hush-hush"];
        let diskless = "repl-diskless-sync-delay 0";
        let master = Redis::with(&[secret[0], secret[1], diskless]);
        let of = format!("replicaof 127.0.0.1 {}", master.addr().port());
        let replica = Redis::with(&[secret[0], secret[1], &of]);
        replica.until_said("AUTH hush-hush\r\nINFO replication", "master_link_status:up");
        let sentinel =
            sentinel(&master, &["sentinel auth-pass main hush-hush", "requirepass hush"]);
        sentinel.until_said("AUTH hush\r\nSENTINEL MASTER main", "num-slaves\r\n$1\r\n1");
        (master, replica, sentinel)
    });
    let url = format!(
        "redis-sentinel://:hush-hush@{}?sentinelServiceName=main&sentinelPassword=hush",
        sentinel.addr()
    );
    let fleet = two(&url, &[]).await;
    are_one_server(&fleet, "ann").await;
    let mut before = pair(&fleet, "bob").await;
    block_in_place(|| {
        master.kill();
        let new = "AUTH hush\r\nSENTINEL GET-MASTER-ADDR-BY-NAME main";
        sentinel.until_said(new, &replica.addr().port().to_string());
    });
    go_on(&fleet, &mut before, ("bob", "eve")).await;
}

/// Two nodes on a Redis Cluster: the master of all leases, its replica and another master first.
async fn on_a_cluster(prefix: &str) -> ([Redis; 4], Fleet) {
    let cluster = block_in_place(|| cluster("connections"));
    let url = format!("redis-cluster://{}?node={}", cluster[0].addr(), cluster[2].addr());
    let fleet = two(&url, &[("REDIS_KEY_PREFIX", prefix)]).await;
    (cluster, fleet)
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_share_a_redis_cluster_whose_masters_change() {
    // The channel of this prefix belongs to the same master.
    let (cluster, fleet) = on_a_cluster("kinds").await;
    let [owner, replica, ..] = &cluster;
    are_one_server(&fleet, "ann").await;
    let mut before = pair(&fleet, "bob").await;
    block_in_place(|| {
        assert_eq!(replica.command("CLUSTER FAILOVER"), "+OK");
        replica.until_said("INFO replication", "role:master");
        owner.until_said("INFO replication", "master_link_status:up");
    });
    go_on(&fleet, &mut before, ("bob", "eve")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_go_on_with_the_replica_of_a_master_of_a_redis_cluster_that_is_killed() {
    let (cluster, fleet) = on_a_cluster("kinds").await;
    let [owner, replica, another, _] = &cluster;
    let mut before = pair(&fleet, "bob").await;
    block_in_place(|| {
        owner.kill();
        replica.until_said("INFO replication", "role:master");
        another.until_said("CLUSTER INFO", "cluster_state:ok");
    });
    go_on(&fleet, &mut before, ("bob", "eve")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_give_up_a_master_of_a_redis_cluster_that_is_silent() {
    // The channel of this prefix belongs to another master, which goes on answering.
    let (cluster, fleet) = on_a_cluster("other").await;
    let [owner, replica, another, _] = &cluster;
    let mut before = pair(&fleet, "bob").await;
    block_in_place(|| owner.signal("-STOP"));
    assert_eq!(fleet.attempt(0, "bob").await.err().unwrap().0, "unavailable");
    // Soon nobody waits for it any more: that others answer is no sign that it does.
    let signs = || fleet.metric(0, r#"redis_operations_total{operation="nodes",status="success"}"#);
    let before_it_opens = signs().await;
    while fleet.metric(0, r#"circuit_breaker_state{service="redis"}"#).await == "0" {
        // Where others use the machine, the whole connection may be given up first.
        if fleet.metric(0, "redis_connected").await == "0" {
            break;
        }
        drop(fleet.attempt(0, "bob").await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(signs().await, before_it_opens);
    block_in_place(|| {
        replica.until_said("INFO replication", "role:master");
        another.until_said("CLUSTER INFO", "cluster_state:ok");
    });
    go_on(&fleet, &mut before, ("bob", "eve")).await;
}
