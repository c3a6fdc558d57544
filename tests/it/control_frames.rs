//! The budgets of control frames and of small fragments, and what honest clients may send all the same.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::support::{Client, Closed, TestServer, on_both_runtimes};

on_both_runtimes!(
    a_flood_of_empty_pings_is_closed,
    a_flood_of_the_largest_pings_is_closed,
    a_flood_of_pongs_that_nobody_asked_for_is_closed,
    a_flood_of_json_pings_is_closed,
    a_flood_of_empty_fragments_inside_a_message_is_closed,
    a_message_of_empty_fragments_that_never_ends_is_closed,
    a_message_of_single_bytes_is_closed,
    a_flood_of_refreshes_is_closed,
    a_burst_within_the_budget_is_served,
    a_json_ping_over_the_budget_is_told_when_to_come_back,
    five_refreshes_are_taken_at_once_and_then_one_in_two_seconds,
    bad_refreshes_over_the_budget_are_not_looked_at_and_are_strikes,
    without_strikes_a_flood_of_pings_is_read_no_faster_than_the_budget,
    without_strikes_a_flood_of_fragments_is_read_no_faster_than_the_budget,
    without_strikes_nonsense_is_read_no_faster_than_the_budget,
    a_connection_whose_reading_pauses_is_not_closed_for_its_silence,
    a_pong_that_answers_a_ping_costs_nothing,
    a_client_that_fragments_its_messages_is_served,
    reserved_bits_and_opcodes_end_a_connection_at_once,
);

const HITS: &str = r#"rate_limit_hits_total{limit_type="websocket_control"}"#;
const TEXT: u8 = 0x1;
const CONTINUE: u8 = 0x0;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;
const FINAL: u8 = 0x80;

/// The bytes of a masked frame. The mask is zero.
fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![head];
    match payload.len() {
        short @ 0..126 => bytes.push(0x80 | u8::try_from(short).unwrap()),
        long => {
            bytes.push(0x80 | 126);
            bytes.extend(u16::try_from(long).unwrap().to_be_bytes());
        }
    }
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

fn text(value: &Value) -> Vec<u8> {
    frame(FINAL | TEXT, value.to_string().as_bytes())
}

fn echo() -> Value {
    json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": {} })
}

async fn write(client: &mut Client, bytes: &[u8]) {
    // The server may have closed before it has read all.
    drop(client.socket().get_mut().write_all(bytes).await);
}

/// Sends six thousand frames and a request, and expects 1008 instead of an answer to the request.
async fn assert_flood_is_closed(first: &[u8], frame: &[u8]) {
    assert_flood_closes(&TestServer::start(&[]).await, first, frame).await;
}

async fn assert_flood_closes(server: &TestServer, first: &[u8], frame: &[u8]) {
    let mut client = server.client("ann").await;
    let request = echo();
    write(&mut client, &[first, &frame.repeat(6000), &text(&request)].concat()).await;
    let closed = loop {
        match client.next().await {
            Ok(Message::Text(answer)) => {
                let answer: Value = serde_json::from_str(&answer).unwrap();
                assert_ne!(answer["req_id"], request["req_id"], "the flood was served");
            }
            Ok(other) => panic!("{other:?}"),
            Err(closed) => break closed,
        }
    };
    assert_eq!(closed, Closed::Code(1008));
    assert!(server.metric(HITS).await >= 20.0);
    server.until_metric(r#"ws_disconnections_total{code="1008"}"#, 1.0).await;
}

async fn a_flood_of_empty_pings_is_closed() {
    assert_flood_is_closed(&[], &frame(FINAL | PING, &[])).await;
}

async fn a_flood_of_the_largest_pings_is_closed() {
    assert_flood_is_closed(&[], &frame(FINAL | PING, &[b'x'; 125])).await;
}

async fn a_flood_of_pongs_that_nobody_asked_for_is_closed() {
    assert_flood_is_closed(&[], &frame(FINAL | PONG, &[])).await;
    assert_flood_is_closed(&[], &frame(FINAL | PONG, &[b'x'; 125])).await;
}

async fn a_flood_of_json_pings_is_closed() {
    assert_flood_is_closed(&[], &text(&json!({ "type": "ping" }))).await;
}

async fn a_flood_of_empty_fragments_inside_a_message_is_closed() {
    let request = echo().to_string();
    let (head, tail) = request.split_at(40);
    let run = frame(CONTINUE, &[]).repeat(300);
    let whole =
        [frame(TEXT, head.as_bytes()), run, frame(FINAL | CONTINUE, tail.as_bytes())].concat();
    assert_flood_is_closed(&whole.repeat(20), &frame(FINAL | PONG, &[])).await;
}

async fn a_message_of_empty_fragments_that_never_ends_is_closed() {
    assert_flood_is_closed(&frame(TEXT, &[]), &frame(CONTINUE, &[])).await;
}

async fn a_message_of_single_bytes_is_closed() {
    assert_flood_is_closed(&frame(TEXT, b"{"), &frame(CONTINUE, b" ")).await;
}

async fn a_flood_of_refreshes_is_closed() {
    let server = TestServer::start(&[]).await;
    let fresh = refresh(&server.token("ann"));
    assert_flood_closes(&server, &[], &text(&fresh)).await;
}

async fn a_burst_within_the_budget_is_served() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "1")]).await;
    let mut client = server.client("ann").await;
    let kinds = [
        frame(FINAL | PING, b"keepalive"),
        frame(FINAL | PONG, &[]),
        text(&json!({ "type": "ping" })),
        [frame(TEXT, b""), frame(FINAL | CONTINUE, echo().to_string().as_bytes())].concat(),
    ];
    for kind in kinds {
        write(&mut client, &kind.repeat(24)).await;
    }
    for _ in 0..24 * 2 {
        client.receive().await;
    }
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    assert_eq!(server.metric(HITS).await, 0.0);
}

