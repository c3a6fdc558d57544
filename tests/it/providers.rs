//! Access tokens as the documents of identity providers show them are let in with the settings that
//! `docs/identity.md` names; their ID and refresh tokens, and tokens for others, are not.

use std::{collections::BTreeMap, fs};

use jsonwebtoken::{Algorithm, Header};
use serde_json::{Value, json};

use crate::{
    backchannel::{log_out, logout_token},
    bad_tokens::{refused_by_rest, refused_by_websocket},
    oidc::trusting,
    support::{
        Client, TestServer,
        issuer::{CLIENT, Issuer, now},
    },
};

/// What a provider signs.
struct Shown {
    /// The heading of its settings.
    name: &'static str,
    /// The `typ` of the header of all its tokens.
    typ: Option<&'static str>,
    user: &'static str,
    access: Vec<Value>,
    id: Value,
    /// Signed like the others; most providers have opaque ones.
    refresh: Option<Value>,
    /// Access tokens for somebody else.
    others: Vec<Value>,
}

/// The settings under each heading of the section on providers.
fn documented() -> BTreeMap<String, BTreeMap<String, String>> {
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/identity.md");
    let text = fs::read_to_string(text).unwrap();
    let section = text.split("## Providers").nth(1).unwrap();
    let block = section.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let mut providers = BTreeMap::new();
    for part in block.split("\n\n") {
        let (heading, settings) = part.trim().strip_prefix("# ").unwrap().split_once('\n').unwrap();
        let name = heading.split(':').next().unwrap().to_owned();
        let settings = settings.lines().map(|line| line.split_once('=').unwrap());
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        providers.insert(name, settings.collect());
    }
    providers
}

/// A token's claims: those that all have, and these.
fn with(issuer: &str, more: &Value) -> Value {
    let mut claims = json!({ "iss": issuer, "iat": now(), "exp": now() + 600 });
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    claims
}

/// Claims with some replaced.
fn but(claims: &Value, changes: &Value) -> Value {
    let mut claims = claims.clone();
    claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    claims
}

fn keycloak(issuer: &str) -> Shown {
    let access = json!({
        "auth_time": now(), "jti": "onrtac:0b1", "aud": [CLIENT, "account"], "sub": "7a1f", "typ": "Bearer",
        "azp": "switchboard-web", "sid": "51d", "acr": "1", "allowed-origins": ["https://app.example.com"],
        "realm_access": { "roles": ["offline_access"] },
        "resource_access": { CLIENT: { "roles": ["get-authors"] } },
        "scope": "openid profile", "name": "Ann Admin", "preferred_username": "ann",
    });
    let id = json!({
        "auth_time": now(), "jti": "5e1", "aud": "switchboard", "sub": "7a1f", "typ": "ID", "azp": CLIENT,
        "sid": "51d", "at_hash": "UrDR9Abc", "acr": "1", "preferred_username": "ann",
    });
    let refresh = json!({
        "jti": "0c2", "aud": issuer, "sub": "7a1f", "typ": "Refresh", "azp": CLIENT, "sid": "51d",
        "scope": "openid profile",
    });
    let others = vec![
        but(&access, &json!({ "aud": ["orders", "account"], "azp": "shop" })),
        but(&access, &json!({ "aud": ["orders", "account"], "azp": CLIENT })),
    ];
    let access = vec![but(&access, &json!({ "azp": CLIENT })), access];
    let typ = Some("JWT");
    Shown { name: "Keycloak", typ, user: "ann", access, id, refresh: Some(refresh), others }
}

