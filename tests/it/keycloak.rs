//! Users, sessions and keys of a real Keycloak. `tests/keycloak.sh` starts it and runs these, one at a time.

mod realm;

use std::time::{Duration, Instant};

use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{
    Client, Closed, TestServer,
    keycloak::{Keycloak, SECRET, Tokens, password},
    monitoring::unserved,
    rest::refused,
};

/// The users of docker/keycloak, and whether they may read and add authors.
const USERS: [(&str, bool, bool); 4] = [
    ("admin-ann", true, true),
    ("editor-eve", true, true),
    ("reader-rob", true, false),
    ("nobody-nick", false, false),
];
/// A server asks for the keys again at most this often, and a bit.
const KEYS_PATIENCE: Duration = Duration::from_secs(15);
/// For a logout in Keycloak to arrive.
const LOGOUT_PATIENCE: Duration = Duration::from_secs(2);

async fn post(server: &TestServer, path: &str, body: &Value) -> Response {
    server.request(Method::POST, path).json(body).send().await.unwrap()
}

async fn try_login(server: &TestServer, user: &str, password: &str) -> Response {
    post(server, "/auth/login", &json!({ "username": user, "password": password })).await
}

async fn login(server: &TestServer, user: &str) -> Tokens {
    let answer = try_login(server, user, &password(user)).await;
    assert_eq!(answer.status(), 200, "{user}");
    Tokens::from(&answer.json().await.unwrap())
}

async fn refresh(server: &TestServer, tokens: &Tokens) -> Tokens {
    let answer = post(server, "/auth/refresh", &json!({ "refresh_token": tokens.refresh })).await;
    assert_eq!(answer.status(), 200);
    Tokens::from(&answer.json().await.unwrap())
}

async fn log_out(server: &TestServer, tokens: &Tokens) -> StatusCode {
    let request = server.request(Method::POST, "/auth/logout").bearer_auth(&tokens.access);
    let body = json!({ "refresh_token": tokens.refresh });
    request.json(&body).send().await.unwrap().status()
}

/// A REST call that needs the role get-authors.
async fn authors(server: &TestServer, token: &str) -> Response {
    server.request(Method::GET, "/authors").bearer_auth(token).send().await.unwrap()
}

async fn socket(server: &TestServer, tokens: &Tokens) -> Client {
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(&tokens.access).await;
    client
}

async fn is_open(client: &mut Client) {
    assert_eq!(client.call(100, json!({ "still": "here" })).await["status_code"], 0);
}

