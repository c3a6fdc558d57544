//! Exactly one answer for every request, whatever the handler does; how many run at once, in which order.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Client, TestServer,
    handlers::{FAILS, GATE, Gate, PANICS, SLEEPS, misbehaving},
    on_both_runtimes,
};

on_both_runtimes!(
    a_handler_that_panics_is_answered_and_counted_and_the_connection_lives,
    a_failure_shows_no_internals,
    a_database_that_cannot_be_read_is_unavailable_and_the_connection_lives,
    a_handler_that_takes_too_long_is_answered_timeout,
    a_full_handler_queue_is_answered_overloaded_and_harms_no_other_handler,
    answers_may_overtake_each_other,
    with_one_in_flight_answers_keep_the_order_of_the_requests,
    with_all_in_flight_the_server_stops_reading,
    a_client_that_never_stops_sending_is_held_up_by_its_socket,
    many_requests_of_every_kind_get_one_answer_each,
    a_ping_is_answered_while_a_request_waits,
    the_gauge_of_open_requests_returns_to_zero_also_when_their_client_left,
    a_request_that_waited_too_long_for_its_turn_times_out_as_well,
    sixteen_requests_of_a_connection_run_at_once_by_default,
);

async fn start(settings: &[(&str, &str)]) -> (TestServer, Gate) {
    let gate = Gate::closed();
    (TestServer::with_packages(settings, misbehaving(&gate)).await, gate)
}

fn code(answer: &Value) -> (i64, &str) {
    (answer["status_code"].as_i64().unwrap(), answer["data"]["code"].as_str().unwrap_or("-"))
}

/// The next answers, by the ids of their requests; two for one request fail the test.
async fn answers(client: &mut Client, count: usize) -> HashMap<String, Value> {
    let mut answers = HashMap::new();
    for _ in 0..count {
        let answer = client.receive().await;
        let id = answer["req_id"].as_str().unwrap().to_owned();
        assert!(answers.insert(id, answer).is_none(), "a request was answered twice");
    }
    answers
}

