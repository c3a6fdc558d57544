//! Pings in silence, and what becomes of those who do not answer.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::json;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{GATE, Gate, misbehaving},
};

const FAST: [(&str, &str); 2] = [("WS_PING_INTERVAL", "150ms"), ("WS_PONG_TIMEOUT", "300ms")];

/// The next frame, pings included.
async fn raw(client: &mut Client) -> Message {
    timeout(Duration::from_secs(5), client.socket().next()).await.unwrap().unwrap().unwrap()
}

#[tokio::test]
async fn a_ping_goes_out_after_silence_and_a_client_that_pongs_stays() {
    let server = TestServer::start(&FAST).await;
    let mut client = server.client("ann").await;
    let begun = Instant::now();
    // Reading answers the pings.
    for _ in 0..6 {
        assert!(matches!(raw(&mut client).await, Message::Ping(_)));
    }
    assert!((850..3000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn a_client_that_does_not_pong_is_closed() {
    let server = TestServer::start(&FAST).await;
    let mut client = server.client("ann").await;
    let begun = Instant::now();
    // Nothing is read, so nothing is answered.
    server.until_metric(r#"ws_connections_active"#, 1.0).await;
    sleep(Duration::from_millis(700)).await;
    assert_eq!(client.until_closed().await.1, Closed::Code(4006));
    assert!(begun.elapsed() < Duration::from_secs(3));
    server.until_metric(r#"ws_disconnections_total{code="4006"}"#, 1.0).await;
}

#[tokio::test]
async fn no_ping_goes_to_a_client_that_talks() {
    let server = TestServer::start(&[("WS_PING_INTERVAL", "400ms")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..12 {
        client.send(&json!({ "type": "ping" })).await;
        assert!(matches!(raw(&mut client).await, Message::Text(_)));
        sleep(Duration::from_millis(60)).await;
    }
}

#[tokio::test]
async fn any_sign_of_life_will_do_for_a_pong() {
    let server = TestServer::start(&FAST).await;
    let mut client = server.client("ann").await;
    for _ in 0..10 {
        // Sends without reading: no pong ever goes out.
        client.request(100, json!({})).await;
        sleep(Duration::from_millis(100)).await;
    }
    server.until_metric("ws_connections_active", 1.0).await;
    assert_eq!(client.receive().await["status_code"], 0);
}

#[tokio::test]
async fn a_client_whose_pong_the_server_does_not_read_is_not_to_blame() {
    let gate = Gate::closed();
    let settings = [FAST.as_slice(), &[("WS_MAX_IN_FLIGHT", "1")]].concat();
    let server = TestServer::with_packages(&settings, misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    client.silent_for_data(Duration::from_millis(900)).await;
    gate.release(1);
    assert_eq!(client.receive().await["status_code"], 0);
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn a_clients_ping_is_answered_with_its_payload() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    client.send_frame(Message::Ping("payload".into())).await;
    assert_eq!(raw(&mut client).await, Message::Pong("payload".into()));
}