/// Sockets of a session that was ended close in time, and its token opens no other.
async fn is_revoked(server: &TestServer, since: Instant, sockets: &mut [Client], token: &str) {
    for client in sockets {
        assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    }
    let took = since.elapsed();
    assert!(took < LOGOUT_PATIENCE, "{took:?}");
    refused(authors(server, token).await, 401, "unauthorized").await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    assert_eq!(client.until_closed().await.1, Closed::Code(4001));
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_user_logs_in_and_may_do_what_their_roles_say() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    for (user, reads, adds) in USERS {
        let answer = try_login(&server, user, &password(user)).await;
        assert_eq!(answer.status(), 200, "{user}");
        let body: Value = answer.json().await.unwrap();
        let mut members: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        members.sort_unstable();
        let expected =
            ["access_token", "expires_in", "refresh_expires_in", "refresh_token", "token_type"];
        assert_eq!(members, expected, "{user}");
        assert_eq!((&body["expires_in"], &body["token_type"]), (&json!(300), &json!("Bearer")));

        let tokens = Tokens::from(&body);
        let status = authors(&server, &tokens.access).await.status();
        assert_eq!(status, if reads { 200 } else { 403 }, "{user}");
        let mut client = Client::open(server.addr, "/web").await;
        let hello = client.authenticate(&tokens.access).await;
        assert_eq!(hello["user"], user);
        assert!(hello["expires_in"].as_i64().is_some_and(|s| (290..=300).contains(&s)), "{hello}");
        let answer = client.call(1, json!({})).await;
        assert_eq!(answer["status_code"], if reads { 0 } else { 3 }, "{user}");
        let answer = client.call(3, json!({ "name": format!("by {user}") })).await;
        assert_eq!(answer["status_code"], if adds { 0 } else { 3 }, "{user}");
    }
    let logins = "keycloak_auth_attempts_total{method=\"password\",status=\"success\"}";
    assert!((server.metric(logins).await - 4.0).abs() < f64::EPSILON);
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_login_that_keycloak_refuses_is_401_whatever_the_reason() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let long = "x".repeat(16 * 1024);
    for (user, password) in [
        ("reader-rob", "wrong"),
        ("nobody-knows", "x"),
        ("'\" &=%", "&=%00"),
        // What makes Keycloak fail would open the breaker for everybody.
        ("\u{10FFFF}\u{202E}", "\u{0}\u{FFFE}"),
        (&long, "x"),
        ("reader-rob", &long),
        ("nobody-knows", &long),
    ] {
        refused(try_login(&server, user, password).await, 401, "unauthorized").await;
        keycloak.forget_failures().await;
    }
    // Two wrong passwords at once lock a user: then the right one is refused as well.
    for _ in 0..2 {
        refused(try_login(&server, "reader-rob", "wrong").await, 401, "unauthorized").await;
    }
    sleep(Duration::from_millis(500)).await;
    refused(try_login(&server, "reader-rob", &password("reader-rob")).await, 401, "unauthorized")
        .await;
    keycloak.forget_failures().await;
    let tokens = login(&server, "reader-rob").await;

    keycloak.set_enabled("reader-rob", false).await;
    refused(try_login(&server, "reader-rob", &password("reader-rob")).await, 401, "unauthorized")
        .await;
    let body = json!({ "refresh_token": tokens.refresh });
    refused(post(&server, "/auth/refresh", &body).await, 401, "unauthorized").await;
    keycloak.set_enabled("reader-rob", true).await;
    login(&server, "reader-rob").await;
    let failed = "keycloak_auth_attempts_total{method=\"password\",status=\"failure\"}";
    assert!(server.metric(failed).await >= 7.0);
    // A refusal is an answer: Keycloak is well.
    let failures = server.metric("circuit_breaker_failures_total{service=\"keycloak\"}").await;
    assert!(failures.abs() < f64::EPSILON, "{failures}");
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_confidential_client_needs_its_secret_and_that_is_no_fault_of_users() {
    let keycloak = Keycloak::up().await;
    keycloak.set_secret("hush & hush%20+").await;
    let server = keycloak.server_with(&[("KEYCLOAK_CLIENT_SECRET", "hush & hush%20+")]).await;
    let tokens = refresh(&server, &login(&server, "reader-rob").await).await;
    let mut client = [socket(&server, &tokens).await];
    let since = Instant::now();
    assert_eq!(log_out(&server, &tokens).await, 204);
    is_revoked(&server, since, &mut client, &tokens.access).await;
    for secret in ["wrong", ""] {
        let server = keycloak.server_with(&[("KEYCLOAK_CLIENT_SECRET", secret)]).await;
        refused(
            try_login(&server, "reader-rob", &password("reader-rob")).await,
            503,
            "unavailable",
        )
        .await;
        let failed = "keycloak_auth_attempts_total{method=\"password\",status=\"error\"}";
        assert!((server.metric(failed).await - 1.0).abs() < f64::EPSILON);
    }
    keycloak.set_secret(SECRET).await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_refresh_brings_the_roles_that_changed_meanwhile() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let mut tokens = login(&server, "reader-rob").await;
    let session = tokens.session();
    let mut client = socket(&server, &tokens).await;
    for (given, gained, lost, status) in
        [(true, json!([3]), json!([]), 0), (false, json!([]), json!([3]), 3)]
    {
        keycloak.set_role("reader-rob", "create-author", given).await;
        tokens = refresh(&server, &tokens).await;
        assert_eq!(tokens.session(), session);
        let frame = json!({ "type": "refresh", "token": format!("Bearer {}", tokens.access) });
        client.send(&frame).await;
        let answer = client.receive().await;
        assert_eq!(answer["type"], "refresh_ok", "{answer}");
        assert_eq!((&answer["gained"], &answer["lost"]), (&gained, &lost), "{answer}");
        let answer = client.call(3, json!({ "name": format!("by Rob {given}") })).await;
        assert_eq!(answer["status_code"], status, "{answer}");
    }
    for bad in ["garbage", "", &*tokens.access] {
        let answer = post(&server, "/auth/refresh", &json!({ "refresh_token": bad })).await;
        assert!([401, 422].contains(&answer.status().as_u16()), "{bad:?}: {}", answer.status());
    }
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_logout_ends_one_session_and_not_the_users_other_one() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let (gone, kept) = (login(&server, "reader-rob").await, login(&server, "reader-rob").await);
    let mut ended = [socket(&server, &gone).await, socket(&server, &gone).await];
    let mut client = socket(&server, &kept).await;

    // These name the session too, but it is not theirs to end.
    let forged = format!("{}AAAA", &gone.refresh[..gone.refresh.len() - 4]);
    for bad in ["garbage", &forged, &gone.access] {
        let answer = post(&server, "/auth/logout", &json!({ "refresh_token": bad })).await;
        refused(answer, 401, "unauthorized").await;
    }
    for client in &mut ended {
        is_open(client).await;
    }
    let since = Instant::now();
    for _ in 0..2 {
        assert_eq!(log_out(&server, &gone).await, 204);
    }
    is_revoked(&server, since, &mut ended, &gone.access).await;
    let body = json!({ "refresh_token": gone.refresh });
    refused(post(&server, "/auth/refresh", &body).await, 401, "unauthorized").await;

    is_open(&mut client).await;
    let again = refresh(&server, &kept).await;
    assert_eq!(authors(&server, &again.access).await.status(), 200);

    // The same from Keycloak's side.
    let since = keycloak.end_session(&kept.session()).await;
    is_revoked(&server, since, &mut [client], &again.access).await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_user_logged_out_by_an_administrator_loses_every_socket_and_nobody_else_does() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let (desk, phone) = (login(&server, "reader-rob").await, login(&server, "reader-rob").await);
    let mut gone = Vec::new();
    for tokens in [&desk, &phone, &desk, &phone] {
        gone.push(socket(&server, tokens).await);
    }
    let other = login(&server, "editor-eve").await;
    let mut kept = [socket(&server, &other).await, socket(&server, &other).await];

    let since = keycloak.log_out("reader-rob").await;
    is_revoked(&server, since, &mut gone, &desk.access).await;
    refused(authors(&server, &phone.access).await, 401, "unauthorized").await;
    server.until_metric("ws_disconnections_total{code=\"4004\"}", 4.0).await;

    for client in &mut kept {
        is_open(client).await;
    }
    assert_eq!(authors(&server, &other.access).await.status(), 200);
    let fresh = login(&server, "reader-rob").await;
    is_open(&mut socket(&server, &fresh).await).await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn the_keys_are_rotated_under_a_hundred_sockets_and_none_drops() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let old = login(&server, "admin-ann").await;
    let mut sockets = Vec::new();
    for _ in 0..100 {
        sockets.push(socket(&server, &old).await);
    }

    keycloak.rotate_keys().await;
    let new = login(&server, "editor-eve").await;
    assert_ne!(new.key_id(), old.key_id());
    let since = Instant::now();
    while authors(&server, &new.access).await.status() != 200 {
        assert!(since.elapsed() < KEYS_PATIENCE, "the new key is not fetched");
        sleep(Duration::from_millis(250)).await;
    }
    is_open(&mut socket(&server, &new).await).await;
    // The old key is published still.
    assert_eq!(authors(&server, &old.access).await.status(), 200);
    let renewed = refresh(&server, &old).await;
    assert_eq!(renewed.key_id(), new.key_id());
    let frame = json!({ "type": "refresh", "token": format!("Bearer {}", renewed.access) });
    sockets[0].send(&frame).await;
    assert_eq!(sockets[0].receive().await["type"], "refresh_ok");

    keycloak.withdraw_old_keys().await;
    for client in &mut sockets {
        is_open(client).await;
    }
    // The logout token is signed by the new key.
    let since = keycloak.log_out("admin-ann").await;
    is_revoked(&server, since, &mut sockets, &renewed.access).await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn sockets_and_tokens_outlive_keycloak_and_logins_come_back_with_it() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let tokens = login(&server, "reader-rob").await;
    let mut client = socket(&server, &tokens).await;
    let breaker = "circuit_breaker_state{service=\"keycloak\"}";

    keycloak.stop().await;
    for _ in 0..50 {
        refused(
            try_login(&server, "reader-rob", &password("reader-rob")).await,
            503,
            "unavailable",
        )
        .await;
        if server.metric(breaker).await > 1.5 {
            break;
        }
    }
    server.until_metric(breaker, 2.0).await;
    let since = Instant::now();
    refused(try_login(&server, "reader-rob", &password("reader-rob")).await, 503, "unavailable")
        .await;
    assert!(since.elapsed() < Duration::from_millis(100), "{:?}", since.elapsed());
    let body = json!({ "refresh_token": tokens.refresh });
    refused(post(&server, "/auth/refresh", &body).await, 503, "unavailable").await;
    is_open(&mut client).await;
    is_open(&mut socket(&server, &tokens).await).await;
    assert_eq!(authors(&server, &tokens.access).await.status(), 200);

    keycloak.start().await;
    let since = Instant::now();
    while try_login(&server, "reader-rob", &password("reader-rob")).await.status() != 200 {
        assert!(since.elapsed() < Duration::from_secs(60), "logins do not come back");
        sleep(Duration::from_millis(250)).await;
    }
    server.until_metric(breaker, 0.0).await;
    is_open(&mut client).await;
    // Keycloak keeps its sessions over a restart.
    let renewed = refresh(&server, &tokens).await;
    let since = keycloak.log_out("reader-rob").await;
    is_revoked(&server, since, &mut [client], &renewed.access).await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_token_is_accepted_in_every_algorithm_of_private_keys() {
    let keycloak = Keycloak::up().await;
    for algorithm in
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA", "HS256"]
    {
        keycloak.sign_with(algorithm).await;
        let form = [
            ("grant_type", "password"),
            ("client_id", "switchboard"),
            ("client_secret", SECRET),
            ("username", "reader-rob"),
            ("password", "reader-rob-development"),
        ];
        // The first token makes the key, which the server then finds when it starts.
        let tokens = Tokens::from(&keycloak.tokens(&form).await.json().await.unwrap());
        let server = keycloak.server().await;
        let status = authors(&server, &tokens.access).await.status();
        // The secret of HS256 is Keycloak's own, so that nobody else can check such a token.
        assert_eq!(status, if algorithm == "HS256" { 401 } else { 200 }, "{algorithm}");
    }
    keycloak.sign_with("").await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn keycloaks_other_tokens_let_nobody_in() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let form = |client: &'static str| {
        [
            ("grant_type", "password"),
            ("client_id", client),
            ("client_secret", SECRET),
            ("username", "admin-ann"),
            ("password", "admin-ann-development"),
            ("scope", "openid"),
        ]
    };
    let ours: Value = keycloak.tokens(&form("switchboard")).await.json().await.unwrap();
    keycloak.set_password_grant("grafana", true).await;
    let others: Value = keycloak.tokens(&form("grafana")).await.json().await.unwrap();
    keycloak.set_password_grant("grafana", false).await;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    assert_eq!(authors(&server, &text(&ours["access_token"])).await.status(), 200);
    for (name, token) in [
        ("a refresh token", text(&ours["refresh_token"])),
        ("an ID token", text(&ours["id_token"])),
        ("another client's token", text(&others["access_token"])),
        ("another realm's token", keycloak.admin_token().await),
    ] {
        let answer = authors(&server, &token).await;
        assert_eq!(answer.status(), 401, "{name}");
    }
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn grafana_learns_the_role_of_those_who_may_come_in() {
    let keycloak = Keycloak::up().await;
    for (user, roles) in [
        ("admin-ann", json!(["admin"])),
        ("editor-eve", Value::Null),
        ("reader-rob", json!(["viewer"])),
        ("nobody-nick", Value::Null),
    ] {
        assert_eq!(keycloak.id_token("grafana", user).await["roles"], roles, "{user}");
    }
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn it_has_every_metric_that_its_dashboard_asks_for() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    login(&server, "reader-rob").await;
    let beginnings = ["agroal_", "http_", "jvm_", "process_", "system_"];
    let missing = unserved("Keycloak", &beginnings, &keycloak.metrics().await);
    assert_eq!(missing, [""; 0]);
}
