//! What the process writes: one JSON object a line, each with its own request's ids, and no secrets.

use std::path::Path;

use reqwest::{Client as Http, Method, RequestBuilder};
use serde_json::{Value, json};
use switchboard::auth::DevIssuer;
use tempfile::TempDir;

use crate::support::{
    Client, Closed,
    issuer::now,
    process::{Process, Ran, token},
};

fn http(process: &Process, method: Method, path: &str) -> RequestBuilder {
    Http::new().request(method, format!("http://{}{path}", process.addr))
}

/// Ends the process and reads its lines, every one of which must be as promised.
fn lines(process: Process) -> (Ran, Vec<Value>) {
    process.signal("-TERM");
    let ran = process.end();
    let lines: Vec<Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    for line in &lines {
        let text = |name: &str| line[name].as_str().unwrap_or_else(|| panic!("no {name}: {line}"));
        let timestamp = text("timestamp");
        assert!(timestamp.ends_with('Z') && timestamp.as_bytes()[10] == b'T', "{timestamp}");
        assert!(timestamp.parse::<jiff::Timestamp>().is_ok(), "{timestamp}");
        assert!(["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&text("level")), "{line}");
        assert!(!text("logger").contains(':'), "{line}");
        // Libraries may have only fields.
        let ours = text("logger").starts_with("switchboard");
        assert!(!text("message").is_empty() || !ours, "{line}");
        assert_eq!(text("environment"), "dev", "{line}");
        assert!(line.as_object().unwrap().values().all(|value| !value.is_null()), "{line}");
    }
    (ran, lines)
}

fn of<'a>(lines: &'a [Value], request_id: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["request_id"] == request_id).collect()
}