fn entra() -> Shown {
    let us = "6e74172b-be56-4843-9ff4-e66a39bb12e3";
    let access = json!({
        "aud": us, "nbf": now(), "aio": "AXQAi/8IAAAAtAaZLo", "azp": "04b07795-8ddb-461a-bbee-02f9e1bf7b46",
        "azpacr": "0", "name": "Abe Lincoln", "oid": "690222be-ff1a-4d56-abd1-7e4f7d38e474",
        "preferred_username": "abeli@microsoft.com", "rh": "0.ATAA", "roles": ["get-authors"],
        "scp": "access_as_user", "sid": "1c4d", "sub": "HKZpfaHyWadeOouYlitjrI",
        "tid": "72f988bf-86f1-41af-91ab-2d7cd011db47", "uti": "fqiBqXLPj0eQa82S", "ver": "2.0",
    });
    let id = json!({
        "aud": us, "nbf": now(), "aio": "Df2UVXL1ix", "name": "Abe Lincoln", "roles": ["get-authors"],
        "oid": "690222be-ff1a-4d56-abd1-7e4f7d38e474", "preferred_username": "abeli@microsoft.com",
        "sub": "AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ", "tid": "72f988bf", "uti": "x", "ver": "2.0",
    });
    let others = vec![
        but(&access, &json!({ "aud": "00000003-0000-0000-c000-000000000000" })),
        // ID tokens that were asked for with a nonce, and with a code.
        but(&id, &json!({ "nonce": "12345" })),
        but(&id, &json!({ "c_hash": "x", "azp": us })),
    ];
    let access = vec![but(&access, &json!({ "azp": us })), access];
    let (typ, user) = (Some("JWT"), "abeli@microsoft.com");
    Shown { name: "Entra ID", typ, user, access, id, refresh: None, others }
}

fn okta(issuer: &str) -> Shown {
    let us = "0oaosna3ilNxgPTmk0h7";
    let access = json!({
        "ver": 1, "jti": "AT.xtjhr8FeMkyMfgLiFzVYOYPbgqWdd6ONULT3ffeK7d4", "aud": "api://default", "cid": us,
        "uid": "00uixa271s6x7qt8I0h7", "scp": ["openid", "profile"], "auth_time": now(),
        "sub": "joe.smith@okta.com", "groups": ["Everyone", "get-authors"],
    });
    let id = json!({
        "sub": "00uixa271s6x7qt8I0h7", "ver": 1, "aud": us, "jti": "ID.radCQMOQUmyvcTBm", "amr": ["pwd"],
        "idp": "00o5ivsvqlJSJVBme0h7", "preferred_username": "joe.smith@okta.com", "auth_time": now(),
        "at_hash": "fPlsvVszI29LU2UhDyJ9vg", "groups": ["get-authors"],
    });
    let org = json!({ "aud": issuer.split("/oauth2").next(), "cid": "0oaother" });
    let others = vec![but(&access, &json!({ "cid": "0oa3en4fAAA3ddc204w5" })), but(&access, &org)];
    let access = vec![access];
    Shown { name: "Okta", typ: None, user: "joe.smith@okta.com", access, id, refresh: None, others }
}

/// With Auth0's own profile, or with that of RFC 9068.
fn auth0(issuer: &str, name: &'static str, typ: &'static str) -> Shown {
    let us = "K1AUPhZq8mRi0Q0pjhkfu1D7y6KjDQja";
    let userinfo = format!("{issuer}userinfo");
    let mut access = json!({
        "sub": "auth0|6553da60a54af58e29493993", "aud": ["https://switchboard.example.com", userinfo],
        "scope": "openid profile get-authors", "permissions": ["get-authors"],
    });
    let own = match typ {
        "JWT" => json!({ "azp": us, "gty": "password" }),
        _ => json!({ "client_id": us, "jti": "73WakrfVbNJBaAmhQtEeDv" }),
    };
    access = but(&access, &own);
    let id = json!({
        "sub": "auth0|6553da60a54af58e29493993", "aud": us, "sid": "Zx9", "nickname": "ann", "name": "Ann",
        "updated_at": "2026-01-01T00:00:00.000Z", "permissions": ["get-authors"],
    });
    let userinfo = json!([format!("{issuer}userinfo")]);
    let others = vec![
        but(&access, &json!({ "aud": "https://orders.example.com" })),
        but(&access, &json!({ "aud": userinfo })),
        but(&id, &json!({ "nonce": "12345" })),
    ];
    let (typ, user, access) = (Some(typ), "auth0|6553da60a54af58e29493993", vec![access]);
    Shown { name, typ, user, access, id, refresh: None, others }
}

