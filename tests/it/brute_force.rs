//! Who fails to authenticate too often is refused unseen, by address, over WebSocket and REST alike.

use reqwest::{Method, Response};
use serde_json::json;
use tokio_tungstenite::tungstenite::Error;

use crate::support::{Client, Closed, TestServer, rest::refused};

const LIMIT: &[(&str, &str)] =
    &[("AUTH_FAILURES_PER_MINUTE", "3"), ("TRUSTED_PROXIES", "127.0.0.1")];
const FROM: &str = "x-forwarded-for";

async fn get(server: &TestServer, from: &str, token: &str) -> Response {
    let request = server.request(Method::GET, "/authors").header(FROM, from);
    request.bearer_auth(token).send().await.unwrap()
}

/// The status of an upgrade.
async fn upgrade(server: &TestServer, headers: &[(&'static str, &str)]) -> u16 {
    match Client::try_open(server.addr, "/web", headers).await {
        Ok(_) => 101,
        Err(Error::Http(answer)) => {
            let status = answer.status().as_u16();
            assert_eq!(answer.headers().contains_key("retry-after"), status == 429);
            status
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn rest_refuses_an_address_that_failed_too_often_and_no_other() {
    let server = TestServer::start(LIMIT).await;
    let good = server.token("ann");
    for _ in 0..3 {
        refused(get(&server, "203.0.113.1", "garbage").await, 401, "unauthorized").await;
    }
    for token in ["garbage", &*good] {
        let answer = get(&server, "203.0.113.1", token).await;
        let wait = answer.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap();
        assert!((1..=20).contains(&wait), "{wait}");
        let details = refused(answer, 429, "rate_limit_exceeded").await;
        assert!(details["retry_after_ms"].as_u64().is_some_and(|ms| ms <= 20_000), "{details}");
    }
    assert_eq!(get(&server, "203.0.113.2", &good).await.status(), 200);
    // Without a token there is nothing to refuse.
    let bare = server.request(Method::GET, "/authors").header(FROM, "203.0.113.1");
    refused(bare.send().await.unwrap(), 401, "unauthorized").await;
    assert_eq!(server.metric("rate_limit_hits_total{limit_type=\"http\"}").await, 2.0);
    assert_eq!(server.metric("auth_attempts_total{status=\"failed\"}").await, 3.0);
    assert_eq!(server.metric("token_validation_total{status=\"invalid\"}").await, 3.0);
}

#[tokio::test]
async fn an_upgrade_is_refused_however_the_token_failed() {
    let server = TestServer::start(LIMIT).await;
    let good = format!("Bearer {}", server.token("ann"));
    let mut early = Client::try_open(server.addr, "/web", &[(FROM, "203.0.113.1")]).await.unwrap();
    // By the first message, in the header, and over REST.
    let mut client = Client::try_open(server.addr, "/web", &[(FROM, "203.0.113.1")]).await.unwrap();
    client.send(&json!({ "type": "auth", "token": "Bearer garbage" })).await;
    assert_eq!(client.until_closed().await.1, Closed::Code(4001));
    let bad = [(FROM, "203.0.113.1"), ("authorization", "Bearer garbage")];
    assert_eq!(upgrade(&server, &bad).await, 401);
    assert_eq!(get(&server, "203.0.113.1", "garbage").await.status(), 401);

    assert_eq!(upgrade(&server, &bad).await, 429);
    // Its token may be one that was good before: see `strangers`.
    assert_eq!(upgrade(&server, &[(FROM, "203.0.113.1")]).await, 101);
    assert_eq!(upgrade(&server, &[(FROM, "203.0.113.1"), ("authorization", &good)]).await, 429);
    assert_eq!(get(&server, "203.0.113.1", "garbage").await.status(), 429);
    assert_eq!(upgrade(&server, &[(FROM, "203.0.113.2"), ("authorization", &good)]).await, 101);
    // Opened before: its token is not looked at either, unless it was good before.
    let fresh = format!("Bearer {}", server.token("bob"));
    early.send(&json!({ "type": "auth", "token": fresh })).await;
    assert_eq!(early.until_closed().await.1, Closed::Code(1008));
    let hits = "rate_limit_hits_total{limit_type=\"websocket_connection\"}";
    assert_eq!(server.metric(hits).await, 3.0);
    assert_eq!(server.metric("ws_connections_total{status=\"rejected_limit\"}").await, 3.0);
}

#[tokio::test]
async fn what_is_no_guess_does_not_count() {
    let server = TestServer::start(LIMIT).await;
    let (good, expired) = (server.token("ann"), server.expired_token("ann"));
    for _ in 0..5 {
        refused(get(&server, "203.0.113.1", &expired).await, 401, "token_expired").await;
        let bare = server.request(Method::GET, "/authors").header(FROM, "203.0.113.1");
        assert_eq!(bare.send().await.unwrap().status(), 401);
        assert_eq!(get(&server, "203.0.113.1", &good).await.status(), 200);
        let mut client =
            Client::try_open(server.addr, "/web", &[(FROM, "203.0.113.1")]).await.unwrap();
        client.send(&json!({ "type": "auth", "token": format!("Bearer {expired}") })).await;
        assert_eq!(client.until_closed().await.1, Closed::Code(4001));
    }
}

#[tokio::test]
async fn the_address_of_a_proxy_that_is_not_trusted_is_the_clients() {
    let server = TestServer::start(&[("AUTH_FAILURES_PER_MINUTE", "3")]).await;
    for i in 0..5 {
        let from = format!("203.0.113.{i}");
        let wanted = if i < 3 { 401 } else { 429 };
        assert_eq!(get(&server, &from, "garbage").await.status(), wanted);
    }
}

#[tokio::test]
async fn the_whole_budget_can_be_spent_at_once() {
    let server = TestServer::start(&[("AUTH_FAILURES_PER_MINUTE", "30")]).await;
    let mut refused = 0;
    for _ in 0..40 {
        refused += u32::from(get(&server, "203.0.113.1", "garbage").await.status() == 429);
    }
    // One more every two seconds, on a slow machine.
    assert!((5..=10).contains(&refused), "{refused}");
}

#[tokio::test]
async fn what_a_client_wrote_does_not_hide_what_its_proxy_added_to_the_same_line() {
    let settings = [("TRUSTED_PROXIES", "127.0.0.1"), ("AUTH_FAILURES_PER_MINUTE", "1")];
    let server = TestServer::start(&settings).await;
    let mut statuses = Vec::new();
    for i in 0..2 {
        let added = reqwest::header::HeaderValue::from_bytes(b"\xff, 203.0.113.1").unwrap();
        let request = server.request(Method::GET, "/authors").bearer_auth("garbage");
        let request = request.header(FROM, format!("9.9.9.{i}")).header(FROM, added);
        statuses.push(request.send().await.unwrap().status().as_u16());
    }
    assert_eq!(statuses, [401, 429]);
}
