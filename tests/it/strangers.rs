//! What clients without a token may try, and how often: by address, at every door.

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::json;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::{Client, Closed, TestServer, rest::refused};

const FROM: &str = "x-forwarded-for";
const ANN: &str = "203.0.113.1";
const BEA: &str = "203.0.113.2";
/// What browsers send to `/auth/backchannel-logout` if a page has them do so.
const FORM: &str = "application/x-www-form-urlencoded";

/// A server behind a proxy, so that tests choose where requests come from.
async fn proxied(settings: &[(&str, &str)]) -> TestServer {
    TestServer::start(&[&[("TRUSTED_PROXIES", "127.0.0.1")], settings].concat()).await
}

async fn get(server: &TestServer, from: &str, token: &str) -> Response {
    let request = server.request(Method::GET, "/authors").header(FROM, from);
    request.bearer_auth(token).send().await.unwrap()
}

async fn post_logout(server: &TestServer, header: Option<(&str, &str)>, body: String) -> Response {
    let request = server.request(Method::POST, "/auth/backchannel-logout");
    let request = request.header("content-type", FORM).header(FROM, ANN).body(body);
    let request = match header {
        Some((name, value)) => request.header(name, value),
        None => request,
    };
    request.send().await.unwrap()
}

/// The status of an upgrade.
async fn upgrade(server: &TestServer, headers: &[(&'static str, &str)]) -> u16 {
    match Client::try_open(server.addr, "/web", headers).await {
        Ok(_) => 101,
        Err(Error::Http(answer)) => answer.status().as_u16(),
        Err(error) => panic!("{error}"),
    }
}

async fn open(server: &TestServer, from: &str) -> Client {
    Client::try_open(server.addr, "/web", &[(FROM, from)]).await.unwrap()
}

/// Sends a token; the code of the error frame and of the close frame.
async fn refusal(client: &mut Client, token: &str) -> (String, Closed) {
    client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
    let (seen, closed) = client.until_closed().await;
    (seen[0]["code"].as_str().unwrap().to_owned(), closed)
}

fn too_many() -> (String, Closed) {
    ("rate_limit_exceeded".to_owned(), Closed::Code(1008))
}

#[tokio::test]
async fn cross_site_posts_to_the_back_channel_spend_nothing_of_their_visitors_failures() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "3")]).await;
    let good = server.token("ann");
    let body = || "logout_token=nonsense".to_owned();
    for header in [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")] {
        for _ in 0..5 {
            refused(post_logout(&server, Some(header), body()).await, 403, "permission_denied")
                .await;
        }
    }
    for _ in 0..5 {
        refused(post_logout(&server, None, body()).await, 400, "invalid_request").await;
    }
    assert_eq!(get(&server, ANN, &good).await.status(), 200);
}

#[tokio::test]
async fn refused_logout_tokens_have_a_budget_of_their_own_by_address() {
    let server = proxied(&[("BACKCHANNEL_FAILURES_PER_MINUTE", "3")]).await;
    let body = || "logout_token=nonsense".to_owned();
    for _ in 0..3 {
        refused(post_logout(&server, None, body()).await, 400, "invalid_request").await;
    }
    let over = post_logout(&server, None, body()).await;
    assert!(over.headers().contains_key("retry-after"));
    refused(over, 429, "rate_limit_exceeded").await;
    let elsewhere = server.request(Method::POST, "/auth/backchannel-logout");
    let elsewhere = elsewhere.header("content-type", FORM).header(FROM, BEA).body(body());
    assert_eq!(elsewhere.send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn a_logout_form_has_at_most_16_kib() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "0")]).await;
    let form = format!("logout_token={}", "x".repeat(16 * 1024));
    refused(post_logout(&server, None, form).await, 413, "payload_too_large").await;
}

#[tokio::test]
async fn a_token_that_was_good_before_passes_while_its_address_is_over_its_failures() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "3")]).await;
    let (known, fresh) = (server.token("ann"), server.token("bea"));
    assert_eq!(get(&server, ANN, &known).await.status(), 200);
    for _ in 0..3 {
        assert_eq!(get(&server, ANN, "garbage").await.status(), 401);
    }
    let bearer = |token: &str| format!("Bearer {token}");
    for (token, rest, web) in [(&*known, 200, 101), (&fresh, 429, 429), ("garbage", 429, 429)] {
        assert_eq!(get(&server, ANN, token).await.status(), rest);
        let headers = [(FROM, ANN), ("authorization", &*bearer(token))];
        assert_eq!(upgrade(&server, &headers).await, web);
    }
    open(&server, ANN).await.authenticate(&known).await;
    assert_eq!(refusal(&mut open(&server, ANN).await, &fresh).await, too_many());
    open(&server, BEA).await.authenticate(&fresh).await;
}

