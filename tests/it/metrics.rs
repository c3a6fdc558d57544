//! What moves a metric: requests by route, upgrades, statements, authentications, limits.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::support::{Client, Closed, TestServer, rest::add_author};

fn requests(method: &str, endpoint: &str, status: u16) -> String {
    format!(
        "http_requests_total{{endpoint=\"{endpoint}\",method=\"{method}\",status_code=\"{status}\"}}"
    )
}

#[tokio::test]
async fn requests_are_counted_by_route_and_never_by_path() {
    let server = TestServer::start(&[]).await;
    let id = add_author(&server, "Ann").await;
    for (method, path) in [
        ("GET", format!("/authors/{id}")),
        ("GET", "/authors/4711".into()),
        ("GET", "/authors/secret-path".into()),
        ("GET", "/secret-path/4711".into()),
        ("GET", "/authors/secret-path/4711".into()),
        ("PUT", "/secret-path".into()),
        ("DELETE", "/authors?q=secret-path".into()),
        ("BREW", "/secret-path".into()),
        ("HEAD", "/authors".into()),
    ] {
        server.rest(method.parse().unwrap(), &path).send().await.unwrap();
    }
    for (method, endpoint, status, count) in [
        ("POST", "/authors", 201, 1.0),
        ("GET", "/authors/{id}", 200, 1.0),
        ("GET", "/authors/{id}", 404, 1.0),
        ("GET", "/authors/{id}", 422, 1.0),
        ("GET", "unmatched", 404, 2.0),
        ("PUT", "unmatched", 404, 1.0),
        ("DELETE", "/authors", 405, 1.0),
        ("OTHER", "unmatched", 404, 1.0),
        ("HEAD", "/authors", 200, 1.0),
    ] {
        let series = requests(method, endpoint, status);
        assert_eq!(server.metric(&series).await, count, "{series}");
    }
    let durations =
        "http_request_duration_seconds_count{endpoint=\"/authors/{id}\",method=\"GET\"}";
    assert_eq!(server.metric(durations).await, 3.0);
    let text = server.metrics().await;
    assert!(!text.contains("secret-path") && !text.contains("4711") && !text.contains("BREW"));
}

#[tokio::test]
async fn an_upgrade_counts_as_101_and_its_life_is_no_duration() {
    let server = TestServer::start(&[]).await;
    let mut ann = server.client("ann").await;
    ann.call(100, json!({})).await;
    assert_eq!(server.metric(&requests("GET", "/web", 101)).await, 1.0);
    ann.close().await;
    server.until_metric("ws_disconnections_total{code=\"1000\"}", 1.0).await;
    let text = server.metrics().await;
    let web = "http_request_duration_seconds_count{endpoint=\"/web\",method=\"GET\"} ";
    let counted = text.lines().find_map(|line| line.strip_prefix(web)).unwrap_or("0");
    assert_eq!(counted, "0");
}

#[tokio::test]
async fn a_request_is_in_progress_until_it_is_answered_or_given_up() {
    let server = TestServer::start(&[]).await;
    let series = "http_requests_in_progress{endpoint=\"/authors\",method=\"POST\"}";
    let head = format!(
        "POST /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{{",
        server.token("ann"),
    );
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let mut tcp = TcpStream::connect(server.addr).await.unwrap();
        tcp.write_all(head.as_bytes()).await.unwrap();
        waiting.push(tcp);
    }
    server.until_metric(series, 2.0).await;
    drop(waiting.pop());
    server.until_metric(series, 1.0).await;
    waiting[0].write_all(b"\"name\":\"Ann\"}").await.unwrap();
    server.until_metric(series, 0.0).await;
    server.until_metric(&requests("POST", "/authors", 201), 1.0).await;
}