fn cognito() -> Shown {
    let us = "617jkna9pqeg8rmgtg9uv4e6j4";
    let access = json!({
        "sub": "c27a05a2-4ce1-4173-be51-9bbc3fe65a0a", "device_key": "eu-west-1_d1",
        "cognito:groups": ["get-authors"], "version": 2, "client_id": us, "origin_jti": "o1", "event_id": "e1",
        "token_use": "access", "scope": "openid", "auth_time": now(), "jti": "d49208e7", "username": "sai",
    });
    let id = json!({
        "sub": "c27a05a2-4ce1-4173-be51-9bbc3fe65a0a", "cognito:groups": ["get-authors"], "aud": us,
        "cognito:username": "sai", "origin_jti": "o1", "event_id": "e1", "token_use": "id",
        "auth_time": now(), "jti": "i1", "email": "sai@example.com",
    });
    let others = vec![
        but(&access, &json!({ "client_id": "1234567890abcdefghijklmnop" })),
        but(&access, &json!({ "token_use": "id" })),
        but(&access, &json!({ "token_use": 5 })),
    ];
    Shown {
        name: "Cognito",
        typ: None,
        user: "sai",
        access: vec![access],
        id,
        refresh: None,
        others,
    }
}

fn zitadel() -> Shown {
    let (us, project) = ("178204173316174381", "165378731437097089");
    let roles = json!({ "get-authors": { "178204173316174381": "acme.ch" } });
    let access = json!({
        "aud": [us, "209358103284843523", project], "nbf": now(), "jti": "V2_2280-at_2281",
        "sub": "228010", "urn:zitadel:iam:org:project:roles": roles,
    });
    let id = json!({
        "aud": [us, "209358103284843523", project], "amr": ["pwd"], "auth_time": now(), "azp": us,
        "client_id": us, "at_hash": "UrDR9Abc", "sub": "228010", "sid": "V2_2280",
        "urn:zitadel:iam:org:project:roles": roles,
    });
    let others = vec![
        but(&access, &json!({ "aud": ["300000000000000001", "300000000000000002"] })),
        // Neither a client nor a name.
        json!({ "aud": [project], "sub": "228010" }),
    ];
    let (typ, access) = (Some("JWT"), vec![but(&access, &json!({ "azp": us })), access]);
    Shown { name: "Zitadel", typ, user: "228010", access, id, refresh: None, others }
}

async fn lets_in(server: &TestServer, shown: &Shown, token: &str) {
    let (name, addr) = (shown.name, server.addr);
    let request = reqwest::Client::new().get(format!("http://{addr}/authors")).bearer_auth(token);
    assert_eq!(request.send().await.unwrap().status(), 200, "{name}: an access token");
    let hello = Client::open(addr, "/web").await.authenticate(token).await;
    assert_eq!(hello["user"], shown.user, "{name}");
}

#[tokio::test]
async fn each_provider_gets_in_with_the_settings_of_the_documents_and_with_access_tokens_alone() {
    let issuer = Issuer::start().await;
    let url = issuer.url();
    let documented = documented();
    let table = [
        keycloak(&url),
        entra(),
        okta(&url),
        auth0(&url, "Auth0", "JWT"),
        auth0(&url, "Auth0 with the RFC 9068 token profile", "at+jwt"),
        cognito(),
        zitadel(),
    ];
    let names: Vec<_> = table.iter().map(|shown| shown.name).collect();
    let mut sorted = names.clone();
    sorted.sort_unstable();
    assert!(documented.keys().eq(&sorted), "{documented:?}");
    for shown in &table {
        let mut settings = documented[shown.name].clone();
        // Where it is, is for the test to say.
        for name in ["KEYCLOAK_BASE_URL", "KEYCLOAK_REALM", "OIDC_ISSUER"] {
            settings.remove(name);
        }
        let settings: Vec<_> = settings.iter().map(|(name, value)| (&**name, &**value)).collect();
        let server = trusting(&issuer, &settings).await;
        let sign = |claims: &Value, typ: Option<&str>| {
            let typ = typ.map(ToOwned::to_owned);
            let header = Header { typ, ..Header::new(Algorithm::RS256) };
            issuer.key().sign_as(&header, &with(&url, claims))
        };
        for claims in &shown.access {
            lets_in(&server, shown, &sign(claims, shown.typ)).await;
        }
        // ID tokens are JWT everywhere, also with RFC 9068.
        let id = shown.typ.map(|_| "JWT");
        let mut bad = vec![("an ID token", sign(&shown.id, id)), ("opaque", "AAAA.BBBB".into())];
        bad.extend(shown.refresh.iter().map(|claims| ("a refresh token", sign(claims, shown.typ))));
        bad.extend(shown.others.iter().map(|claims| ("for others", sign(claims, shown.typ))));
        for (kind, token) in bad {
            let name = format!("{}: {kind}", shown.name);
            refused_by_rest(server.addr, &name, &token, "unauthorized").await;
            refused_by_websocket(server.addr, &name, &token, "unauthorized").await;
        }
        // By the settings of a moment ago none but Keycloak's got in.
        if shown.name == "Keycloak" {
            continue;
        }
        let server = trusting(&issuer, &[]).await;
        let token = sign(&shown.access[0], shown.typ);
        refused_by_rest(server.addr, shown.name, &token, "unauthorized").await;
    }
}

