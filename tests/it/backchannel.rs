//! Back-channel logout: what the issuer says has ended, ends here, and nothing else does.

use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::{
    auth_routes::login,
    oidc::trusting,
    support::{
        Client, Closed, TestServer,
        issuer::{CLIENT, Issuer, Mood, SigningKey, claims, now},
        rest::refused,
        users::PASSWORD,
    },
};

const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";
/// From a logout to the end of its last socket.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a logout token says, with some claims replaced; null takes one away.
fn logout_claims(issuer: &Issuer, changes: &Value) -> Value {
    static NAME: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let name = NAME.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut claims = json!({
        "iss": issuer.url(), "aud": CLIENT, "iat": now(), "exp": now() + 120,
        "jti": format!("logout-{name}"), "typ": "Logout", "sub": "7a1f", "sid": "51d",
        "events": { EVENT: {} },
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

fn header(typ: Option<&str>) -> Header {
    Header { typ: typ.map(ToOwned::to_owned), ..Header::new(Algorithm::RS256) }
}

pub(crate) fn logout_token(issuer: &Issuer, changes: &Value) -> String {
    let key = issuer.key();
    let header = Header { typ: Some("logout+jwt".into()), ..Header::new(key.algorithm) };
    key.sign_as(&header, &logout_claims(issuer, changes))
}

async fn send(server: &TestServer, kind: &str, body: String) -> Response {
    let request = server.request(Method::POST, "/auth/backchannel-logout");
    request.header("content-type", kind).body(body).send().await.unwrap()
}

async fn post(server: &TestServer, token: &str) -> Response {
    let body =
        form_urlencoded::Serializer::new(String::new()).append_pair("logout_token", token).finish();
    send(server, "application/x-www-form-urlencoded", body).await
}

pub(crate) async fn log_out(server: &TestServer, token: &str) -> Instant {
    let since = Instant::now();
    let answer = post(server, token).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["cache-control"], "no-store");
    since
}

pub(crate) async fn socket(server: &TestServer, token: &str) -> Client {
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(token).await;
    client
}

pub(crate) async fn is_open(client: &mut Client) {
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

pub(crate) async fn is_closed(client: &mut Client, since: Instant) {
    assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    assert!(since.elapsed() < PATIENCE, "{:?}", since.elapsed());
}

async fn get(server: &TestServer, token: &str) -> Response {
    server.request(Method::GET, "/authors").bearer_auth(token).send().await.unwrap()
}

/// The token opens nothing any more, over WebSocket and REST.
pub(crate) async fn is_refused(server: &TestServer, token: &str) {
    refused(get(server, token).await, 401, "unauthorized").await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((&seen[0]["code"], closed), (&json!("unauthorized"), Closed::Code(4001)));
}

#[tokio::test]
async fn a_session_that_ended_loses_its_sockets_and_its_tokens_and_no_other_does() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let token = |sub: &str, sid: Value| issuer.token(json!({ "sub": sub, "sid": sid }));
    let gone = [token("ann", json!("s1")), token("ann", json!("s1"))];
    let kept = [
        token("ann", json!("s2")),
        token("ann", Value::Null),
        token("ann", json!("S1")),
        token("bob", json!("s3")),
    ];
    let mut closing = [
        socket(&server, &gone[0]).await,
        socket(&server, &gone[0]).await,
        socket(&server, &gone[1]).await,
    ];
    let mut open = Vec::new();
    for token in &kept {
        open.push(socket(&server, token).await);
    }
    // With both, as Keycloak sends them, the session alone is meant.
    let since =
        log_out(&server, &logout_token(&issuer, &json!({ "sub": "ann", "sid": "s1" }))).await;
    for client in &mut closing {
        is_closed(client, since).await;
    }
    for (client, token) in open.iter_mut().zip(&kept) {
        is_open(client).await;
        assert_eq!(get(&server, token).await.status(), 200);
    }
    for token in &gone {
        is_refused(&server, token).await;
    }
    // The session of a token that was never seen before is over as well.
    is_refused(&server, &token("ann", json!("s1"))).await;
    server.until_metric("ws_disconnections_total{code=\"4004\"}", 3.0).await;
    let route = "endpoint=\"/auth/backchannel-logout\",method=\"POST\",status_code=\"200\"";
    assert_eq!(server.metric(&format!("http_requests_total{{{route}}}")).await, 1.0);
}

#[tokio::test]
async fn a_user_who_was_logged_out_loses_all_that_came_before() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let token = |sub: &str, sid: &str, iat: i64| {
        issuer.token(json!({ "sub": sub, "sid": sid, "iat": iat }))
    };
    let gone = [token("ann", "s1", now() - 60), token("ann", "s2", now() - 1)];
    let other = token("bob", "s3", now() - 60);
    let mut closing = [socket(&server, &gone[0]).await, socket(&server, &gone[1]).await];
    let mut open = socket(&server, &other).await;
    let since =
        log_out(&server, &logout_token(&issuer, &json!({ "sub": "ann", "sid": null }))).await;
    for (client, token) in closing.iter_mut().zip(&gone) {
        is_closed(client, since).await;
        is_refused(&server, token).await;
    }
    is_open(&mut open).await;
    assert_eq!(get(&server, &other).await.status(), 200);
    // Who does not say when it was issued may be from before.
    is_refused(&server, &issuer.token(json!({ "sub": "ann", "iat": null }))).await;
    // A login after that is a new one, and stays when an older logout arrives late.
    let new = token("ann", "s4", now() + 2);
    let mut client = socket(&server, &new).await;
    let late = json!({ "sub": "ann", "sid": null, "iat": now() - 30 });
    log_out(&server, &logout_token(&issuer, &late)).await;
    is_open(&mut client).await;
    assert_eq!(get(&server, &new).await.status(), 200);
}

#[tokio::test]
async fn every_way_to_write_a_good_logout_token_is_taken() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    for (i, (typ, changes)) in [
        (None, json!({})),
        (Some("JWT"), json!({})),
        (Some("Logout+JWT"), json!({})),
        (Some("application/logout+jwt"), json!({ "typ": null })),
        (None, json!({ "exp": null })),
        (None, json!({ "aud": ["other", CLIENT] })),
        (None, json!({ "sub": null })),
        (None, json!({ "iat": now() + 5 })),
        (None, json!({ "iat": now() - 290, "exp": now() - 5 })),
        (None, json!({ "events": { EVENT: { "more": 1 }, "https://other.example": 7 } })),
        (None, json!({ "unheard-of": [] })),
    ]
    .into_iter()
    .enumerate()
    {
        let sid = format!("s{i}");
        let token = issuer.token(json!({ "sid": sid }));
        let mut client = socket(&server, &token).await;
        let mut claims = logout_claims(&issuer, &changes);
        claims["sid"] = json!(sid);
        let since = log_out(&server, &issuer.key().sign_as(&header(typ), &claims)).await;
        is_closed(&mut client, since).await;
    }
}

