//! Login, refresh and logout over REST, as the identity provider has them.

use std::time::{Duration, Instant};

use reqwest::{Method, Response};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    oidc::trusting,
    support::{
        Client, TestServer,
        issuer::{Issuer, Mood},
        process::Process,
        rest::{path, refused},
        users::PASSWORD,
    },
};

async fn post(server: &TestServer, path: &str, body: &Value) -> Response {
    server.request(Method::POST, path).json(body).send().await.unwrap()
}

async fn try_login(server: &TestServer, user: &str, password: &str) -> Response {
    post(server, "/auth/login", &json!({ "username": user, "password": password })).await
}

/// The tokens of a login that must do: access and refresh.
pub(crate) async fn login(server: &TestServer, user: &str, password: &str) -> (String, String) {
    tokens(try_login(server, user, password).await).await
}

async fn tokens(answer: Response) -> (String, String) {
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["cache-control"], "no-store");
    let body: Value = answer.json().await.unwrap();
    let mut members: Vec<_> = body.as_object().unwrap().keys().collect();
    members.sort_unstable();
    let five = ["access_token", "expires_in", "refresh_expires_in", "refresh_token", "token_type"];
    assert_eq!(members, five);
    assert_eq!((&body["expires_in"], &body["refresh_expires_in"]), (&json!(600), &json!(1800)));
    assert_eq!(body["token_type"], "Bearer");
    let text = |name: &str| body[name].as_str().unwrap().to_owned();
    (text("access_token"), text("refresh_token"))
}

async fn status(server: &TestServer, token: &str) -> u16 {
    let request = server.request(Method::GET, "/authors").bearer_auth(token);
    request.send().await.unwrap().status().as_u16()
}

async fn attempts(server: &TestServer, method: &str, status: &str) -> f64 {
    let labels = format!("method=\"{method}\",status=\"{status}\"");
    server.metric(&format!("keycloak_auth_attempts_total{{{labels}}}")).await
}

#[tokio::test]
async fn a_login_and_a_refresh_bring_tokens_that_let_in() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let (access, refresh) = login(&server, "ann", PASSWORD).await;
    assert_eq!(status(&server, &access).await, 200);
    let body = json!({ "refresh_token": refresh });
    let (access, _) = tokens(post(&server, "/auth/refresh", &body).await).await;
    let mut client = Client::open(server.addr, "/web").await;
    assert_eq!(client.authenticate(&access).await["user"], "ann");

    assert_eq!(attempts(&server, "password", "success").await, 1.0);
    assert_eq!(attempts(&server, "refresh", "success").await, 1.0);
    for operation in ["login", "refresh"] {
        let calls =
            format!("keycloak_operation_duration_seconds_count{{operation=\"{operation}\"}}");
        assert_eq!(server.metric(&calls).await, 1.0, "{operation}");
    }
    // A login, and the token twice.
    assert_eq!(server.metric("auth_attempts_total{status=\"success\"}").await, 3.0);
}

#[tokio::test]
async fn logins_and_their_failures_stand_in_the_audit_trail_with_the_name_that_was_given() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let (access, refresh) = login(&server, "ann", PASSWORD).await;
    assert_eq!(try_login(&server, "mallory", "hush-hush").await.status(), 401);
    let token = json!({ "refresh_token": refresh });
    let logout = server.request(Method::POST, "/auth/logout").bearer_auth(access).json(&token);
    assert_eq!(logout.send().await.unwrap().status(), 204);
    let mut rows = server.audited(3).await;
    // A failure is summed up, and written when its interval ends.
    let failed = rows.iter_mut().find(|row| row["outcome"] == "error").unwrap();
    let data = failed["request_data"].as_object_mut().unwrap();
    assert!(data.remove("first").is_some() && data.remove("last").is_some(), "{data:?}");
    let logout = rows.iter_mut().find(|row| row["resource"] == "/auth/logout").unwrap();
    let sid = logout["request_data"]["sid"].take();
    assert!(sid.as_str().is_some_and(|sid| sid.len() == 36), "{sid}");
    rows.sort_by_key(|row| row["username"].to_string());
    let seen: Vec<_> = rows
        .iter()
        .map(|row| json!([row["resource"], row["outcome"], row["username"], row["request_data"]]))
        .collect();
    assert_eq!(
        serde_json::Value::from(seen),
        json!([
            ["/auth/login", "success", "ann", { "username": "ann" }],
            ["/auth/logout", "success", "id-of-ann", { "sid": null }],
            ["/auth/login", "error", "mallory", { "times": 1 }],
        ])
    );
}

