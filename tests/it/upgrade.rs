//! What is refused before the upgrade, and with which status.

use std::time::Duration;

use reqwest::{Method, StatusCode, header::HeaderMap};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::Error;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{GATE, Gate, misbehaving},
};

/// The headers of a good upgrade request.
const GOOD: &[(&str, &str)] = &[
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

struct Refused {
    status: StatusCode,
    headers: HeaderMap,
    code: String,
}

/// Asks for an upgrade that is refused; `changes` replace good headers, an empty value removes one.
async fn refused(server: &TestServer, path: &str, changes: &[(&'static str, &str)]) -> Refused {
    let mut request = server.request(Method::GET, path);
    let kept = GOOD.iter().filter(|(name, _)| !changes.iter().any(|(changed, _)| changed == name));
    for (name, value) in kept.chain(changes.iter().filter(|(_, value)| !value.is_empty())) {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    let (status, headers) = (answer.status(), answer.headers().clone());
    assert_ne!(status, 101, "{path} {changes:?} was not refused");
    let body: Value = answer.json().await.unwrap();
    assert!(body["error"]["msg"].is_string(), "{body}");
    Refused { status, headers, code: body["error"]["code"].as_str().unwrap().to_owned() }
}

#[tokio::test]
async fn an_unknown_format_is_a_bad_request() {
    let server = TestServer::start(&[]).await;
    for path in ["/web?format=xml", "/web?format=", "/web?format=JSON"] {
        let answer = refused(&server, path, &[]).await;
        assert_eq!((answer.status.as_u16(), &*answer.code), (400, "bad_request"), "{path}");
    }
}

#[tokio::test]
async fn an_upgrade_that_breaks_rfc_6455_is_a_bad_request() {
    let server = TestServer::start(&[]).await;
    for (name, value) in [
        ("sec-websocket-key", ""),
        ("sec-websocket-key", "c2hvcnQ="),
        ("sec-websocket-key", "not base64 at all"),
        ("sec-websocket-version", ""),
        ("sec-websocket-version", "8"),
        ("connection", "keep-alive"),
    ] {
        let answer = refused(&server, "/web", &[(name, value)]).await;
        assert_eq!(answer.status, 400, "{name}: {value:?}");
    }
}

/// Found by the fuzzer: its bytes were read as frames.
#[tokio::test]
async fn an_upgrade_with_a_body_is_a_bad_request() {
    let server = TestServer::start(&[]).await;
    for body in
        ["content-length: 3\r\n\r\nabc", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
    {
        let mut socket = TcpStream::connect(server.addr).await.unwrap();
        let headers: String =
            GOOD.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("GET /web HTTP/1.1\r\nhost: a\r\n{headers}{body}");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        socket.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 400", "{body}");
    }
}

#[tokio::test]
async fn web_without_an_upgrade_asks_for_one() {
    let server = TestServer::start(&[]).await;
    for changes in
        [&[("upgrade", "")][..], &[("upgrade", "h2c")], &[("upgrade", ""), ("connection", "")]]
    {
        let answer = refused(&server, "/web", changes).await;
        assert_eq!(answer.status, 426, "{changes:?}");
        assert_eq!(answer.code, "upgrade_required", "{changes:?}");
        assert_eq!(answer.headers["upgrade"], "websocket");
    }
    let mut post = server.request(Method::POST, "/web");
    for (name, value) in GOOD {
        post = post.header(*name, *value);
    }
    assert_eq!(post.send().await.unwrap().status(), 426);
}

#[tokio::test]
async fn a_bad_token_in_the_header_is_unauthorized() {
    let server = TestServer::start(&[]).await;
    let expired = server.expired_token("ann");
    for (value, code) in [
        ("Bearer nonsense".to_owned(), "unauthorized"),
        ("Basic YW5uOnNlY3JldA==".to_owned(), "unauthorized"),
        (server.token("ann"), "unauthorized"),
        (format!("Bearer {expired}"), "token_expired"),
    ] {
        let answer = refused(&server, "/web", &[("authorization", &value)]).await;
        assert_eq!((answer.status.as_u16(), &*answer.code), (401, code), "{value}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    server.until_metric(r#"ws_connections_total{status="rejected_auth"}"#, 4.0).await;
}

#[tokio::test]
async fn a_bad_token_in_the_query_is_unauthorized_where_query_tokens_are_on() {
    let server = TestServer::start(&[("WS_QUERY_TOKEN", "true")]).await;
    let expired = server.expired_token("ann");
    for (query, code) in [
        ("token=nonsense".to_owned(), "unauthorized"),
        ("Authorization=Bearer%20nonsense".to_owned(), "unauthorized"),
        (format!("Authorization={}", server.token("ann")), "unauthorized"),
        (format!("token={expired}"), "token_expired"),
        (format!("Authorization=Bearer%20{expired}"), "token_expired"),
    ] {
        let answer = refused(&server, &format!("/web?{query}"), &[]).await;
        assert_eq!((answer.status.as_u16(), &*answer.code), (401, code), "{query}");
    }
}

#[tokio::test]
async fn an_origin_that_is_not_allowed_is_forbidden() {
    let server = TestServer::start(&[("ALLOWED_WS_ORIGINS", "https://a.example")]).await;
    for origin in ["https://b.example", "http://a.example", "https://a.example.evil", "null"] {
        let answer = refused(&server, "/web", &[("origin", origin)]).await;
        assert_eq!(answer.status, 403, "{origin}");
    }
    server.until_metric(r#"ws_connections_total{status="rejected_origin"}"#, 4.0).await;
    let good = [("origin", "https://a.example")];
    let mut client = Client::try_open(server.addr, "/web", &good).await.unwrap();
    client.authenticate(&server.token("ann")).await;
    // Whoever is no browser has no origin.
    server.client("bob").await;
}

#[tokio::test]
async fn any_origin_may_connect_where_all_are_allowed() {
    let server = TestServer::start(&[("ALLOWED_WS_ORIGINS", "*")]).await;
    let origin = [("origin", "https://anywhere.example")];
    let mut client = Client::try_open(server.addr, "/web", &origin).await.unwrap();
    client.authenticate(&server.token("ann")).await;
}

async fn is_full(server: &TestServer) {
    let answer = refused(server, "/web", &[]).await;
    assert_eq!((answer.status.as_u16(), &*answer.code), (503, "unavailable"));
    let wait: u32 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(wait > 0);
}

/// Opens a connection as soon as there is a place; the server learns of an end a little later.
async fn opened_in_time(server: &TestServer) -> Client {
    for _ in 0..100 {
        match Client::try_open(server.addr, "/web", &[]).await {
            Ok(client) => return client,
            Err(Error::Http(answer)) => assert_eq!(answer.status().as_u16(), 503),
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("no place was given back");
}

#[tokio::test]
async fn a_full_node_refuses_and_gives_places_back() {
    let settings = [
        ("WS_MAX_CONNECTIONS", "2"),
        ("WS_MAX_CONNECTIONS_PER_USER", "1"),
        ("WS_AUTH_TIMEOUT", "5s"),
    ];
    let server = TestServer::start(&settings).await;
    let ann = server.client("ann").await;
    // One that has not authenticated takes none of these places.
    let _silent = Client::open(server.addr, "/web").await;
    let dora = server.client("dora").await;
    is_full(&server).await;
    server.until_metric(r#"ws_connections_total{status="rejected_capacity"}"#, 1.0).await;

    dora.close().await;
    // Refused after the upgrade, for its token and for its user's limit: neither keeps its place.
    let mut nobody = opened_in_time(&server).await;
    nobody.send(&json!({ "type": "auth", "token": "Bearer nonsense" })).await;
    assert_eq!(nobody.until_closed().await.1, Closed::Code(4001));
    drop(nobody);
    let mut again = opened_in_time(&server).await;
    again
        .send(&json!({ "type": "auth", "token": format!("Bearer {}", server.token("ann")) }))
        .await;
    assert_eq!(again.until_closed().await.1, Closed::Code(1008));
    drop(again);
    let mut bob = opened_in_time(&server).await;
    bob.authenticate(&server.token("bob")).await;
    is_full(&server).await;

    ann.close().await;
    opened_in_time(&server).await.authenticate(&server.token("cat")).await;
}

#[tokio::test]
async fn a_refused_upgrade_keeps_no_place() {
    let server = TestServer::start(&[("WS_MAX_CONNECTIONS", "1")]).await;
    for _ in 0..3 {
        let answer = refused(&server, "/web", &[("authorization", "Bearer nonsense")]).await;
        assert_eq!(answer.status, 401);
    }
    server.client("ann").await;
}

#[tokio::test]
async fn a_draining_node_refuses_upgrades() {
    let gate = Gate::closed();
    let mut server = TestServer::with_packages(&[], misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    server.begin_shutdown();
    assert_eq!(client.receive().await["type"], "drain");
    is_full(&server).await;
    gate.release(1);
    assert_eq!(client.receive().await["status_code"], 0);
    assert_eq!(client.next().await.unwrap_err(), Closed::Code(1001));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn frames_that_arrive_with_the_upgrade_request_are_not_lost() {
    let server = TestServer::start(&[]).await;
    let auth = json!({ "type": "auth", "token": format!("Bearer {}", server.token("ann")) });
    let echo = json!({ "pkg_id": 100, "req_id": uuid::Uuid::nil(), "data": { "early": 1 } });
    let mut bytes = b"GET /web HTTP/1.1\r\nHost: x\r\n".to_vec();
    for (name, value) in GOOD {
        bytes.extend(format!("{name}: {value}\r\n").bytes());
    }
    bytes.extend(b"\r\n");
    for text in [auth.to_string(), echo.to_string()] {
        // A whole text frame, masked with zeros, its length in 16 bits.
        bytes.extend([0x81, 0x80 | 126]);
        bytes.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(text.bytes());
    }
    let mut tcp = TcpStream::connect(server.addr).await.unwrap();
    tcp.write_all(&bytes).await.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(r#"{"early":1}"#) {
        let read = tokio::time::timeout(Duration::from_secs(5), tcp.read_buf(&mut seen));
        assert_ne!(read.await.expect("an answer was lost").unwrap(), 0);
    }
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.starts_with("HTTP/1.1 101 ") && seen.contains("auth_ok"));
    // From the example of RFC 6455.
    assert!(seen.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
}