#[tokio::test]
async fn no_other_token_logs_anybody_out() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[("BACKCHANNEL_FAILURES_PER_MINUTE", "0")]).await;
    let access = issuer.token(json!({}));
    let mut client = socket(&server, &access).await;
    let with = |changes: Value| logout_token(&issuer, &changes);
    let good = logout_claims(&issuer, &json!({}));
    let used = with(json!({ "sid": "another" }));
    log_out(&server, &used).await;
    let used_name = with(json!({ "sid": "another", "jti": "used" }));
    log_out(&server, &used_name).await;
    let stranger = SigningKey::other_rsa(&issuer.key().kid);
    let unknown = SigningKey::new("unknown", Algorithm::ES256);
    let public = EncodingKey::from_secret(&issuer.key().public_pem());
    let hmac = Header { kid: Some(issuer.key().kid), ..Header::new(Algorithm::HS256) };
    let hmac = jsonwebtoken::encode(&hmac, &good, &public).unwrap();
    let parts: Vec<String> = with(json!({})).split('.').map(ToOwned::to_owned).collect();
    // {"alg":"none","kid":"rsa"}
    let none = format!("eyJhbGciOiJub25lIiwia2lkIjoicnNhIn0.{}.", parts[1]);
    let critical = Header { crit: Some(vec!["b64".into()]), ..header(None) };
    let mut cases = vec![
        ("another key", stranger.sign_as(&header(None), &good)),
        ("an unknown key", unknown.sign(&good)),
        ("HMAC with the public key", hmac),
        ("alg none", none),
        ("a cut signature", format!("{}.{}.{}", parts[0], parts[1], &parts[2][..40])),
        ("no signature", format!("{}.{}.", parts[0], parts[1])),
        ("critical extensions", issuer.key().sign_as(&critical, &good)),
        ("an access token", access.clone()),
        ("an access token's header", issuer.key().sign_as(&header(Some("at+jwt")), &good)),
        ("an ID token", issuer.token(json!({ "typ": "ID", "aud": CLIENT, "jti": "id" }))),
        ("a token that was used", used),
        ("garbage", "garbage".into()),
        ("nothing", String::new()),
    ];
    for (name, changes) in [
        ("iss", json!({ "iss": "https://evil.example" })),
        ("iss missing", json!({ "iss": null })),
        ("iss of another type", json!({ "iss": [issuer.url()] })),
        ("aud", json!({ "aud": "other" })),
        ("aud in a list", json!({ "aud": ["other", "account"] })),
        ("aud missing, though azp is there", json!({ "aud": null, "azp": CLIENT })),
        ("iat in the future", json!({ "iat": now() + 60 })),
        ("iat long ago", json!({ "iat": now() - 400 })),
        ("iat missing", json!({ "iat": null })),
        ("iat of another type", json!({ "iat": now().to_string() })),
        ("exp", json!({ "exp": now() - 30 })),
        ("exp of another type", json!({ "exp": "soon" })),
        ("nbf", json!({ "nbf": now() + 60 })),
        ("jti missing", json!({ "jti": null })),
        ("jti empty", json!({ "jti": "" })),
        ("jti of another type", json!({ "jti": 7 })),
        ("jti that was used", json!({ "jti": "used" })),
        ("events missing", json!({ "events": null })),
        ("events empty", json!({ "events": {} })),
        ("another event", json!({ "events": { "https://other.example/event": {} } })),
        ("events as a text", json!({ "events": EVENT })),
        ("events as a list", json!({ "events": [EVENT] })),
        ("an event that is true", json!({ "events": { EVENT: true } })),
        ("an event that is a list", json!({ "events": { EVENT: [] } })),
        ("a nonce", json!({ "nonce": "n" })),
        ("a nonce in vain", json!({ "nonce": false })),
        ("typ", json!({ "typ": "Bearer" })),
        ("a refresh token's typ", json!({ "typ": "Refresh" })),
        ("neither sid nor sub", json!({ "sid": null, "sub": null })),
        ("an empty sid", json!({ "sid": "" })),
        ("an empty sub", json!({ "sid": null, "sub": "" })),
        ("sid of another type", json!({ "sid": ["51d"] })),
        ("sub of another type", json!({ "sid": null, "sub": 7 })),
    ] {
        cases.push((name, with(changes)));
    }
    let mut said = Vec::new();
    for (name, token) in &cases {
        let answer = post(&server, token).await;
        assert_eq!(answer.status(), 400, "{name}");
        assert_eq!(answer.headers()["cache-control"], "no-store", "{name}");
        said.push(answer.text().await.unwrap());
    }
    let good = with(json!({}));
    let body = |name: &str| format!("{name}={good}");
    for (kind, body) in [
        ("application/x-www-form-urlencoded", String::new()),
        ("application/x-www-form-urlencoded", body("token")),
        ("application/x-www-form-urlencoded", body("Logout_Token")),
        ("application/x-www-form-urlencoded", format!("{0}&{0}", body("logout_token"))),
        ("application/json", json!({ "logout_token": good }).to_string()),
        ("application/jwt", good.clone()),
        ("text/plain", body("logout_token")),
        ("", body("logout_token")),
    ] {
        let answer = send(&server, kind, body).await;
        assert_eq!(answer.status(), 400, "{kind}");
        said.push(answer.text().await.unwrap());
    }
    said.dedup();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("\"invalid_request\""), "{said:?}");
    is_open(&mut client).await;
    assert_eq!(get(&server, &access).await.status(), 200);
    assert_eq!(server.metric("ws_disconnections_total{code=\"4004\"}").await, 0.0);
    // None of these used the name of a token up.
    let since = log_out(&server, &good).await;
    is_closed(&mut client, since).await;
}

