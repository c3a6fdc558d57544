//! What every answer carries, and who gets which: security, correlation, limits, proxies, CORS, gzip,
//! and the listener of the operators.

use std::{collections::HashSet, net::SocketAddr};

use reqwest::{Method, Response};
use serde_json::json;

use crate::support::{
    TestServer,
    rest::{Raw, add_author, refused, send_raw},
};

const SECURITY: &[(&str, &str)] = &[
    ("x-frame-options", "DENY"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=()"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
];

async fn get(server: &TestServer, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = server.request(Method::GET, path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

fn header<'a>(answer: &'a Response, name: &str) -> Option<&'a str> {
    answer.headers().get(name).map(|value| value.to_str().unwrap())
}

/// `GET` with more header lines, as it comes over the wire.
async fn raw(addr: SocketAddr, path: &str, lines: &str) -> Raw {
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n");
    send_raw(addr, request.as_bytes()).await.unwrap()
}

#[tokio::test]
async fn every_answer_has_the_security_headers_and_a_correlation_id() {
    let server = TestServer::start(&[
        ("RATE_LIMIT_PER_MINUTE", "3"),
        ("RATE_LIMIT_BURST", "0"),
        ("ALLOWED_HOSTS", "127.0.0.1"),
    ])
    .await;
    let token = format!("Bearer {}", server.token_with("ann", &["get-authors"]));
    for (method, path, authorization, host, status) in [
        ("GET", "/nothing", "", "", 404),
        ("GET", "/authors", "", "", 401),
        ("DELETE", "/authors", "", "", 405),
        ("GET", "/authors", &*token, "", 200),
        ("POST", "/authors", &*token, "", 403),
        ("GET", "/authors?id=x", &*token, "", 422),
        ("GET", "/authors", &*token, "", 429),
        ("GET", "/authors", &*token, "evil.example", 400),
        ("GET", "/health", "", "", 200),
        ("GET", "/metrics", "", "", 200),
        ("GET", "/web", "", "", 426),
        ("OPTIONS", "/authors", "", "", 405),
    ] {
        let mut request = server.request(method.parse().unwrap(), path);
        for (name, value) in [("authorization", authorization), ("host", host)] {
            if !value.is_empty() {
                request = request.header(name, value);
            }
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), status, "{method} {path}");
        for (name, value) in SECURITY {
            assert_eq!(header(&answer, name), Some(*value), "{name}: {method} {path}");
        }
        assert!(header(&answer, "x-correlation-id").is_some(), "{method} {path}");
        assert_eq!(header(&answer, "strict-transport-security"), None, "{method} {path}");
    }
}

#[tokio::test]
async fn a_correlation_id_is_echoed_made_or_replaced() {
    let server = TestServer::start(&[]).await;
    let longest = "x".repeat(64);
    for good in ["a", "Order_66-b", &*longest] {
        let answer = get(&server, "/nothing", &[("x-correlation-id", good)]).await;
        assert_eq!(header(&answer, "x-correlation-id"), Some(good));
    }
    let mut made = HashSet::new();
    let too_long = "x".repeat(65);
    for bad in [None, Some(""), Some("a b"), Some("a\"b"), Some("a/b"), Some("ä"), Some(&*too_long)]
    {
        let headers: Vec<_> = bad.map(|bad| ("x-correlation-id", bad)).into_iter().collect();
        let answer = get(&server, "/health", &headers).await;
        let id = header(&answer, "x-correlation-id").unwrap();
        assert_eq!(id.len(), 8, "{bad:?}");
        assert!(id.bytes().all(|b| b.is_ascii_alphanumeric()), "{bad:?}");
        made.insert(id.to_owned());
    }
    assert_eq!(made.len(), 7);
}

