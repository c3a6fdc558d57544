//! Clients that do not read: closed with 4005, and nobody else notices.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{Client, Closed, TestServer, on_both_runtimes};

on_both_runtimes!(
    a_full_push_queue_closes_the_slow_one_and_nobody_else,
    a_client_that_reads_nothing_for_the_write_timeout_is_closed,
    a_client_that_reads_slowly_but_steadily_stays,
    a_drain_that_came_while_a_write_waited_ends_after_its_grace,
    pushes_accepted_before_a_drain_are_written_before_the_close,
    pushes_that_had_to_wait_keep_their_order,
    a_client_that_pings_and_never_reads_is_closed_and_costs_no_memory,
);

const DROPPED: &str = r#"ws_send_queue_dropped_total{reason="slow_consumer"}"#;

/// Pushes half a megabyte to everyone.
async fn push(server: &TestServer) {
    let body = json!({ "pkg_id": 150, "data": { "x": "x".repeat(500_000) } });
    let answer = server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 202);
}

async fn small_push(server: &TestServer) {
    let body = json!({ "pkg_id": 150, "data": {} });
    server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
}

/// The pushes that were on their way, and how the connection ended.
async fn read_all(client: &mut Client) -> (usize, Closed) {
    let mut pushes = 0;
    loop {
        match client.next().await {
            Ok(Message::Text(text)) => {
                assert!(text.starts_with(r#"{"pkg_id":150"#));
                pushes += 1;
            }
            Ok(other) => panic!("{other:?}"),
            Err(closed) => return (pushes, closed),
        }
    }
}

async fn a_full_push_queue_closes_the_slow_one_and_nobody_else() {
    let server = TestServer::start(&[("WS_SEND_QUEUE", "4")]).await;
    let mut slow = server.client("slow").await;
    let mut healthy = server.client("ann").await;
    let mut sent = 0;
    while server.metric(DROPPED).await == 0.0 {
        push(&server).await;
        sent += 1;
        assert!(healthy.next().await.is_ok());
        assert!(sent < 100, "the queue takes pushes without end");
    }
    assert_eq!(healthy.call(100, json!({})).await["status_code"], 0);
    let (seen, closed) = read_all(&mut slow).await;
    assert_eq!(closed, Closed::Code(4005));
    assert!(seen < sent, "{seen} of {sent}");
    server.until_metric(r#"ws_disconnections_total{code="4005"}"#, 1.0).await;
    server.until_metric("ws_connections_active", 1.0).await;
    small_push(&server).await;
    assert_eq!(healthy.receive().await["pkg_id"], 150);
}

async fn a_client_that_reads_nothing_for_the_write_timeout_is_closed() {
    let settings = [("WS_WRITE_TIMEOUT", "300ms"), ("WS_SEND_QUEUE", "1000")];
    let server = TestServer::start(&settings).await;
    let mut slow = server.client("slow").await;
    // Past what socket buffers take.
    for _ in 0..24 {
        push(&server).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(read_all(&mut slow).await.1, Closed::Code(4005));
    server.until_metric(r#"ws_disconnections_total{code="4005"}"#, 1.0).await;
    assert_eq!(server.metric(DROPPED).await, 0.0);
}

async fn a_client_that_reads_slowly_but_steadily_stays() {
    let settings = [("WS_WRITE_TIMEOUT", "500ms"), ("MAX_REQUEST_BODY_SIZE", "32MiB")];
    let server = TestServer::start(&settings).await;
    let mut steady = server.client("steady").await;
    let body = json!({ "pkg_id": 150, "data": { "x": "x".repeat(12_000_000) } });
    server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    let begun = Instant::now();
    assert!(steady.read_slowly(128 * 1024, Duration::from_millis(20)).await > 12_000_000);
    assert!(begun.elapsed() > Duration::from_secs(1), "no slower than the timeout");
    assert_eq!(steady.call(100, json!({})).await["status_code"], 0);
}

async fn a_drain_that_came_while_a_write_waited_ends_after_its_grace() {
    let settings = [("WS_SEND_QUEUE", "1000"), ("DRAIN_GRACE", "1s"), ("DRAIN_SPREAD", "1s")];
    let mut server = TestServer::start(&settings).await;
    let mut slow = server.client("slow").await;
    for _ in 0..24 {
        push(&server).await;
    }
    server.begin_shutdown();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    let (seen, closed) = slow.until_closed().await;
    assert_eq!(closed, Closed::Code(1001));
    assert_eq!(seen.iter().filter(|frame| frame["type"] == "drain").count(), 1);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    server.stop().await.unwrap();
}

async fn pushes_accepted_before_a_drain_are_written_before_the_close() {
    let settings = [("WS_SEND_QUEUE", "1000"), ("DRAIN_GRACE", "50ms"), ("DRAIN_SPREAD", "1s")];
    let mut server = TestServer::start(&settings).await;
    let mut slow = server.client("slow").await;
    for _ in 0..24 {
        push(&server).await;
    }
    server.begin_shutdown();
    // The grace ends while a write waits and more pushes wait behind it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (seen, closed) = slow.until_closed().await;
    assert_eq!(closed, Closed::Code(1001));
    let pushes = seen.iter().filter(|frame| frame["pkg_id"] == 150).count();
    assert_eq!((seen.len(), pushes), (25, 24));
    server.stop().await.unwrap();
}

async fn pushes_that_had_to_wait_keep_their_order() {
    let server = TestServer::start(&[("WS_SEND_QUEUE", "1000")]).await;
    let mut slow = server.client("slow").await;
    for n in 0..40 {
        // The first ones fill the socket, so that the others queue up.
        let fill = if n < 24 { 500_000 } else { 1 };
        let body = json!({ "pkg_id": 150, "data": { "n": n, "x": "x".repeat(fill) } });
        server.rest(Method::POST, "/admin/broadcast").json(&body).send().await.unwrap();
    }
    for n in 0..40 {
        assert_eq!(slow.receive().await["data"]["n"], n);
    }
}

async fn a_client_that_pings_and_never_reads_is_closed_and_costs_no_memory() {
    // Far below the budget of control frames, which would close it first.
    let settings = [("WS_WRITE_TIMEOUT", "300ms"), ("WS_MESSAGE_RATE_LIMIT", "1000000000")];
    let server = TestServer::start(&settings).await;
    let mut flood = server.client("flood").await;
    let payload = vec![0; 125];
    // Ends when the server has stopped reading and both socket buffers are full.
    let pings = async {
        loop {
            let ping = Message::Ping(payload.clone().into());
            if futures_util::SinkExt::send(flood.socket(), ping).await.is_err() {
                return;
            }
        }
    };
    drop(tokio::time::timeout(Duration::from_secs(5), pings).await);
    server.until_metric(r#"ws_disconnections_total{code="4005"}"#, 1.0).await;
}
