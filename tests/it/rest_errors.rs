//! Errors over REST: one shape, the right status in the right order, and never 5xx for bad input.

use std::{fs, path::Path, time::Duration};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, Executor, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

use crate::support::{
    TestServer,
    rest::{add_author, path, problem, refused, send_raw},
};

/// Every route with a role: method, path, role.
const GUARDED: &[(&str, &str, &str)] = &[
    ("GET", "/authors", "get-authors"),
    ("GET", "/authors/paginated", "get-authors"),
    ("GET", "/authors/1", "get-authors"),
    ("POST", "/authors", "create-author"),
    ("PUT", "/authors/1", "update-author"),
    ("DELETE", "/authors/1", "delete-author"),
    ("GET", "/audit-logs", "admin"),
    ("GET", "/audit-logs/1", "admin"),
    ("GET", "/audit-logs/user/1", "admin"),
    ("POST", "/admin/broadcast", "admin"),
    ("GET", "/admin/connections", "admin"),
    ("DELETE", "/admin/connections/1", "admin"),
    ("DELETE", "/admin/users/1/connections", "admin"),
];

/// Every route with a body: method, path, a body that fits.
const WITH_BODY: &[(&str, &str, &str)] = &[
    ("POST", "/authors", r#"{"name":"Ann"}"#),
    ("PUT", "/authors/1", r#"{"name":"Ann"}"#),
    ("POST", "/admin/broadcast", r#"{"pkg_id":150,"data":{}}"#),
];

fn method(name: &str) -> Method {
    name.parse().unwrap()
}

#[tokio::test]
async fn a_request_without_a_token_is_401_and_says_what_is_wanted() {
    let server = TestServer::start(&[]).await;
    for (name, path, _) in GUARDED {
        for authorization in [None, Some("Basic YTpi"), Some("Bearer"), Some("Bearer a b c")] {
            // The body is bad as well: that must not show.
            let mut request = server.request(method(name), path).body("{");
            if let Some(authorization) = authorization {
                request = request.header("authorization", authorization);
            }
            let answer = request.send().await.unwrap();
            assert_eq!(answer.headers()["www-authenticate"], "Bearer", "{name} {path}");
            let details = refused(answer, 401, "unauthorized").await;
            assert_eq!(details, json!(null), "{name} {path}");
        }
    }
}

#[tokio::test]
async fn a_missing_role_is_403_before_any_input_is_read() {
    let server = TestServer::start(&[]).await;
    for (name, path, role) in GUARDED {
        let others: Vec<_> =
            switchboard::handlers::roles::ALL.into_iter().filter(|known| known != role).collect();
        let token = server.token_with("ann", &others);
        let path = path.replace("/1", "/not-a-number") + "?page=0&id=x";
        let request = server.request(method(name), &path).bearer_auth(token).body("{");
        let details = refused(request.send().await.unwrap(), 403, "permission_denied").await;
        assert_eq!(details, json!({ "required_roles": [role] }), "{name} {path}");
    }
}

#[tokio::test]
async fn an_unknown_path_is_404_with_or_without_a_token() {
    let server = TestServer::start(&[]).await;
    for path in
        ["/", "/nothing", "/authors/", "/authors/1/books", "/Authors", "//authors", "/admin"]
    {
        let without = server.request(Method::GET, path).send().await.unwrap();
        assert_eq!(refused(without, 404, "not_found").await, json!(null));
        let with = server.rest(Method::POST, path).send().await.unwrap();
        refused(with, 404, "not_found").await;
    }
}

#[tokio::test]
async fn a_method_that_a_path_does_not_take_is_405_with_allow() {
    let server = TestServer::start(&[]).await;
    for (method, path, allowed) in [
        (Method::DELETE, "/authors", &["GET", "HEAD", "POST"][..]),
        (Method::PATCH, "/authors/1", &["DELETE", "GET", "HEAD", "PUT"]),
        (Method::POST, "/authors/paginated", &["GET", "HEAD"]),
        (Method::GET, "/admin/broadcast", &["POST"]),
        (Method::POST, "/health", &["GET", "HEAD"]),
        (Method::PUT, "/metrics", &["GET", "HEAD"]),
        (method("BREW"), "/authors", &["GET", "HEAD", "POST"]),
    ] {
        let answer = server.rest(method.clone(), path).send().await.unwrap();
        let allow = answer.headers().get("allow").map(|allow| allow.to_str().unwrap().to_owned());
        let allow = allow.unwrap_or_else(|| panic!("no Allow: {method} {path}"));
        let mut methods: Vec<_> = allow.split(',').map(str::trim).collect();
        methods.sort_unstable();
        assert_eq!(methods, allowed, "{method} {path}");
        refused(answer, 405, "method_not_allowed").await;
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_by_its_declared_length_before_it_is_sent() {
    let server = TestServer::start(&[]).await;
    let head = format!(
        "POST /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: 1048577\r\n\r\n",
        server.token("ann"),
    );
    // Nothing of the body: the length is enough to know.
    let answer = send_raw(server.addr, head.as_bytes()).await.unwrap();
    assert_eq!(answer.status, 413);
    problem(answer.text(), "payload_too_large");
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_also_when_chunked() {
    let server = TestServer::start(&[("MAX_REQUEST_BODY_SIZE", "1KiB")]).await;
    let request = |body: &str| {
        let mut text = format!(
            "POST /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n\
             Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            server.token("ann"),
        );
        for chunk in body.as_bytes().chunks(100) {
            let chunk = std::str::from_utf8(chunk).unwrap();
            text += &format!("{:x}\r\n{chunk}\r\n", chunk.len());
        }
        text + "0\r\n\r\n"
    };
    let padded = |bytes: usize| format!("{:<bytes$}", r#"{"name":"Ann"}"#);
    let fits = send_raw(server.addr, request(&padded(1024)).as_bytes()).await.unwrap();
    assert_eq!(fits.status, 201);
    let over = send_raw(server.addr, request(&padded(1025)).as_bytes()).await.unwrap();
    assert_eq!(over.status, 413);
    problem(over.text(), "payload_too_large");
}

#[tokio::test]
async fn a_body_that_is_not_json_is_415() {
    let server = TestServer::start(&[]).await;
    for (kind, status) in [
        (None, 415),
        (Some("text/plain"), 415),
        (Some("application/x-www-form-urlencoded"), 415),
        (Some("application/jsonp"), 415),
        (Some("garbage"), 415),
        (Some("Application/JSON; charset=utf-8"), 201),
        (Some("application/vnd.author+json"), 409),
    ] {
        let mut request = server.rest(Method::POST, "/authors").body(r#"{"name":"Ann"}"#);
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{kind:?}");
        if status == 415 {
            refused(answer, 415, "unsupported_media_type").await;
        }
    }
}

#[tokio::test]
async fn every_route_with_a_body_refuses_one_that_is_too_large_no_json_or_malformed() {
    let server = TestServer::start(&[("MAX_REQUEST_BODY_SIZE", "1KiB")]).await;
    for (name, path, fits) in WITH_BODY {
        for (body, kind, status, code) in [
            (format!("{fits:<1025}"), "application/json", 413, "payload_too_large"),
            (format!("{fits:<1024}"), "text/plain", 415, "unsupported_media_type"),
            ("{".to_owned(), "application/json", 422, "invalid_data"),
        ] {
            let request = server.rest(method(name), path).header("content-type", kind);
            refused(request.body(body).send().await.unwrap(), status, code).await;
        }
        let request = server.rest(method(name), path).header("content-type", "application/json");
        let answer = request.body(format!("{fits:<1024}")).send().await.unwrap();
        assert!(answer.status().is_success(), "{name} {path}: {}", answer.status());
    }
}

#[tokio::test]
async fn malformed_json_is_422_with_the_reason() {
    let server = TestServer::start(&[]).await;
    for body in [&b""[..], b"{", b"{'name':'a'}", b"{\"name\":\"a\"} x", b"{\"name\":NaN}", b"\xff"]
    {
        let request = server.rest(Method::POST, "/authors").body(body);
        let request = request.header("content-type", "application/json");
        let details = refused(request.send().await.unwrap(), 422, "invalid_data").await;
        path(&details);
    }
    let deep = "[".repeat(100_000);
    let request = server.rest(Method::POST, "/authors").body(deep);
    let request = request.header("content-type", "application/json");
    refused(request.send().await.unwrap(), 422, "invalid_data").await;
}

#[tokio::test]
async fn an_exhausted_budget_is_429_with_the_time_to_wait() {
    let server =
        TestServer::start(&[("RATE_LIMIT_PER_MINUTE", "2"), ("RATE_LIMIT_BURST", "0")]).await;
    for _ in 0..2 {
        assert_eq!(server.rest(Method::GET, "/authors").send().await.unwrap().status(), 200);
    }
    let answer = server.rest(Method::GET, "/authors").send().await.unwrap();
    let wait: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(answer.headers()["x-ratelimit-remaining"], "0");
    let details = refused(answer, 429, "rate_limit_exceeded").await;
    let millis = details["retry_after_ms"].as_u64().unwrap();
    assert!((1..=wait * 1000).contains(&millis), "{millis}");
}

#[tokio::test]
async fn every_route_with_a_role_is_limited_and_tells_the_budget_whatever_it_answers() {
    let server =
        TestServer::start(&[("RATE_LIMIT_PER_MINUTE", "1"), ("RATE_LIMIT_BURST", "0")]).await;
    for (i, (name, path, _)) in GUARDED.iter().enumerate() {
        let token = server.token_with(&format!("user{i}"), &[]);
        for (status, code) in [(403, "permission_denied"), (429, "rate_limit_exceeded")] {
            let request = server.request(method(name), path).bearer_auth(&token);
            let answer = request.send().await.unwrap();
            let number = |header| answer.headers()[header].to_str().unwrap().parse::<u64>();
            assert_eq!(number("x-ratelimit-limit"), Ok(1), "{name} {path}");
            assert_eq!(number("x-ratelimit-remaining"), Ok(0), "{name} {path}");
            assert!(number("x-ratelimit-reset").is_ok_and(|s| (1..=60).contains(&s)), "{path}");
            assert_eq!(answer.headers().contains_key("retry-after"), status == 429, "{path}");
            refused(answer, status, code).await;
        }
    }
}

#[tokio::test]
async fn a_database_that_cannot_be_read_is_503_on_every_route_that_reads() {
    for path in ["/authors", "/authors/1", "/authors/paginated", "/authors/paginated?cursor="] {
        let data = TempDir::new().unwrap();
        let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
        // What readers have in their caches is out of date.
        add_author(&server, "Ann").await;
        for file in ["switchboard.db", "switchboard.db-wal"] {
            // Emptied in place, as by a full or failing disk.
            fs::File::create(data.path().join(file)).unwrap();
        }
        let answer = server.rest(Method::GET, path).send().await.unwrap();
        assert_eq!(refused(answer, 503, "unavailable").await, json!(null), "{path}");
    }
}

#[tokio::test]
async fn a_locked_database_is_503_and_no_cause_is_told() {
    let data = TempDir::new().unwrap();
    let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
    let file = Path::new(data.path()).join("switchboard.db");
    let mut other =
        SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(file)).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let change = |method, path| {
        let request = server.rest(method, path).json(&json!({ "name": "Ann" }));
        request.timeout(Duration::from_secs(20)).send()
    };
    let create = change(Method::POST, "/authors");
    let (rename, delete) =
        (change(Method::PUT, "/authors/1"), change(Method::DELETE, "/authors/1"));
    for answer in join_all([create, rename, delete]).await {
        assert_eq!(refused(answer.unwrap(), 503, "unavailable").await, json!(null));
    }
    // The first of them holds the one connection of writers; the others wait for it.
    let mut failed = 0.0;
    for operation in ["insert", "update", "delete"] {
        let labels = format!(r#"{{error_type="connection_error",operation="{operation}"}}"#);
        failed += server.metric(&format!("db_errors_total{labels}")).await;
    }
    assert!(failed >= 1.0, "{failed}");
    // Readers do not care.
    assert_eq!(server.rest(Method::GET, "/authors").send().await.unwrap().status(), 200);
    other.execute("ROLLBACK").await.unwrap();
    let create = server.rest(Method::POST, "/authors").json(&json!({ "name": "Ann" }));
    assert_eq!(create.send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn a_broadcast_reaches_everyone_or_one_user() {
    let server = TestServer::start(&[]).await;
    let (mut ann, mut bea) = (server.client("ann").await, server.client("bea").await);
    let broadcast = |body| server.rest(Method::POST, "/admin/broadcast").json(&body).send();
    let all = broadcast(json!({ "pkg_id": 150, "data": { "x": 1 } })).await.unwrap();
    assert_eq!(all.status(), 202);
    let reached: serde_json::Value = all.json().await.unwrap();
    assert_eq!(reached, json!({ "nodes": 1, "connections": 2 }));
    for client in [&mut ann, &mut bea] {
        let push = client.receive().await;
        let expected = json!({ "pkg_id": 150, "data": { "x": 1 },
                               "req_id": "00000000-0000-0000-0000-000000000000" });
        assert_eq!(push, expected);
    }
    for (user, connections) in [("bea", 1), ("nobody", 0)] {
        let one = broadcast(json!({ "pkg_id": 151, "data": {}, "user": user })).await.unwrap();
        let reached: serde_json::Value = one.json().await.unwrap();
        assert_eq!(reached["connections"], connections, "{user}");
    }
    assert_eq!(bea.receive().await["pkg_id"], 151);
    ann.silent_for(Duration::from_millis(100)).await;
    for (body, expected) in [
        (json!({ "data": {} }), ""),
        (json!({ "pkg_id": 1 }), ""),
        (json!({ "pkg_id": 2_147_483_648_i64, "data": {} }), "pkg_id"),
        (json!({ "pkg_id": 1, "data": {}, "user": 5 }), "user"),
        (json!({ "pkg_id": 1, "data": {}, "more": 5 }), "more"),
    ] {
        let details = refused(broadcast(body).await.unwrap(), 422, "invalid_data").await;
        assert_eq!(path(&details), expected);
    }
}

#[tokio::test]
async fn nothing_that_a_client_sends_gives_5xx() {
    let server = TestServer::start(&[]).await;
    let token = server.token("ann");
    let authorized = format!("Authorization: Bearer {token}\r\n");
    let json = "Content-Type: application/json\r\n";
    let long = "x".repeat(8000);
    let requests = [
        format!("GET /authors?name=%00 HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors?search=%FF%FE HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors?search={long} HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors?id=%F0%9F%98%80&id=&id=1 HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors?&&==&=x HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors/paginated?name=%25%5F&id=-5 HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors/%2e%2e/%2e HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors/%FF HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /%ZZ HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET http://a/authors HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        format!("GET /authors HTTP/1.0\r\n{authorized}\r\n"),
        format!("GET /authors HTTP/1.1\r\n{authorized}\r\n"),
        "GET /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \u{e9}\r\n\r\n".to_owned(),
        "GET /authors HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: ,,;x\r\n\r\n".to_owned(),
        format!("GET /authors HTTP/1.1\r\nHost: a\r\nX-Correlation-ID: \u{e9}\r\n{authorized}\r\n"),
        format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(70_000)),
        format!("POST /authors HTTP/1.1\r\nHost: a\r\n{authorized}{json}Content-Length: x\r\n\r\n"),
        format!("POST /authors HTTP/1.1\r\nHost: a\r\n{authorized}{json}Content-Length: 0\r\n\r\n"),
        format!(
            "POST /authors HTTP/1.1\r\nHost: a\r\n{authorized}{json}Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        ),
        format!(
            "POST /authors HTTP/1.1\r\nHost: a\r\n{authorized}{json}Content-Length: 27\r\n\r\n{{\"name\":\"\\ud800 and so on\"}}"
        ),
        format!(
            "PUT /authors/1e3 HTTP/1.1\r\nHost: a\r\n{authorized}{json}Content-Length: 2\r\n\r\n{{}}"
        ),
        format!("DELETE /authors/+1 HTTP/1.1\r\nHost: a\r\n{authorized}\r\n"),
        "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "TRACE / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET /web HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        "\r\n\r\n\0\0garbage\r\n\r\n".to_owned(),
    ];
    for request in requests {
        let shown: String = request.chars().take(100).collect();
        let request = request.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        if let Some(answer) = send_raw(server.addr, request.as_bytes()).await {
            assert!((200..500).contains(&answer.status), "{}: {shown}", answer.status);
        }
    }
    let healthy = server.request(Method::GET, "/health").send().await.unwrap();
    assert_eq!(healthy.status(), 200);
}