#[tokio::test]
async fn whatever_is_wrong_with_a_login_the_answer_is_the_same() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let mut seen = Vec::new();
    for (user, password) in [("ann", "wrong"), ("ann", "bob"), ("nobody", PASSWORD), ("' &=", "%")]
    {
        let answer = try_login(&server, user, password).await;
        assert_eq!(answer.status(), 401);
        assert!(answer.headers().contains_key("www-authenticate"));
        seen.push(answer.text().await.unwrap());
    }
    seen.dedup();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(seen[0].contains("\"unauthorized\""), "{seen:?}");
    assert_eq!(attempts(&server, "password", "failure").await, 4.0);
    assert_eq!(server.metric("auth_attempts_total{status=\"failed\"}").await, 4.0);
    // That it refuses somebody is no failure of the provider.
    assert_eq!(server.metric("circuit_breaker_failures_total{service=\"keycloak\"}").await, 0.0);
}

#[tokio::test]
async fn a_bad_refresh_token_is_refused_and_is_no_guess() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("AUTH_FAILURES_PER_MINUTE", "2")]).await;
    let (access, _) = login(&server, "ann", PASSWORD).await;
    for bad in ["garbage", "a.b.c", &*access] {
        for route in ["/auth/refresh", "/auth/logout"] {
            let answer = post(&server, route, &json!({ "refresh_token": bad })).await;
            refused(answer, 401, "unauthorized").await;
        }
    }
    assert_eq!(attempts(&server, "refresh", "failure").await, 3.0);
    assert_eq!(server.metric("auth_attempts_total{status=\"failed\"}").await, 0.0);
}

#[tokio::test]
async fn bad_input_is_refused_before_the_provider_is_asked_and_never_repeated() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("MAX_REQUEST_BODY_SIZE", "40KiB")]).await;
    let long = "x".repeat(16 * 1024 + 1);
    for (route, body, wrong) in [
        ("/auth/login", json!({}), ""),
        ("/auth/login", json!([]), ""),
        ("/auth/login", json!({ "username": "ann" }), ""),
        ("/auth/login", json!({ "username": "ann", "password": "" }), "password"),
        ("/auth/login", json!({ "username": "", "password": "hush-hush" }), "username"),
        ("/auth/login", json!({ "username": "ann", "password": ["hush-hush"] }), "password"),
        ("/auth/login", json!({ "username": "ann", "password": 4_711_471 }), "password"),
        ("/auth/login", json!({ "username": "ann", "password": null }), "password"),
        ("/auth/login", json!({ "username": "ann", "password": long }), "password"),
        ("/auth/login", json!({ "username": "ann\0", "password": "hush-hush" }), "username"),
        ("/auth/login", json!({ "username": "ann", "password": "x", "realm": "m" }), "realm"),
        ("/auth/refresh", json!({}), ""),
        ("/auth/refresh", json!({ "refresh_token": "" }), "refresh_token"),
        ("/auth/refresh", json!({ "refresh_token": 4_711_471 }), "refresh_token"),
        ("/auth/logout", json!({ "refresh_token": { "a": "hush-hush" } }), "refresh_token"),
        ("/auth/logout", json!({ "token": "hush-hush" }), "token"),
    ] {
        let details = refused(post(&server, route, &body).await, 422, "invalid_data").await;
        assert_eq!(path(&details), wrong, "{route} {body}");
        let details = details.to_string();
        assert!(!details.contains("hush") && !details.contains("4711"), "{details}");
    }
    for route in ["/auth/login", "/auth/refresh", "/auth/logout"] {
        let request = server.request(Method::POST, route);
        let form = request.header("content-type", "application/x-www-form-urlencoded");
        let form = form.body("username=ann&password=x").send().await.unwrap();
        refused(form, 415, "unsupported_media_type").await;
        let huge = json!({ "refresh_token": "x".repeat(50_000) });
        refused(post(&server, route, &huge).await, 413, "payload_too_large").await;
        let got = server.request(Method::GET, route).send().await.unwrap();
        refused(got, 405, "method_not_allowed").await;
    }
    assert_eq!(issuer.users().asked().len(), 0);
}