#[tokio::test]
async fn limited_routes_tell_the_budget_and_health_and_metrics_have_none() {
    let server =
        TestServer::start(&[("RATE_LIMIT_PER_MINUTE", "6"), ("RATE_LIMIT_BURST", "2")]).await;
    let answer = server.rest(Method::GET, "/authors").send().await.unwrap();
    assert_eq!(header(&answer, "x-ratelimit-limit"), Some("6"));
    assert_eq!(header(&answer, "x-ratelimit-remaining"), Some("5"));
    let reset: u64 = header(&answer, "x-ratelimit-reset").unwrap().parse().unwrap();
    assert!((1..=10).contains(&reset), "{reset}");
    let second = server.rest(Method::GET, "/authors").send().await.unwrap();
    assert_eq!(header(&second, "x-ratelimit-remaining"), Some("4"));
    // Far more than the budget.
    for _ in 0..12 {
        for path in ["/health", "/health/live", "/health/ready", "/metrics"] {
            let answer = get(&server, path, &[]).await;
            assert_eq!(answer.status(), 200, "{path}");
            for name in ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"] {
                assert_eq!(header(&answer, name), None, "{path}");
            }
        }
    }
}

/// How many requests are answered before the first 429.
async fn allowed(server: &TestServer, headers: &[(&str, &str)]) -> usize {
    for n in 0..20 {
        if get(server, "/authors", headers).await.status() == 429 {
            return n;
        }
    }
    panic!("no limit");
}

#[tokio::test]
async fn each_user_and_each_address_has_a_budget_with_the_burst_on_top() {
    let server =
        TestServer::start(&[("RATE_LIMIT_PER_MINUTE", "2"), ("RATE_LIMIT_BURST", "3")]).await;
    let bearer = |user| format!("Bearer {}", server.token(user));
    let (ann, bea) = (bearer("ann"), bearer("bea"));
    assert_eq!(allowed(&server, &[("authorization", &ann)]).await, 5);
    // Another token of the same user is no other user.
    let again = bearer("ann");
    assert_ne!(again, ann);
    assert_eq!(allowed(&server, &[("authorization", &again)]).await, 0);
    assert_eq!(allowed(&server, &[("authorization", &bea)]).await, 5);
    assert_eq!(allowed(&server, &[]).await, 5);
    // A bad token is no user: it draws on the address.
    assert_eq!(allowed(&server, &[("authorization", "Bearer x")]).await, 0);
    // Nobody trusts this client's word.
    assert_eq!(allowed(&server, &[("x-forwarded-for", "203.0.113.9")]).await, 0);
}

#[tokio::test]
async fn a_forwarded_address_counts_from_trusted_proxies_and_is_read_from_the_right() {
    let server = TestServer::start(&[
        ("RATE_LIMIT_PER_MINUTE", "2"),
        ("RATE_LIMIT_BURST", "0"),
        ("TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8"),
    ])
    .await;
    let forwarded = |chain| [("x-forwarded-for", chain)];
    assert_eq!(allowed(&server, &forwarded("203.0.113.1")).await, 2);
    assert_eq!(allowed(&server, &forwarded("203.0.113.2")).await, 2);
    for same in [
        // What the client wrote itself stands on the left.
        "198.51.100.7, 203.0.113.1",
        "10.1.2.3, 203.0.113.1",
        // Our own proxies stand on the right.
        "198.51.100.8, 203.0.113.1, 10.1.2.3",
        "garbage,203.0.113.1 ,10.9.9.9,10.1.2.3",
        "::ffff:203.0.113.1",
    ] {
        assert_eq!(allowed(&server, &forwarded(same)).await, 0, "{same}");
    }
    let split = [("x-forwarded-for", "198.51.100.9"), ("x-forwarded-for", "203.0.113.1")];
    assert_eq!(allowed(&server, &split).await, 0);
    assert_eq!(allowed(&server, &forwarded("203.0.113.1, 203.0.113.3")).await, 2);
    assert_eq!(allowed(&server, &forwarded("2001:db8::1")).await, 2);
}

