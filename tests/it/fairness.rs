//! The places of a package are shared fairly among users, and its work among threads.

use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use tokio::{task::block_in_place, time::sleep};

use crate::support::{
    Client, TestServer,
    handlers::{COMPUTES, GATE, Gate, READS, misbehaving},
    on_both_runtimes,
    process::{Process, token},
};

on_both_runtimes!(
    a_user_with_many_connections_leaves_places_to_others,
    users_take_turns_and_a_user_holds_a_quarter_while_others_wait,
    a_request_is_answered_in_time_while_others_have_their_turn,
    a_read_ends_with_its_connection_and_a_change_runs_to_its_end,
    a_read_whose_connection_ended_while_it_waited_for_its_turn_is_not_begun,
);

async fn start(settings: &[(&str, &str)]) -> (TestServer, Gate) {
    let gate = Gate::closed();
    (TestServer::with_packages(settings, misbehaving(&gate)).await, gate)
}

async fn ask(client: &mut Client, pkg_id: i64, requests: usize) {
    for _ in 0..requests {
        client.request(pkg_id, json!({})).await;
    }
}

async fn a_user_with_many_connections_leaves_places_to_others() {
    let (server, gate) = start(&[("WS_HANDLER_CONCURRENCY", "8")]).await;
    let mut of_ann = Vec::new();
    for _ in 0..5 {
        let mut client = server.client("ann").await;
        ask(&mut client, GATE, 16).await;
        // The first connection alone: two requests that begin at the same time may take a place too many.
        gate.until_begun(6).await;
        of_ann.push(client);
    }
    // So that the requests of all have arrived.
    for client in &mut of_ann {
        ask(client, 100, 1).await;
        client.receive().await;
    }
    let mut bob = server.client("bob").await;
    ask(&mut bob, GATE, 2).await;
    gate.until_begun(8).await;
    assert_eq!(gate.users()[6..], ["bob", "bob"]);
    gate.release(100);
}

