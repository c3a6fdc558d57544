//! The table of tokens that let nobody in: of the development issuer and of an identity provider, over
//! REST and WebSocket, each with the right code, and none of them in a log.

use std::{fs, net::SocketAddr, sync::LazyLock};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, jwk::Jwk};
use serde_json::{Value, json};
use switchboard::auth::DevIssuer;
use tempfile::TempDir;

use crate::support::{
    Client, Closed, TestServer,
    issuer::{CLIENT, Issuer, SigningKey, claims, now},
    process::Process,
    rest::refused,
};

/// What is wrong, and the token.
pub(crate) type Bad = (&'static str, String);

const DEV: &str = "switchboard-dev";

/// Tokens whose claims are at fault; the signature is good.
fn bad_claims(issuer: &str, sign: impl Fn(&Value) -> String) -> Vec<Bad> {
    let resource = |roles| json!({ "resource_access": { CLIENT: { "roles": roles } } });
    let mut table: Vec<Bad> = [
        ("another issuer", json!({ "iss": "https://evil.example/realms/a" })),
        ("an issuer that starts like ours", json!({ "iss": format!("{issuer}.evil") })),
        ("an issuer that ends with a slash", json!({ "iss": format!("{issuer}/") })),
        ("an issuer in capitals", json!({ "iss": issuer.to_uppercase() })),
        ("no issuer", json!({ "iss": null })),
        ("an issuer of the wrong type", json!({ "iss": 5 })),
        ("issuers in a list", json!({ "iss": [issuer] })),
        ("another client, no aud", json!({ "azp": "other" })),
        ("no azp, no aud", json!({ "azp": null })),
        ("an azp of the wrong type", json!({ "azp": [CLIENT] })),
        ("aud account only", json!({ "azp": null, "aud": "account" })),
        ("aud account in a list", json!({ "azp": null, "aud": ["account"] })),
        ("another client, aud account", json!({ "azp": "other", "aud": "account" })),
        ("an aud of the wrong type", json!({ "azp": null, "aud": 5 })),
        ("an aud that starts like us", json!({ "azp": null, "aud": format!("{CLIENT}2") })),
        ("a refresh token", json!({ "typ": "Refresh", "aud": issuer })),
        ("an ID token", json!({ "typ": "ID", "aud": CLIENT })),
        ("an offline token", json!({ "typ": "Offline" })),
        ("a logout token", json!({ "typ": "Logout" })),
        ("no typ", json!({ "typ": null })),
        ("a typ of the wrong type", json!({ "typ": ["Bearer"] })),
        ("no sub", json!({ "sub": null })),
        ("an empty sub", json!({ "sub": "" })),
        ("a sub of the wrong type", json!({ "sub": 5 })),
        ("a sid of the wrong type", json!({ "sid": 5 })),
        ("a name of the wrong type", json!({ "preferred_username": ["ann"] })),
        ("no exp", json!({ "exp": null })),
        ("an exp of the wrong type", json!({ "exp": "tomorrow" })),
        ("an exp beyond all numbers", json!({ "exp": 1e300 })),
        ("a negative exp", json!({ "exp": -1 })),
        ("not valid yet", json!({ "nbf": now() + 300 })),
        ("an nbf of the wrong type", json!({ "nbf": "yesterday" })),
        ("roles of the wrong type", resource(json!(5))),
        ("a role of the wrong type", resource(json!(["get-authors", 5]))),
        ("clients of the wrong type", json!({ "resource_access": [CLIENT] })),
        ("huge", json!({ "padding": "x".repeat(20_000) })),
    ]
    .into_iter()
    .map(|(name, changes)| (name, sign(&claims(issuer, &changes))))
    .collect();
    table.push(("claims that are no object", sign(&json!([1, 2]))));
    table.push(("no claims", sign(&json!({}))));
    table
}

/// Tokens whose form or signature is at fault, made of a good one and of claims that are good.
fn bad_forms(good: &str, kid: &str, claims: &Value) -> Vec<Bad> {
    let (content, signature) = good.rsplit_once('.').unwrap();
    let (head, body) = content.split_once('.').unwrap();
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let mut other = claims.clone();
    other["sub"] = json!("root");
    let headed = |header: Value, signature: &str| format!("{}.{body}.{signature}", part(&header));
    let middle = signature.len() / 2;
    let flipped = if &signature[middle..=middle] == "A" { "B" } else { "A" };
    let flipped = format!("{}{flipped}{}", &signature[..middle], &signature[middle + 1..]);
    vec![
        ("other claims under the signature", format!("{head}.{}.{signature}", part(&other))),
        ("another signature", format!("{content}.{flipped}")),
        ("alg none", headed(json!({ "alg": "none", "kid": kid, "typ": "JWT" }), "")),
        ("alg none without a kid", headed(json!({ "alg": "none" }), "")),
        ("alg None with a signature", headed(json!({ "alg": "None", "kid": kid }), signature)),
        ("alg NONE", headed(json!({ "alg": "NONE", "kid": kid }), "")),
        ("no alg", headed(json!({ "kid": kid }), signature)),
        ("an alg of the wrong type", headed(json!({ "alg": ["RS256"], "kid": kid }), signature)),
        ("a kid of the wrong type", headed(json!({ "alg": "RS256", "kid": 5 }), signature)),
        ("a header that is no object", headed(json!([]), signature)),
        ("no signature", format!("{content}.")),
        ("two parts", content.to_owned()),
        ("four parts", format!("{good}.{signature}")),
        ("a truncated signature", good[..good.len() - 4].to_owned()),
        ("a truncated header", good[5..].to_owned()),
        ("half", good[..good.len() / 2].to_owned()),
        ("garbage", "garbage".to_owned()),
        ("dots", "..".to_owned()),
        ("base64 that is no JSON", "AAAA.AAAA.AAAA".to_owned()),
        ("a long garbage", "A".repeat(14_000)),
    ]
}

/// HMAC with what everybody knows as its secret.
fn confused(kid: &str, claims: &Value, secrets: &[(&'static str, Vec<u8>)]) -> Vec<Bad> {
    let sign = |algorithm, secret: &[u8]| {
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(algorithm) };
        jsonwebtoken::encode(&header, claims, &EncodingKey::from_secret(secret)).unwrap()
    };
    let hs256 = secrets.iter().map(|(name, secret)| (*name, sign(Algorithm::HS256, secret)));
    let (name, secret) = &secrets[0];
    let others = [Algorithm::HS384, Algorithm::HS512].map(|alg| (*name, sign(alg, secret)));
    hs256.chain(others).collect()
}

/// Tokens of the development issuer, whose key is in `folder`.
pub(crate) fn of_development(issuer: &DevIssuer, folder: &std::path::Path) -> Vec<Bad> {
    let good = claims(DEV, &json!({}));
    let pem = fs::read(folder.join("dev-key.pem")).unwrap();
    let key = EncodingKey::from_ec_pem(&pem).unwrap();
    let jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
    let public = DecodingKey::from_jwk(&jwk).unwrap().try_get_as_bytes().unwrap().to_vec();
    let elsewhere = TempDir::new().unwrap();
    let other = DevIssuer::open(&elsewhere.path().join("key.pem"), CLIENT).unwrap();
    let signed = |kid: Option<&str>| {
        let kid = kid.map(ToOwned::to_owned);
        let header = Header { kid, ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, &good, &key).unwrap()
    };
    let mut table = bad_claims(DEV, |claims| issuer.sign(claims));
    table.extend(bad_forms(&issuer.sign(&good), "dev", &good));
    table.extend(confused(
        "dev",
        &good,
        &[
            ("HMAC with the public key", public),
            ("HMAC with the key file", pem),
            ("HMAC with the JWK", serde_json::to_vec(&jwk).unwrap()),
            ("HMAC with an empty secret", Vec::new()),
        ],
    ));
    table.extend([
        ("another key", other.sign(&good)),
        ("no kid", signed(None)),
        ("an unknown kid", signed(Some("other"))),
        ("a kid that is a path", signed(Some("../dev-key.pem"))),
    ]);
    table
}

/// The keys of the provider: to sign with, and one that is for something else.
pub(crate) static KEYS: LazyLock<Vec<SigningKey>> = LazyLock::new(|| {
    let encryption = json!({ "use": "enc", "alg": "RSA-OAEP" });
    vec![
        SigningKey::new("rsa", Algorithm::RS256),
        SigningKey::new("ec", Algorithm::ES256),
        SigningKey::new("ed", Algorithm::EdDSA),
        SigningKey::new("enc", Algorithm::RS256).published_with(encryption),
    ]
});

/// Tokens of an identity provider with [`KEYS`].
pub(crate) fn of_provider(issuer: &Issuer) -> Vec<Bad> {
    let [rsa, ec, ed, encryption] = &KEYS[..] else { panic!("there are four keys") };
    let url = issuer.url();
    let good = claims(&url, &json!({}));
    let named = |kid: &str, key: &SigningKey| {
        let mut key = key.clone();
        key.kid = kid.to_owned();
        key.sign(&good)
    };
    let stranger = SigningKey::other_rsa("rsa");
    let its_own = Header {
        jwk: serde_json::from_value(stranger.jwk.clone()).ok(),
        jku: Some("http://127.0.0.1:1/keys".into()),
        ..Header::new(Algorithm::RS256)
    };
    let critical = Header { crit: Some(vec!["exp".into()]), ..Header::new(Algorithm::RS256) };
    let at_jwt = Header { typ: Some("at+jwt".into()), ..Header::new(Algorithm::RS256) };
    let id_token = claims(&url, &json!({ "typ": "ID" }));
    let (content, _) = good_parts(&ec.sign(&good));
    let zeros = BASE64_URL_SAFE_NO_PAD.encode([0; 64]);

    let mut table = bad_claims(&url, |claims| rsa.sign(claims));
    table.extend(bad_forms(&rsa.sign(&good), "rsa", &good));
    let modulus = rsa.jwk["n"].as_str().unwrap().as_bytes().to_vec();
    let pem = rsa.public_pem();
    table.extend(confused(
        "rsa",
        &good,
        &[
            ("HMAC with the public key as PEM", pem.clone()),
            ("HMAC with the PEM in one line", pem.trim_ascii_end().to_vec()),
            ("HMAC with the modulus", modulus),
            ("HMAC with the JWK", rsa.jwk.to_string().into_bytes()),
            ("HMAC with an empty secret", Vec::new()),
        ],
    ));
    let dev = TempDir::new().unwrap();
    let dev = DevIssuer::open(&dev.path().join("key.pem"), CLIENT).unwrap();
    table.extend([
        ("another key", stranger.sign(&good)),
        ("a key that the token brings along", stranger.sign_as(&its_own, &good)),
        ("an algorithm that is not the key's", rsa.sign_as(&Header::new(Algorithm::PS256), &good)),
        ("a hash that is not the key's", rsa.sign_as(&Header::new(Algorithm::RS384), &good)),
        ("an EC key under the name of the RSA key", named("rsa", ec)),
        ("an Ed25519 key under the name of the EC key", named("ec", ed)),
        ("a key that is for encryption", encryption.sign(&good)),
        ("an unknown kid", named("other", rsa)),
        ("an empty kid", named("", rsa)),
        ("a kid in capitals", named("RSA", rsa)),
        ("an ECDSA signature of zeros", format!("{content}.{zeros}")),
        ("critical extensions", rsa.sign_as(&critical, &good)),
        ("an ID token under the header of an access token", rsa.sign_as(&at_jwt, &id_token)),
        ("a development token", dev.token("ann", &[], std::time::Duration::from_secs(60))),
        ("a development token's claims", rsa.sign(&claims(DEV, &json!({})))),
    ]);
    table
}

fn good_parts(token: &str) -> (String, String) {
    let (content, signature) = token.rsplit_once('.').unwrap();
    (content.to_owned(), signature.to_owned())
}

/// Asks with a token over REST.
pub(crate) async fn refused_by_rest(addr: SocketAddr, name: &str, token: &str, code: &str) {
    let request = reqwest::Client::new().get(format!("http://{addr}/authors"));
    let answer = request.bearer_auth(token).send().await.unwrap();
    assert_eq!(answer.headers().get("www-authenticate").unwrap(), "Bearer", "{name}");
    refused(answer, 401, code).await;
}

/// Sends a token as the first message.
pub(crate) async fn refused_by_websocket(addr: SocketAddr, name: &str, token: &str, code: &str) {
    let mut client = Client::open(addr, "/web").await;
    client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    let (seen, closed) = client.until_closed().await;
    // Refused by the header of its frame, with what surrounds the token there.
    if token.len() > 20 * 1024 - 64 {
        assert_eq!((closed, seen.len()), (Closed::Code(1009), 0), "{name}");
        return;
    }
    assert_eq!(closed, Closed::Code(4001), "{name}");
    assert_eq!(seen.len(), 1, "{name}: {seen:?}");
    assert_eq!((&seen[0]["type"], &seen[0]["code"]), (&json!("error"), &json!(code)), "{name}");
}

async fn all_refused(addr: SocketAddr, table: &[Bad]) {
    assert!(table.len() >= 60, "{}", table.len());
    for (name, token) in table {
        refused_by_rest(addr, name, token, "unauthorized").await;
        refused_by_websocket(addr, name, token, "unauthorized").await;
    }
}

async fn lets_in(addr: SocketAddr, token: &str) {
    let request = reqwest::Client::new().get(format!("http://{addr}/authors")).bearer_auth(token);
    assert_eq!(request.send().await.unwrap().status(), 200, "what the table changes is good");
    Client::open(addr, "/web").await.authenticate(token).await;
}

#[tokio::test]
async fn bad_tokens_of_the_development_issuer_let_nobody_in() {
    let data = TempDir::new().unwrap();
    let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
    lets_in(server.addr, &server.issuer.sign(&claims(DEV, &json!({})))).await;
    all_refused(server.addr, &of_development(&server.issuer, data.path())).await;
}

#[tokio::test]
async fn bad_tokens_of_a_provider_let_nobody_in_and_stand_in_no_log() {
    let issuer = Issuer::with(KEYS.clone()).await;
    let data = TempDir::new().unwrap();
    let settings = [
        ("OIDC_ISSUER", &*issuer.url()),
        ("AUTH_FAILURES_PER_MINUTE", "0"),
        ("RATE_LIMIT_PER_MINUTE", "0"),
        ("LOG_LEVEL", "trace"),
    ];
    let process = Process::start(data.path(), &settings);
    let good: Vec<_> =
        KEYS[..3].iter().map(|key| key.sign(&claims(&issuer.url(), &json!({})))).collect();
    let access = Header { typ: Some("at+jwt".into()), ..Header::new(Algorithm::RS256) };
    let without_typ = claims(&issuer.url(), &json!({ "typ": null }));
    let good = [good, vec![KEYS[0].sign_as(&access, &without_typ)]].concat();
    for token in &good {
        lets_in(process.addr, token).await;
    }
    let mut table = of_provider(&issuer);
    all_refused(process.addr, &table).await;
    let expired = KEYS[0].sign(&claims(&issuer.url(), &json!({ "exp": now() - 60 })));
    refused_by_rest(process.addr, "expired", &expired, "token_expired").await;
    refused_by_websocket(process.addr, "expired", &expired, "token_expired").await;

    process.signal("-TERM");
    let ran = process.end();
    let log = ran.stdout + &ran.stderr;
    assert!(log.matches("connection refused").count() > table.len(), "{log}");
    table.push(("expired", expired));
    table.extend(good.into_iter().map(|token| ("good", token)));
    for (name, token) in &table {
        // Shorter ones are words that stand in a log of their own accord.
        for part in token.split('.').filter(|part| part.len() > 16) {
            assert!(!log.contains(part), "{name}: {part}");
        }
    }
}