#[tokio::test]
async fn sockets_that_were_opened_first_are_asked_again_before_their_tokens_are_examined() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "30")]).await;
    let mut sockets = Vec::new();
    for _ in 0..100 {
        sockets.push(open(&server, ANN).await);
    }
    let (mut examined, mut unseen) = (0, 0);
    for mut socket in sockets {
        match refusal(&mut socket, "garbage").await {
            (code, Closed::Code(4001)) if code == "unauthorized" => examined += 1,
            refused => {
                assert_eq!(refused, too_many());
                unseen += 1;
            }
        }
    }
    // One more comes every two seconds.
    assert!((30..=33).contains(&examined) && unseen == 100 - examined, "{examined}");
    let invalid = server.metric("token_validation_total{status=\"invalid\"}").await;
    assert_eq!(invalid, f64::from(examined));
}

#[tokio::test]
async fn a_refresh_takes_from_the_same_failures_as_every_other_token() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "2")]).await;
    let mut client = open(&server, ANN).await;
    client.authenticate(&server.token("ann")).await;
    let mut codes = Vec::new();
    for _ in 0..3 {
        client.send(&json!({ "type": "refresh", "token": "Bearer garbage" })).await;
        codes.push(client.receive().await["code"].as_str().unwrap().to_owned());
    }
    assert_eq!(codes, ["unauthorized", "unauthorized", "rate_limit_exceeded"]);
    assert_eq!(get(&server, ANN, "garbage").await.status(), 429);
}

#[tokio::test]
async fn expired_tokens_beyond_a_rate_are_refused_unseen_and_fresh_ones_pass() {
    let server = proxied(&[("AUTH_REFUSALS_PER_MINUTE", "3")]).await;
    let expired = server.expired_token("ann");
    let bearer = format!("Bearer {expired}");
    assert_eq!(get(&server, ANN, &expired).await.status(), 401);
    assert_eq!(upgrade(&server, &[(FROM, ANN), ("authorization", &bearer)]).await, 401);
    let by_message = refusal(&mut open(&server, ANN).await, &expired).await;
    assert_eq!(by_message, ("token_expired".to_owned(), Closed::Code(4001)));

    assert_eq!(get(&server, ANN, &expired).await.status(), 429);
    assert_eq!(upgrade(&server, &[(FROM, ANN), ("authorization", &bearer)]).await, 429);
    assert_eq!(refusal(&mut open(&server, ANN).await, &expired).await, too_many());
    assert_eq!(server.metric("token_validation_total{status=\"expired\"}").await, 3.0);

    open(&server, ANN).await.authenticate(&server.token("ann")).await;
    assert_eq!(get(&server, BEA, &expired).await.status(), 401);
}

#[tokio::test]
async fn foreign_origins_and_broken_upgrades_beyond_a_rate_are_told_429() {
    let settings =
        [("AUTH_REFUSALS_PER_MINUTE", "3"), ("ALLOWED_WS_ORIGINS", "https://app.example.com")];
    let server = proxied(&settings).await;
    let foreign = [(FROM, ANN), ("origin", "https://evil.example")];
    let broken = [(FROM, ANN), ("sec-websocket-version", "12")];
    let mut seen = Vec::new();
    for headers in [foreign, broken, foreign, foreign, broken] {
        seen.push(upgrade(&server, &headers).await);
    }
    assert_eq!(seen, [403, 400, 403, 429, 429]);
    // The visitor of such a page is let in by its own.
    let own = [(FROM, ANN), ("origin", "https://app.example.com")];
    let mut client = Client::try_open(server.addr, "/web", &own).await.unwrap();
    client.authenticate(&server.token("ann")).await;
}