#[tokio::test]
async fn a_body_has_at_most_32_kib() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    for path in ["/auth/login", "/auth/refresh", "/auth/logout"] {
        for (size, status) in [(32 * 1024, 422), (32 * 1024 + 1, 413)] {
            let request = server.request(Method::POST, path);
            let request = request.header("content-type", "application/json");
            let body = format!("{}{{}}", " ".repeat(size - 2));
            let answer = request.body(body).send().await.unwrap();
            assert_eq!(answer.status(), status, "{path}: {size} bytes");
        }
    }
}

#[tokio::test]
async fn the_provider_is_asked_by_the_client_with_its_secret_and_the_requests_id() {
    let issuer = Issuer::start().await;
    // Under a name that only clients can reach.
    let (base, public) = (format!("http://{}", issuer.addr), "https://sso.example/realms/test");
    issuer.set_name(public);
    let settings = [
        ("KEYCLOAK_BASE_URL", &*base),
        ("KEYCLOAK_REALM", "test"),
        ("OIDC_ISSUER", public),
        ("KEYCLOAK_CLIENT_SECRET", "hush & hush"),
    ];
    let server = TestServer::start(&settings).await;
    let (_, refresh) = login(&server, "ann", PASSWORD).await;
    for (route, status) in [("/auth/refresh", 200), ("/auth/logout", 204)] {
        let request = server.request(Method::POST, route).header("x-correlation-id", "call-7");
        let answer = request.json(&json!({ "refresh_token": refresh })).send().await.unwrap();
        assert_eq!(answer.status(), status);
        assert_eq!(answer.headers()["x-correlation-id"], "call-7");
    }
    let asked = issuer.users().asked();
    let kinds: Vec<_> =
        asked.iter().map(|asked| (&*asked.path, asked.form.get("grant_type"))).collect();
    let (password, renewal) = ("password".to_owned(), "refresh_token".to_owned());
    assert_eq!(kinds, [("token", Some(&password)), ("token", Some(&renewal)), ("logout", None)]);
    for asked in &asked {
        assert_eq!(asked.form["client_id"], "switchboard");
        assert_eq!(asked.form["client_secret"], "hush & hush");
    }
    assert!(asked[0].correlation.as_ref().is_some_and(|id| id.len() == 8), "{asked:?}");
    assert_eq!(asked[1].correlation.as_deref(), Some("call-7"));
    assert_eq!(asked[2].correlation.as_deref(), Some("call-7"));
}