async fn a_handler_that_panics_is_answered_and_counted_and_the_connection_lives() {
    let (server, _) = start(&[]).await;
    let mut client = server.client("ann").await;
    for (count, later) in [(1.0, false), (2.0, true)] {
        let answer = client.call(PANICS, json!({ "later": later })).await;
        assert_eq!(code(&answer), (1, "internal_error"));
        assert!(!answer.to_string().contains("on purpose"), "{answer}");
        let panics = r#"app_errors_total{error_type="panic",handler="PANICS"}"#;
        server.until_metric(panics, count).await;
    }
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    assert_eq!(code(&client.call(PANICS, json!({})).await), (1, "internal_error"));
    assert_eq!(server.metric(r#"actor_restarts_total{actor="handler"}"#).await, 0.0);
}

async fn a_failure_shows_no_internals() {
    let (server, _) = start(&[]).await;
    let mut client = server.client("ann").await;
    for (dependency, error) in [(false, "internal_error"), (true, "unavailable")] {
        let answer = client.call(FAILS, json!({ "dependency": dependency })).await;
        assert_eq!(code(&answer), (1, error));
        assert!(!answer.to_string().contains("secret"), "{answer}");
        let series = format!(r#"app_errors_total{{error_type="{error}",handler="FAILS"}}"#);
        server.until_metric(&series, 1.0).await;
    }
}

async fn a_database_that_cannot_be_read_is_unavailable_and_the_connection_lives() {
    let data = TempDir::new().unwrap();
    let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
    let mut client = server.client("ann").await;
    // What readers have in their caches is out of date.
    assert_eq!(client.call(3, json!({ "name": "Ann" })).await["status_code"], 0);
    for file in ["switchboard.db", "switchboard.db-wal"] {
        // Emptied in place, as by a full or failing disk.
        fs::File::create(data.path().join(file)).unwrap();
    }
    for (pkg_id, name) in [(1, "GET_AUTHORS"), (2, "GET_PAGINATED_AUTHORS")] {
        let answer = client.call(pkg_id, json!({})).await;
        assert_eq!(code(&answer), (1, "unavailable"), "{answer}");
        assert!(!answer.to_string().contains("disk"), "{answer}");
        let series = format!(r#"app_errors_total{{error_type="unavailable",handler="{name}"}}"#);
        server.until_metric(&series, 1.0).await;
    }
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn a_locked_database_is_unavailable_until_it_is_free() {
    let data = TempDir::new().unwrap();
    let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
    let mut client = server.client("ann").await;
    let options = SqliteConnectOptions::new().filename(data.path().join("switchboard.db"));
    let mut other = SqliteConnection::connect_with(&options).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let create = client.request(3, json!({ "name": "Ann" })).await;
    // Reading goes on beside it.
    assert_eq!(client.call(1, json!({})).await["data"], json!([]));
    let answer = client.receive().await;
    assert_eq!(answer["req_id"], create.to_string());
    assert_eq!(code(&answer), (1, "unavailable"), "{answer}");
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(client.call(3, json!({ "name": "Ann" })).await["status_code"], 0);
}

async fn a_handler_that_takes_too_long_is_answered_timeout() {
    let (server, gate) = start(&[("WS_HANDLER_TIMEOUT", "100ms")]).await;
    let mut client = server.client("ann").await;
    let begun = Instant::now();
    assert_eq!(code(&client.call(GATE, json!({})).await), (1, "timeout"));
    assert!((90..2000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    server.until_metric(r#"app_errors_total{error_type="timeout",handler="GATE"}"#, 1.0).await;
    // A late end of the handler brings no second answer.
    gate.release(1);
    client.silent_for(Duration::from_millis(100)).await;
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

async fn a_full_handler_queue_is_answered_overloaded_and_harms_no_other_handler() {
    let settings = [("WS_HANDLER_CONCURRENCY", "1"), ("WS_HANDLER_QUEUE", "2")];
    let (server, gate) = start(&settings).await;
    let mut client = server.client("ann").await;
    let first = client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    let second = client.request(GATE, json!({})).await;
    let third = client.request(GATE, json!({})).await;
    let overloaded = client.call(GATE, json!({})).await;
    assert_eq!(code(&overloaded), (1, "overloaded"));
    assert!(overloaded["data"]["details"]["retry_after_ms"].as_u64().unwrap() > 0);
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    assert_eq!(gate.begun(), 1, "one at once was configured");
    gate.release(4);
    let answers = answers(&mut client, 3).await;
    for id in [first, second, third] {
        assert_eq!(answers[&id.to_string()]["status_code"], 0);
    }
    assert_eq!(client.call(GATE, json!({})).await["status_code"], 0);
}

async fn answers_may_overtake_each_other() {
    let (server, gate) = start(&[]).await;
    let mut client = server.client("ann").await;
    let slow = client.request(GATE, json!({ "slow": 1 })).await;
    gate.until_begun(1).await;
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    gate.release(1);
    assert_eq!(client.receive().await["req_id"], slow.to_string());
}

async fn with_one_in_flight_answers_keep_the_order_of_the_requests() {
    let (server, _) = start(&[("WS_MAX_IN_FLIGHT", "1")]).await;
    let mut client = server.client("ann").await;
    let mut ids = Vec::new();
    for (pkg_id, data) in [
        (SLEEPS, json!({ "ms": 60 })),
        (100, json!({})),
        (SLEEPS, json!({ "ms": 20 })),
        (PANICS, json!({ "later": true })),
        (999, json!({})),
        (100, json!({})),
    ] {
        ids.push(client.request(pkg_id, data).await.to_string());
    }
    for id in ids {
        assert_eq!(client.receive().await["req_id"], id);
    }
}

async fn with_all_in_flight_the_server_stops_reading() {
    let (server, gate) = start(&[("WS_MAX_IN_FLIGHT", "2")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..3 {
        client.request(GATE, json!({})).await;
    }
    client.send(&json!({ "type": "ping" })).await;
    gate.until_begun(2).await;
    client.silent_for(Duration::from_millis(150)).await;
    assert_eq!(gate.begun(), 2);
    assert_eq!(server.metric("ws_messages_received_total").await, 2.0);
    // One end makes room for the third, and the ping behind it is still not read.
    gate.release(1);
    assert_eq!(client.receive().await["status_code"], 0);
    gate.until_begun(3).await;
    client.silent_for(Duration::from_millis(100)).await;
    gate.release(2);
    let mut kinds = Vec::new();
    for _ in 0..3 {
        kinds.push(client.receive().await["type"] == "pong");
    }
    kinds.sort_unstable();
    assert_eq!(kinds, [false, false, true]);
}

async fn a_client_that_never_stops_sending_is_held_up_by_its_socket() {
    let (server, gate) = start(&[("WS_MAX_IN_FLIGHT", "1")]).await;
    let mut client = server.client("ann").await;
    client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    let request = json!({ "pkg_id": 100, "req_id": uuid::Uuid::new_v4(), "data": { "x": "x".repeat(60_000) } });
    let frame = Message::text(request.to_string());
    let flood = async {
        loop {
            client.send_frame(frame.clone()).await;
        }
    };
    // More than any socket buffer takes: without back-pressure, the flood would never stop growing.
    tokio::time::timeout(Duration::from_millis(500), flood).await.unwrap_err();
    assert_eq!(server.metric("ws_messages_received_total").await, 1.0);
    gate.release(1);
    assert_eq!(client.receive().await["pkg_id"], GATE);
    assert_eq!(client.receive().await["status_code"], 0);
}

async fn many_requests_of_every_kind_get_one_answer_each() {
    let (server, gate) = start(&[("WS_MAX_STRIKES", "0"), ("WS_HANDLER_TIMEOUT", "300ms")]).await;
    gate.release(20);
    let mut client = server.client("ann").await;
    let mut ids = Vec::new();
    for i in 0..150_u64 {
        let (pkg_id, data) = match i % 6 {
            0 => (PANICS, json!({ "later": i % 4 == 0 })),
            1 => (FAILS, json!({})),
            2 => (SLEEPS, json!({ "ms": i % 20 })),
            3 if i < 36 => (GATE, json!({})),
            4 => (999, json!({})),
            _ => (100, json!({})),
        };
        ids.push(client.request(pkg_id, data).await.to_string());
    }
    let answers = answers(&mut client, ids.len()).await;
    assert!(ids.iter().all(|id| answers.contains_key(id)));
    client.silent_for(Duration::from_millis(50)).await;
}

async fn a_ping_is_answered_while_a_request_waits() {
    let (server, gate) = start(&[]).await;
    let mut client = server.client("ann").await;
    client.request(GATE, json!({})).await;
    client.send(&json!({ "type": "ping", "more": 1 })).await;
    assert_eq!(client.receive().await, json!({ "type": "pong" }));
    gate.release(1);
    assert_eq!(client.receive().await["status_code"], 0);
}

async fn the_gauge_of_open_requests_returns_to_zero_also_when_their_client_left() {
    let (server, gate) = start(&[]).await;
    let mut client = server.client("ann").await;
    client.request(GATE, json!({})).await;
    client.request(GATE, json!({})).await;
    server.until_metric("ws_requests_in_flight", 2.0).await;
    gate.release(2);
    answers(&mut client, 2).await;
    server.until_metric("ws_requests_in_flight", 0.0).await;
    client.request(GATE, json!({})).await;
    gate.until_begun(3).await;
    drop(client);
    server.until_metric("ws_requests_in_flight", 0.0).await;
    server.until_metric("ws_connections_active", 0.0).await;
    gate.release(1);
    assert_eq!(server.client("bob").await.call(100, json!({})).await["status_code"], 0);
}

async fn a_request_that_waited_too_long_for_its_turn_times_out_as_well() {
    let settings = [("WS_HANDLER_TIMEOUT", "200ms"), ("WS_HANDLER_CONCURRENCY", "1")];
    let (server, gate) = start(&settings).await;
    let mut client = server.client("ann").await;
    let begun = Instant::now();
    for _ in 0..5 {
        client.request(GATE, json!({})).await;
    }
    for answer in answers(&mut client, 5).await.values() {
        assert_eq!(code(answer), (1, "timeout"));
    }
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
    // The first has begun, and goes on to its end.
    gate.release(2);
    assert_eq!(client.call(GATE, json!({})).await["status_code"], 0);
}

async fn sixteen_requests_of_a_connection_run_at_once_by_default() {
    let (server, gate) = start(&[]).await;
    let (mut client, mut other) = (server.client("ann").await, server.client("ann").await);
    for _ in 0..17 {
        client.request(GATE, json!({})).await;
    }
    gate.until_begun(16).await;
    client.silent_for(Duration::from_millis(100)).await;
    assert_eq!(gate.begun(), 16);
    // What one connection waits for holds up no other.
    assert_eq!(other.call(100, json!({})).await["status_code"], 0);
    gate.release(17);
    answers(&mut client, 17).await;
}