#[tokio::test]
async fn hsts_comes_with_https_by_the_word_of_a_trusted_proxy() {
    let https = [("x-forwarded-proto", "https")];
    let plain = TestServer::start(&[("TRUSTED_PROXIES", "10.0.0.0/8")]).await;
    let answer = get(&plain, "/health", &https).await;
    assert_eq!(header(&answer, "strict-transport-security"), None);
    let proxied = TestServer::start(&[("TRUSTED_PROXIES", "127.0.0.0/8")]).await;
    for path in ["/health", "/nothing"] {
        let answer = get(&proxied, path, &https).await;
        let hsts = header(&answer, "strict-transport-security").expect("HSTS");
        assert!(hsts.starts_with("max-age=31536000"), "{hsts}");
    }
    let answer = get(&proxied, "/health", &[("x-forwarded-proto", "http")]).await;
    assert_eq!(header(&answer, "strict-transport-security"), None);
}

#[tokio::test]
async fn a_host_that_is_not_allowed_is_400() {
    let server = TestServer::start(&[("ALLOWED_HOSTS", "127.0.0.1,api.example.com,[::1]")]).await;
    // Without a token, a host that is allowed gets as far as 401.
    for good in ["api.example.com", "API.Example.com:8000", "127.0.0.1:1", "[::1]", "[::1]:80"] {
        assert_eq!(get(&server, "/authors", &[("host", good)]).await.status(), 401, "{good}");
    }
    for bad in ["example.com", "evil.example", "api.example.com.evil.example", "api.example.com:x"]
    {
        let answer = get(&server, "/authors", &[("host", bad)]).await;
        refused(answer, 400, "bad_request").await;
    }
    let none = send_raw(server.addr, b"GET /authors HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert_eq!(none.unwrap().status, 400);
}

#[tokio::test]
async fn probes_by_address_pass_whatever_hosts_are_allowed() {
    let server = TestServer::start(&[("ALLOWED_HOSTS", "api.example.com")]).await;
    for path in ["/health", "/health/live", "/health/ready", "/metrics"] {
        assert_eq!(get(&server, path, &[]).await.status(), 200, "{path}");
    }
    for path in ["/authors", "/healthy", "/metrics/"] {
        refused(get(&server, path, &[]).await, 400, "bad_request").await;
    }
}

fn preflight(server: &TestServer, origin: &'static str) -> reqwest::RequestBuilder {
    server
        .request(Method::OPTIONS, "/authors")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type")
}

#[tokio::test]
async fn no_origin_is_allowed_by_default() {
    let server = TestServer::start(&[]).await;
    for request in [
        preflight(&server, "https://app.example.com"),
        server.rest(Method::GET, "/authors").header("origin", "https://app.example.com"),
    ] {
        let answer = request.send().await.unwrap();
        let names = answer.headers().keys();
        let cors: Vec<_> =
            names.filter(|name| name.as_str().starts_with("access-control")).collect();
        assert!(cors.is_empty(), "{cors:?}");
    }
    refused(
        preflight(&server, "https://a.example").send().await.unwrap(),
        405,
        "method_not_allowed",
    )
    .await;
    let nowhere = server.request(Method::OPTIONS, "/nothing").send().await.unwrap();
    refused(nowhere, 404, "not_found").await;
}

#[tokio::test]
async fn a_star_lets_every_origin_call() {
    let server = TestServer::start(&[("CORS_ALLOWED_ORIGINS", "*")]).await;
    let answer = preflight(&server, "https://anyone.example").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(header(&answer, "access-control-allow-origin"), Some("*"));
    assert_eq!(header(&answer, "access-control-allow-credentials"), None);
}

#[tokio::test]
async fn a_listed_origin_may_call_and_read_the_headers_that_matter() {
    let server =
        TestServer::start(&[("CORS_ALLOWED_ORIGINS", "https://app.example.com,https://b.example")])
            .await;
    let answer = preflight(&server, "https://app.example.com").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(header(&answer, "access-control-allow-origin"), Some("https://app.example.com"));
    let methods = header(&answer, "access-control-allow-methods").unwrap();
    for method in ["GET", "POST", "PUT", "DELETE"] {
        assert!(methods.contains(method), "{methods}");
    }
    let headers = header(&answer, "access-control-allow-headers").unwrap().to_lowercase();
    for name in ["authorization", "content-type", "x-correlation-id"] {
        assert!(headers.contains(name), "{headers}");
    }
    for (origin, expected) in [
        ("https://b.example", Some("https://b.example")),
        ("https://c.example", None),
        ("http://b.example", None),
        ("null", None),
    ] {
        // A refusal must be readable too.
        for request in
            [server.rest(Method::GET, "/authors"), server.request(Method::GET, "/authors")]
        {
            let answer = request.header("origin", origin).send().await.unwrap();
            assert_eq!(header(&answer, "access-control-allow-origin"), expected, "{origin}");
            let exposed = header(&answer, "access-control-expose-headers").unwrap().to_lowercase();
            for name in ["retry-after", "location", "x-ratelimit-remaining", "x-correlation-id"] {
                assert!(exposed.contains(name), "{exposed}");
            }
            // A cache must not give one origin's answer to another.
            let vary: Vec<_> = answer.headers().get_all("vary").iter().collect();
            assert!(vary.iter().any(|v| v.to_str().unwrap().to_lowercase().contains("origin")));
        }
    }
}

#[tokio::test]
async fn a_body_over_one_kib_is_gzipped_where_the_client_asks() {
    let server = TestServer::start(&[]).await;
    let bearer = format!("Authorization: Bearer {}\r\n", server.token("ann"));
    let gzip = format!("{bearer}Accept-Encoding: br;q=0.5, gzip\r\n");
    for c in ["a", "b", "c"] {
        add_author(&server, &c.repeat(255)).await;
    }
    let small = raw(server.addr, "/authors", &gzip).await;
    assert!((800..1024).contains(&small.body.len()), "{}", small.body.len());
    assert_eq!(small.header("content-encoding"), None);
    for i in 0..10 {
        add_author(&server, &format!("{i}{}", "x".repeat(150))).await;
    }
    let packed = raw(server.addr, "/authors", &gzip).await;
    assert_eq!(packed.header("content-encoding"), Some("gzip"));
    assert!(packed.body.windows(2).any(|magic| magic == [0x1f, 0x8b]));
    assert!(packed.body.len() < 1024);
    let unasked = raw(server.addr, "/authors", &bearer).await;
    assert_eq!(unasked.header("content-encoding"), None);
    assert!(unasked.body.len() > 1024);
    let unwanted = format!("{bearer}Accept-Encoding: gzip;q=0\r\n");
    let unpacked = raw(server.addr, "/authors", &unwanted).await;
    assert_eq!(unpacked.header("content-encoding"), None);
}

#[tokio::test]
async fn operations_are_on_their_own_address_and_only_there() {
    let server = TestServer::start(&[("OPS_ADDR", "127.0.0.1:0")]).await;
    let ops = server.ops_addr.unwrap();
    for path in ["/metrics", "/health", "/health/live", "/health/ready"] {
        refused(get(&server, path, &[]).await, 404, "not_found").await;
        assert_eq!(raw(ops, path, "").await.status, 200, "{path}");
    }
    let broadcast = server.rest(Method::POST, "/admin/broadcast");
    let broadcast = broadcast.json(&json!({ "pkg_id": 150, "data": {} }));
    refused(broadcast.send().await.unwrap(), 404, "not_found").await;
    let there = raw(ops, "/admin/broadcast", "").await;
    assert_eq!(there.status, 405);
    let bearer = format!("Authorization: Bearer {}\r\n", server.token("ann"));
    for path in ["/authors", "/authors/1", "/web"] {
        assert_eq!(raw(ops, path, &bearer).await.status, 404, "{path}");
    }
    let health = raw(ops, "/nothing", "").await;
    for (name, value) in SECURITY {
        assert_eq!(health.header(name), Some(*value));
    }
}