fn start(data: &Path, more: &[(&str, &str)]) -> Process {
    let settings = [&[("DRAIN_SPREAD", "0s"), ("WS_QUERY_TOKEN", "true")], more].concat();
    Process::start(data, &settings)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_leaves_one_line_that_tells_it_all() {
    let data = TempDir::new().unwrap();
    let bearer = token(data.path(), &["--user", "ann"]);
    let process = start(data.path(), &[("LOG_FORMAT", "json")]);
    for (id, method, path, authorized) in [
        ("listed", Method::GET, "/authors?name=x", true),
        ("missed", Method::GET, "/authors/77", true),
        ("refused", Method::DELETE, "/authors/77", false),
        ("lost", Method::GET, "/nothing", true),
    ] {
        let mut request = http(&process, method, path).header("x-correlation-id", id);
        if authorized {
            request = request.bearer_auth(&bearer);
        }
        request.send().await.unwrap();
    }
    let (_, lines) = lines(process);
    for (id, method, endpoint, status, has_user) in [
        ("listed", "GET", "/authors", 200, true),
        ("missed", "GET", "/authors/77", 404, true),
        ("refused", "DELETE", "/authors/77", 401, false),
        ("lost", "GET", "/nothing", 404, false),
    ] {
        let lines = of(&lines, id);
        assert_eq!(lines.len(), 1, "{id}: {lines:?}");
        let line = lines[0];
        assert_eq!((&line["method"], &line["endpoint"]), (&json!(method), &json!(endpoint)));
        assert_eq!((&line["status_code"], &line["level"]), (&json!(status), &json!("INFO")));
        assert!(line["duration_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{line}");
        assert!(line["logger"].as_str().unwrap().starts_with("switchboard.http"), "{line}");
        assert_eq!(line.get("user_id").is_some(), has_user, "{line}");
        assert_eq!(line.get("connection_id"), None, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_requests_do_not_share_their_ids() {
    let data = TempDir::new().unwrap();
    let tokens: Vec<_> =
        (0..4).map(|i| token(data.path(), &["--user", &format!("user{i}")])).collect();
    let process = start(data.path(), &[("RATE_LIMIT_PER_MINUTE", "0")]);
    let requests = (0..60).map(|i| {
        let request = http(&process, Method::POST, "/authors").bearer_auth(&tokens[i % 4]);
        let request = request.header("x-correlation-id", format!("r{i}"));
        request.json(&json!({ "name": format!("n{}", i / 2) })).send()
    });
    let answers = futures_util::future::join_all(requests).await;
    let (_, lines) = lines(process);
    let mut users = std::collections::HashSet::new();
    for (i, answer) in answers.into_iter().enumerate() {
        let answer = answer.unwrap();
        let id = format!("r{i}");
        assert_eq!(answer.headers()["x-correlation-id"].to_str().unwrap(), id);
        let lines = of(&lines, &id);
        assert_eq!(lines.len(), 1, "{id}: {lines:?}");
        assert_eq!(lines[0]["status_code"], answer.status().as_u16(), "{id}");
        let user = lines[0]["user_id"].as_str().unwrap();
        users.insert((i % 4, user.to_owned()));
    }
    assert_eq!(users.len(), 4, "a user has one id: {users:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_not_logged_at_info() {
    let data = TempDir::new().unwrap();
    for (level, expected) in [("info", 0), ("info,switchboard=debug", 4)] {
        let process = start(data.path(), &[("LOG_LEVEL", level)]);
        for path in ["/health", "/health/live", "/health/ready", "/metrics"] {
            let request = http(&process, Method::GET, path).header("x-correlation-id", "probe");
            assert_eq!(request.send().await.unwrap().status(), 200);
        }
        let (_, lines) = lines(process);
        assert_eq!(of(&lines, "probe").len(), expected, "{level}");
        // The format was not set: no terminal, so it is JSON.
        assert!(lines.iter().any(|line| line["message"] == "listening"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_named_in_its_lines_with_the_id_of_its_upgrade() {
    let data = TempDir::new().unwrap();
    let process = start(data.path(), &[]);
    let bearer = format!("Bearer {}", token(data.path(), &["--user", "ann"]));
    let headers = [("authorization", &*bearer), ("x-correlation-id", "upgrade-1")];
    let mut client = Client::try_open(process.addr, "/web", &headers).await.unwrap();
    let hello = client.receive().await;
    client.close().await;
    let mut stranger =
        Client::try_open(process.addr, "/web", &[("x-correlation-id", "upgrade-2")]).await.unwrap();
    stranger.send(&json!({ "type": "auth", "token": "garbage" })).await;
    assert_eq!(stranger.until_closed().await.1, Closed::Code(4001));
    let (_, lines) = lines(process);
    let seen: Vec<_> = of(&lines, "upgrade-1");
    let messages: Vec<_> = seen.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["request", "connection opened", "connection closed"]);
    assert_eq!(seen[0]["status_code"], 101);
    for line in &seen[1..] {
        assert_eq!(line["connection_id"], hello["connection_id"], "{line}");
        assert!(line["user_id"].is_string(), "{line}");
    }
    assert_eq!(seen[2]["code"], 1000);
    let refused: Vec<_> = of(&lines, "upgrade-2");
    let messages: Vec<_> = refused.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["request", "connection refused"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_logged_with_the_login_session_of_its_token() {
    let data = TempDir::new().unwrap();
    let process = start(data.path(), &[]);
    let issuer = DevIssuer::open(&data.path().join("dev-key.pem"), "switchboard").unwrap();
    let token = |sid: Value| {
        let token = issuer.sign(&json!({
            "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": "7a1f",
            "exp": now() + 600, "sid": sid,
        }));
        format!("Bearer {token}")
    };
    for (id, sid) in [("login-1", json!("first")), ("login-2", Value::Null)] {
        let headers = [("authorization", &*token(sid)), ("x-correlation-id", id)];
        let mut client = Client::try_open(process.addr, "/web", &headers).await.unwrap();
        client.receive().await;
        client.send(&json!({ "type": "refresh", "token": "Bearer garbage" })).await;
        assert_eq!(client.receive().await["type"], "error");
        client.send(&json!({ "type": "refresh", "token": token(json!("second")) })).await;
        assert_eq!(client.receive().await["type"], "refresh_ok");
        client.close().await;
    }
    let (_, lines) = lines(process);
    for (id, first) in [("login-1", json!("first")), ("login-2", Value::Null)] {
        let [_, opened, refused, closed] = of(&lines, id)[..] else { panic!("{lines:?}") };
        assert_eq!((&opened["session_id"], &closed["session_id"]), (&first, &json!("second")));
        assert_eq!(refused["message"], "refresh refused");
        assert_eq!(
            (&refused["user_id"], &refused["code"]),
            (&json!("7a1f"), &json!("unauthorized"))
        );
        assert_eq!(refused["connection_id"], closed["connection_id"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_reaches_a_log_line_at_any_level() {
    let data = TempDir::new().unwrap();
    let roles = ["--roles", "get-authors"];
    let issue = |user| token(data.path(), &[&["--user", user][..], &roles].concat());
    let tokens: Vec<_> = ["ann", "bea", "cy", "dan", "eve"].into_iter().map(issue).collect();
    let process = start(data.path(), &[("LOG_LEVEL", "trace")]);
    let addr = process.addr;
    let get = http(&process, Method::GET, "/authors").bearer_auth(&tokens[0]);
    assert_eq!(get.send().await.unwrap().status(), 200);
    let post = http(&process, Method::POST, "/authors").bearer_auth(&tokens[0]);
    assert_eq!(post.send().await.unwrap().status(), 403);

    let mut first = Client::open(addr, "/web").await;
    first.authenticate(&tokens[1]).await;
    first.send(&json!({ "type": "refresh", "token": format!("Bearer {}", tokens[1]) })).await;
    assert_eq!(first.receive().await["type"], "refresh_ok");
    let mut header =
        Client::try_open(addr, "/web", &[("authorization", &format!("Bearer {}", tokens[2]))])
            .await
            .unwrap();
    assert_eq!(header.receive().await["type"], "auth_ok");
    let mut query = Client::open(addr, &format!("/web?token={}", tokens[3])).await;
    assert_eq!(query.receive().await["type"], "auth_ok");
    let mut old = Client::open(addr, &format!("/web?Authorization=Bearer%20{}", tokens[4])).await;
    assert_eq!(old.receive().await["type"], "auth_ok");
    // Refused ones are secrets as well: another server may take them.
    let refused = "refused-secret-token";
    assert!(Client::try_open(addr, &format!("/web?token={refused}"), &[]).await.is_err());
    first.send(&json!({ "type": "refresh", "token": format!("Bearer {refused}") })).await;
    assert_eq!(first.receive().await["type"], "error");
    let mut bad = Client::open(addr, "/web").await;
    bad.send(&json!({ "type": "auth", "token": format!("Bearer {refused}") })).await;
    assert_eq!(bad.until_closed().await.1, Closed::Code(4001));
    let plain = http(&process, Method::GET, &format!("/web?token={refused}")).send().await.unwrap();
    assert_eq!(plain.status(), 426);
    assert_eq!(http(&process, Method::GET, "/health").send().await.unwrap().status(), 200);

    let (ran, _) = lines(process);
    let written = ran.stdout + &ran.stderr;
    assert!(written.contains("connection opened") && written.contains("\"DEBUG\""));
    assert!(!written.contains(refused));
    for token in &tokens {
        for part in token.split('.').skip(1) {
            assert!(!written.contains(part), "a part of a token was logged");
        }
    }
}