#[tokio::test]
async fn statements_are_timed_and_their_failures_counted() {
    let server = TestServer::start(&[("AUDIT_ENABLED", "false")]).await;
    let id = add_author(&server, "Ann").await;
    let taken = server.rest(Method::POST, "/authors").json(&json!({ "name": "Ann" }));
    assert_eq!(taken.send().await.unwrap().status(), 409);
    for (method, path) in
        [(Method::PUT, format!("/authors/{id}")), (Method::GET, "/authors".into())]
    {
        let request = server.rest(method, &path).json(&json!({ "name": "Bea" }));
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    let delete = server.rest(Method::DELETE, &format!("/authors/{id}"));
    assert_eq!(delete.send().await.unwrap().status(), 204);
    // The server itself has asked for logouts at its start.
    for (operation, count) in [("select", 2.0), ("insert", 2.0), ("update", 1.0), ("delete", 1.0)] {
        let series = format!("db_query_duration_seconds_count{{operation=\"{operation}\"}}");
        assert_eq!(server.metric(&series).await, count, "{operation}");
    }
    let integrity = "db_errors_total{error_type=\"integrity_error\",operation=\"insert\"}";
    assert_eq!(server.metric(integrity).await, 1.0);
    assert!(server.metric("db_connections_idle").await >= 1.0);
    assert_eq!(server.metric("db_connections_active").await, 0.0);
}

#[tokio::test]
async fn authentications_are_counted_over_rest_and_websocket() {
    let server = TestServer::start(&[("JWT_LEEWAY", "0s")]).await;
    let good = server.token("ann");
    let expired = server.issuer.sign(&json!({
        "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": "a", "exp": 1000,
    }));
    for token in [&*good, &*expired, "garbage"] {
        server.request(Method::GET, "/authors").bearer_auth(token).send().await.unwrap();
        let mut client = Client::open(server.addr, "/web").await;
        client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
        if token == good {
            client.receive().await;
        } else {
            assert_eq!(client.until_closed().await.1, Closed::Code(4001));
        }
    }
    // No token at all is no attempt.
    server.request(Method::GET, "/authors").send().await.unwrap();
    for (attempt, validation) in
        [("success", "valid"), ("failed", "invalid"), ("token_expired", "expired")]
    {
        let series = format!("auth_attempts_total{{status=\"{attempt}\"}}");
        assert_eq!(server.metric(&series).await, 2.0, "{attempt}");
        let series = format!("token_validation_total{{status=\"{validation}\"}}");
        assert_eq!(server.metric(&series).await, 2.0, "{validation}");
    }
    assert_eq!(server.metric("ws_connections_total{status=\"rejected_auth\"}").await, 2.0);
}

#[tokio::test]
async fn every_kind_of_limit_counts_its_hits() {
    let server = TestServer::start(&[
        ("RATE_LIMIT_PER_MINUTE", "1"),
        ("RATE_LIMIT_BURST", "0"),
        ("WS_MAX_CONNECTIONS_PER_USER", "1"),
        ("WS_MESSAGE_RATE_LIMIT", "1"),
    ])
    .await;
    for _ in 0..3 {
        server.rest(Method::GET, "/authors").send().await.unwrap();
    }
    let mut ann = server.client("ann").await;
    ann.call(100, json!({})).await;
    assert_eq!(ann.call(100, json!({})).await["data"]["code"], "rate_limit_exceeded");
    let mut second = Client::open(server.addr, "/web").await;
    let token = format!("Bearer {}", server.token("ann"));
    second.send(&json!({ "type": "auth", "token": token })).await;
    assert_eq!(second.until_closed().await.1, Closed::Code(1008));
    for (limit, hits) in [("http", 2.0), ("websocket_message", 1.0), ("websocket_connection", 1.0)]
    {
        let series = format!("rate_limit_hits_total{{limit_type=\"{limit}\"}}");
        assert_eq!(server.metric(&series).await, hits, "{limit}");
    }
}

#[tokio::test]
async fn refused_connections_do_not_take_from_the_gauge_of_open_ones() {
    let server = TestServer::start(&[("WS_MAX_CONNECTIONS_PER_USER", "1")]).await;
    let _ann = server.client("ann").await;
    for token in ["garbage".to_owned(), server.token("ann")] {
        let mut refused = Client::open(server.addr, "/web").await;
        refused.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
        refused.until_closed().await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.metric("ws_connections_active").await, 1.0);
}