#[tokio::test]
async fn a_refusal_of_the_server_is_not_the_users() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    for (status, body, ours) in [
        (400, r#"{"error":"invalid_grant"}"#, 401),
        (401, r#"{"error":"invalid_grant"}"#, 401),
        (401, r#"{"error":"invalid_request"}"#, 401),
        // HTTPS required.
        (403, r#"{"error":"invalid_request"}"#, 503),
        (401, r#"{"error":"invalid_client"}"#, 503),
        (400, r#"{"error":"unauthorized_client"}"#, 503),
        (400, r#"{"error":7}"#, 503),
        (401, "who are you?", 503),
        (404, "", 503),
        (302, "", 503),
        (200, "{}", 503),
        (200, "", 503),
        (204, "", 503),
        (429, "", 503),
    ] {
        issuer.users().answer_with(status, body);
        let code = if ours == 401 { "unauthorized" } else { "unavailable" };
        refused(try_login(&server, "ann", PASSWORD).await, ours, code).await;
        let token = json!({ "refresh_token": "r" });
        refused(post(&server, "/auth/refresh", &token).await, ours, code).await;
        if status != 204 {
            refused(post(&server, "/auth/logout", &token).await, ours, code).await;
        }
    }
    assert_eq!(attempts(&server, "password", "failure").await, 3.0);
    assert_eq!(attempts(&server, "password", "error").await, 11.0);
    assert_eq!(attempts(&server, "refresh", "error").await, 11.0);
    // It was there every time.
    assert_eq!(server.metric("circuit_breaker_state{service=\"keycloak\"}").await, 0.0);
}

#[tokio::test]
async fn logins_that_fail_at_a_provider_that_is_well_otherwise_open_the_breaker() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    issuer.set_mood(Mood::LoginsFailing);
    for _ in 0..5 {
        refused(try_login(&server, "ann", PASSWORD).await, 503, "unavailable").await;
    }
    server.until_metric("circuit_breaker_state{service=\"keycloak\"}", 2.0).await;
}

#[tokio::test]
async fn a_provider_that_is_down_is_not_waited_for_once_the_breaker_is_open() {
    let mut issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("OIDC_TIMEOUT", "1s")]).await;
    let (access, refresh) = login(&server, "ann", PASSWORD).await;
    issuer.set_mood(Mood::Slow(Duration::from_secs(60)));
    let asked = Instant::now();
    let answer = try_login(&server, "ann", PASSWORD).await;
    assert!(answer.headers().contains_key("retry-after"));
    refused(answer, 503, "unavailable").await;
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    issuer.set_mood(Mood::Failing);
    refused(try_login(&server, "ann", PASSWORD).await, 503, "unavailable").await;
    issuer.down().await;
    for _ in 0..3 {
        refused(try_login(&server, "ann", PASSWORD).await, 503, "unavailable").await;
    }
    server.until_metric("circuit_breaker_state{service=\"keycloak\"}", 2.0).await;
    let errors = attempts(&server, "password", "error").await;
    assert_eq!(errors, 5.0);
    let token = json!({ "refresh_token": refresh });
    let asked = Instant::now();
    refused(try_login(&server, "ann", PASSWORD).await, 503, "unavailable").await;
    refused(post(&server, "/auth/refresh", &token).await, 503, "unavailable").await;
    refused(post(&server, "/auth/logout", &token).await, 503, "unavailable").await;
    assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
    assert_eq!(status(&server, &access).await, 200, "known keys check tokens all the same");
    // None of it was a failure of the user's.
    assert_eq!(server.metric("auth_attempts_total{status=\"failed\"}").await, 0.0);

    issuer.set_mood(Mood::Well);
    issuer.up().await;
    let started = Instant::now();
    while try_login(&server, "ann", PASSWORD).await.status() != 200 {
        assert!(started.elapsed() < Duration::from_secs(20), "logins do not come back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn without_a_provider_the_answer_says_where_tokens_come_from() {
    let server = TestServer::start(&[]).await;
    for route in ["/auth/login", "/auth/refresh", "/auth/logout"] {
        let answer = post(&server, route, &json!({})).await;
        assert_eq!(answer.status(), 503, "{route}");
        let text = answer.text().await.unwrap();
        assert!(text.contains("\"unavailable\"") && text.contains("switchboard token"), "{text}");
    }
}

#[tokio::test]
async fn guessing_passwords_is_limited_by_address() {
    let issuer = Issuer::start().await;
    let settings = [("AUTH_FAILURES_PER_MINUTE", "3"), ("TRUSTED_PROXIES", "127.0.0.1")];
    let server = trusting(&issuer, &settings).await;
    let login = async |from: &str, password: &str| {
        let request = server.request(Method::POST, "/auth/login").header("x-forwarded-for", from);
        request.json(&json!({ "username": "ann", "password": password })).send().await.unwrap()
    };
    for _ in 0..3 {
        refused(login("203.0.113.1", "guess").await, 401, "unauthorized").await;
    }
    let answer = login("203.0.113.1", PASSWORD).await;
    assert!(answer.headers().contains_key("retry-after"));
    refused(answer, 429, "rate_limit_exceeded").await;
    assert_eq!(issuer.users().asked().len(), 3, "the fourth went no further");
    assert_eq!(login("203.0.113.2", PASSWORD).await.status(), 200);
    assert_eq!(server.metric("rate_limit_hits_total{limit_type=\"http\"}").await, 1.0);
    // The budget is the one of bad tokens.
    let token = server.request(Method::GET, "/authors").header("x-forwarded-for", "203.0.113.1");
    assert_eq!(token.bearer_auth("garbage").send().await.unwrap().status(), 429);
}

#[tokio::test]
async fn the_routes_have_the_budget_of_the_address_whatever_token_comes_along() {
    let issuer = Issuer::start().await;
    let settings = [
        ("RATE_LIMIT_PER_MINUTE", "5"),
        ("RATE_LIMIT_BURST", "0"),
        ("AUTH_FAILURES_PER_MINUTE", "1"),
    ];
    let server = trusting(&issuer, &settings).await;
    for i in 0..5 {
        // An interceptor of the client adds what it has to every request: that is no attempt.
        let request = server.request(Method::POST, "/auth/refresh").bearer_auth("garbage");
        let answer = request.json(&json!({ "refresh_token": "r" })).send().await.unwrap();
        assert_eq!(answer.headers()["x-ratelimit-limit"], "5");
        assert_eq!(answer.headers()["x-ratelimit-remaining"], (4 - i).to_string());
        assert!(answer.headers().contains_key("x-ratelimit-reset"));
        refused(answer, 401, "unauthorized").await;
    }
    let answer = try_login(&server, "ann", PASSWORD).await;
    refused(answer, 429, "rate_limit_exceeded").await;
    assert_eq!(server.metric("auth_attempts_total{status=\"failed\"}").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_passwords_nor_tokens_are_logged() {
    let mut issuer = Issuer::start().await;
    let url = issuer.url();
    let data = TempDir::new().unwrap();
    let environment = [
        ("OIDC_ISSUER", &*url),
        ("LOG_LEVEL", "trace"),
        ("LOG_FORMAT", "json"),
        ("KEYCLOAK_CLIENT_SECRET", "client-hush"),
    ];
    let process = Process::start(data.path(), &environment);
    let ask = async |path: &str, body: Value| {
        let url = format!("http://{}{path}", process.addr);
        reqwest::Client::new().post(url).json(&body).send().await.unwrap()
    };
    let good = json!({ "username": "ann", "password": PASSWORD });
    let answer = ask("/auth/login", good.clone()).await;
    let (access, refresh) = tokens(answer).await;
    for (path, body) in [
        ("/auth/login", json!({ "username": "ann", "password": "hush-hush" })),
        ("/auth/login", json!({ "username": "hush-hush", "password": 4_711_471 })),
        ("/auth/login", json!({ "username": "ann", "password": "x", "hush": "hush-hush" })),
        ("/auth/refresh", json!({ "refresh_token": refresh })),
        ("/auth/refresh", json!({ "refresh_token": "hush-hush" })),
        ("/auth/logout", json!({ "refresh_token": refresh })),
    ] {
        ask(path, body).await;
    }
    let form = "application/x-www-form-urlencoded";
    let url = format!("http://{}/auth/backchannel-logout", process.addr);
    let request = reqwest::Client::new().post(url).header("content-type", form);
    let answer = request.body(format!("logout_token={access}")).send().await.unwrap();
    assert_eq!(answer.status(), 400);
    issuer.users().answer_with(200, r#"{"access_token":"hush-hush"}"#);
    assert_eq!(ask("/auth/login", good.clone()).await.status(), 503);
    issuer.users().answer_with(400, r#"{"error":"hush-hush"}"#);
    assert_eq!(ask("/auth/login", good.clone()).await.status(), 503);
    issuer.down().await;
    assert_eq!(ask("/auth/login", good).await.status(), 503);

    process.signal("-TERM");
    let ran = process.end();
    let log = ran.stdout + &ran.stderr;
    assert!(log.contains("cannot be asked") && log.contains("refuses this server"), "{log}");
    let encoded: String = form_urlencoded::byte_serialize(PASSWORD.as_bytes()).collect();
    let parts = access.split('.').chain(refresh.split('.').skip(1));
    for secret in
        parts.chain([PASSWORD, &*encoded, "b=ttery", "hush-hush", "4711471", "client-hush"])
    {
        assert!(!log.contains(secret), "{secret}");
    }
}
