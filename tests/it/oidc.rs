//! Tokens of an identity provider: where its keys come from, and what becomes of them on its bad days.

use std::time::{Duration, Instant};

use jsonwebtoken::Algorithm;
use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;

use crate::support::{
    Client, Closed, TestServer,
    issuer::{Issuer, Mood, SigningKey, claims, now},
    process::{Process, run},
    rest::refused,
};

/// A server that trusts an issuer, with more settings.
pub(crate) async fn trusting(issuer: &Issuer, more: &[(&str, &str)]) -> TestServer {
    let settings = issuer.settings();
    let mut all: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    all.extend(more);
    TestServer::start(&all).await
}

pub(crate) async fn status(server: &TestServer, token: &str) -> u16 {
    let request = server.request(Method::GET, "/authors").bearer_auth(token);
    request.send().await.unwrap().status().as_u16()
}

pub(crate) async fn until_status(server: &TestServer, token: &str, wanted: u16) {
    let started = Instant::now();
    while status(server, token).await != wanted {
        assert!(started.elapsed() < Duration::from_secs(15), "it never was {wanted}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

#[tokio::test]
async fn tokens_of_every_algorithm_are_good_by_discovery_alone() {
    let keys: Vec<_> =
        ALGORITHMS.iter().map(|alg| SigningKey::new(&format!("{alg:?}"), *alg)).collect();
    let issuer = Issuer::with(keys.clone()).await;
    let server = trusting(&issuer, &[]).await;
    for key in &keys {
        let token = key.sign(&claims(&issuer.url(), &json!({})));
        assert_eq!(status(&server, &token).await, 200, "{:?}", key.algorithm);
        let mut client = Client::open(server.addr, "/web").await;
        assert_eq!(client.authenticate(&token).await["user"], "ann");
    }
    assert_eq!((issuer.discoveries(), issuer.key_sets()), (1, 1));
    assert_eq!(server.metric("jwks_refreshes_total{status=\"success\"}").await, 1.0);
    let calls = "keycloak_operation_duration_seconds_count{operation=\"jwks\"}";
    assert_eq!(server.metric(calls).await, 2.0);
}

#[tokio::test]
async fn a_key_without_an_algorithm_is_good_for_those_of_its_type() {
    for algorithm in ALGORITHMS {
        let key = SigningKey::new("k", algorithm).published_with(json!({ "alg": null }));
        let issuer = Issuer::with(vec![key]).await;
        let server = trusting(&issuer, &[]).await;
        assert_eq!(status(&server, &issuer.token(json!({}))).await, 200, "{algorithm:?}");
    }
}

#[tokio::test]
async fn keys_that_do_not_sign_tokens_are_passed_over() {
    let good = SigningKey::new("good", Algorithm::ES256);
    let rsa = |kid: &str| SigningKey::new(kid, Algorithm::RS256);
    let others = [
        rsa("enc").published_with(json!({ "use": "enc", "alg": "RSA-OAEP" })),
        rsa("enc, though its algorithm signs").published_with(json!({ "use": "enc" })),
        rsa("of no use").published_with(json!({ "use": "" })),
        rsa("to sign with").published_with(json!({ "use": null, "key_ops": ["sign"] })),
        rsa("of another type").published_with(json!({ "alg": "ES256" })),
        rsa("symmetric by algorithm").published_with(json!({ "alg": "HS256" })),
        rsa("odd").published_with(json!({ "alg": 5 })),
        rsa("no number").published_with(json!({ "n": "§" })),
        rsa("short").published_with(json!({ "n": "A".repeat(86) + "__" })),
        SigningKey::new("P-521", Algorithm::ES256).published_with(json!({ "crv": "P-521" })),
        SigningKey::new("oct", Algorithm::ES256)
            .published_with(json!({ "kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "crv": null })),
        SigningKey::new("AKP", Algorithm::ES256).published_with(json!({ "kty": "AKP" })),
    ];
    let issuer = Issuer::with([others.to_vec(), vec![good.clone()]].concat()).await;
    let server = trusting(&issuer, &[]).await;
    let claims = claims(&issuer.url(), &json!({}));
    assert_eq!(status(&server, &good.sign(&claims)).await, 200);
    for key in others {
        assert_eq!(status(&server, &key.sign(&claims)).await, 401, "{}", key.kid);
    }
}

#[tokio::test]
async fn an_issuer_has_one_name_for_clients_and_another_for_servers() {
    let issuer = Issuer::start().await;
    let (base, public) = (format!("http://{}", issuer.addr), "https://sso.example/realms/test");
    let token = |iss: &str| issuer.token(json!({ "iss": iss }));
    // What clients see is what discovery says, or not: Keycloak can be set up both ways.
    for discovered in [public, &issuer.url()] {
        issuer.set_name(discovered);
        let settings =
            [("KEYCLOAK_BASE_URL", &*base), ("KEYCLOAK_REALM", "test"), ("OIDC_ISSUER", public)];
        let server = TestServer::start(&settings).await;
        assert_eq!(status(&server, &token(public)).await, 200, "{discovered}");
        assert_eq!(status(&server, &token(&issuer.url())).await, 401, "{discovered}");
    }
    issuer.set_name(&issuer.url());
    let settings = [("KEYCLOAK_BASE_URL", &*base), ("KEYCLOAK_REALM", "test")];
    let server = TestServer::start(&settings).await;
    assert_eq!(status(&server, &token(&issuer.url())).await, 200);
    assert_eq!(status(&server, &token(public)).await, 401);
    // Someone else's discovery document is not to be trusted.
    issuer.set_name(public);
    let server = TestServer::start(&settings).await;
    assert_eq!(status(&server, &token(&issuer.url())).await, 503);
}

#[tokio::test]
async fn the_names_of_claims_are_settings() {
    let issuer = Issuer::start().await;
    let settings = [
        ("JWT_USERNAME_CLAIM", "email"),
        ("JWT_ROLES_CLAIM", "groups.{client}"),
        ("JWT_REALM_ROLES", "true"),
    ];
    let server = trusting(&issuer, &settings).await;
    let token = issuer.token(json!({
        "email": "ann@a.example",
        "groups": { "switchboard": ["get-authors"] },
        "realm_access": { "roles": ["create-author"] },
    }));
    let mut client = Client::open(server.addr, "/web").await;
    assert_eq!(client.authenticate(&token).await["user"], "ann@a.example");
    assert_eq!(client.call(1, json!({})).await["status_code"], 0);
    assert_eq!(client.call(3, json!({ "name": "Ann" })).await["status_code"], 0);
    assert_eq!(client.call(5, json!({ "id": 1 })).await["status_code"], 3);
}

#[tokio::test]
async fn with_an_issuer_the_development_issuer_is_not_trusted() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    assert_eq!(status(&server, &server.token("ann")).await, 401);
}

#[tokio::test]
async fn a_server_starts_without_its_issuer_and_recovers_when_it_comes() {
    let mut issuer = Issuer::start().await;
    issuer.down().await;
    let server = trusting(&issuer, &[]).await;
    let token = issuer.token(json!({}));
    let request = server.request(Method::GET, "/authors").bearer_auth(&token).send();
    let answer = request.await.unwrap();
    assert!(answer.headers().contains_key("retry-after"));
    refused(answer, 503, "unavailable").await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((closed, &seen[0]["code"]), (Closed::Code(1011), &json!("unavailable")));
    // A token that is bad by itself is bad without keys.
    assert_eq!(status(&server, "garbage").await, 401);
    for series in
        ["auth_attempts_total{status=\"failed\"}", "token_validation_total{status=\"invalid\"}"]
    {
        assert_eq!(server.metric(series).await, 1.0, "{series}");
    }
    issuer.up().await;
    until_status(&server, &token, 200).await;
}

#[tokio::test]
async fn plain_http_needs_no_root_certificates() {
    let issuer = Issuer::start().await;
    let data = TempDir::new().unwrap();
    let nowhere = data.path().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    let url = issuer.url();
    let environment =
        [("OIDC_ISSUER", &*url), ("SSL_CERT_FILE", nowhere), ("SSL_CERT_DIR", nowhere)];
    let process = Process::start(data.path(), &environment);
    Client::open(process.addr, "/web").await.authenticate(&issuer.token(json!({}))).await;
}

#[tokio::test]
async fn a_token_waits_for_the_first_keys_and_no_longer_than_one_call() {
    let issuer = Issuer::start().await;
    let token = issuer.token(json!({}));
    issuer.set_mood(Mood::Slow(Duration::from_millis(500)));
    let server = trusting(&issuer, &[]).await;
    assert_eq!(status(&server, &token).await, 200);
    issuer.set_mood(Mood::Slow(Duration::from_secs(60)));
    let server = trusting(&issuer, &[("OIDC_TIMEOUT", "1s")]).await;
    let asked = Instant::now();
    assert_eq!(status(&server, &token).await, 503);
    assert!(asked.elapsed() < Duration::from_millis(1800), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn slow_and_broken_key_sets_do_not_matter_to_known_keys() {
    let issuer = Issuer::start().await;
    let settings =
        [("OIDC_JWKS_LIFETIME", "100ms"), ("OIDC_JWKS_MAX_AGE", "1h"), ("TOKEN_CACHE_SIZE", "0")];
    let server = trusting(&issuer, &settings).await;
    let token = issuer.token(json!({}));
    assert_eq!(status(&server, &token).await, 200);
    for mood in [Mood::Slow(Duration::from_secs(3)), Mood::Broken, Mood::Failing] {
        issuer.set_mood(mood);
        let before = issuer.key_sets() + issuer.discoveries();
        let started = Instant::now();
        while issuer.key_sets() + issuer.discoveries() < before + 2 {
            let asked = Instant::now();
            assert_eq!(status(&server, &token).await, 200, "{mood:?}");
            assert!(asked.elapsed() < Duration::from_secs(1), "{mood:?} held a good token up");
            assert!(started.elapsed() < Duration::from_secs(20), "no fetch in {mood:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(server.metric("jwks_refreshes_total{status=\"error\"}").await >= 2.0);
}

#[tokio::test]
async fn a_thousand_unknown_keys_cause_one_request() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let good = issuer.token(json!({}));
    assert_eq!(status(&server, &good).await, 200);
    assert_eq!(issuer.key_sets(), 1);
    issuer.set_mood(Mood::Slow(Duration::from_millis(500)));

    let claims = claims(&issuer.url(), &json!({}));
    let mut key = SigningKey::new("", Algorithm::ES256);
    let tokens: Vec<_> = (0..1000)
        .map(|i| {
            key.kid = format!("unknown-{i}");
            key.sign(&claims)
        })
        .collect();
    let started = Instant::now();
    let server = &server;
    let clients = tokens.chunks(20).map(|tokens| async move {
        for token in tokens {
            assert_eq!(status(server, token).await, 401);
        }
    });
    let known = async {
        let asked = Instant::now();
        assert_eq!(status(server, &good).await, 200);
        asked.elapsed()
    };
    let (_, waited) = tokio::join!(futures_util::future::join_all(clients), known);
    assert!(started.elapsed() < Duration::from_secs(10), "too slow to mean anything");
    assert_eq!(issuer.key_sets(), 2);
    assert!(waited < Duration::from_millis(400), "a known key waited for {waited:?}");
    let invalid = server.metric("token_validation_total{status=\"invalid\"}").await;
    assert_eq!(invalid, 1000.0);
}

#[tokio::test]
async fn new_keys_work_at_once_and_sockets_of_old_ones_stay() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let old = issuer.token(json!({}));
    let mut sockets = Vec::new();
    for _ in 0..20 {
        let mut socket = Client::open(server.addr, "/web").await;
        socket.authenticate(&old).await;
        sockets.push(socket);
    }
    issuer.publish(vec![
        SigningKey::new("new", Algorithm::ES256),
        SigningKey::new("rsa", Algorithm::RS256),
    ]);
    assert_eq!(status(&server, &issuer.token(json!({}))).await, 200);
    assert_eq!(status(&server, &old).await, 200, "the old key is still published");
    assert_eq!(issuer.key_sets(), 2);
    for mut socket in sockets {
        assert_eq!(socket.call(100, json!({})).await["status_code"], 0);
    }
}

#[tokio::test]
async fn a_token_is_not_remembered_beyond_its_key() {
    let issuer = Issuer::start().await;
    let settings = [("OIDC_JWKS_LIFETIME", "100ms"), ("OIDC_JWKS_MAX_AGE", "1h")];
    let server = trusting(&issuer, &settings).await;
    let token = issuer.token(json!({}));
    assert_eq!(status(&server, &token).await, 200);
    // Another key under the name of the old one.
    issuer.publish(vec![
        SigningKey::new("rsa", Algorithm::ES256),
        SigningKey::new("more", Algorithm::ES256),
    ]);
    until_status(&server, &token, 401).await;
    let invalid = server.metric("token_validation_total{status=\"invalid\"}").await;
    assert!(invalid >= 1.0);
}

#[tokio::test]
async fn a_provider_that_is_down_opens_the_breaker_and_stale_keys_serve_on() {
    let mut issuer = Issuer::start().await;
    let settings =
        [("OIDC_JWKS_LIFETIME", "100ms"), ("OIDC_JWKS_MAX_AGE", "1h"), ("TOKEN_CACHE_SIZE", "0")];
    let server = trusting(&issuer, &settings).await;
    let token = issuer.token(json!({}));
    assert_eq!(status(&server, &token).await, 200);
    issuer.down().await;
    let state = "circuit_breaker_state{service=\"keycloak\"}";
    let started = Instant::now();
    while server.metric(state).await != 2.0 {
        assert_eq!(status(&server, &token).await, 200);
        assert!(started.elapsed() < Duration::from_secs(15), "the breaker never opened");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let failures = "circuit_breaker_failures_total{service=\"keycloak\"}";
    assert_eq!(server.metric(failures).await, 5.0);
    let changes = "circuit_breaker_state_changes_total{service=\"keycloak\"}";
    assert_eq!(server.metric(changes).await, 1.0);
    assert_eq!(status(&server, &token).await, 200);

    issuer.up().await;
    let started = Instant::now();
    while server.metric(state).await != 0.0 {
        assert!(started.elapsed() < Duration::from_secs(30), "the breaker never closed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(server.metric(changes).await, 3.0);
    assert_eq!(status(&server, &token).await, 200);
}

#[tokio::test]
async fn a_valid_token_is_checked_once_and_never_remembered_past_its_end() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("JWT_LEEWAY", "60s")]).await;
    let cached = || async {
        let hits = server.metric("token_cache_hits_total").await;
        (hits, server.metric("token_cache_misses_total").await)
    };
    let token = issuer.token(json!({}));
    for hits in 0..3 {
        assert_eq!(status(&server, &token).await, 200);
        assert_eq!(cached().await, (f64::from(hits), 1.0));
    }
    Client::open(server.addr, "/web").await.authenticate(&token).await;
    assert_eq!(cached().await, (3.0, 1.0));
    // Let in by the leeway alone, and bad ones.
    let late = issuer.token(json!({ "exp": now() - 5 }));
    for (token, code) in [(&*late, 200), ("garbage", 401)] {
        for _ in 0..2 {
            assert_eq!(status(&server, token).await, code);
        }
    }
    assert_eq!(cached().await, (3.0, 5.0));
    let short = issuer.token(json!({ "exp": now() + 2 }));
    for _ in 0..2 {
        assert_eq!(status(&server, &short).await, 200);
    }
    assert_eq!(cached().await, (4.0, 6.0));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(status(&server, &short).await, 200);
    assert_eq!(cached().await, (4.0, 7.0));
}

#[tokio::test]
async fn production_starts_with_an_issuer_and_makes_no_development_key() {
    let issuer = Issuer::start().await;
    let data = TempDir::new().unwrap();
    let base = format!("http://{}", issuer.addr);
    let settings = [
        ("ENV", "production"),
        ("ALLOWED_WS_ORIGINS", "https://app.example"),
        ("KEYCLOAK_BASE_URL", &*base),
        ("KEYCLOAK_REALM", "test"),
        ("KEYCLOAK_CLIENT_SECRET", "hush-hush"),
    ];
    let process = Process::start(data.path(), &settings);
    Client::open(process.addr, "/web").await.authenticate(&issuer.token(json!({}))).await;
    process.signal("-TERM");
    let ran = process.end();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!(ran.stdout + &ran.stderr).contains("hush-hush"));
    assert!(!data.path().join("dev-key.pem").exists());

    let shown = run(&["config"], &settings);
    assert!(shown.stdout.contains("keycloak_client_secret = \"***\""), "{}", shown.stdout);
    let refused = run(&["token", "--user", "ann"], &settings);
    assert_eq!(refused.code, Some(64), "{refused:?}");
    let without = run(&["serve"], &settings[..2]);
    assert_eq!(without.code, Some(64), "{without:?}");
    assert!(without.stderr.contains("OIDC_ISSUER"), "{without:?}");
    assert!(!data.path().join("dev-key.pem").exists());
}