/// Opens silent sockets from an address until one is refused; returns them and the status.
async fn fill(server: &TestServer, from: &str) -> (Vec<Client>, u16) {
    let mut silent = Vec::new();
    loop {
        assert!(silent.len() < 100, "{from} has no bound");
        match Client::try_open(server.addr, "/web", &[(FROM, from)]).await {
            Ok(client) => silent.push(client),
            Err(Error::Http(answer)) => {
                assert!(answer.headers().contains_key("retry-after"));
                return (silent, answer.status().as_u16());
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn silent_sockets_of_one_address_leave_places_to_all_others() {
    let settings = [
        ("WS_MAX_CONNECTIONS", "4"),
        ("WS_MAX_PENDING", "20"),
        ("WS_MAX_PENDING_PER_ADDRESS", "5"),
        ("WS_AUTH_TIMEOUT", "60s"),
    ];
    let server = proxied(&settings).await;
    let (v4, status) = fill(&server, ANN).await;
    assert_eq!((v4.len(), status), (5, 429));
    // All addresses of an IPv6 network are one.
    let (v6, status) = fill(&server, "2001:db8::1").await;
    assert_eq!((v6.len(), status), (5, 429));
    assert_eq!(fill(&server, "2001:db8::ffff").await.1, 429);
    // A token that comes with the upgrade does not wait among them, and a known place is not theirs.
    let bearer = format!("Bearer {}", server.token("ann"));
    assert_eq!(upgrade(&server, &[(FROM, ANN), ("authorization", &bearer)]).await, 101);
    open(&server, BEA).await.authenticate(&server.token("bea")).await;
    // Behind a proxy of ours that does not say where they come from, there may be a crowd.
    let (crowd, status) = fill(&server, "127.0.0.1").await;
    assert_eq!((crowd.len(), status), (10, 503));
    assert_eq!(server.metric("ws_connections_pending").await, 20.0);
    drop((v4, v6, crowd));
    server.until_metric("ws_connections_pending", 0.0).await;
    server.until_metric("table_entries{table=\"holders\"}", 0.0).await;
}

#[tokio::test]
async fn a_refused_socket_has_given_its_place_back_before_it_is_told() {
    let settings = [("WS_MAX_PENDING", "1"), ("WS_MAX_CONNECTIONS", "1")];
    let server = proxied(&settings).await;
    let mut refused = Vec::new();
    for _ in 0..3 {
        let mut client = open(&server, ANN).await;
        client.send(&json!({ "type": "auth", "token": "Bearer garbage" })).await;
        assert_eq!(client.receive().await["code"], "unauthorized");
        // It answers no close frame, and stays.
        refused.push(client);
    }
    open(&server, ANN).await.authenticate(&server.token("ann")).await;
}

#[tokio::test]
async fn silence_that_is_repeated_is_a_failed_authentication() {
    let settings = [("WS_AUTH_TIMEOUT", "50ms"), ("AUTH_FAILURES_PER_MINUTE", "2")];
    let server = proxied(&settings).await;
    // Ten are nobody's fault; the last of those, and two more, are failures.
    for _ in 0..11 {
        assert_eq!(get(&server, ANN, &server.token("ann")).await.status(), 200);
        let (seen, closed) = open(&server, ANN).await.until_closed().await;
        assert_eq!((&seen[0]["code"], closed), (&json!("auth_timeout"), Closed::Code(4002)));
    }
    server.until_metric("table_entries{table=\"failures\"}", 2.0).await;
    assert_eq!(get(&server, ANN, "garbage").await.status(), 429);
    assert_eq!(get(&server, BEA, "garbage").await.status(), 401);
}

#[tokio::test]
async fn the_budget_of_rest_is_that_of_a_whole_ipv6_network() {
    let settings = [("RATE_LIMIT_PER_MINUTE", "2"), ("RATE_LIMIT_BURST", "1")];
    let server = proxied(&settings).await;
    let status = async |from: &str| {
        let request = server.request(Method::GET, "/authors").header(FROM, from);
        request.send().await.unwrap().status().as_u16()
    };
    let mut seen = Vec::new();
    for host in 1..=4 {
        seen.push(status(&format!("2001:db8::{host:x}")).await);
    }
    assert_eq!(seen, [401, 401, 401, 429]);
    assert_eq!(status("2001:db8:0:1::1").await, 401);
    assert_eq!(status("::ffff:203.0.113.1").await, 401);
}

#[tokio::test]
async fn a_forwarded_address_may_have_a_port_and_what_cannot_be_read_is_counted() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "1")]).await;
    let status = async |name: &str, value: &str| {
        let request = server.request(Method::GET, "/authors").bearer_auth("garbage");
        request.header(name, value).send().await.unwrap().status().as_u16()
    };
    for (name, one, other) in [
        (FROM, "203.0.113.5:4444", "203.0.113.6:4444"),
        (FROM, "[2001:db8:5::1]:80", "[2001:db8:6::1]:80"),
        ("forwarded", "for=203.0.113.7;proto=http", "for=\"203.0.113.8:1\""),
        ("forwarded", "for=\"[2001:db8:7::1]\"", "for=\"[2001:db8:8::1]:5\""),
    ] {
        let seen = [status(name, one).await, status(name, one).await, status(name, other).await];
        assert_eq!(seen, [401, 429, 401], "{one}");
    }
    let ignored = "forwarded_headers_ignored_total{reason=\"unreadable\"}";
    assert_eq!(server.metric(ignored).await, 0.0);
    status(FROM, "unknown").await;
    status("forwarded", "for=_hidden").await;
    assert_eq!(server.metric(ignored).await, 2.0);
    let bare = TestServer::start(&[]).await;
    bare.request(Method::GET, "/authors").header(FROM, ANN).send().await.unwrap();
    let ignored = "forwarded_headers_ignored_total{reason=\"untrusted_peer\"}";
    assert_eq!(bare.metric(ignored).await, 1.0);
}