#[tokio::test]
async fn with_an_audience_set_azp_alone_is_not_enough() {
    let issuer = Issuer::start().await;
    let others = issuer.token(json!({ "azp": CLIENT, "aud": ["orders", "account"] }));
    let ours = issuer.token(json!({ "azp": "shop", "aud": ["orders", "board-api"] }));
    let status = async |server: &TestServer, token: &str| {
        let request = server.request(reqwest::Method::GET, "/authors").bearer_auth(token);
        request.send().await.unwrap().status().as_u16()
    };
    for (audience, azp_alone, named) in
        [("", 200, 401), ("board-api", 401, 200), ("x, orders", 200, 200)]
    {
        let server = trusting(&issuer, &[("JWT_AUDIENCE", audience)]).await;
        assert_eq!(status(&server, &others).await, azp_alone, "{audience}");
        assert_eq!(status(&server, &ours).await, named, "{audience}");
        let nobodys = issuer.token(json!({ "azp": CLIENT }));
        assert_eq!(status(&server, &nobodys).await, if audience.is_empty() { 200 } else { 401 });
    }
    // What is set of the provider's tokens is not asked of development tokens.
    let settings = [("JWT_AUDIENCE", "x"), ("JWT_TYPES", "JWT"), ("JWT_CLIENT_CLAIM", "cid")];
    let server = TestServer::start(&settings).await;
    assert_eq!(status(&server, &server.token("ann")).await, 200);
}

#[tokio::test]
async fn moments_of_a_token_may_have_a_fraction() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("JWT_LEEWAY", "0s")]).await;
    let at = |seconds: f64| json!(now() as f64 + seconds);
    let token = issuer.token(json!({ "iat": at(-0.25), "nbf": at(-1.5), "exp": at(99.9) }));
    let hello = Client::open(server.addr, "/web").await.authenticate(&token).await;
    let left = hello["expires_in"].as_i64().unwrap();
    assert!((97..=99).contains(&left), "{hello}");
    let expired = issuer.token(json!({ "iat": at(-99.5), "exp": at(-3.5) }));
    refused_by_rest(server.addr, "expired", &expired, "token_expired").await;
    log_out(&server, &logout_token(&issuer, &json!({ "iat": at(-0.25), "exp": at(99.9) }))).await;
    refused_by_rest(server.addr, "logged out", &token, "unauthorized").await;
}

#[tokio::test]
async fn logout_tokens_of_the_clients_that_are_named_count_as_well() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("BACKCHANNEL_CLIENTS", "switchboard-web, shop")]).await;
    for aud in ["switchboard-web", "shop", CLIENT] {
        let token = issuer.token(json!({ "sid": aud }));
        let mut client = Client::open(server.addr, "/web").await;
        client.authenticate(&token).await;
        log_out(&server, &logout_token(&issuer, &json!({ "aud": aud, "sid": aud }))).await;
        assert_eq!(client.until_closed().await.1, crate::support::Closed::Code(4004), "{aud}");
    }
}
