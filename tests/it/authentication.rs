//! Who gets in, by which of the three ways, and what the others are told.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use switchboard::{auth::DevIssuer, handlers::roles};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};
use uuid::Uuid;

use crate::support::{Client, Closed, TestServer};

fn assert_welcome(frame: &Value, user: &str) {
    assert_eq!(frame["type"], "auth_ok", "{frame}");
    assert_eq!(frame["user"], user);
    assert!(Uuid::parse_str(frame["connection_id"].as_str().unwrap()).is_ok_and(|id| !id.is_nil()));
    assert!((590..=600).contains(&frame["expires_in"].as_u64().unwrap()), "{frame}");
}

/// Expects an error frame of this code, then the end with this close code.
async fn assert_refused(mut client: Client, code: &str, close: u16, case: &str) {
    let (seen, closed) = client.until_closed().await;
    assert_eq!(seen.len(), 1, "{case}: {seen:?}");
    assert_eq!(seen[0]["type"], "error", "{case}");
    assert_eq!(seen[0]["code"], code, "{case}");
    assert!(seen[0]["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{case}");
    assert_eq!(closed, Closed::Code(close), "{case}");
}

fn auth(token: &str) -> Value {
    json!({ "type": "auth", "token": format!("Bearer {token}") })
}

#[tokio::test]
async fn the_first_message_authenticates() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    let welcome = client.authenticate(&server.token("ann")).await;
    assert_welcome(&welcome, "ann");
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn the_upgrade_header_authenticates_without_an_auth_frame() {
    let server = TestServer::start(&[]).await;
    for scheme in ["Bearer", "bearer", "BEARER"] {
        let value = format!("{scheme} {}", server.token("ann"));
        let mut client =
            Client::try_open(server.addr, "/web", &[("authorization", &value)]).await.unwrap();
        assert_welcome(&client.receive().await, "ann");
        assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    }
}

#[tokio::test]
async fn a_query_token_authenticates_where_it_is_switched_on() {
    let server = TestServer::start(&[("WS_QUERY_TOKEN", "true")]).await;
    let token = server.token("ann");
    for query in [format!("token={token}"), format!("Authorization=Bearer%20{token}")] {
        let mut client = Client::open(server.addr, &format!("/web?{query}")).await;
        assert_welcome(&client.receive().await, "ann");
    }
}

#[tokio::test]
async fn a_query_token_is_not_looked_at_by_default() {
    let server = TestServer::start(&[("WS_AUTH_TIMEOUT", "200ms")]).await;
    for token in [server.token("ann"), "nonsense".to_owned()] {
        for query in [format!("token={token}"), format!("Authorization=Bearer%20{token}")] {
            let client = Client::open(server.addr, &format!("/web?{query}")).await;
            assert_refused(client, "auth_timeout", 4002, &query).await;
        }
    }
}

#[tokio::test]
async fn the_scheme_has_no_case_and_more_members_do_not_matter() {
    let server = TestServer::start(&[]).await;
    let token = server.token("ann");
    for scheme in ["Bearer", "bearer", "BEARER"] {
        let mut client = Client::open(server.addr, "/web").await;
        let frame = json!({
            "type": "auth", "token": format!("{scheme} {token}"),
            "pkg_id": "x", "client": { "version": 9 },
        });
        client.send(&frame).await;
        assert_welcome(&client.receive().await, "ann");
    }
}

#[tokio::test]
async fn pings_before_the_auth_frame_do_not_matter() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send_frame(Message::Ping("x".into())).await;
    client.authenticate(&server.token("ann")).await;
}

#[tokio::test]
async fn auth_ok_is_json_text_also_in_protobuf() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web?format=protobuf").await;
    client.send(&auth(&server.token("ann"))).await;
    assert_welcome(&client.receive().await, "ann");
    let mut client = Client::open(server.addr, "/web?format=protobuf").await;
    client.send(&auth("nonsense")).await;
    assert_refused(client, "unauthorized", 4001, "protobuf").await;
}

