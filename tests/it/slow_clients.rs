//! Clients that send slowly, or take slowly what waits for them: who is waited for, and for how long.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::{Value, json};
use switchboard::handlers::{Answer, Caller, Context, Handler, HandlerError, Package};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use uuid::Uuid;

use crate::support::{
    Client, Closed, TestServer,
    handlers::{GATE, Gate, misbehaving},
    on_both_runtimes,
};

on_both_runtimes!(
    a_slow_upload_of_one_large_frame_is_no_dead_peer,
    a_message_that_does_not_become_whole_ends_with_4006,
    fragments_and_pings_between_them_do_not_extend_the_time_of_a_message,
    a_control_frame_that_does_not_become_whole_ends_with_4006,
    a_client_that_always_is_within_some_message_stays,
    a_message_that_the_server_does_not_read_is_not_late,
    a_message_that_is_not_read_on_for_a_while_is_not_late_afterwards,
    a_client_that_takes_twenty_kibibytes_a_second_of_a_large_answer_stays,
    a_message_that_waits_behind_a_slow_answer_is_not_late,
    a_client_that_takes_under_a_kibibyte_a_second_is_closed,
    while_too_many_bytes_of_answers_wait_no_more_requests_are_read,
);

/// Three times this is the time of a message.
const FAST: (&str, &str) = ("WS_WRITE_TIMEOUT", "300ms");
const BOUND: Duration = Duration::from_millis(900);

/// A text frame as it goes over the wire, with a mask of zeros.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u64;
    let head = match u16::try_from(length) {
        Ok(length) => [&[kind, 0x80 | 126][..], &length.to_be_bytes()].concat(),
        Err(_) => [&[kind, 0x80 | 127][..], &length.to_be_bytes()].concat(),
    };
    [&head[..], &[0; 4], payload].concat()
}

/// A request of ECHO in one frame of about so many bytes.
fn echo(bytes: usize) -> Vec<u8> {
    let data = json!({ "x": "x".repeat(bytes) });
    let request = json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": data });
    frame(0x81, request.to_string().as_bytes())
}

async fn write(client: &mut Client, bytes: &[u8]) {
    client.socket().get_mut().write_all(bytes).await.unwrap();
}

/// Sends pieces until the server closes, one each 50 ms; returns how it closed, and when.
async fn trickle(
    client: &mut Client,
    mut piece: impl FnMut(usize) -> Vec<u8>,
) -> (Closed, Duration) {
    let begun = Instant::now();
    for n in 0..60 {
        // A server that has closed resets the connection.
        if client.socket().get_mut().write_all(&piece(n)).await.is_err() {
            break;
        }
        if let Ok(end) = timeout(Duration::from_millis(50), client.until_closed()).await {
            return (end.1, begun.elapsed());
        }
    }
    panic!("the server waits without end");
}

fn assert_ended((closed, after): (Closed, Duration)) {
    assert_eq!(closed, Closed::Code(4006));
    assert!(after >= BOUND - Duration::from_millis(50), "{after:?}");
    // A second of it is for answers to what came before.
    assert!(after < BOUND + Duration::from_millis(1500), "{after:?}");
}

async fn a_slow_upload_of_one_large_frame_is_no_dead_peer() {
    let settings = [("WS_PING_INTERVAL", "150ms"), ("WS_PONG_TIMEOUT", "300ms")];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    // Nothing is read meanwhile, so no pong goes out.
    for piece in echo(40_000).chunks(2000) {
        write(&mut client, piece).await;
        sleep(Duration::from_millis(60)).await;
    }
    assert_eq!(client.receive().await["status_code"], 0);
}

