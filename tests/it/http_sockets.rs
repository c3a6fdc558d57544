//! The sockets under HTTP: how many there may be, how long they may take, and that answers arrive.

use std::{net::SocketAddr, time::Duration};

use reqwest::Method;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};

use crate::support::{Client, TestServer, rest::send_raw};

const PATIENCE: Duration = Duration::from_secs(10);
const ACTIVE: &str = "http_connections_active";

/// Connects from an address of this machine.
async fn connect(from: &str, to: SocketAddr) -> TcpStream {
    let from = SocketAddr::new(from.parse().unwrap(), 0);
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
    socket.bind(from).unwrap();
    socket.connect(to).await.unwrap()
}

/// Reads to the end; what came.
async fn rest(tcp: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tcp.read_to_end(&mut bytes);
    // A reset after the answer is an end as well.
    drop(timeout(PATIENCE, read).await.expect("the connection stays open"));
    String::from_utf8(bytes).unwrap()
}

/// The status of the first answer in a text.
fn status(text: &str) -> u16 {
    text.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {text:?}")).parse().unwrap()
}

#[tokio::test]
async fn an_early_answer_arrives_while_the_client_still_sends() {
    let settings = [("AUTH_FAILURES_PER_MINUTE", "0"), ("RATE_LIMIT_PER_MINUTE", "0")];
    let server = TestServer::start(&settings).await;
    let good = format!("Authorization: Bearer {}\r\n", server.token("ann"));
    let body = vec![b'x'; 3 << 20];
    for (path, more, expected) in [
        ("/authors", "", 401),
        ("/authors", "Authorization: Bearer garbage\r\n", 401),
        ("/authors", &*good, 413),
        ("/admin/broadcast", &good, 413),
        ("/auth/login", "", 503),
        ("/auth/backchannel-logout", "", 400),
        ("/nowhere", "", 404),
        ("/metrics", "", 405),
    ] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{more}\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        // So small a buffer that the client has not sent everything before the server answers.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_send_buffer_size(16 * 1024).unwrap();
        let mut tcp = socket.connect(server.addr).await.unwrap();
        tcp.write_all(head.as_bytes()).await.unwrap();
        // A client that reads when it has sent everything.
        let sent = tcp.write_all(&body).await;
        assert!(sent.is_ok(), "{path}: {sent:?}");
        assert_eq!(status(&rest(&mut tcp).await), expected, "{path}");
    }
    server.until_metric(ACTIVE, 1.0).await;
}

#[tokio::test]
async fn what_a_refused_client_still_sends_is_read_within_bounds() {
    let server = TestServer::start(&[]).await;
    let mut tcp = TcpStream::connect(server.addr).await.unwrap();
    let head = "POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
    tcp.write_all(head.as_bytes()).await.unwrap();
    let since = Instant::now();
    let mut bytes = [0; 1024];
    assert!(tcp.read(&mut bytes).await.unwrap() > 0);
    // It sends nothing more, and stays.
    server.until_metric(ACTIVE, 1.0).await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
}

#[tokio::test]
async fn a_client_that_has_sent_everything_and_says_so_is_answered() {
    let server = TestServer::start(&[]).await;
    let body = r#"{"name":"Half"}"#;
    let post = format!(
        "POST /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        server.token("ann"),
        body.len()
    );
    let get = "GET /health HTTP/1.1\r\nHost: a\r\n\r\n".to_owned();
    for (request, expected) in [(get, 200), (post, 201)] {
        let mut tcp = TcpStream::connect(server.addr).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        tcp.shutdown().await.unwrap();
        assert_eq!(status(&rest(&mut tcp).await), expected);
    }
}

#[tokio::test]
async fn a_client_that_pipelines_and_never_reads_is_closed() {
    let server = TestServer::start(&[("WS_WRITE_TIMEOUT", "300ms")]).await;
    let mut deaf = Vec::new();
    for _ in 0..3 {
        let mut tcp = TcpStream::connect(server.addr).await.unwrap();
        let requests = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n".repeat(2000);
        // Until the server takes no more.
        let sent = timeout(Duration::from_millis(500), tcp.write_all(requests.as_bytes())).await;
        drop(sent);
        deaf.push(tcp);
    }
    for tcp in &mut deaf {
        let more = vec![b'x'; 16 << 20];
        let sent = timeout(Duration::from_secs(3), tcp.write_all(&more)).await;
        assert!(sent.expect("it is still open").is_err());
    }
    server.until_metric(ACTIVE, 1.0).await;
}