#[tokio::test]
async fn a_logout_token_lets_nobody_in() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let roles = json!({ CLIENT: { "roles": ["get-authors"] } });
    let token = logout_token(&issuer, &json!({ "azp": CLIENT, "resource_access": roles }));
    is_refused(&server, &token).await;
}

#[tokio::test]
async fn logouts_have_no_budget_and_forged_ones_have_their_own() {
    let issuer = Issuer::start().await;
    let settings = [
        ("RATE_LIMIT_PER_MINUTE", "5"),
        ("RATE_LIMIT_BURST", "0"),
        ("AUTH_FAILURES_PER_MINUTE", "3"),
        ("BACKCHANNEL_FAILURES_PER_MINUTE", "3"),
    ];
    let server = trusting(&issuer, &settings).await;
    for i in 0..50 {
        let token = logout_token(&issuer, &json!({ "sid": format!("s{i}") }));
        let answer = post(&server, &token).await;
        assert_eq!(answer.status(), 200);
        assert!(!answer.headers().contains_key("x-ratelimit-limit"));
    }
    for _ in 0..3 {
        assert_eq!(post(&server, "garbage").await.status(), 400);
    }
    assert_eq!(get(&server, &issuer.token(json!({}))).await.status(), 200);
    // Not looked at any more, however good it is.
    let good = logout_token(&issuer, &json!({ "sid": "last" }));
    refused(post(&server, &good).await, 429, "rate_limit_exceeded").await;
}

