//! Faults of the client that end the connection: the code, and what was asked before is answered first.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};
use uuid::Uuid;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{Gate, SLEEPS, misbehaving},
};

async fn start(settings: &[(&str, &str)]) -> TestServer {
    TestServer::with_packages(settings, misbehaving(&Gate::closed())).await
}

fn request(pkg_id: i64, ms: u64) -> (String, Message) {
    let req_id = Uuid::new_v4();
    let text = json!({ "pkg_id": pkg_id, "req_id": req_id, "data": { "ms": ms } }).to_string();
    (req_id.to_string(), Message::text(text))
}

fn not_utf8() -> Message {
    Message::Frame(Frame::message(&b"{\"a\":\"\xff\"}"[..], OpCode::Data(Data::Text), true))
}

fn reserved() -> Message {
    Message::Frame(Frame::message("x", OpCode::Data(Data::Reserved(3)), true))
}

/// A request of so many bytes in all.
fn sized(bytes: usize) -> Message {
    let text =
        |fill| json!({ "pkg_id": 100, "req_id": Uuid::nil(), "data": { "x": fill } }).to_string();
    Message::text(text("x".repeat(bytes - text(String::new()).len())))
}

#[tokio::test]
async fn requests_before_a_fatal_frame_are_answered_before_the_close() {
    let server = start(&[]).await;
    for (case, bad, code) in [
        ("wrong kind", Message::binary("x"), 1003),
        ("broken framing", reserved(), 1002),
        ("not UTF-8", not_utf8(), 1007),
        ("too big", sized(64 * 1024 + 1), 1009),
    ] {
        let mut client = server.client("ann").await;
        let ((slow, first), (quick, second)) = (request(SLEEPS, 150), request(100, 0));
        client.send_together([first, second, bad]).await;
        let (seen, closed) = client.until_closed().await;
        assert_eq!(closed, Closed::Code(code), "{case}");
        let ids: Vec<_> = seen.iter().map(|answer| answer["req_id"].as_str().unwrap()).collect();
        assert_eq!(ids, [quick, slow], "{case}");
        assert!(seen.iter().all(|answer| answer["status_code"] == 0), "{case}");
        server.until_metric(&format!(r#"ws_disconnections_total{{code="{code}"}}"#), 1.0).await;
    }
}

#[tokio::test]
async fn a_frame_without_a_mask_breaks_the_framing() {
    let server = start(&[]).await;
    let mut client = server.client("ann").await;
    let ping = br#"{"type":"ping"}"#;
    let bare = [&[0x81, u8::try_from(ping.len()).unwrap()], &ping[..]].concat();
    client.socket().get_mut().write_all(&bare).await.unwrap();
    assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(1002)));
    server.until_metric(r#"ws_disconnections_total{code="1002"}"#, 1.0).await;
}

#[tokio::test]
async fn what_comes_behind_a_fatal_frame_is_not_served() {
    let server = start(&[]).await;
    let mut client = server.client("ann").await;
    let (_, late) = request(100, 0);
    client.send_together([Message::binary("x"), late]).await;
    assert_eq!(client.until_closed().await, (Vec::new(), Closed::Code(1003)));
}

#[tokio::test]
async fn a_message_of_exactly_the_limit_passes() {
    let server = start(&[]).await;
    let mut client = server.client("ann").await;
    client.send_frame(sized(64 * 1024)).await;
    assert_eq!(client.receive().await["status_code"], 0);
}

#[tokio::test]
async fn the_message_limit_is_for_all_fragments_together() {
    let server = start(&[("WS_MAX_MESSAGE_BYTES", "1KiB")]).await;
    let mut client = server.client("ann").await;
    let part =
        |opcode, last| Message::Frame(Frame::message(vec![b' '; 600], OpCode::Data(opcode), last));
    client.send_together([part(Data::Text, false), part(Data::Continue, true)]).await;
    assert_eq!(client.next().await.unwrap_err(), Closed::Code(1009));
}

#[tokio::test]
async fn a_message_in_fragments_is_one_message() {
    let server = start(&[]).await;
    let mut client = server.client("ann").await;
    let text = json!({ "pkg_id": 100, "req_id": Uuid::nil(), "data": {} }).to_string();
    let (head, tail) = text.split_at(20);
    let part = |bytes: &str, opcode, last| {
        Message::Frame(Frame::message(bytes.to_owned(), OpCode::Data(opcode), last))
    };
    let ping = Message::Ping("between".into());
    client
        .send_together([part(head, Data::Text, false), ping, part(tail, Data::Continue, true)])
        .await;
    assert_eq!(client.receive().await["status_code"], 0);
}

#[tokio::test]
async fn a_clients_close_is_answered() {
    let server = start(&[]).await;
    let client = server.client("ann").await;
    assert_eq!(client.close_and_see().await, Closed::Code(1000));
    server.until_metric(r#"ws_disconnections_total{code="1000"}"#, 1.0).await;
}

#[tokio::test]
async fn a_socket_that_breaks_is_noticed_and_counted() {
    let server = start(&[]).await;
    let mut client: Client = server.client("ann").await;
    client.request(SLEEPS, json!({ "ms": 100 })).await;
    server.until_metric("ws_connections_active", 1.0).await;
    drop(client);
    server.until_metric("ws_connections_active", 0.0).await;
    server.until_metric(r#"ws_disconnections_total{code="abnormal"}"#, 1.0).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(server.client("bob").await.call(100, json!({})).await["status_code"], 0);
}

#[tokio::test]
async fn a_request_is_answered_before_its_token_expires_under_it() {
    let server = start(&[("WS_EXPIRY_WARNING", "0")]).await;
    // A token ends on a whole second: one made at the start of a second lives for all of it.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    tokio::time::sleep(Duration::from_millis(1010 - u64::from(now.subsec_millis()))).await;
    let token = server.issuer.token("ann", &[], Duration::from_secs(1));
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(&token).await;
    let late = client.request(SLEEPS, json!({ "ms": 1200 })).await;
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (1, Closed::Code(4003)));
    assert_eq!(seen[0]["req_id"], late.to_string());
}