async fn a_json_ping_over_the_budget_is_told_when_to_come_back() {
    // The least budget: a hundred at once, ten in a second.
    let server = TestServer::start(&[("WS_MESSAGE_RATE_LIMIT", "1")]).await;
    let mut client = server.client("ann").await;
    let ping = json!({ "type": "ping" });
    write(&mut client, &text(&ping).repeat(101)).await;
    for _ in 0..100 {
        assert_eq!(client.receive().await, json!({ "type": "pong" }));
    }
    let refused = client.receive().await;
    assert_eq!(
        (&refused["type"], &refused["code"]),
        (&json!("error"), &json!("rate_limit_exceeded"))
    );
    let wait = refused["retry_after_ms"].as_u64().unwrap();
    assert!((1..=100).contains(&wait), "{refused}");
    assert_eq!(server.metric(HITS).await, 1.0);
    tokio::time::sleep(Duration::from_millis(wait)).await;
    client.send(&ping).await;
    assert_eq!(client.receive().await, json!({ "type": "pong" }));
}

fn refresh(token: &str) -> Value {
    json!({ "type": "refresh", "token": format!("Bearer {token}") })
}

async fn five_refreshes_are_taken_at_once_and_then_one_in_two_seconds() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    let fresh = refresh(&server.token("ann"));
    for _ in 0..6 {
        client.send(&fresh).await;
    }
    for _ in 0..5 {
        assert_eq!(client.receive().await["type"], "refresh_ok");
    }
    let refused = client.receive().await;
    assert_eq!(
        (&refused["type"], &refused["code"]),
        (&json!("error"), &json!("rate_limit_exceeded"))
    );
    let wait = refused["retry_after_ms"].as_u64().unwrap();
    assert!((1500..=2000).contains(&wait), "{refused}");
    assert_eq!(server.metric(HITS).await, 1.0);
    tokio::time::sleep(Duration::from_millis(wait)).await;
    client.send(&fresh).await;
    assert_eq!(client.receive().await["type"], "refresh_ok");
    client.send(&fresh).await;
    assert_eq!(client.receive().await["code"], "rate_limit_exceeded");
    server.until_metric(r#"auth_attempts_total{status="success"}"#, 7.0).await;
}

