//! How long the identity provider's keys are trusted: until it withdraws them, and until they are too old.

use std::time::{Duration, Instant};

use jsonwebtoken::Algorithm;
use reqwest::Method;
use serde_json::{Value, json};
use switchboard::handlers::roles;

use crate::{
    oidc::{status, trusting, until_status},
    support::{
        TestServer,
        issuer::{CLIENT, Issuer, SigningKey, claims},
        redis::shared,
        rest::refused,
    },
};

async fn is_ready(server: &TestServer) -> bool {
    server.request(Method::GET, "/health/ready").send().await.unwrap().status() == 200
}

async fn until_fetched(issuer: &Issuer, times: usize) {
    let since = Instant::now();
    while issuer.key_sets() < times {
        assert!(since.elapsed() < Duration::from_secs(10), "no fetch");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_key_set_that_stays_empty_withdraws_all_keys() {
    let issuer = Issuer::start().await;
    let settings = [("OIDC_JWKS_LIFETIME", "1s"), ("OIDC_JWKS_MAX_AGE", "1h")];
    let server = trusting(&issuer, &settings).await;
    let (key, token) = (issuer.key(), issuer.token(json!({})));
    assert_eq!(status(&server, &token).await, 200);
    let before = issuer.key_sets();
    issuer.publish(Vec::new());
    // Once may be a mistake.
    until_fetched(&issuer, before + 1).await;
    assert_eq!(status(&server, &token).await, 200);
    assert!(is_ready(&server).await);
    until_status(&server, &token, 401).await;
    assert!(!is_ready(&server).await);
    issuer.publish(vec![key]);
    until_status(&server, &token, 200).await;
    assert!(is_ready(&server).await);
}

#[tokio::test]
async fn a_key_set_without_the_key_of_a_token_withdraws_it_at_once() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("OIDC_JWKS_LIFETIME", "300ms")]).await;
    let token = issuer.token(json!({}));
    assert_eq!(status(&server, &token).await, 200);
    issuer.publish(vec![SigningKey::new("new", Algorithm::ES256)]);
    let before = issuer.key_sets();
    until_status(&server, &token, 401).await;
    assert!(issuer.key_sets() <= before + 3);
    assert_eq!(status(&server, &issuer.token(json!({}))).await, 200);
}

#[tokio::test]
async fn without_its_provider_keys_are_trusted_until_they_are_too_old() {
    let mut issuer = Issuer::start().await;
    let settings = [("OIDC_JWKS_LIFETIME", "500ms"), ("OIDC_JWKS_MAX_AGE", "2s")];
    let server = trusting(&issuer, &settings).await;
    let token = issuer.token(json!({}));
    assert_eq!(status(&server, &token).await, 200);
    assert_eq!(server.metric("jwks_max_age_seconds").await, 2.0);
    assert!(server.metric("jwks_age_seconds").await <= 1.0);
    issuer.down().await;
    assert_eq!(status(&server, &token).await, 200);
    assert!(is_ready(&server).await);
    until_status(&server, &token, 503).await;
    assert!(!is_ready(&server).await);
    assert!(server.metric("jwks_age_seconds").await >= 2.0);
    issuer.up().await;
    until_status(&server, &token, 200).await;
    assert!(is_ready(&server).await);
}

#[tokio::test]
async fn a_node_that_never_had_keys_is_not_ready() {
    let mut issuer = Issuer::start().await;
    issuer.down().await;
    let server = trusting(&issuer, &[]).await;
    assert!(!is_ready(&server).await);
    issuer.up().await;
    until_status(&server, &issuer.token(json!({})), 200).await;
    assert!(is_ready(&server).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_has_the_keys_fetched_on_all_nodes() {
    let mut issuer = Issuer::start().await;
    let (url, prefix) = shared();
    let settings = [("REDIS_URL", &*url), ("REDIS_KEY_PREFIX", &*prefix)];
    let nodes = [trusting(&issuer, &settings).await, trusting(&issuer, &settings).await];
    let refresh = async |token: &str| {
        let request = nodes[0].request(Method::POST, "/admin/keys/refresh");
        request.bearer_auth(token).send().await.unwrap()
    };
    let token = issuer.token(json!({}));
    for node in &nodes {
        node.until_metric("redis_connected", 1.0).await;
        assert_eq!(status(node, &token).await, 200);
    }
    let reader = json!({ "resource_access": { CLIENT: { "roles": [roles::GET_AUTHORS] } } });
    refused(refresh(&issuer.token(reader)).await, 403, "permission_denied").await;

    issuer.publish(vec![SigningKey::new("new", Algorithm::ES256)]);
    let answer = refresh(&token).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({ "keys": ["new"] }));
    assert_eq!(status(&nodes[0], &token).await, 401);
    until_status(&nodes[1], &token, 401).await;
    let new = issuer.key().sign(&claims(&issuer.url(), &json!({})));
    assert_eq!(status(&nodes[1], &new).await, 200);

    issuer.down().await;
    refused(refresh(&new).await, 503, "unavailable").await;
    assert_eq!(status(&nodes[0], &new).await, 200, "the keys from before stay");
    let development = TestServer::start(&[]).await;
    let answer = development.rest(Method::POST, "/admin/keys/refresh").send().await.unwrap();
    refused(answer, 503, "unavailable").await;
}