async fn users_take_turns_and_a_user_holds_a_quarter_while_others_wait() {
    let (server, gate) = start(&[("WS_HANDLER_CONCURRENCY", "8")]).await;
    let mut clients = Vec::new();
    for user in ["ann", "bob", "cat", "dan", "eve"] {
        let mut client = server.client(user).await;
        let wanted = if user == "ann" { 15 } else { 4 };
        ask(&mut client, GATE, wanted).await;
        let begun = match user {
            // All but the last quarter, as nobody else waits.
            "ann" => 6,
            _ => 8,
        };
        gate.until_begun(begun).await;
        clients.push(client);
    }
    // So that the requests of all have arrived.
    for client in &mut clients {
        ask(client, 100, 1).await;
        client.receive().await;
    }
    for begun in 9..=14 {
        gate.release(1);
        gate.until_begun(begun).await;
    }
    gate.release(100);
    gate.until_begun(31).await;
    let users = gate.users();
    assert_eq!(users[..8], ["ann", "ann", "ann", "ann", "ann", "ann", "bob", "bob"]);
    // The places that ann gives back go to others, until she holds a quarter.
    assert!(!users[8..12].contains(&"ann".to_owned()), "{users:?}");
    for user in ["cat", "dan", "eve"] {
        let waited = users.iter().position(|name| name == user).unwrap();
        assert!(waited < 12, "{user}: {users:?}");
    }
    assert_eq!(users.iter().filter(|name| *name == "bob").count(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_that_wait_for_places_begin_in_their_order() {
    for _ in 0..20 {
        let (server, gate) = start(&[("WS_HANDLER_CONCURRENCY", "16")]).await;
        let (mut bob, mut ann) = (server.client("bob").await, server.client("ann").await);
        ask(&mut bob, GATE, 14).await;
        // All but the last quarter.
        gate.until_begun(12).await;
        for n in 0..15 {
            ann.request(GATE, json!({ "n": n })).await;
        }
        gate.until_begun(16).await;
        ask(&mut ann, 100, 1).await;
        ann.receive().await;
        gate.release(100);
        gate.until_begun(29).await;
        let of_ann: Vec<_> =
            gate.users().into_iter().filter(|name| name.starts_with("ann")).collect();
        assert_eq!(of_ann, (0..15).map(|n| format!("ann {n}")).collect::<Vec<_>>());
    }
}

async fn a_request_is_answered_in_time_while_others_have_their_turn() {
    let settings = [("WS_HANDLER_CONCURRENCY", "1"), ("WS_HANDLER_TIMEOUT", "500ms")];
    let (server, gate) = start(&settings).await;
    let (mut ann, mut bob) = (server.client("ann").await, server.client("bob").await);
    let begun = Instant::now();
    ask(&mut ann, READS, 1).await;
    gate.until_begun(1).await;
    sleep(Duration::from_millis(100)).await;
    ask(&mut bob, READS, 1).await;
    bob.request(100, json!({})).await;
    bob.receive().await;
    ask(&mut ann, READS, 2).await;
    sleep(Duration::from_millis(300)).await;
    // Its turn comes before that of ann's third, and it may take until 900 ms.
    ask(&mut bob, READS, 1).await;
    for _ in 0..3 {
        assert_eq!(ann.receive().await["data"]["code"], "timeout");
    }
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
    gate.release(10);
}

async fn a_read_ends_with_its_connection_and_a_change_runs_to_its_end() {
    let (server, gate) = start(&[]).await;
    let (mut reader, mut writer) = (server.client("ann").await, server.client("ann").await);
    ask(&mut reader, READS, 3).await;
    ask(&mut writer, GATE, 2).await;
    gate.until_begun(5).await;
    drop((reader, writer));
    gate.until_cancelled(3).await;
    server.until_metric("ws_connections_active", 0.0).await;
    gate.release(2);
    // Their places are free again.
    let mut client = server.client("bob").await;
    ask(&mut client, READS, 1).await;
    gate.until_begun(6).await;
    gate.release(1);
    assert_eq!(client.receive().await["status_code"], 0);
    assert_eq!(gate.cancelled(), 3);
}

async fn a_read_whose_connection_ended_while_it_waited_for_its_turn_is_not_begun() {
    let (server, gate) = start(&[("WS_HANDLER_CONCURRENCY", "1")]).await;
    let (mut first, mut second) = (server.client("ann").await, server.client("bob").await);
    ask(&mut first, READS, 1).await;
    gate.until_begun(1).await;
    ask(&mut second, READS, 5).await;
    ask(&mut second, 100, 1).await;
    second.receive().await;
    drop(second);
    server.until_metric("ws_connections_active", 1.0).await;
    gate.release(1);
    assert_eq!(first.receive().await["status_code"], 0);
    ask(&mut first, READS, 1).await;
    gate.until_begun(2).await;
    assert_eq!(gate.users(), ["ann", "ann"]);
    gate.release(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_given_back_once_for_all_threads() {
    let data = TempDir::new().unwrap();
    let settings = [
        ("TOKIO_WORKER_THREADS", "4"),
        ("LOG_LEVEL", "info,switchboard::machine=debug"),
        ("WS_MAX_CONNECTIONS_PER_USER", "1000"),
    ];
    let process = block_in_place(|| Process::start(data.path(), &settings));
    let token = block_in_place(|| token(data.path(), &["--user", "ann"]));
    let mut clients = Vec::new();
    for _ in 0..120 {
        let mut client = Client::open(process.addr, "/web").await;
        client.authenticate(&token).await;
        clients.push(client);
    }
    drop(clients);
    // The registry looks every five seconds.
    sleep(Duration::from_secs(7)).await;
    process.signal("-TERM");
    let ran = block_in_place(|| process.end());
    let times = ran.stdout.matches("free memory was given back").count();
    assert_eq!(times, 1, "{}", ran.stdout.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_package_computes_on_every_thread_of_the_server() {
    let (server, _) = start(&[]).await;
    let mut clients = Vec::new();
    for _ in 0..16 {
        clients.push(server.client("ann").await);
    }
    for client in &mut clients {
        client.request(COMPUTES, json!({ "ms": 30 })).await;
    }
    let mut most = 0;
    for client in &mut clients {
        most = client.receive().await["data"].as_u64().unwrap().max(most);
    }
    assert!(most >= 3, "{most} at once on four threads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_of_a_connection_begin_in_their_order_on_many_threads() {
    let (server, _) = start(&[("WS_MESSAGE_RATE_LIMIT", "0")]).await;
    let talk = async |mut client: Client| {
        for _ in 0..20 {
            let mut sent = Vec::new();
            for _ in 0..16 {
                sent.push(client.request(100, json!({})).await.to_string());
            }
            for id in sent {
                assert_eq!(client.receive().await["req_id"], id);
            }
        }
    };
    let mut talks = Vec::new();
    for _ in 0..8 {
        talks.push(talk(server.client("ann").await));
    }
    let all = futures_util::future::join_all(talks);
    tokio::time::timeout(Duration::from_secs(30), all).await.unwrap();
}

/// Answers of a handler that computes for a millisecond, in two seconds.
fn computed(threads: usize) -> usize {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(threads).enable_all().build().unwrap();
    runtime.block_on(async {
        let (server, _) = start(&[("WS_MESSAGE_RATE_LIMIT", "0")]).await;
        let end = Instant::now() + Duration::from_secs(2);
        let ask = async |mut client: Client| {
            let mut answers = 0;
            while Instant::now() < end {
                client.call(COMPUTES, json!({ "ms": 1, "spin": true })).await;
                answers += 1;
            }
            answers
        };
        let mut asking = Vec::new();
        for _ in 0..16 {
            asking.push(ask(server.client("ann").await));
        }
        futures_util::future::join_all(asking).await.into_iter().sum()
    })
}

#[test]
#[ignore = "needs two cores for itself: .ci/long"]
fn two_threads_compute_almost_twice_as_much_as_one() {
    let mut ratios: Vec<_> = (0..5).map(|_| computed(2) as f64 / computed(1) as f64).collect();
    ratios.sort_by(f64::total_cmp);
    eprintln!("two threads / one: {ratios:.2?}");
    assert!(ratios[2] >= 1.8, "{ratios:?}");
}