#[tokio::test]
async fn anything_but_an_auth_frame_first_is_unauthorized() {
    let server = TestServer::start(&[]).await;
    let request = json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": {} }).to_string();
    let token = server.token("ann");
    for frame in [
        Message::text(request),
        Message::text("nonsense"),
        Message::text("[]"),
        Message::text(r#"{"type":"ping"}"#),
        Message::text(r#"{"type":"auth"}"#),
        Message::text(r#"{"type":"auth","token":null}"#),
        Message::text(r#"{"type":"auth","token":7}"#),
        Message::text(r#"{"type":"auth","token":"Bearer "}"#),
        Message::text(json!({ "type": "auth", "token": token }).to_string()),
        Message::text(json!({ "type": "auth", "token": format!("Basic {token}") }).to_string()),
        Message::binary(auth(&token).to_string()),
    ] {
        let mut client = Client::open(server.addr, "/web").await;
        let case = frame.to_string();
        client.send_frame(frame).await;
        assert_refused(client, "unauthorized", 4001, &case).await;
    }
    server.until_metric(r#"ws_connections_total{status="rejected_auth"}"#, 11.0).await;
    server.until_metric("ws_connections_active", 0.0).await;
}

#[tokio::test]
async fn a_token_of_another_issuer_client_key_or_kind_is_unauthorized() {
    let server = TestServer::start(&[]).await;
    let folder = tempfile::TempDir::new().unwrap();
    let stranger = DevIssuer::open(&folder.path().join("key.pem"), "switchboard").unwrap();
    let hour = u64::try_from(jiff::Timestamp::now().as_second()).unwrap() + 3600;
    let good = json!({
        "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": "s", "exp": hour,
    });
    let changed = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        server.issuer.sign(&claims)
    };
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(&server.issuer.sign(&good)).await;
    for (case, token, code) in [
        ("issuer", changed("iss", json!("https://evil.example")), "unauthorized"),
        ("client", changed("azp", json!("another")), "unauthorized"),
        ("refresh token", changed("typ", json!("Refresh")), "unauthorized"),
        ("id token", changed("typ", json!("ID")), "unauthorized"),
        ("no subject", changed("sub", json!("")), "unauthorized"),
        ("no expiry", changed("exp", json!(null)), "unauthorized"),
        ("not yet", changed("nbf", json!(hour)), "unauthorized"),
        ("key", stranger.token("ann", &roles::ALL, Duration::from_secs(600)), "unauthorized"),
        ("expired", changed("exp", json!(hour - 7200)), "token_expired"),
    ] {
        let mut client = Client::open(server.addr, "/web").await;
        client.send(&auth(&token)).await;
        assert_refused(client, code, 4001, case).await;
    }
}

#[tokio::test]
async fn silence_after_the_upgrade_is_an_auth_timeout() {
    let server = TestServer::start(&[("WS_AUTH_TIMEOUT", "300ms")]).await;
    let mut client = Client::open(server.addr, "/web").await;
    let begun = std::time::Instant::now();
    // A ping is no auth frame, and gives no more time.
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.send_frame(Message::Ping("x".into())).await;
    assert_refused(client, "auth_timeout", 4002, "silence").await;
    let took = begun.elapsed();
    assert!((250..1500).contains(&took.as_millis()), "{took:?}");
    server.until_metric(r#"ws_connections_total{status="rejected_auth_timeout"}"#, 1.0).await;
}

#[tokio::test]
async fn twenty_connections_at_once_pass_a_limit_of_five_exactly_five_times() {
    let server = TestServer::start(&[("WS_MAX_CONNECTIONS_PER_USER", "5")]).await;
    let token = server.token("ann");
    let opened = join_all((0..20).map(|_| Client::open(server.addr, "/web"))).await;
    let answered = join_all(opened.into_iter().map(|mut client| async {
        client.send(&auth(&token)).await;
        let answer = client.receive().await;
        (answer, client)
    }));
    let mut inside = Vec::new();
    for (answer, mut client) in answered.await {
        if answer["type"] == "auth_ok" {
            inside.push(client);
        } else {
            assert_eq!(
                (&answer["type"], &answer["code"]),
                (&json!("error"), &json!("connection_limit"))
            );
            assert_eq!(client.next().await.unwrap_err(), Closed::Code(1008));
        }
    }
    assert_eq!(inside.len(), 5);
    for client in &mut inside {
        assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    }
    server.until_metric("ws_connections_active", 5.0).await;
    server.until_metric(r#"ws_connections_total{status="rejected_limit"}"#, 15.0).await;
    server.until_metric(r#"ws_connections_total{status="accepted"}"#, 5.0).await;
    // Another user has a limit of their own, and an end gives the place back.
    server.client("bob").await.close().await;
    inside.pop().unwrap().close().await;
    server.until_metric("ws_connections_active", 4.0).await;
    server.client("ann").await;
}

#[tokio::test]
async fn roles_and_limits_are_those_of_the_token_that_authenticated() {
    let server = TestServer::start(&[("WS_MAX_CONNECTIONS_PER_USER", "1")]).await;
    // The Python server took the roles from the query and the user from the first message.
    let strong = server.token("boss");
    let path = format!("/web?token={strong}&Authorization=Bearer%20{strong}");
    let mut client = Client::open(server.addr, &path).await;
    let welcome = client.authenticate(&server.token_with("ann", &[])).await;
    assert_eq!(welcome["user"], "ann");
    assert_eq!(client.call(1, json!({})).await["status_code"], 3);
    // The place taken is ann's, not the boss's.
    server.client("boss").await;
    let mut second = Client::open(server.addr, "/web").await;
    second.send(&auth(&server.token("ann"))).await;
    assert_refused(second, "connection_limit", 1008, "ann again").await;
}

#[tokio::test]
async fn an_auth_frame_later_changes_nobody() {
    let server = TestServer::start(&[]).await;
    let header = format!("Bearer {}", server.token_with("ann", &[]));
    let mut client =
        Client::try_open(server.addr, "/web", &[("authorization", &header)]).await.unwrap();
    assert_eq!(client.receive().await["user"], "ann");
    client.send(&auth(&server.token("boss"))).await;
    assert_eq!(client.receive().await["type"], "error");
    assert_eq!(client.call(1, json!({})).await["status_code"], 3);
}

#[tokio::test]
async fn an_expired_token_ends_the_connection() {
    let server = TestServer::start(&[("WS_EXPIRY_WARNING", "0")]).await;
    let token = server.issuer.token("ann", &roles::ALL, Duration::from_secs(2));
    let mut client = Client::open(server.addr, "/web").await;
    let welcome = client.authenticate(&token).await;
    assert!(welcome["expires_in"].as_u64().unwrap() <= 2);
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    assert_eq!(client.until_closed().await.1, Closed::Code(4003));
    server.until_metric(r#"ws_disconnections_total{code="4003"}"#, 1.0).await;
    server.until_metric("ws_connections_active", 0.0).await;
}

#[tokio::test]
async fn every_connection_of_a_user_ends_with_its_own_token() {
    let server = TestServer::start(&[("WS_EXPIRY_WARNING", "0")]).await;
    let mut short = Vec::new();
    for format in ["json", "protobuf"] {
        let mut client = Client::open(server.addr, &format!("/web?format={format}")).await;
        let token = server.issuer.token("ann", &[], Duration::from_secs(2));
        client.authenticate(&token).await;
        short.push(client);
    }
    let mut long = server.client("ann").await;
    for client in &mut short {
        assert_eq!(client.until_closed().await.1, Closed::Code(4003));
    }
    assert_eq!(long.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn a_header_wins_over_the_query() {
    let server = TestServer::start(&[("WS_QUERY_TOKEN", "true")]).await;
    let header = format!("Bearer {}", server.token("ann"));
    for query in [server.token("boss"), "nonsense".to_owned()] {
        let path = format!("/web?token={query}");
        let by_header = [("authorization", &*header)];
        let mut client = Client::try_open(server.addr, &path, &by_header).await.unwrap();
        assert_welcome(&client.receive().await, "ann");
    }
}

#[tokio::test]
async fn a_frame_that_cannot_be_read_before_authentication_closes_with_its_own_code() {
    let server = TestServer::start(&[("WS_MAX_MESSAGE_BYTES", "1KiB")]).await;
    let text =
        |bytes: Vec<u8>| Message::Frame(Frame::message(bytes, OpCode::Data(Data::Text), true));
    for (frame, code) in [(text(vec![b' '; 1025]), 1009), (text(vec![0xff]), 1007)] {
        let mut client = Client::open(server.addr, "/web").await;
        client.send_frame(frame).await;
        assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(code)));
    }
    server.until_metric("ws_connections_active", 0.0).await;
}

#[tokio::test]
async fn a_client_that_closes_before_it_authenticates_gets_its_close_answered() {
    let server = TestServer::start(&[("WS_MAX_CONNECTIONS", "1")]).await;
    let client = Client::open(server.addr, "/web").await;
    assert_eq!(client.close_and_see().await, Closed::Code(1000));
}

#[tokio::test]
async fn five_connections_are_a_users_limit_in_every_way_to_authenticate() {
    let settings = [("WS_MAX_CONNECTIONS_PER_USER", "5"), ("WS_QUERY_TOKEN", "true")];
    let server = TestServer::start(&settings).await;
    let mut inside = Vec::new();
    for _ in 0..5 {
        inside.push(server.client("ann").await);
    }
    let token = server.token("ann");
    let header = format!("Bearer {token}");
    let by_header =
        Client::try_open(server.addr, "/web", &[("authorization", &header)]).await.unwrap();
    assert_refused(by_header, "connection_limit", 1008, "header").await;
    let by_query = Client::open(server.addr, &format!("/web?token={token}")).await;
    assert_refused(by_query, "connection_limit", 1008, "query").await;
    server.until_metric(r#"rate_limit_hits_total{limit_type="websocket_connection"}"#, 2.0).await;
}
