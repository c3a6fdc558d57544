//! What the realm of docker/keycloak lets nobody do, and how browsers log in.

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::Response;
use serde_json::json;

use super::{authors, is_revoked, login, post, refresh, socket};
use crate::support::{
    keycloak::{BROWSERS, Keycloak, SECRET, Tokens, password},
    rest::refused,
};

/// Where the realm's file sends browsers back to, unless it is told otherwise.
const PAGE: &str = "http://localhost:8000/callback";
const VERIFIER: &str = "a-word-of-the-page-that-nobody-else-knows-0123456789";

fn challenge() -> String {
    BASE64_URL_SAFE_NO_PAD.encode(digest(&SHA256, VERIFIER.as_bytes()))
}

/// The `Location` of an answer.
fn sent_to(answer: &Response) -> &str {
    let location = answer.headers().get("location");
    location.unwrap_or_else(|| panic!("{}", answer.status())).to_str().unwrap()
}

/// Logs in as a page does that has PKCE.
async fn browse(keycloak: &Keycloak, user: &str) -> Tokens {
    let challenge = challenge();
    let query = [
        ("client_id", BROWSERS),
        ("response_type", "code"),
        ("scope", "openid"),
        ("redirect_uri", PAGE),
        ("code_challenge", &challenge),
        ("code_challenge_method", "S256"),
    ];
    let page = keycloak.login_page(&query).await;
    let form = [("username", user), ("password", &password(user))];
    let sent = keycloak.fill_in(page, &form).await;
    let sent = sent_to(&sent);
    assert!(sent.starts_with(PAGE), "{sent}");
    let code = sent.split("code=").nth(1).unwrap().split('&').next().unwrap();
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", BROWSERS),
        ("redirect_uri", PAGE),
        ("code", code),
        ("code_verifier", VERIFIER),
    ];
    Tokens::from(&keycloak.tokens(&form).await.json().await.unwrap())
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_password_alone_gets_no_token() {
    let keycloak = Keycloak::up().await;
    for (client, secret, status) in [
        ("switchboard", SECRET, 200),
        ("switchboard", "", 401),
        ("switchboard", "wrong", 401),
        (BROWSERS, "", 400),
        ("admin-cli", "", 401),
        ("grafana", SECRET, 400),
    ] {
        let form = [
            ("grant_type", "password"),
            ("client_id", client),
            ("client_secret", secret),
            ("username", "reader-rob"),
            ("password", "reader-rob-development"),
        ];
        let answer = keycloak.tokens(&form[..]).await;
        let (seen, text) = (answer.status(), answer.text().await.unwrap());
        assert_eq!(seen, status, "{client} {secret}: {text}");
    }
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_browser_logs_in_with_pkce_and_its_logout_closes_its_sockets() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    for user in ["reader-rob", "nobody-nick"] {
        let tokens = browse(&keycloak, user).await;
        let mut sockets = [socket(&server, &tokens).await];
        let status = authors(&server, &tokens.access).await.status();
        assert_eq!(status, if user == "reader-rob" { 200 } else { 403 });
        let since = keycloak.log_out(user).await;
        is_revoked(&server, since, &mut sockets, &tokens.access).await;
    }
    // A token of the login by password is none of another client's.
    let tokens = browse(&keycloak, "reader-rob").await;
    let body = json!({ "refresh_token": tokens.refresh });
    assert!([401, 503].contains(&post(&server, "/auth/refresh", &body).await.status().as_u16()));
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn without_pkce_or_to_another_page_no_browser_is_sent() {
    let keycloak = Keycloak::up().await;
    let challenge = challenge();
    let begin = [("client_id", BROWSERS), ("response_type", "code"), ("scope", "openid")];
    let pkce = |method| [("code_challenge", &*challenge), ("code_challenge_method", method)];
    for (page, pkce) in [(PAGE, &[][..]), (PAGE, &pkce("plain")[..])] {
        let query = [&begin[..], &[("redirect_uri", page)], pkce].concat();
        let answer = keycloak.login_page(&query).await;
        assert!(sent_to(&answer).contains("error=invalid_request"), "{}", sent_to(&answer));
    }
    let query = [&begin[..], &pkce("S256"), &[("redirect_uri", PAGE)]].concat();
    assert_eq!(keycloak.login_page(&query).await.status(), 200);
    for page in
        ["http://127.0.0.1:8000/callback", "https://evil.example/", "http://localhost:8001/"]
    {
        let query = [&begin[..], &pkce("S256"), &[("redirect_uri", page)]].concat();
        assert_eq!(keycloak.login_page(&query).await.status(), 400, "{page}");
    }
    // The client that has a password grant has no page.
    let query = [("client_id", "switchboard"), ("response_type", "code"), ("redirect_uri", PAGE)];
    assert_eq!(keycloak.login_page(&query).await.status(), 400);
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn a_refresh_token_works_once() {
    let keycloak = Keycloak::up().await;
    let server = keycloak.server().await;
    let first = login(&server, "editor-eve").await;
    let second = refresh(&server, &first).await;
    assert_ne!(first.refresh, second.refresh);
    let body = json!({ "refresh_token": first.refresh });
    refused(post(&server, "/auth/refresh", &body).await, 401, "unauthorized").await;
}

#[tokio::test]
#[ignore = "needs Keycloak: tests/keycloak.sh"]
async fn weak_passwords_are_refused() {
    let keycloak = Keycloak::up().await;
    let (user, email) = ("wendy-with-a-long-name", "wendy@switchboard.example");
    keycloak.add_user(user, email).await;
    for weak in ["elevenchars", user, email, &"x".repeat(129)] {
        assert_eq!(keycloak.set_password(user, weak).await, 400, "{weak}");
    }
    let good = ["a good one of 2026", "a better one of 2026"];
    for password in good {
        assert_eq!(keycloak.set_password(user, password).await, 204);
    }
    assert_eq!(keycloak.set_password(user, good[0]).await, 400, "it was used before");
}
