//! The message limit of a user, and the strikes of a connection.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{Gate, SLEEPS, misbehaving},
};

const HITS: &str = r#"rate_limit_hits_total{limit_type="websocket_message"}"#;

async fn echo(client: &mut Client) -> Value {
    client.call(100, json!({})).await
}

fn assert_limited(answer: &Value) {
    assert_eq!(answer["status_code"], 1, "{answer}");
    assert_eq!(answer["data"]["code"], "rate_limit_exceeded");
    let wait = answer["data"]["details"]["retry_after_ms"].as_u64().unwrap();
    // Three a minute: one comes back every twenty seconds.
    assert!((1..=20_000).contains(&wait), "{wait}");
}

#[tokio::test]
async fn the_message_limit_is_the_users_over_all_connections_and_reconnects() {
    let server = TestServer::start(&[("WS_MESSAGE_RATE_LIMIT", "3")]).await;
    let mut first = server.client("ann").await;
    let mut second = server.client_with("ann", &[], "protobuf").await;
    assert_eq!(echo(&mut first).await["status_code"], 0);
    assert_eq!(second.call_protobuf(100, "{}").await.status_code, 0);
    // Requests that no handler sees cost the same.
    assert_eq!(first.call(999, json!({})).await["data"]["code"], "unknown_pkg");
    assert_limited(&echo(&mut first).await);
    let answer = second.call_protobuf(100, "{}").await;
    assert_eq!((answer.status_code, &answer.data()["code"]), (1, &json!("rate_limit_exceeded")));
    first.close().await;
    second.close().await;
    server.until_metric("ws_connections_active", 0.0).await;
    assert_limited(&echo(&mut server.client("ann").await).await);
    server.until_metric(HITS, 3.0).await;
    assert_eq!(echo(&mut server.client("bob").await).await["status_code"], 0);
}

#[tokio::test]
async fn a_message_is_taken_again_after_the_time_that_the_refusal_named() {
    // One comes back every three seconds.
    let server = TestServer::start(&[("WS_MESSAGE_RATE_LIMIT", "20")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..20 {
        assert_eq!(echo(&mut client).await["status_code"], 0);
    }
    let refused = echo(&mut client).await;
    assert_eq!(refused["data"]["code"], "rate_limit_exceeded");
    let wait = refused["data"]["details"]["retry_after_ms"].as_u64().unwrap();
    assert!((1..=3000).contains(&wait), "{wait}");
    tokio::time::sleep(Duration::from_millis(wait)).await;
    assert_eq!(echo(&mut client).await["status_code"], 0);
    assert_eq!(echo(&mut client).await["data"]["code"], "rate_limit_exceeded");
}

#[tokio::test]
async fn pings_cost_nothing_of_the_message_limit() {
    let server = TestServer::start(&[("WS_MESSAGE_RATE_LIMIT", "2")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..10 {
        client.send(&json!({ "type": "ping" })).await;
        assert_eq!(client.receive().await, json!({ "type": "pong" }));
    }
    assert_eq!(echo(&mut client).await["status_code"], 0);
}

#[tokio::test]
async fn no_limit_is_no_limit() {
    let server = TestServer::start(&[("WS_MESSAGE_RATE_LIMIT", "0")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..200 {
        assert_eq!(echo(&mut client).await["status_code"], 0);
    }
}

#[tokio::test]
async fn bad_messages_close_only_past_the_strikes_and_every_one_is_answered() {
    let server = TestServer::with_packages(
        &[("WS_MAX_STRIKES", "4"), ("WS_MAX_IN_FLIGHT", "64")],
        misbehaving(&Gate::closed()),
    )
    .await;
    let mut client = server.client("ann").await;
    for _ in 0..3 {
        client.send_frame(Message::text("nonsense")).await;
        assert_eq!(client.receive().await["data"]["code"], "invalid_message");
        assert_eq!(echo(&mut client).await["status_code"], 0);
    }
    // A slow request and the last strike arrive together: both are answered before the close.
    let req_id = Uuid::new_v4();
    let slow = json!({ "pkg_id": SLEEPS, "req_id": req_id, "data": { "ms": 200 } });
    client.send_together([Message::text(slow.to_string()), Message::text("nonsense")]).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!(closed, Closed::Code(1008));
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert_eq!(seen[0]["data"]["code"], "invalid_message");
    assert_eq!((&seen[1]["req_id"], &seen[1]["status_code"]), (&json!(req_id), &json!(0)));
    server.until_metric(r#"ws_disconnections_total{code="1008"}"#, 1.0).await;
}

#[tokio::test]
async fn messages_over_the_limit_are_strikes_too() {
    let settings = [("WS_MAX_STRIKES", "2"), ("WS_MESSAGE_RATE_LIMIT", "3")];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    for _ in 0..5 {
        client.request(100, json!({})).await;
    }
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (5, Closed::Code(1008)));
    let limited = seen.iter().filter(|answer| answer["data"]["code"] == "rate_limit_exceeded");
    assert_eq!(limited.count(), 2);
}

#[tokio::test]
async fn answers_that_say_no_are_no_strikes() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "2")]).await;
    let mut client = server.client_with("ann", &["create-author"], "json").await;
    for _ in 0..5 {
        assert_eq!(client.call(999, json!({})).await["data"]["code"], "unknown_pkg");
        assert_eq!(client.call(1, json!({})).await["data"]["code"], "permission_denied");
        assert_eq!(client.call(3, json!({})).await["data"]["code"], "invalid_data");
    }
}

#[tokio::test]
async fn strikes_may_be_switched_off() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "0")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..50 {
        client.send_frame(Message::text("nonsense")).await;
        assert_eq!(client.receive().await["data"]["code"], "invalid_message");
    }
}

#[tokio::test]
async fn an_unknown_control_type_is_answered_with_an_error_and_is_a_strike() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "2")]).await;
    let mut client = server.client("ann").await;
    client.send(&json!({ "type": "dance" })).await;
    let error = client.receive().await;
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("invalid_message")));
    assert!(error["msg"].as_str().unwrap().contains("dance"));
    assert_eq!(echo(&mut client).await["status_code"], 0);
    client.send(&json!({ "type": "" })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), &seen[0]["type"], closed), (1, &json!("error"), Closed::Code(1008)));
}

#[tokio::test]
async fn twenty_refused_messages_close_by_default() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    for _ in 0..19 {
        client.send_frame(Message::text("nonsense")).await;
        assert_eq!(client.receive().await["data"]["code"], "invalid_message");
    }
    assert_eq!(echo(&mut client).await["status_code"], 0);
    client.send_frame(Message::text("nonsense")).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (1, Closed::Code(1008)));
}
