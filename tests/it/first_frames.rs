//! What a socket may send before it is authenticated.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};
use uuid::Uuid;

use crate::support::{Client, Closed, TestServer, on_both_runtimes};

on_both_runtimes!(
    a_first_frame_that_says_it_is_too_long_is_refused_by_its_header,
    the_first_message_is_limited_over_all_its_fragments,
    a_first_frame_of_the_limit_is_read,
    a_smaller_limit_of_messages_is_the_limit_of_the_first_frame_too,
    a_large_request_may_follow_the_auth_frame_at_once,
    a_token_of_the_upgrade_lifts_the_limit_at_once,
    frames_that_come_in_one_piece_with_the_upgrade_follow_the_same_rules,
    ten_control_frames_are_taken_before_the_auth_frame,
    an_eleventh_control_frame_before_the_auth_frame_is_refused,
    an_auth_frame_in_fragments_is_read,
);

const LIMIT: usize = 20 * 1024;

fn auth(server: &TestServer) -> Message {
    let token = format!("Bearer {}", server.token("ann"));
    Message::text(json!({ "type": "auth", "token": token }).to_string())
}

/// An auth frame of so many bytes, with a token that is none.
fn long_auth(bytes: usize) -> String {
    let text = |token: String| json!({ "type": "auth", "token": token }).to_string();
    text("x".repeat(bytes - text(String::new()).len()))
}

/// The header of a masked text frame that says it has so many bytes.
fn header(bytes: u64) -> Vec<u8> {
    [&[0x81, 0x80 | 127][..], &bytes.to_be_bytes(), &[0; 4]].concat()
}

fn part(bytes: Vec<u8>, opcode: Data, last: bool) -> Message {
    Message::Frame(Frame::message(bytes, OpCode::Data(opcode), last))
}

async fn assert_refused(mut client: Client, code: u16, case: &str) {
    let begun = Instant::now();
    assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(code)), "{case}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{case}: {:?}", begun.elapsed());
}

async fn a_first_frame_that_says_it_is_too_long_is_refused_by_its_header() {
    let server = TestServer::start(&[("WS_MAX_MESSAGE_BYTES", "1MiB")]).await;
    for bytes in [LIMIT as u64 + 1, 64 * 1024, 1024 * 1024, u64::MAX] {
        let mut client = Client::open(server.addr, "/web").await;
        let partial = [header(bytes), vec![b' '; 100]].concat();
        client.socket().get_mut().write_all(&partial).await.unwrap();
        assert_refused(client, 1009, &bytes.to_string()).await;
    }
    server.until_metric(r#"ws_connections_total{status="rejected_auth"}"#, 4.0).await;
}

async fn the_first_message_is_limited_over_all_its_fragments() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    let parts =
        [part(vec![b' '; LIMIT], Data::Text, false), part(vec![b' '; 100], Data::Continue, false)];
    client.send_together(parts).await;
    assert_refused(client, 1009, "fragments").await;
}

async fn a_first_frame_of_the_limit_is_read() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send_frame(Message::text(long_auth(LIMIT))).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((&seen[0]["code"], closed), (&json!("unauthorized"), Closed::Code(4001)));
}

async fn a_smaller_limit_of_messages_is_the_limit_of_the_first_frame_too() {
    let server = TestServer::start(&[("WS_MAX_MESSAGE_BYTES", "2KiB")]).await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send_frame(Message::text(long_auth(2049))).await;
    assert_refused(client, 1009, "2049 bytes").await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send_frame(Message::text(long_auth(2048))).await;
    assert_eq!(client.until_closed().await.1, Closed::Code(4001));
}

/// A request that is larger than a first frame may be.
fn large() -> Message {
    let data = json!({ "x": "x".repeat(60_000) });
    Message::text(json!({ "pkg_id": 100, "req_id": Uuid::nil(), "data": data }).to_string())
}

async fn a_large_request_may_follow_the_auth_frame_at_once() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    client.send_together([auth(&server), large()]).await;
    assert_eq!(client.receive().await["type"], "auth_ok");
    assert_eq!(client.receive().await["status_code"], 0);
}

