//! Connections from the first to the last: tabs, gauges, and the drain that ends them all.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio_tungstenite::tungstenite::Error;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{GATE, Gate, SLEEPS, misbehaving},
    redis,
};

#[tokio::test]
async fn a_second_tab_does_not_replace_the_first() {
    let server = TestServer::start(&[]).await;
    let mut first = server.client("ann").await;
    let mut second = server.client("ann").await;
    server.until_metric("ws_connections_active", 2.0).await;
    for tab in [&mut first, &mut second] {
        assert_eq!(tab.call(100, json!({})).await["status_code"], 0);
    }
    // Both get pushes, and the end of one leaves the other alone.
    let mut bob = server.client("bob").await;
    bob.call(3, json!({ "name": "x" })).await;
    assert_eq!(first.receive().await["pkg_id"], 3);
    assert_eq!(second.receive().await["pkg_id"], 3);
    second.close().await;
    server.until_metric("ws_connections_active", 2.0).await;
    bob.call(3, json!({ "name": "y" })).await;
    assert_eq!(first.receive().await["data"]["name"], "y");
    assert_eq!(first.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn the_gauge_is_never_negative_and_returns_to_zero() {
    let settings = [("WS_MAX_CONNECTIONS_PER_USER", "2"), ("WS_AUTH_TIMEOUT", "300ms")];
    let server = TestServer::start(&settings).await;
    let inside = vec![server.client("ann").await, server.client("ann").await];
    for token in [server.token("ann"), "nonsense".to_owned(), "nonsense".to_owned()] {
        let mut client = Client::open(server.addr, "/web").await;
        client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
        client.until_closed().await;
        assert_eq!(server.metric("ws_connections_active").await, 2.0);
    }
    Client::open(server.addr, "/web").await.until_closed().await;
    drop(Client::open(server.addr, "/web").await);
    assert_eq!(server.metric("ws_connections_active").await, 2.0);
    for (left, client) in [1.0, 0.0].into_iter().zip(inside) {
        client.close().await;
        server.until_metric("ws_connections_active", left).await;
    }
    for (status, count) in
        [("accepted", 2.0), ("rejected_limit", 1.0), ("rejected_auth_timeout", 1.0)]
    {
        server.until_metric(&format!(r#"ws_connections_total{{status="{status}"}}"#), count).await;
    }
    server.until_metric(r#"ws_disconnections_total{code="1000"}"#, 2.0).await;
    // Refused connections were never open: they do not end.
    assert_eq!(server.metric(r#"ws_disconnections_total{code="1008"}"#).await, 0.0);
    assert_eq!(server.metric(r#"ws_disconnections_total{code="4001"}"#).await, 0.0);
}

#[tokio::test]
async fn a_drain_tells_every_client_when_to_come_back_and_spreads_them() {
    let mut server = TestServer::start(&[("DRAIN_SPREAD", "2s"), ("DRAIN_GRACE", "50ms")]).await;
    let mut clients = Vec::new();
    for i in 0..40 {
        let format = if i % 2 == 0 { "json" } else { "protobuf" };
        clients.push(server.client_with(&format!("u{i}"), &[], format).await);
    }
    server.begin_shutdown();
    let ends = join_all(clients.iter_mut().map(|client| client.until_closed())).await;
    let mut waits = Vec::new();
    for (seen, closed) in ends {
        assert_eq!(closed, Closed::Code(1001));
        assert_eq!((seen.len(), &seen[0]["type"]), (1, &json!("drain")));
        waits.push(seen[0]["reconnect_after_ms"].as_u64().unwrap());
    }
    assert!(waits.iter().all(|wait| *wait <= 2000), "{waits:?}");
    // Forty uniform draws all in one half: once in 10^11 runs.
    assert!(waits.iter().any(|wait| *wait < 1000) && waits.iter().any(|wait| *wait >= 1000));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_balancer_has_time_to_notice_before_anybody_is_refused() {
    let settings = [("DRAIN_DELAY", "1s"), ("DRAIN_GRACE", "500ms"), ("DRAIN_SPREAD", "0s")];
    let mut server = TestServer::start(&settings).await;
    let mut early = server.client("ann").await;
    let begun = Instant::now();
    server.begin_shutdown();
    while server.request(Method::GET, "/health/ready").send().await.unwrap().status() != 503 {
        assert!(begun.elapsed() < Duration::from_millis(800), "it is still ready");
    }
    // No connection is left open to break under the next request.
    let answer = server.rest(Method::GET, "/authors").send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["connection"].as_bytes()),
        (200, &b"close"[..])
    );
    let mut late = server.client("bob").await;
    assert_eq!(late.call(100, json!({})).await["status_code"], 0);
    assert_eq!(late.receive().await["type"], "drain");
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    match Client::try_open(server.addr, "/web", &[]).await {
        Err(Error::Http(refusal)) => assert_eq!(refusal.status(), 503),
        other => panic!("a refusal was expected: {:?}", other.err()),
    }
    let (seen, closed) = early.until_closed().await;
    assert_eq!((seen.len(), &seen[0]["type"], closed), (1, &json!("drain"), Closed::Code(1001)));
    assert_eq!(late.until_closed().await.1, Closed::Code(1001));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn in_a_cluster_a_connection_lasts_until_its_client_has_had_time_for_another() {
    let (url, prefix) = redis::shared();
    let drain = [("DRAIN_DELAY", "0"), ("DRAIN_SPREAD", "2s"), ("DRAIN_GRACE", "300ms")];
    let cluster = [("REDIS_URL", &*url), ("REDIS_KEY_PREFIX", &prefix)];
    for (more, overlap) in [(&[][..], false), (&cluster, true)] {
        let mut server = TestServer::start(&[&drain, more].concat()).await;
        let mut clients = Vec::new();
        for i in 0..10 {
            clients.push(server.client(&format!("u{i}")).await);
        }
        server.begin_shutdown();
        let ends = clients.iter_mut().map(async |client| {
            let told = client.receive().await["reconnect_after_ms"].as_u64().unwrap();
            let since = Instant::now();
            assert_eq!(client.until_closed().await.1, Closed::Code(1001));
            (Duration::from_millis(told), since.elapsed())
        });
        for (told, lasted) in join_all(ends).await {
            let least = Duration::from_millis(290) + if overlap { told } else { Duration::ZERO };
            assert!(
                lasted >= least && lasted < least + Duration::from_secs(1),
                "{told:?}: {lasted:?}"
            );
        }
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn requests_in_flight_are_answered_before_a_drain_closes() {
    let gate = Gate::closed();
    let settings = [("DRAIN_GRACE", "50ms"), ("DRAIN_SPREAD", "1s")];
    let mut server = TestServer::with_packages(&settings, misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    let held = client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    server.begin_shutdown();
    assert_eq!(client.receive().await["type"], "drain");
    // Past the grace, and past the second that a faulty client is given, the connection waits.
    client.silent_for(Duration::from_millis(1200)).await;
    gate.release(1);
    let (seen, closed) = client.until_closed().await;
    assert_eq!(
        (seen.len(), &seen[0]["req_id"], &seen[0]["status_code"]),
        (1, &json!(held), &json!(0))
    );
    assert_eq!(closed, Closed::Code(1001));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn requests_within_the_grace_of_a_drain_are_answered() {
    let settings = [("DRAIN_GRACE", "500ms"), ("DRAIN_SPREAD", "1s")];
    let mut server = TestServer::with_packages(&settings, misbehaving(&Gate::closed())).await;
    let mut client = server.client("ann").await;
    server.begin_shutdown();
    assert_eq!(client.receive().await["type"], "drain");
    let late = client.request(SLEEPS, json!({ "ms": 700 })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), &seen[0]["req_id"], closed), (1, &json!(late), Closed::Code(1001)));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_handler_that_never_ends_does_not_hold_up_a_shutdown() {
    let gate = Gate::closed();
    let settings =
        [("DRAIN_GRACE", "50ms"), ("DRAIN_TIMEOUT", "300ms"), ("WS_HANDLER_TIMEOUT", "60s")];
    let mut server = TestServer::with_packages(&settings, misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    let begun = Instant::now();
    server.begin_shutdown();
    let (seen, closed) = client.until_closed().await;
    assert_eq!((&seen[0]["type"], closed), (&json!("drain"), Closed::Code(1001)));
    server.stop().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn sockets_in_their_handshake_are_closed_by_a_drain() {
    let mut server = TestServer::start(&[("WS_AUTH_TIMEOUT", "60s")]).await;
    let mut waiting = join_all((0..3).map(|_| Client::open(server.addr, "/web"))).await;
    let begun = Instant::now();
    server.begin_shutdown();
    for client in &mut waiting {
        assert_eq!(client.until_closed().await.1, Closed::Code(1001));
    }
    server.stop().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_server_without_clients_stops_at_once() {
    let server = TestServer::start(&[]).await;
    let begun = Instant::now();
    server.stop().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}