#[tokio::test]
async fn an_address_has_a_bound_of_http_connections_and_others_come_in() {
    for (listen, crowd, other) in
        [("127.0.0.1:0", "127.0.0.7", "127.0.0.8"), ("[::]:0", "127.0.0.7", "::1")]
    {
        let settings = [("LISTEN_ADDR", listen), ("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "4")];
        let server = TestServer::start(&settings).await;
        let v4 = SocketAddr::from(([127, 0, 0, 1], server.addr.port()));
        let mut open = Vec::new();
        for _ in 0..4 {
            open.push(connect(crowd, v4).await);
        }
        assert_eq!(status(&rest(&mut connect(crowd, v4).await).await), 503);
        let refused = "http_connections_refused_total{reason=\"address\"}";
        assert_eq!(server.metric(refused).await, 1.0);
        let to = if other == "::1" { server.addr } else { v4 };
        let to = if to.ip().is_unspecified() {
            SocketAddr::new(other.parse().unwrap(), to.port())
        } else {
            to
        };
        let mut tcp = connect(other, to).await;
        tcp.write_all(b"GET /health HTTP/1.0\r\n\r\n").await.unwrap();
        assert_eq!(status(&rest(&mut tcp).await), 200);
        drop(open);
        server.until_metric(ACTIVE, 1.0).await;
        let mut again = connect(crowd, v4).await;
        again.write_all(b"GET /health HTTP/1.0\r\n\r\n").await.unwrap();
        assert_eq!(status(&rest(&mut again).await), 200);
    }
}

#[tokio::test]
async fn a_trusted_proxy_has_the_bound_of_all_connections_and_no_other() {
    let settings = [
        ("TRUSTED_PROXIES", "127.0.0.7"),
        ("HTTP_MAX_CONNECTIONS", "8"),
        ("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "2"),
    ];
    let server = TestServer::start(&settings).await;
    let mut open = Vec::new();
    for _ in 0..7 {
        open.push(connect("127.0.0.7", server.addr).await);
    }
    // One is the test's own, which is not kept.
    server.until_metric(ACTIVE, 8.0).await;
    open.push(connect("127.0.0.7", server.addr).await);
    assert_eq!(status(&rest(&mut connect("127.0.0.7", server.addr).await).await), 503);
    open.pop();
    server.until_metric("http_connections_refused_total{reason=\"capacity\"}", 1.0).await;
}

#[tokio::test]
async fn a_websocket_is_no_http_connection_any_more() {
    let server = TestServer::start(&[("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "4")]).await;
    let mut open = Vec::new();
    for _ in 0..10 {
        let mut client = Client::open(server.addr, "/web").await;
        client.authenticate(&server.token("ann")).await;
        open.push(client);
    }
    server.until_metric(ACTIVE, 1.0).await;
}

#[tokio::test]
async fn where_room_is_scarce_nobody_keeps_a_connection_between_requests() {
    let server = TestServer::start(&[("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "4")]).await;
    let ask = "GET /health HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut alone = connect("127.0.0.9", server.addr).await;
    alone.write_all(ask.as_bytes()).await.unwrap();
    let mut head = [0; 64];
    assert!(alone.read(&mut head).await.unwrap() > 0);
    let _others =
        [connect("127.0.0.9", server.addr).await, connect("127.0.0.9", server.addr).await];
    server.until_metric(ACTIVE, 4.0).await;
    alone.write_all(ask.as_bytes()).await.unwrap();
    let text = rest(&mut alone).await;
    assert!(text.contains("connection: close"), "{text}");
}

#[tokio::test]
async fn an_idle_connection_is_kept_for_the_time_that_is_set_and_a_head_has_its_own() {
    let server = TestServer::start(&[("HTTP_KEEP_ALIVE", "400ms")]).await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    let mut halfway = TcpStream::connect(server.addr).await.unwrap();
    for tcp in [&mut idle, &mut halfway] {
        tcp.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut bytes = [0; 4096];
        assert!(tcp.read(&mut bytes).await.unwrap() > 0);
    }
    let since = Instant::now();
    halfway.write_all(b"GET /health HT").await.unwrap();
    assert_eq!(rest(&mut idle).await, "");
    let waited = since.elapsed();
    assert!((300..2000).contains(&waited.as_millis()), "{waited:?}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    halfway.write_all(b"TP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    assert_eq!(status(&rest(&mut halfway).await), 200);
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_503_with_timeout() {
    let server = TestServer::start(&[("HTTP_REQUEST_TIMEOUT", "200ms")]).await;
    let head = format!(
        "POST /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{{",
        server.token("ann")
    );
    let answer = send_raw(server.addr, head.as_bytes()).await.unwrap();
    assert_eq!(answer.status, 503);
    crate::support::rest::problem(answer.text(), "timeout");
}

#[tokio::test]
async fn bodies_that_are_being_read_are_bounded_together_and_by_address() {
    let settings = [
        ("MAX_REQUEST_BODY_SIZE", "4KiB"),
        ("HTTP_MAX_BODY_MEMORY", "16KiB"),
        ("TRUSTED_PROXIES", "127.0.0.1"),
    ];
    let server = TestServer::start(&settings).await;
    let post = |from: &str| {
        format!(
            "POST /authors HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {from}\r\n\
             Authorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: 4096\r\n\r\n{}",
            server.token("ann"),
            " ".repeat(3072)
        )
    };
    let mut held = Vec::new();
    for n in 1..=5_u8 {
        let mut tcp = TcpStream::connect(server.addr).await.unwrap();
        tcp.write_all(post(&format!("203.0.113.{n}")).as_bytes()).await.unwrap();
        held.push(tcp);
        server.until_metric("http_body_memory_bytes", f64::from(n) * 3072.0).await;
    }
    // A second body of an address has a quarter for both; over IPv6 the address is a network.
    let mut v6 = TcpStream::connect(server.addr).await.unwrap();
    drop(held.pop());
    server.until_metric("http_body_memory_bytes", 4.0 * 3072.0).await;
    v6.write_all(post("2001:db8::1").as_bytes()).await.unwrap();
    server.until_metric("http_body_memory_bytes", 5.0 * 3072.0).await;
    for from in ["203.0.113.1", "2001:db8::2", "203.0.113.9"] {
        let answer = send_raw(server.addr, post(from).as_bytes()).await.unwrap();
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("5")), "{from}");
    }
    drop((held, v6));
    server.until_metric("http_body_memory_bytes", 0.0).await;
    let added = server.rest(Method::POST, "/authors").json(&serde_json::json!({ "name": "Ann" }));
    assert_eq!(added.send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn a_request_says_once_which_host_it_is_for() {
    let server = TestServer::start(&[("ALLOWED_HOSTS", "a,b")]).await;
    for (request, expected) in [
        ("GET /health HTTP/1.1\r\n", 400),
        ("GET /health HTTP/1.0\r\n", 200),
        ("GET /health HTTP/1.1\r\nHost: a\r\n", 200),
        ("GET /health HTTP/1.1\r\nHost: a\r\nHost: a\r\n", 400),
        ("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n", 400),
        ("GET /health HTTP/1.0\r\nHost: a\r\nHost: b\r\n", 400),
        ("GET /health HTTP/1.1\r\nHost: a/b\r\n", 400),
        ("GET /health HTTP/1.1\r\nHost: user@a\r\n", 400),
        ("GET http://a/health HTTP/1.1\r\nHost: a\r\n", 200),
        ("GET http://A:80/health HTTP/1.1\r\nHost: a:80\r\n", 200),
        ("GET http://b/health HTTP/1.1\r\nHost: a\r\n", 400),
        ("GET http://a/authors HTTP/1.1\r\nHost: a\r\n", 401),
        ("GET http://evil.example/authors HTTP/1.1\r\nHost: evil.example\r\n", 400),
        ("GET http://evil.example/authors HTTP/1.1\r\nHost: a\r\n", 400),
        ("GET /authors HTTP/1.0\r\n", 400),
    ] {
        let text = format!("{request}Connection: close\r\n\r\n");
        let answer = send_raw(server.addr, text.as_bytes()).await.unwrap();
        assert_eq!(answer.status, expected, "{request:?}");
    }
}

#[tokio::test]
async fn probes_and_prometheus_come_by_address_whatever_hosts_are_allowed() {
    let settings = [("ALLOWED_HOSTS", "api.example.com")];
    let ops = [("ALLOWED_HOSTS", "api.example.com"), ("OPS_ADDR", "127.0.0.1:0")];
    for settings in [&settings[..], &ops] {
        let server = TestServer::start(settings).await;
        let addr = server.ops_addr.unwrap_or(server.addr);
        for (path, expected) in [
            ("/health", 200),
            ("/health/live", 200),
            ("/health/ready", 200),
            ("/metrics", 200),
            ("/admin/connections", 400),
        ] {
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
            let answer = send_raw(addr, request.as_bytes()).await.unwrap();
            assert_eq!(answer.status, expected, "{path}");
        }
    }
}