#[tokio::test]
async fn a_logout_is_unavailable_without_keys_and_good_with_new_ones() {
    let mut issuer = Issuer::start().await;
    issuer.down().await;
    let server = trusting(&issuer, &[]).await;
    let token = logout_token(&issuer, &json!({}));
    refused(post(&server, &token).await, 503, "unavailable").await;
    issuer.up().await;
    let started = Instant::now();
    while post(&server, &token).await.status() != 200 {
        assert!(started.elapsed() < Duration::from_secs(15), "it is never taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // This one has not asked for an unknown key yet.
    let server = trusting(&issuer, &[]).await;
    let mut client = socket(&server, &issuer.token(json!({ "sid": "s2" }))).await;
    issuer.publish(vec![SigningKey::new("new", Algorithm::ES256)]);
    let since = log_out(&server, &logout_token(&issuer, &json!({ "sid": "s2" }))).await;
    is_closed(&mut client, since).await;
}

#[tokio::test]
async fn a_logout_over_rest_ends_its_session_here_and_may_be_repeated() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let (gone, refresh) = login(&server, "ann", PASSWORD).await;
    let (kept, other) = login(&server, "ann", PASSWORD).await;
    let mut closing = [socket(&server, &gone).await, socket(&server, &gone).await];
    let mut open = socket(&server, &kept).await;
    let logout = async |refresh: &str| {
        let request = server.request(Method::POST, "/auth/logout").bearer_auth(&gone);
        request.json(&json!({ "refresh_token": refresh })).send().await.unwrap()
    };
    // Signed by somebody else, it names the session in vain.
    let forged = format!("{}AAAA", &refresh[..refresh.len() - 4]);
    refused(logout(&forged).await, 401, "unauthorized").await;
    is_open(&mut closing[0]).await;

    let since = Instant::now();
    let answer = logout(&refresh).await;
    assert_eq!(answer.status(), 204);
    assert_eq!(answer.bytes().await.unwrap().len(), 0);
    for client in &mut closing {
        is_closed(client, since).await;
    }
    is_refused(&server, &gone).await;
    let request = server.request(Method::POST, "/auth/refresh");
    let again = request.json(&json!({ "refresh_token": refresh })).send().await.unwrap();
    refused(again, 401, "unauthorized").await;
    assert_eq!(logout(&refresh).await.status(), 204);
    is_open(&mut open).await;
    assert_eq!(get(&server, &kept).await.status(), 200);
    let calls = "keycloak_operation_duration_seconds_count{operation=\"logout\"}";
    assert_eq!(server.metric(calls).await, 3.0);

    // 200 is no promise that the token was looked at.
    issuer.users().answer_with(200, "<html>Goodbye</html>");
    refused(logout(&other).await, 503, "unavailable").await;
    is_open(&mut open).await;
}

#[tokio::test]
async fn a_logout_goes_on_when_its_client_has_left() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let (access, refresh) = login(&server, "ann", PASSWORD).await;
    let mut client = socket(&server, &access).await;
    issuer.set_mood(Mood::Slow(Duration::from_millis(500)));
    let since = Instant::now();
    let request = server.request(Method::POST, "/auth/logout").bearer_auth(&access);
    let request = request.json(&json!({ "refresh_token": refresh }));
    let left = request.timeout(Duration::from_millis(100)).send().await;
    assert!(left.unwrap_err().is_timeout());
    is_closed(&mut client, since).await;
}