async fn a_token_of_the_upgrade_lifts_the_limit_at_once() {
    let server = TestServer::start(&[]).await;
    let header = format!("Bearer {}", server.token("ann"));
    let mut client =
        Client::try_open(server.addr, "/web", &[("authorization", &header)]).await.unwrap();
    client.send_frame(large()).await;
    assert_eq!(client.receive().await["type"], "auth_ok");
    assert_eq!(client.receive().await["status_code"], 0);
}

const UPGRADE: &str = "GET /web HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Sends bytes in one piece with the upgrade; what the server sent until `end` or its close.
async fn together(server: &TestServer, bytes: &[u8], end: &str) -> String {
    let mut tcp = TcpStream::connect(server.addr).await.unwrap();
    tcp.write_all(&[UPGRADE.as_bytes(), bytes].concat()).await.unwrap();
    let mut seen = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&seen).contains(end) {
            if tcp.read_buf(&mut seen).await.unwrap() == 0 {
                break;
            }
        }
    };
    timeout(Duration::from_secs(3), read).await.expect("no answer, and no close");
    String::from_utf8_lossy(&seen).into_owned()
}

fn masked(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap().to_be_bytes();
    [&[0x81, 0x80 | 126][..], &length, &[0; 4], text.as_bytes()].concat()
}

async fn frames_that_come_in_one_piece_with_the_upgrade_follow_the_same_rules() {
    let server = TestServer::start(&[]).await;
    let auth = auth(&server).into_text().unwrap();
    let request = json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": { "x": "echoed" } });
    let served = [masked(&auth), masked(&request.to_string())].concat();
    let seen = together(&server, &served, "echoed").await;
    assert!(seen.contains("auth_ok") && seen.contains("echoed"), "{seen}");
    let seen = together(&server, &header(64 * 1024), "message too large").await;
    assert!(seen.contains("message too large"), "{seen}");
}

fn ping() -> Message {
    Message::Ping("x".into())
}

fn pong() -> Message {
    Message::Pong("x".into())
}

fn empty_fragment() -> Message {
    part(Vec::new(), Data::Continue, false)
}

async fn ten_control_frames_are_taken_before_the_auth_frame() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    let frames = (0..5).flat_map(|_| [ping(), pong()]).chain([auth(&server)]);
    client.send_together(frames).await;
    assert_eq!(client.receive().await["type"], "auth_ok");
    // They do not count from then on.
    client.send_together((0..100).map(|_| ping())).await;
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

async fn an_eleventh_control_frame_before_the_auth_frame_is_refused() {
    let server = TestServer::start(&[]).await;
    let first = part(Vec::new(), Data::Text, false);
    let floods: [(&str, Vec<Message>); 4] = [
        ("pings", (0..11).map(|_| ping()).collect()),
        ("pongs", (0..11).map(|_| pong()).collect()),
        ("both", (0..6).flat_map(|_| [ping(), pong()]).collect()),
        (
            "empty fragments",
            std::iter::once(first).chain((0..10).map(|_| empty_fragment())).collect(),
        ),
    ];
    for (case, flood) in floods {
        let mut client = Client::open(server.addr, "/web").await;
        client.send_together(flood).await;
        assert_refused(client, 1008, case).await;
    }
    server.until_metric(r#"ws_connections_total{status="rejected_auth"}"#, 4.0).await;
}

async fn an_auth_frame_in_fragments_is_read() {
    let server = TestServer::start(&[]).await;
    let mut client = Client::open(server.addr, "/web").await;
    let text = auth(&server).into_text().unwrap().to_string();
    let chunks: Vec<_> = text.as_bytes().chunks(100).collect();
    let last = chunks.len() - 1;
    let parts = chunks.iter().enumerate().map(|(n, chunk)| {
        let opcode = if n == 0 { Data::Text } else { Data::Continue };
        part(chunk.to_vec(), opcode, n == last)
    });
    client.send_together(parts).await;
    let answer: Value = client.receive().await;
    assert_eq!(answer["type"], "auth_ok", "{answer}");
}
