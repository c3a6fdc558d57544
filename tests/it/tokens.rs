//! Which tokens let in, and which do not: one table for REST and WebSocket, which share the validator.

use std::{
    fs,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, jwk::Jwk};
use reqwest::Method;
use serde_json::{Value, json};
use switchboard::{auth::DevIssuer, handlers::roles};
use tempfile::TempDir;

use crate::support::{
    Client, Closed, TestServer,
    rest::{refused, send_raw},
};

const CLIENT: &str = "switchboard";

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// Claims that let in, with some replaced; null takes one away.
fn claims(changes: Value) -> Value {
    let mut claims = json!({
        "iss": "switchboard-dev", "azp": CLIENT, "typ": "Bearer", "sub": "7a1f",
        "preferred_username": "ann", "iat": now(), "exp": now() + 600,
        "resource_access": { CLIENT: { "roles": roles::ALL } },
    });
    let object = claims.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        object.insert(name.clone(), value.clone());
        if value.is_null() {
            object.remove(name);
        }
    }
    claims
}

fn signed(header: &Header, key: &EncodingKey) -> String {
    jsonwebtoken::encode(header, &claims(json!({})), key).unwrap()
}

fn unsigned(header: &Value, signature: &str) -> String {
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{signature}", part(header), part(&claims(json!({}))))
}

/// Tokens whose claims are at fault; the signature is good.
fn bad_claims(issuer: &DevIssuer) -> Vec<(&'static str, String)> {
    let sign = |changes| issuer.sign(&claims(changes));
    vec![
        ("another issuer", sign(json!({ "iss": "https://evil.example/realms/a" }))),
        ("an issuer that starts like ours", sign(json!({ "iss": "switchboard-dev.evil" }))),
        ("no issuer", sign(json!({ "iss": null }))),
        ("an issuer of the wrong type", sign(json!({ "iss": 5 }))),
        ("another client, no aud", sign(json!({ "azp": "other" }))),
        ("no azp, no aud", sign(json!({ "azp": null }))),
        ("aud account only", sign(json!({ "azp": null, "aud": "account" }))),
        ("aud account in a list", sign(json!({ "azp": null, "aud": ["account"] }))),
        ("another client, aud account", sign(json!({ "azp": "other", "aud": "account" }))),
        ("an aud of the wrong type", sign(json!({ "azp": null, "aud": 5 }))),
        ("a refresh token", sign(json!({ "typ": "Refresh" }))),
        ("an ID token", sign(json!({ "typ": "ID" }))),
        ("an offline token", sign(json!({ "typ": "Offline" }))),
        ("no typ", sign(json!({ "typ": null }))),
        ("no sub", sign(json!({ "sub": null }))),
        ("an empty sub", sign(json!({ "sub": "" }))),
        ("a sub of the wrong type", sign(json!({ "sub": 5 }))),
        ("no exp", sign(json!({ "exp": null }))),
        ("an exp of the wrong type", sign(json!({ "exp": "tomorrow" }))),
        ("an exp beyond all numbers", sign(json!({ "exp": 1e300 }))),
        ("a negative exp", sign(json!({ "exp": -1 }))),
        ("not valid yet", sign(json!({ "nbf": now() + 300 }))),
        ("roles of the wrong type", sign(json!({ "resource_access": { CLIENT: { "roles": 5 } } }))),
        ("claims that are no object", issuer.sign(&json!([1, 2]))),
        ("no claims", issuer.sign(&json!({}))),
    ]
}

