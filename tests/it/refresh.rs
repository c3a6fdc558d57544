//! Tokens that end, and fresh ones for connections that are open.

use std::{
    io::{Read, Write},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use switchboard::{
    auth::DevIssuer,
    handlers::{
        Answer, Caller, Context, Handler, HandlerError, Package,
        roles::{ALL, CREATE_AUTHOR, GET_AUTHORS},
    },
};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{GATE, Gate, misbehaving},
    on_both_runtimes,
};

on_both_runtimes!(
    a_token_that_expires_is_warned_of_and_closes_with_4003_within_a_second,
    a_token_with_less_time_than_the_warning_is_warned_of_at_once,
    the_warning_may_be_switched_off,
    a_shorter_token_ends_the_connection_sooner,
    a_client_that_never_pauses_is_closed_when_its_token_expires,
    a_refresh_says_which_packages_its_roles_opened_and_closed,
    a_lost_role_is_refused_and_a_gained_one_works_from_the_next_message_on,
    a_token_from_the_upgrade_is_refreshed_like_any_other,
    requests_under_way_finish_with_the_identity_they_came_with,
    a_token_of_another_user_ends_the_connection,
    a_bad_token_leaves_the_old_one_in_force,
    a_failed_refresh_is_a_strike,
    a_refresh_is_no_way_to_authenticate,
    a_refresh_may_follow_the_auth_frame_at_once,
    tokens_expire_and_are_refreshed_during_a_drain_too,
);

fn seconds(value: u64) -> Duration {
    Duration::from_secs(value)
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// A token of Ann's that may call packages 1 and 2, with some claims replaced.
fn token(server: &TestServer, changes: &Value) -> String {
    let mut claims = json!({
        "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": "7a1f",
        "preferred_username": "ann", "exp": now().as_secs() + 600,
        "resource_access": { "switchboard": { "roles": [GET_AUTHORS] } },
    });
    claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    server.issuer.sign(&claims)
}

/// Hers, for so long.
fn short(server: &TestServer, time: Duration) -> String {
    token(server, &json!({ "exp": (now() + time).as_secs() }))
}

/// Hers, with other roles.
fn of_roles(server: &TestServer, roles: &[&str]) -> String {
    token(server, &json!({ "resource_access": { "switchboard": { "roles": roles } } }))
}

async fn opened(server: &TestServer, token: &str) -> Client {
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(token).await;
    client
}

fn frame(token: &str) -> Value {
    json!({ "type": "refresh", "token": format!("Bearer {token}") })
}

async fn refresh(client: &mut Client, token: &str) -> Value {
    client.send(&frame(token)).await;
    let answer = client.receive().await;
    assert_eq!(answer["type"], "refresh_ok", "{answer}");
    answer
}

async fn status(client: &mut Client, pkg_id: i64) -> i64 {
    client.call(pkg_id, json!({})).await["status_code"].as_i64().unwrap()
}

/// Expects an error, after which the token that may call package 1 is still in force.
async fn assert_stays(client: &mut Client, code: &str, case: &str) {
    let error = client.receive().await;
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{case}");
    assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{case}");
    assert_eq!((status(client, 1).await, status(client, 3).await), (0, 3), "{case}");
}

async fn a_token_that_expires_is_warned_of_and_closes_with_4003_within_a_second() {
    let server = TestServer::start(&[("JWT_LEEWAY", "0s"), ("WS_EXPIRY_WARNING", "2s")]).await;
    let expiry = seconds(now().as_secs() + 4);
    let token = token(&server, &json!({ "exp": expiry.as_secs() }));
    let mut client = opened(&server, &token).await;
    assert_eq!(client.receive().await, json!({ "type": "auth_expiring", "expires_in": 1 }));
    let left = expiry.saturating_sub(now()).as_secs_f64();
    assert!((1.2..=2.0).contains(&left), "warned {left} s ahead");
    assert_eq!(status(&mut client, 1).await, 0);
    // Once for each token.
    assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(4003)));
    let late = now().checked_sub(expiry).expect("it was closed too early");
    assert!(late < seconds(1), "closed {late:?} late");
    server.until_metric(r#"ws_disconnections_total{code="4003"}"#, 1.0).await;
}

