//! Which tokens let in, over REST and WebSocket, which share the validator; and when they cease to.

use reqwest::Method;
use serde_json::{Value, json};
use switchboard::{auth::DevIssuer, handlers::roles};
use tempfile::TempDir;

use crate::{
    bad_tokens::{refused_by_rest, refused_by_websocket},
    support::{
        Client, TestServer,
        issuer::{self, CLIENT, now},
        rest::{refused, send_raw},
    },
};

fn claims(changes: Value) -> Value {
    issuer::claims("switchboard-dev", &changes)
}

#[tokio::test]
async fn a_bad_token_at_the_upgrade_is_401_before_any_socket() {
    let server = TestServer::start(&[]).await;
    let expired = server.issuer.sign(&claims(json!({ "exp": now() - 3600 })));
    for (token, code) in [("garbage", "unauthorized"), (&*expired, "token_expired")] {
        let request = format!(
            "GET /web HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Authorization: Bearer {token}\r\n\r\n"
        );
        let answer = send_raw(server.addr, request.as_bytes()).await.unwrap();
        assert_eq!(answer.status, 401);
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        crate::support::rest::problem(answer.text(), code);
    }
}

#[tokio::test]
async fn an_expired_token_is_told_apart_from_a_bad_one() {
    let server = TestServer::start(&[("JWT_LEEWAY", "60s")]).await;
    for ago in [90, 3600] {
        let token = server.issuer.sign(&claims(json!({ "exp": now() - ago })));
        refused_by_rest(server.addr, "expired", &token, "token_expired").await;
        refused_by_websocket(server.addr, "expired", &token, "token_expired").await;
    }
    // Expired, but not by us: that a stranger's token is expired is nobody's business.
    let elsewhere = TempDir::new().unwrap();
    let other = DevIssuer::open(&elsewhere.path().join("key.pem"), CLIENT).unwrap();
    let token = other.sign(&claims(json!({ "exp": now() - 3600 })));
    refused_by_rest(server.addr, "a stranger's", &token, "unauthorized").await;
}

#[tokio::test]
async fn a_token_is_accepted_within_the_leeway() {
    let server = TestServer::start(&[("JWT_LEEWAY", "60s")]).await;
    for changes in [json!({ "exp": now() - 30 }), json!({ "nbf": now() + 30 })] {
        let token = server.issuer.sign(&claims(changes.clone()));
        let answer =
            server.request(Method::GET, "/authors").bearer_auth(&token).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{changes}");
        Client::open(server.addr, "/web").await.authenticate(&token).await;
    }
    let strict = TestServer::start(&[("JWT_LEEWAY", "0s")]).await;
    let token = strict.issuer.sign(&claims(json!({ "exp": now() - 5 })));
    refused_by_rest(strict.addr, "no leeway", &token, "token_expired").await;
}

#[tokio::test]
async fn a_token_for_this_client_is_accepted_in_every_form_it_comes_in() {
    let server = TestServer::start(&[]).await;
    for changes in [
        json!({ "azp": "other", "aud": CLIENT }),
        json!({ "azp": null, "aud": ["account", CLIENT] }),
        json!({ "aud": "account" }),
        json!({ "typ": "bearer" }),
        json!({ "preferred_username": null }),
        json!({ "exp": 4_102_444_800_u64 }),
        json!({ "exp": u64::MAX }),
        json!({ "exp": u64::MAX / 2, "more": { "claims": [1, 2, 3] } }),
    ] {
        let token = server.issuer.sign(&claims(changes.clone()));
        let answer =
            server.request(Method::GET, "/authors").bearer_auth(&token).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{changes}");
        let mut client = Client::open(server.addr, "/web").await;
        client.authenticate(&token).await;
        assert_eq!(client.call(100, json!({})).await["status_code"], 0, "{changes}");
    }
    let token = server.token("ann");
    for scheme in ["bearer", "BEARER"] {
        let request = server.request(Method::GET, "/authors");
        let answer = request.header("authorization", format!("{scheme} {token}"));
        assert_eq!(answer.send().await.unwrap().status(), 200, "{scheme}");
    }
}

#[tokio::test]
async fn roles_of_another_client_or_of_the_realm_do_not_count() {
    let server = TestServer::start(&[]).await;
    for changes in [
        json!({ "resource_access": { "other": { "roles": roles::ALL } } }),
        json!({ "resource_access": null, "realm_access": { "roles": roles::ALL } }),
        json!({ "resource_access": { CLIENT: {} }, "roles": roles::ALL }),
        json!({ "resource_access": { CLIENT: { "roles": ["GET-AUTHORS", "get-authors "] } } }),
    ] {
        let token = server.issuer.sign(&claims(changes));
        let answer = server.request(Method::GET, "/authors").bearer_auth(&token).send();
        refused(answer.await.unwrap(), 403, "permission_denied").await;
        let mut client = Client::open(server.addr, "/web").await;
        client.authenticate(&token).await;
        assert_eq!(client.call(1, json!({})).await["status_code"], 3);
    }
}

#[tokio::test]
async fn a_token_too_large_is_not_looked_at() {
    let server = TestServer::start(&[]).await;
    let token = server.issuer.sign(&claims(json!({ "padding": "x".repeat(20_000) })));
    refused_by_websocket(server.addr, "large", &token, "unauthorized").await;
    let answer = server.request(Method::GET, "/authors").bearer_auth(&token).send();
    refused(answer.await.unwrap(), 401, "unauthorized").await;
    // A larger one still is more than the head of a request may be.
    let token = server.issuer.sign(&claims(json!({ "padding": "x".repeat(60_000) })));
    let request =
        format!("GET /authors HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n");
    let answer = send_raw(server.addr, request.as_bytes()).await;
    assert!(answer.is_none_or(|answer| answer.status == 431));
    server.client("ann").await;
}
