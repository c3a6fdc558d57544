//! `POST /auth/logout` ends here what is proven, also where the provider says yes to everything.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    oidc::trusting,
    support::{
        Client, Closed, TestServer,
        issuer::{CLIENT, Issuer, now},
    },
};

async fn socket(server: &TestServer, token: &str) -> Client {
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(token).await;
    client
}

async fn log_out(server: &TestServer, refresh: &str, access: Option<&str>) {
    let mut request = server.request(Method::POST, "/auth/logout");
    if let Some(access) = access {
        request = request.bearer_auth(access);
    }
    let answer = request.json(&json!({ "refresh_token": refresh })).send().await.unwrap();
    assert_eq!(answer.status(), 204);
}

/// What a refresh token says.
fn claims(issuer: &Issuer, sid: &str) -> Value {
    json!({
        "iss": issuer.url(), "typ": "Refresh", "azp": CLIENT, "sid": sid, "sub": "id-of-mallory",
        "exp": now() + 600,
    })
}

/// A refresh token that nobody signed.
fn unsigned(issuer: &Issuer, sid: &str) -> String {
    let part = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.", part(json!({ "alg": "none" })), part(claims(issuer, sid)))
}

#[tokio::test]
async fn an_unsigned_refresh_token_ends_no_session_but_that_of_the_access_token() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    issuer.users().answer_with(204, "");
    let token = |sid: &str| issuer.token(json!({ "sid": sid, "sub": format!("id-of-{sid}") }));
    let (ann, bob) = (token("ann"), token("bob"));
    let mut kept = socket(&server, &ann).await;
    let mut gone = socket(&server, &bob).await;

    let foreign = unsigned(&issuer, "ann");
    let forged = format!("{}AAAA", issuer.key().sign(&claims(&issuer, "ann")));
    let elsewhere = Issuer::start().await.key().sign(&json!({ "iss": "https://x", "sid": "ann" }));
    for refresh in [&foreign, &forged, &elsewhere, "garbage"] {
        for access in [None, Some(&*bob), Some("garbage"), Some(&*foreign)] {
            log_out(&server, refresh, access).await;
        }
    }
    for client in [&mut kept, &mut gone] {
        assert_eq!(client.call(100, json!({ "still": "here" })).await["status_code"], 0);
    }
    // Its own session, by the access token.
    log_out(&server, &unsigned(&issuer, "bob"), Some(&bob)).await;
    assert_eq!(gone.until_closed().await.1, Closed::Code(4004));
    // And by a signature of the issuer.
    log_out(&server, &issuer.key().sign(&claims(&issuer, "ann")), None).await;
    assert_eq!(kept.until_closed().await.1, Closed::Code(4004));
}

#[tokio::test]
async fn the_audit_trail_names_no_user_that_an_unsigned_refresh_token_names() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    issuer.users().answer_with(204, "");
    log_out(&server, &unsigned(&issuer, "ann"), None).await;
    let access = issuer.token(json!({ "sid": "fresh" }));
    let body = json!({ "access_token": access, "token_type": "Bearer" });
    issuer.users().answer_with(200, &body.to_string());
    let request = server.request(Method::POST, "/auth/refresh");
    let refresh = json!({ "refresh_token": unsigned(&issuer, "ann") });
    assert_eq!(request.json(&refresh).send().await.unwrap().status(), 200);

    let rows = server.audited(2).await;
    for row in &rows {
        assert!(!row.to_string().contains("mallory"), "{row}");
        let known = row["resource"] == "/auth/refresh";
        let sid = if known { json!({ "sid": "fresh" }) } else { Value::Null };
        assert_eq!(row["request_data"], sid, "{row}");
    }
}