async fn a_token_with_less_time_than_the_warning_is_warned_of_at_once() {
    let server = TestServer::start(&[]).await;
    let mut client = opened(&server, &short(&server, seconds(40))).await;
    let warning = client.receive().await;
    assert_eq!(warning["type"], "auth_expiring");
    assert!((35..40).contains(&warning["expires_in"].as_u64().unwrap()), "{warning}");
    assert!(refresh(&mut client, &short(&server, seconds(30))).await["expires_in"].is_u64());
    assert_eq!(client.receive().await["type"], "auth_expiring");
    client.silent_for_data(Duration::from_millis(200)).await;
}

async fn the_warning_may_be_switched_off() {
    let server = TestServer::start(&[("WS_EXPIRY_WARNING", "0")]).await;
    let mut client = opened(&server, &short(&server, seconds(2))).await;
    assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(4003)));
}

#[tokio::test]
async fn a_connection_that_refreshes_stays_through_eight_refreshes() {
    let server = TestServer::start(&[("JWT_LEEWAY", "0s"), ("WS_EXPIRY_WARNING", "1s")]).await;
    let begun = Instant::now();
    let mut client = opened(&server, &short(&server, seconds(2))).await;
    for _ in 0..8 {
        assert_eq!(client.receive().await["type"], "auth_expiring");
        let answer = refresh(&mut client, &short(&server, seconds(2))).await;
        assert_eq!((&answer["gained"], &answer["lost"]), (&json!([]), &json!([])));
        assert_eq!(status(&mut client, 1).await, 0);
    }
    assert!(begun.elapsed() > seconds(6), "{:?}", begun.elapsed());
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (1, Closed::Code(4003)));
    server.until_metric(r#"auth_attempts_total{status="success"}"#, 9.0).await;
    server.until_metric(r#"ws_connections_total{status="accepted"}"#, 1.0).await;
}

async fn a_shorter_token_ends_the_connection_sooner() {
    let server = TestServer::start(&[]).await;
    let mut client = opened(&server, &short(&server, seconds(600))).await;
    let begun = Instant::now();
    let answer = refresh(&mut client, &short(&server, seconds(2))).await;
    assert!(answer["expires_in"].as_u64().unwrap() <= 2, "{answer}");
    assert_eq!(client.receive().await["type"], "auth_expiring");
    assert_eq!(client.until_closed().await.1, Closed::Code(4003));
    assert!(begun.elapsed() < seconds(3), "{:?}", begun.elapsed());
}

async fn a_client_that_never_pauses_is_closed_when_its_token_expires() {
    let text = [&[0x81, 0x80 | 15, 0, 0, 0, 0], &br#"{"type":"ping"}"#[..]].concat();
    // The second is a ping of the WebSocket layer, without payload.
    for ping in [text, vec![0x89, 0x80, 0, 0, 0, 0]] {
        // Else its strikes would end it before.
        let server = TestServer::start(&[("WS_MAX_STRIKES", "0")]).await;
        let expiry = seconds(now().as_secs() + 2);
        let token = token(&server, &json!({ "exp": expiry.as_secs() }));
        let client = opened(&server, &token).await;
        // Threads of their own: on the server's thread they would leave it time to look at its timer.
        let mut sending = client.into_std();
        let mut receiving = sending.try_clone().unwrap();
        let many = ping.repeat(1000);
        std::thread::spawn(move || while sending.write_all(&many).is_ok() {});
        let reading = tokio::task::spawn_blocking(move || {
            let mut last = Vec::new();
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = receiving.read(&mut buffer) {
                last.extend_from_slice(&buffer[..length]);
                last.drain(..last.len().saturating_sub(64));
            }
            last
        });
        let last = timeout(seconds(6), reading).await.expect("it was never closed").unwrap();
        let code = 4003_u16.to_be_bytes();
        assert!(last.windows(2).any(|bytes| bytes == code), "{ping:?}: {last:?}");
        let late = now().checked_sub(expiry).expect("it was closed too early");
        assert!(late < seconds(1), "{ping:?}: closed {late:?} late");
    }
}

async fn a_refresh_says_which_packages_its_roles_opened_and_closed() {
    let server = TestServer::start(&[]).await;
    let mut client = opened(&server, &of_roles(&server, &[GET_AUTHORS])).await;
    let all = ALL.as_slice();
    for (roles, gained, lost) in [
        (&[CREATE_AUTHOR, "unheard-of"][..], json!([3]), json!([1, 2])),
        (all, json!([1, 2, 4, 5]), json!([])),
        (all, json!([]), json!([])),
        (&[], json!([]), json!([1, 2, 3, 4, 5])),
        (&[GET_AUTHORS], json!([1, 2]), json!([])),
    ] {
        let answer = refresh(&mut client, &of_roles(&server, roles)).await;
        let left = answer["expires_in"].as_u64().unwrap();
        assert!((590..=600).contains(&left), "{answer}");
        assert_eq!((&answer["gained"], &answer["lost"]), (&gained, &lost), "{roles:?}");
        assert_eq!(answer.as_object().unwrap().len(), 4);
    }
}

async fn a_lost_role_is_refused_and_a_gained_one_works_from_the_next_message_on() {
    let server = TestServer::start(&[]).await;
    for format in ["json", "protobuf"] {
        let mut client = Client::open(server.addr, &format!("/web?format={format}")).await;
        client.authenticate(&of_roles(&server, &[GET_AUTHORS])).await;
        refresh(&mut client, &of_roles(&server, &[CREATE_AUTHOR])).await;
        let name = json!({ "name": format });
        let (read, create) = match format {
            "json" => {
                (status(&mut client, 1).await, client.call(3, name).await["status_code"].clone())
            }
            _ => {
                let read = client.call_protobuf(1, "{}").await.status_code;
                (read.into(), client.call_protobuf(3, &name.to_string()).await.status_code.into())
            }
        };
        assert_eq!((read, create), (3, json!(0)), "{format}");
    }
}

async fn a_token_from_the_upgrade_is_refreshed_like_any_other() {
    let server = TestServer::start(&[]).await;
    let header = format!("Bearer {}", of_roles(&server, &[]));
    let mut client =
        Client::try_open(server.addr, "/web", &[("authorization", &header)]).await.unwrap();
    assert_eq!(client.receive().await["type"], "auth_ok");
    refresh(&mut client, &token(&server, &json!({ "sid": "another-login" }))).await;
    assert_eq!(status(&mut client, 1).await, 0);
}

/// Answers with the caller's name, once the gate lets it.
struct WhoAmI(Gate);

impl Handler for WhoAmI {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "any object";
    const OUTPUT: &'static str = "a name";

    async fn handle(
        &self,
        context: &Context,
        caller: &Caller,
        input: Value,
    ) -> Result<Answer<Value>, HandlerError> {
        self.0.handle(context, caller, input).await?;
        Ok(json!(&*caller.identity.username).into())
    }
}

async fn requests_under_way_finish_with_the_identity_they_came_with() {
    let gate = Gate::closed();
    let package = Package::new(904, "WHO_AM_I", &[GET_AUTHORS], WhoAmI(gate.clone()));
    let server = TestServer::with_packages(&[], vec![package]).await;
    let mut client = opened(&server, &token(&server, &json!({}))).await;
    let early = client.request(904, json!({})).await;
    gate.until_begun(1).await;
    let answer = refresh(&mut client, &of_roles(&server, &[])).await;
    assert_eq!(answer["lost"], json!([1, 2, 904]));
    assert_eq!(status(&mut client, 904).await, 3);
    gate.release(2);
    let answer = client.receive().await;
    assert_eq!((&answer["req_id"], &answer["data"]), (&json!(early), &json!("ann")));
    refresh(&mut client, &token(&server, &json!({ "preferred_username": "Ann" }))).await;
    assert_eq!(client.call(904, json!({})).await["data"], "Ann");
}

async fn a_token_of_another_user_ends_the_connection() {
    let server = TestServer::start(&[]).await;
    let mut client = opened(&server, &token(&server, &json!({}))).await;
    client.send(&frame(&token(&server, &json!({ "sub": "0bad" })))).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!(closed, Closed::Code(4001));
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((&seen[0]["type"], &seen[0]["code"]), (&json!("error"), &json!("unauthorized")));
    server.until_metric(r#"auth_attempts_total{status="failed"}"#, 1.0).await;
    server.until_metric(r#"ws_disconnections_total{code="4001"}"#, 1.0).await;
    server.until_metric("ws_connections_active", 0.0).await;
}

async fn a_bad_token_leaves_the_old_one_in_force() {
    let server = TestServer::start(&[]).await;
    let folder = tempfile::TempDir::new().unwrap();
    let stranger = DevIssuer::open(&folder.path().join("key.pem"), "switchboard").unwrap();
    let mut client = opened(&server, &token(&server, &json!({}))).await;
    let past = |seconds| json!({ "exp": now().as_secs() - seconds });
    let cases = [
        ("no token", json!({ "type": "refresh" }), "unauthorized"),
        ("null", json!({ "type": "refresh", "token": null }), "unauthorized"),
        ("a number", json!({ "type": "refresh", "token": 7 }), "unauthorized"),
        (
            "no scheme",
            json!({ "type": "refresh", "token": token(&server, &json!({})) }),
            "unauthorized",
        ),
        ("nonsense", frame("nonsense"), "unauthorized"),
        ("empty", frame(""), "unauthorized"),
        ("another key", frame(&stranger.token("ann", &ALL, seconds(600))), "unauthorized"),
        (
            "another issuer",
            frame(&token(&server, &json!({ "iss": "https://evil.example" }))),
            "unauthorized",
        ),
        ("another client", frame(&token(&server, &json!({ "azp": "other" }))), "unauthorized"),
        ("a refresh token", frame(&token(&server, &json!({ "typ": "Refresh" }))), "unauthorized"),
        ("expired", frame(&token(&server, &past(3600))), "token_expired"),
        // The leeway lets it in, but it has no time left to give.
        ("just expired", frame(&token(&server, &past(3))), "token_expired"),
    ];
    for (n, (case, frame, code)) in cases.iter().enumerate() {
        if n > 0 && n % 5 == 0 {
            // Five refreshes are taken at once.
            client = opened(&server, &token(&server, &json!({}))).await;
        }
        client.send(frame).await;
        assert_stays(&mut client, code, case).await;
    }
    server.until_metric(r#"auth_attempts_total{status="failed"}"#, 10.0).await;
    server.until_metric(r#"auth_attempts_total{status="token_expired"}"#, 2.0).await;
    server.until_metric(r#"auth_attempts_total{status="success"}"#, 3.0).await;
    // No connection was refused.
    server.until_metric(r#"ws_connections_total{status="rejected_auth"}"#, 0.0).await;
    refresh(&mut client, &of_roles(&server, &ALL)).await;
}

async fn a_failed_refresh_is_a_strike() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "3")]).await;
    let mut client = opened(&server, &token(&server, &json!({}))).await;
    client.send(&frame("nonsense")).await;
    assert_stays(&mut client, "unauthorized", "first").await;
    refresh(&mut client, &token(&server, &json!({}))).await;
    client.send(&frame(&server.expired_token("ann"))).await;
    assert_stays(&mut client, "token_expired", "second").await;
    client.send(&json!({ "type": "refresh" })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (1, Closed::Code(1008)));
    assert_eq!(seen[0]["code"], "unauthorized");
}

async fn a_refresh_is_no_way_to_authenticate() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send(&frame(&token(&server, &json!({})))).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (1, Closed::Code(4001)));
    assert_eq!(seen[0]["code"], "unauthorized");
}

async fn a_refresh_may_follow_the_auth_frame_at_once() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    let auth = json!({ "type": "auth", "token": format!("Bearer {}", of_roles(&server, &[])) });
    let fresh = frame(&of_roles(&server, &[GET_AUTHORS]));
    client.send_together([auth, fresh].map(|frame| Message::text(frame.to_string()))).await;
    assert_eq!(client.receive().await["type"], "auth_ok");
    assert_eq!(client.receive().await["gained"], json!([1, 2]));
}

async fn tokens_expire_and_are_refreshed_during_a_drain_too() {
    let gate = Gate::closed();
    let mut server =
        TestServer::with_packages(&[("WS_EXPIRY_WARNING", "1s")], misbehaving(&gate)).await;
    let mut client = opened(&server, &short(&server, seconds(600))).await;
    client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    server.begin_shutdown();
    assert_eq!(client.receive().await["type"], "drain");
    tokio::time::sleep(Duration::from_millis(200)).await;
    refresh(&mut client, &short(&server, seconds(3))).await;
    assert_eq!(client.receive().await["type"], "auth_expiring");
    assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(4003)));
}