async fn bad_refreshes_over_the_budget_are_not_looked_at_and_are_strikes() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "8")]).await;
    let mut client = server.client("ann").await;
    for _ in 0..8 {
        client.send(&refresh("guess")).await;
    }
    let (seen, closed) = client.until_closed().await;
    let codes: Vec<_> = seen.iter().map(|answer| answer["code"].as_str().unwrap()).collect();
    assert_eq!(codes, [["unauthorized"; 5].as_slice(), &["rate_limit_exceeded"; 3]].concat());
    assert_eq!(closed, Closed::Code(1008));
    assert_eq!(server.metric(r#"auth_attempts_total{status="failed"}"#).await, 5.0);
}

async fn without_strikes_a_flood_of_pings_is_read_no_faster_than_the_budget() {
    let settings = [("WS_MESSAGE_RATE_LIMIT", "1"), ("WS_MAX_STRIKES", "0")];
    let server = TestServer::start(&settings).await;
    for ping in [text(&json!({ "type": "ping" })), frame(FINAL | PING, &[])] {
        let mut client = server.client("ann").await;
        let request = echo();
        let begun = Instant::now();
        // Twenty more than it has at once.
        write(&mut client, &[ping.repeat(120), text(&request)].concat()).await;
        loop {
            if client.receive().await["req_id"] == request["req_id"] {
                break;
            }
        }
        let took = begun.elapsed();
        assert!((1500..4000).contains(&took.as_millis()), "twenty at ten a second: {took:?}");
    }
}

async fn without_strikes_a_flood_of_fragments_is_read_no_faster_than_the_budget() {
    // A hundred at once, sixty in a second.
    let settings = [("WS_MESSAGE_RATE_LIMIT", "1800"), ("WS_MAX_STRIKES", "0")];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    let request = echo().to_string();
    let fragments = [frame(TEXT, b""), frame(CONTINUE, b"").repeat(199)].concat();
    let begun = Instant::now();
    write(&mut client, &fragments).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    write(&mut client, &frame(FINAL | CONTINUE, request.as_bytes())).await;
    assert_eq!(client.receive().await["status_code"], 0);
    let took = begun.elapsed();
    assert!((1400..4000).contains(&took.as_millis()), "a hundred at sixty a second: {took:?}");
}

async fn without_strikes_nonsense_is_read_no_faster_than_the_budget() {
    let settings = [("WS_MESSAGE_RATE_LIMIT", "1"), ("WS_MAX_STRIKES", "0")];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    let begun = Instant::now();
    write(&mut client, &frame(FINAL | TEXT, b"nonsense").repeat(120)).await;
    for _ in 0..120 {
        assert_eq!(client.receive().await["data"]["code"], "invalid_message");
    }
    let took = begun.elapsed();
    assert!((1500..4000).contains(&took.as_millis()), "twenty at ten a second: {took:?}");
}

async fn a_connection_whose_reading_pauses_is_not_closed_for_its_silence() {
    let settings = [
        ("WS_MESSAGE_RATE_LIMIT", "1"),
        ("WS_MAX_STRIKES", "0"),
        ("WS_PING_INTERVAL", "50ms"),
        ("WS_PONG_TIMEOUT", "100ms"),
    ];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    // Ten fragments of debt: a second without reading.
    write(&mut client, &[frame(TEXT, b""), frame(CONTINUE, b"").repeat(109)].concat()).await;
    client.silent_for_data(Duration::from_millis(1500)).await;
    write(&mut client, &frame(FINAL | CONTINUE, echo().to_string().as_bytes())).await;
    assert_eq!(client.receive().await["status_code"], 0);
}

async fn a_pong_that_answers_a_ping_costs_nothing() {
    let settings = [
        ("WS_MESSAGE_RATE_LIMIT", "1"),
        ("WS_MAX_STRIKES", "1"),
        ("WS_PING_INTERVAL", "5ms"),
        ("WS_PONG_TIMEOUT", "250ms"),
    ];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    // The budget has a hundred and ten more in a second, which are spent. The server pings four times a second.
    let ping = text(&json!({ "type": "ping" }));
    write(&mut client, &ping.repeat(98)).await;
    for _ in 0..98 {
        client.receive().await;
    }
    for _ in 0..20 {
        write(&mut client, &ping).await;
        client.receive().await;
        client.silent_for_data(Duration::from_millis(105)).await;
    }
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    assert_eq!(server.metric(HITS).await, 0.0);
}

async fn a_client_that_fragments_its_messages_is_served() {
    let settings = [("WS_MESSAGE_RATE_LIMIT", "60"), ("WS_MAX_STRIKES", "1")];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    // A budget of a hundred would not do for one of these.
    let request =
        json!({ "pkg_id": 100, "req_id": Uuid::nil(), "data": { "x": "x".repeat(40_000) } });
    let request = request.to_string();
    let mut parts: Vec<_> =
        request.as_bytes().chunks(64).map(|part| frame(CONTINUE, part)).collect();
    parts[0][0] = TEXT;
    parts.last_mut().unwrap()[0] |= FINAL;
    for _ in 0..10 {
        write(&mut client, &parts.concat()).await;
        assert_eq!(client.receive().await["status_code"], 0);
    }
}

async fn reserved_bits_and_opcodes_end_a_connection_at_once() {
    let server = TestServer::start(&[]).await;
    for (case, head) in
        [("rsv1", 0xc0 | TEXT), ("opcode 3", FINAL | 0x3), ("opcode 11", FINAL | 0xb)]
    {
        let mut client = server.client("ann").await;
        write(&mut client, &frame(head, b"x")).await;
        assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(1002)), "{case}");
    }
}