/// Tokens whose signature or form is at fault; the claims are good.
fn bad_signatures(issuer: &DevIssuer, pem: &[u8]) -> Vec<(&'static str, String)> {
    let good = issuer.sign(&claims(json!({})));
    let (content, signature) = good.rsplit_once('.').unwrap();
    let (head, _) = content.split_once('.').unwrap();
    let elsewhere = TempDir::new().unwrap();
    let other = DevIssuer::open(&elsewhere.path().join("key.pem"), CLIENT).unwrap();
    let key = EncodingKey::from_ec_pem(pem).unwrap();
    let jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
    let public = DecodingKey::from_jwk(&jwk).unwrap();
    let header = |algorithm, kid: Option<&str>| Header {
        kid: kid.map(ToOwned::to_owned),
        ..Header::new(algorithm)
    };
    let hmac = |secret: &[u8]| {
        signed(&header(Algorithm::HS256, Some("dev")), &EncodingKey::from_secret(secret))
    };
    let swapped = BASE64_URL_SAFE_NO_PAD.encode(claims(json!({ "sub": "root" })).to_string());
    vec![
        ("another key", other.sign(&claims(json!({})))),
        ("other claims under the signature", format!("{head}.{swapped}.{signature}")),
        ("no kid", signed(&header(Algorithm::ES256, None), &key)),
        ("an unknown kid", signed(&header(Algorithm::ES256, Some("other")), &key)),
        ("a kid that is a path", signed(&header(Algorithm::ES256, Some("../dev-key.pem")), &key)),
        ("HS256 with an empty secret", hmac(b"")),
        ("HS256 with the key file", hmac(pem)),
        ("HS256 with the public key", hmac(public.try_get_as_bytes().unwrap())),
        ("HS256 with the public key's JWK", hmac(&serde_json::to_vec(&jwk).unwrap())),
        ("alg none", unsigned(&json!({ "alg": "none", "kid": "dev", "typ": "JWT" }), "")),
        ("alg None with a signature", unsigned(&json!({ "alg": "None", "kid": "dev" }), signature)),
        ("no alg", unsigned(&json!({ "kid": "dev" }), signature)),
        ("no signature", format!("{content}.")),
        ("two parts", content.to_owned()),
        ("four parts", format!("{good}.{signature}")),
        ("a truncated signature", good[..good.len() - 4].to_owned()),
        ("a truncated header", good[5..].to_owned()),
        ("garbage", "garbage".to_owned()),
        ("dots", "..".to_owned()),
        ("base64 that is no JSON", "AAAA.AAAA.AAAA".to_owned()),
        ("a long garbage", "A".repeat(14_000)),
    ]
}

async fn refused_by_rest(server: &TestServer, name: &str, token: &str, code: &str) {
    let answer = server.request(Method::GET, "/authors").bearer_auth(token).send().await.unwrap();
    assert_eq!(answer.headers().get("www-authenticate").unwrap(), "Bearer", "{name}");
    refused(answer, 401, code).await;
}

async fn refused_by_websocket(server: &TestServer, name: &str, token: &str, code: &str) {
    let mut client = Client::open(server.addr, "/web").await;
    client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!(closed, Closed::Code(4001), "{name}");
    assert_eq!(seen.len(), 1, "{name}: {seen:?}");
    assert_eq!((&seen[0]["type"], &seen[0]["code"]), (&json!("error"), &json!(code)), "{name}");
}

#[tokio::test]
async fn a_bad_token_is_refused_by_rest_and_by_websocket() {
    let data = TempDir::new().unwrap();
    let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
    let pem = fs::read(data.path().join("dev-key.pem")).unwrap();
    let good = server.issuer.sign(&claims(json!({})));
    let answer = server.request(Method::GET, "/authors").bearer_auth(&good).send().await.unwrap();
    assert_eq!(answer.status(), 200, "the claims that the table changes are good");

    let mut table = bad_claims(&server.issuer);
    table.extend(bad_signatures(&server.issuer, &pem));
    assert!(table.len() >= 40);
    for (name, token) in &table {
        refused_by_rest(&server, name, token, "unauthorized").await;
        refused_by_websocket(&server, name, token, "unauthorized").await;
    }
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
        refused_by_rest(&server, "expired", &token, "token_expired").await;
        refused_by_websocket(&server, "expired", &token, "token_expired").await;
    }
    // Expired, but not by us: that a stranger's token is expired is nobody's business.
    let elsewhere = TempDir::new().unwrap();
    let other = DevIssuer::open(&elsewhere.path().join("key.pem"), CLIENT).unwrap();
    let token = other.sign(&claims(json!({ "exp": now() - 3600 })));
    refused_by_rest(&server, "a stranger's", &token, "unauthorized").await;
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
    refused_by_rest(&strict, "no leeway", &token, "token_expired").await;
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
    refused_by_websocket(&server, "large", &token, "unauthorized").await;
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