#[tokio::test]
async fn scrapes_have_a_budget_by_address_and_probes_none() {
    let server = proxied(&[("METRICS_RATE_LIMIT", "600")]).await;
    let ask = async |path: &str, from: &str| {
        let request = server.request(Method::GET, path).header(FROM, from);
        request.send().await.unwrap().status().as_u16()
    };
    let mut asked = 0;
    while ask("/metrics", ANN).await == 200 {
        asked += 1;
        assert!(asked < 5_000, "nobody was refused");
    }
    assert!(asked >= 600, "{asked}");
    assert_eq!(ask("/metrics", BEA).await, 200);
    assert_eq!(ask("/health/ready", ANN).await, 200);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(ask("/metrics", ANN).await, 200);
}

#[tokio::test]
async fn a_user_whose_connections_are_closed_again_and_again_is_refused_and_no_other_is() {
    let server = proxied(&[("WS_MAX_EXPULSIONS", "3")]).await;
    let token = server.token("ann");
    for _ in 0..3 {
        let mut client = open(&server, ANN).await;
        client.authenticate(&token).await;
        client.send_frame(Message::binary("binary in a JSON connection")).await;
        assert_eq!(client.until_closed().await.1, Closed::Code(1003));
    }
    server.until_metric("ws_connections_active", 0.0).await;
    // From every address, with the token in either place.
    assert_eq!(refusal(&mut open(&server, BEA).await, &token).await, too_many());
    let bearer = format!("Bearer {token}");
    assert_eq!(upgrade(&server, &[(FROM, ANN), ("authorization", &bearer)]).await, 429);
    assert_eq!(get(&server, ANN, &token).await.status(), 200);
    open(&server, ANN).await.authenticate(&server.token("bea")).await;
}

#[tokio::test]
async fn users_of_an_address_that_breaks_the_rules_are_refused_sooner_and_the_honest_are_not() {
    // Five times as many of all users of an address.
    let server = proxied(&[("WS_MAX_EXPULSIONS", "2")]).await;
    let expel = async |user: &str, from: &str| {
        let mut client = open(&server, from).await;
        client.authenticate(&server.token(user)).await;
        client.send_frame(Message::binary("binary in a JSON connection")).await;
        assert_eq!(client.until_closed().await.1, Closed::Code(1003));
        server.until_metric("ws_connections_active", 0.0).await;
    };
    for user in 0..9 {
        expel(&format!("user-{user}"), ANN).await;
    }
    open(&server, ANN).await.authenticate(&server.token("user-1")).await;
    // The tenth of the address is the only one of its user.
    expel("ann", ANN).await;
    assert_eq!(refusal(&mut open(&server, ANN).await, &server.token("ann")).await, too_many());
    open(&server, ANN).await.authenticate(&server.token("user-1")).await;
    open(&server, ANN).await.authenticate(&server.token("bea")).await;
    server.until_metric("ws_connections_active", 0.0).await;
    expel("bea", BEA).await;
    open(&server, BEA).await.authenticate(&server.token("bea")).await;
}

#[tokio::test]
async fn an_address_whose_sockets_break_the_rules_before_a_token_is_told_429() {
    let server = proxied(&[("AUTH_REFUSALS_PER_MINUTE", "3")]).await;
    for _ in 0..3 {
        let mut client = open(&server, ANN).await;
        client.send_frame(Message::text("x".repeat(21 * 1024))).await;
        assert_eq!(client.until_closed().await.1, Closed::Code(1009));
    }
    assert_eq!(upgrade(&server, &[(FROM, ANN)]).await, 429);
    // A token in the upgrade needs no such socket.
    let bearer = format!("Bearer {}", server.token("ann"));
    assert_eq!(upgrade(&server, &[(FROM, ANN), ("authorization", &bearer)]).await, 101);
    open(&server, BEA).await.authenticate(&server.token("bea")).await;
}

#[tokio::test]
async fn a_quote_that_a_client_leaves_open_does_not_make_it_its_proxy() {
    let server = proxied(&[("AUTH_FAILURES_PER_MINUTE", "1")]).await;
    let mut seen = Vec::new();
    for i in 0..2 {
        let request = server.request(Method::GET, "/authors").bearer_auth("garbage");
        let forged = format!("\"{i}, {ANN}");
        seen.push(request.header(FROM, forged).send().await.unwrap().status().as_u16());
    }
    assert_eq!(seen, [401, 429]);
    assert_eq!(get(&server, BEA, "garbage").await.status(), 401);
}