#[tokio::test]
async fn a_refresh_moves_a_socket_to_its_new_session() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let token = |sid: &str| issuer.token(json!({ "sid": sid }));
    let mut client = socket(&server, &token("s1")).await;
    let frame = |token: &str| json!({ "type": "refresh", "token": format!("Bearer {token}") });
    client.send(&frame(&token("s2"))).await;
    assert_eq!(client.receive().await["type"], "refresh_ok");
    log_out(&server, &logout_token(&issuer, &json!({ "sid": "s1" }))).await;
    is_open(&mut client).await;
    // The token of a session that is over does not do, and leaves the good one in force.
    client.send(&frame(&token("s1"))).await;
    assert_eq!(client.receive().await["code"], "unauthorized");
    is_open(&mut client).await;
    let since = log_out(&server, &logout_token(&issuer, &json!({ "sid": "s2" }))).await;
    is_closed(&mut client, since).await;
}

#[tokio::test]
async fn a_token_that_waited_for_its_key_is_refused_if_its_session_ended_meanwhile() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let old = issuer.key();
    let logout = logout_token(&issuer, &json!({ "sid": "s1" }));
    let mut open = socket(&server, &issuer.token(json!({ "sid": "s2" }))).await;
    let new = SigningKey::new("new", Algorithm::ES256);
    issuer.publish(vec![new.clone(), old]);
    issuer.set_mood(Mood::Slow(Duration::from_millis(500)));
    let token = new.sign(&claims(&issuer.url(), &json!({ "sid": "s1" })));
    let mut waiting = Client::open(server.addr, "/web").await;
    waiting.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    open.send(&json!({ "type": "refresh", "token": format!("Bearer {token}") })).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    log_out(&server, &logout).await;
    assert_eq!(waiting.until_closed().await.1, Closed::Code(4001));
    assert_eq!(open.receive().await["code"], "unauthorized");
    is_open(&mut open).await;
}

#[tokio::test(flavor = "multi_thread")]
pub(crate) async fn sockets_that_open_while_their_session_ends_are_closed_too() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    for round in 0..20 {
        let sid = format!("s{round}");
        let token = issuer.token(json!({ "sid": sid }));
        let logout = logout_token(&issuer, &json!({ "sid": sid }));
        let opening = (0..10).map(async |_| {
            let mut client = Client::open(server.addr, "/web").await;
            client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
            let closed = client.until_closed().await.1;
            assert!(matches!(closed, Closed::Code(4001 | 4004)), "{closed:?}");
        });
        let ending = async {
            tokio::time::sleep(Duration::from_micros(300 * round)).await;
            log_out(&server, &logout).await;
        };
        let all = async { tokio::join!(futures_util::future::join_all(opening), ending) };
        tokio::time::timeout(Duration::from_secs(4), all).await.expect("a socket stayed open");
    }
}

#[tokio::test]
async fn a_refresh_that_waits_for_a_key_holds_nothing_up_and_is_the_only_one() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let mut client = socket(&server, &issuer.token(json!({}))).await;
    let new = SigningKey::new("new", Algorithm::ES256);
    issuer.publish(vec![new.clone(), issuer.key()]);
    issuer.set_mood(Mood::Slow(Duration::from_millis(500)));
    let roles = json!({ "resource_access": { CLIENT: { "roles": [] } } });
    let token = new.sign(&claims(&issuer.url(), &roles));
    let frame = json!({ "type": "refresh", "token": format!("Bearer {token}") });
    client.send(&frame).await;
    client.send(&frame).await;
    assert_eq!(client.receive().await["code"], "invalid_message");
    // With the old roles meanwhile.
    assert_eq!(client.call(1, json!({})).await["status_code"], 0);
    let answer = client.receive().await;
    assert_eq!((&answer["type"], &answer["lost"]), (&json!("refresh_ok"), &json!([1, 2, 3, 4, 5])));
    assert_eq!(client.call(1, json!({})).await["status_code"], 3);
}