async fn a_message_that_does_not_become_whole_ends_with_4006() {
    let server = TestServer::start(&[FAST]).await;
    let mut client = server.client("ann").await;
    let bytes = echo(40_000);
    assert_ended(trickle(&mut client, |n| vec![bytes[n]]).await);
    server.until_metric(r#"ws_disconnections_total{code="4006"}"#, 1.0).await;
}

async fn fragments_and_pings_between_them_do_not_extend_the_time_of_a_message() {
    let server = TestServer::start(&[FAST]).await;
    let mut client = server.client("ann").await;
    let ended = trickle(&mut client, |n| {
        let fragment = frame(if n == 0 { 0x01 } else { 0x00 }, &[b' '; 100]);
        [fragment, vec![0x89, 0x80, 0, 0, 0, 0]].concat()
    });
    assert_ended(ended.await);
}

async fn a_control_frame_that_does_not_become_whole_ends_with_4006() {
    let server = TestServer::start(&[FAST]).await;
    let mut client = server.client("ann").await;
    let ping = [&[0x89, 0x80 | 125][..], &[0; 4 + 125]].concat();
    assert_ended(trickle(&mut client, |n| vec![ping[n]]).await);
}

async fn a_client_that_always_is_within_some_message_stays() {
    let server = TestServer::start(&[FAST]).await;
    let mut client = server.client("ann").await;
    let bytes = (0..40).flat_map(|_| echo(100)).collect::<Vec<_>>();
    // No piece ends where a frame does, but for the last.
    for piece in bytes.chunks(bytes.len() / 40 - 1) {
        write(&mut client, piece).await;
        sleep(BOUND / 25).await;
    }
    for _ in 0..40 {
        assert_eq!(client.receive().await["status_code"], 0);
    }
}

async fn a_message_that_the_server_does_not_read_is_not_late() {
    let gate = Gate::closed();
    let settings = [FAST, ("WS_MAX_IN_FLIGHT", "1")];
    let server = TestServer::with_packages(&settings, misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    let first = json!({ "pkg_id": GATE, "req_id": Uuid::new_v4() }).to_string();
    let second = echo(100);
    let (part, rest) = second.split_at(50);
    write(&mut client, &[&frame(0x81, first.as_bytes()), part].concat()).await;
    gate.until_begun(1).await;
    sleep(BOUND + Duration::from_millis(400)).await;
    gate.release(1);
    assert_eq!(client.receive().await["pkg_id"], GATE);
    write(&mut client, rest).await;
    assert_eq!(client.receive().await["pkg_id"], 100);
}

/// A listener whose connections hold few bytes that are on their way out.
fn small_buffers() -> TcpListener {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(1).unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket.listen(16).unwrap()
}

/// A TCP connection with room for little that is not yet read.
async fn small_window(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(1).unwrap();
    socket.connect(to).await.unwrap()
}

async fn a_message_that_is_not_read_on_for_a_while_is_not_late_afterwards() {
    let gate = Gate::closed();
    // No tick comes while it is not read.
    let settings = [FAST, ("WS_MAX_IN_FLIGHT", "1"), ("WS_PING_INTERVAL", "1m")];
    let server = TestServer::with_packages(&settings, misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    let first = json!({ "pkg_id": GATE, "req_id": Uuid::new_v4() }).to_string();
    let second = echo(100);
    let (part, rest) = second.split_at(50);
    write(&mut client, &[&frame(0x81, first.as_bytes()), part].concat()).await;
    gate.until_begun(1).await;
    sleep(BOUND * 3 / 4).await;
    gate.release(1);
    assert_eq!(client.receive().await["pkg_id"], GATE);
    // Together with the time before it would be late.
    sleep(BOUND * 3 / 4).await;
    write(&mut client, rest).await;
    assert_eq!(client.receive().await["pkg_id"], 100);
}

async fn a_client_that_takes_twenty_kibibytes_a_second_of_a_large_answer_stays() {
    // Buffers as they come: they take megabytes at once.
    let settings = [("WS_WRITE_TIMEOUT", "1s"), ("WS_MAX_MESSAGE_BYTES", "1MiB")];
    let server = TestServer::start(&settings).await;
    let mut client = Client::over(small_window(server.addr).await).await;
    client.authenticate(&server.token("ann")).await;
    let tcp = client.socket().get_mut();
    // Until neither side takes more.
    let requests = echo(900_000).repeat(6);
    drop(timeout(Duration::from_secs(1), tcp.write_all(&requests)).await);
    let mut part = [0; 2048];
    for _ in 0..40 {
        tcp.read_exact(&mut part).await.unwrap();
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(server.metric("ws_connections_active").await, 1.0);
}

async fn a_message_that_waits_behind_a_slow_answer_is_not_late() {
    let server = TestServer::on(Some(small_buffers()), &[FAST], Vec::new()).await;
    let mut client = Client::over(small_window(server.addr).await).await;
    client.authenticate(&server.token("ann")).await;
    let second = echo(100);
    let (part, rest) = second.split_at(50);
    write(&mut client, &[&echo(60_000), part].concat()).await;
    let tcp = client.socket().get_mut();
    let mut head = [0; 4];
    tcp.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..2], [0x81, 126]);
    let mut answer = vec![0; usize::from(u16::from_be_bytes([head[2], head[3]]))];
    let begun = Instant::now();
    for part in answer.chunks_mut(1500) {
        tcp.read_exact(part).await.unwrap();
        sleep(BOUND / 25).await;
    }
    assert!(begun.elapsed() > BOUND, "no slower than the bound");
    write(&mut client, rest).await;
    assert_eq!(client.receive().await["status_code"], 0);
}

/// Two of this are the time in which a client shows that it is slow. A socket gives away some 1152 bytes at once:
/// one or two of those come in such a time, which is under 1 KiB/s.
const SLOW: (&str, &str) = ("WS_WRITE_TIMEOUT", "2500ms");

/// Reads 600 bytes a second until the server has noticed, then the rest at once. Returns the rest, unless it has no
/// end.
async fn take_slowly(tcp: &mut (impl AsyncReadExt + Unpin)) -> Option<Vec<u8>> {
    let begun = Instant::now();
    let mut part = [0; 60];
    while begun.elapsed() < Duration::from_millis(5300) {
        tcp.read_exact(&mut part).await.ok()?;
        sleep(Duration::from_millis(100)).await;
    }
    let mut rest = Vec::new();
    // A reset is an end, too.
    timeout(Duration::from_secs(1), tcp.read_to_end(&mut rest)).await.ok().map(|_| rest)
}

async fn a_client_that_takes_under_a_kibibyte_a_second_is_closed() {
    let server = TestServer::on(Some(small_buffers()), &[SLOW], Vec::new()).await;
    let mut client = Client::over(small_window(server.addr).await).await;
    client.authenticate(&server.token("ann")).await;
    write(&mut client, &echo(60_000)).await;
    let rest = take_slowly(client.socket().get_mut()).await.expect("it is not closed");
    let code = 4005_u16.to_be_bytes();
    assert!(rest.windows(2).any(|part| part == code), "no close frame in {} bytes", rest.len());
    server.until_metric(r#"ws_disconnections_total{code="4005"}"#, 1.0).await;
}

#[tokio::test]
async fn a_rest_client_that_takes_under_a_kibibyte_a_second_is_closed() {
    // HTTP gives away twice as much at once.
    let settings = [("WS_WRITE_TIMEOUT", "5s")];
    let server = TestServer::on(Some(small_buffers()), &settings, Vec::new()).await;
    let whole = server.metrics().await.len();
    let mut tcp = small_window(server.addr).await;
    tcp.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let rest = take_slowly(&mut tcp).await.expect("it is not closed");
    assert!(rest.len() < whole / 2, "{} of {whole} bytes came", rest.len());
}

/// Answers with so many bytes, once a test lets it go.
#[derive(Clone)]
struct Large(Gate);

impl Handler for Large {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "{bytes}";
    const OUTPUT: &'static str = "{x}";

    async fn handle(
        &self,
        context: &Context,
        caller: &Caller,
        input: Value,
    ) -> Result<Answer<Value>, HandlerError> {
        let bytes = usize::try_from(input["bytes"].as_u64().unwrap()).unwrap();
        self.0.handle(context, caller, input).await?;
        Ok(json!({ "x": "x".repeat(bytes) }).into())
    }
}

const LARGE: i64 = 904;
const SENT: &str = "ws_messages_sent_total";
const RECEIVED: &str = "ws_messages_received_total";

/// Waits until an answer of the only connection waits for the session to take it.
async fn until_an_answer_waits(server: &TestServer) {
    for _ in 0..250 {
        let answer = server.rest(Method::GET, "/admin/connections").send().await.unwrap();
        let connections: Value = answer.json().await.unwrap();
        if connections["items"][0]["queues"]["replies"] == 1 {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("no answer waits");
}

async fn while_too_many_bytes_of_answers_wait_no_more_requests_are_read() {
    let gate = Gate::closed();
    let large = vec![Package::new(904, "LARGE", &[], Large(gate.clone()))];
    let settings = [("WS_SEND_BYTES", "100KiB"), ("RATE_LIMIT_BURST", "1000")];
    let server = TestServer::on(Some(small_buffers()), &settings, large).await;
    let mut client = Client::over(small_window(server.addr).await).await;
    client.authenticate(&server.token("ann")).await;
    for _ in 0..16 {
        client.request(LARGE, json!({ "bytes": 200_000 })).await;
    }
    gate.until_begun(16).await;
    for _ in 0..16 {
        client.request(100, json!({})).await;
    }
    // Each is taken while the one before is out at last. The session reads between two of them, at the eighth.
    gate.release(1);
    server.until_metric(SENT, 1.0).await;
    for n in 1..8 {
        gate.release(1);
        until_an_answer_waits(&server).await;
        assert_eq!(client.receive().await["pkg_id"], LARGE);
        server.until_metric(SENT, f64::from(n) + 1.0).await;
    }
    sleep(Duration::from_millis(100)).await;
    assert_eq!(server.metric(RECEIVED).await, 16.0);
    // It goes on once they are out, those of over the limit included.
    gate.release(8);
    for _ in 0..25 {
        assert_eq!(client.receive().await["status_code"], 0);
    }
    assert_eq!(server.metric(RECEIVED).await, 32.0);
}
