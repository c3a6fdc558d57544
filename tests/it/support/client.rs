//! A WebSocket client that says what it saw.

use std::{net::SocketAddr, time::Duration};

use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, client_async, connect_async,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};
use uuid::Uuid;

use super::wire;

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Closed {
    /// With a close frame of this code.
    Code(u16),
    /// Without one.
    Abnormal,
}

/// A connection, authenticated or not.
pub(crate) struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

const PATIENCE: Duration = Duration::from_secs(10);

impl Client {
    /// Opens a connection, without authenticating.
    pub(crate) async fn open(addr: SocketAddr, path: &str) -> Self {
        Self::try_open(addr, path, &[]).await.unwrap()
    }

    /// Opens a connection with more headers; a refusal is `Error::Http`.
    pub(crate) async fn try_open(
        addr: SocketAddr,
        path: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, Error> {
        let mut request = format!("ws://{addr}{path}").into_client_request()?;
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let (socket, _) = connect_async(request).await?;
        Ok(Self { socket })
    }

    /// Opens a connection over a TCP connection that has few bytes in its buffers.
    pub(crate) async fn over(tcp: TcpStream) -> Self {
        let request = format!("ws://{}/web", tcp.peer_addr().unwrap());
        let (socket, _) = client_async(request, MaybeTlsStream::Plain(tcp)).await.unwrap();
        Self { socket }
    }

    /// Sends the auth frame and returns `auth_ok`.
    pub(crate) async fn authenticate(&mut self, token: &str) -> Value {
        self.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
        let answer = self.receive().await;
        assert_eq!(answer["type"], "auth_ok", "{answer}");
        answer
    }

    /// Opens a connection and authenticates it, or says how it was refused.
    pub(crate) async fn attempt(addr: SocketAddr, token: &str) -> Result<Self, (String, Closed)> {
        let mut client = Self::open(addr, "/web").await;
        client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
        let answer = client.receive().await;
        if answer["type"] == "auth_ok" {
            return Ok(client);
        }
        let code = answer["code"].as_str().unwrap_or_default().to_owned();
        Err((code, client.until_closed().await.1))
    }

    /// Sends a text frame of JSON.
    pub(crate) async fn send(&mut self, value: &Value) {
        self.send_frame(Message::text(value.to_string())).await;
    }

    /// Sends any frame.
    pub(crate) async fn send_frame(&mut self, frame: Message) {
        self.socket.send(frame).await.unwrap();
    }

    /// Sends frames so that they arrive together.
    pub(crate) async fn send_together(&mut self, frames: impl IntoIterator<Item = Message>) {
        for frame in frames {
            self.socket.feed(frame).await.unwrap();
        }
        self.socket.flush().await.unwrap();
    }

    /// Sends a protobuf request and returns its answer; anything else in between fails the test.
    pub(crate) async fn call_protobuf(&mut self, pkg_id: i32, data_json: &str) -> wire::Response {
        let request = wire::Request::new(pkg_id, data_json);
        self.send_frame(request.frame()).await;
        let answer = self.receive_protobuf().await;
        assert_eq!((answer.pkg_id, &answer.req_id), (pkg_id, &request.req_id), "{answer:?}");
        answer
    }

    /// The next frame that is not a ping or pong, as protobuf.
    pub(crate) async fn receive_protobuf(&mut self) -> wire::Response {
        match self.next().await {
            Ok(Message::Binary(bytes)) => wire::Response::decode(bytes).unwrap(),
            other => panic!("a binary frame was expected: {other:?}"),
        }
    }

    /// Sends a request and returns its id.
    pub(crate) async fn request(&mut self, pkg_id: i64, data: Value) -> Uuid {
        let req_id = Uuid::new_v4();
        self.send(&json!({ "pkg_id": pkg_id, "req_id": req_id, "data": data })).await;
        req_id
    }

    /// Sends a request and returns its answer; anything else in between fails the test.
    pub(crate) async fn call(&mut self, pkg_id: i64, data: Value) -> Value {
        let req_id = self.request(pkg_id, data).await;
        let answer = self.receive().await;
        assert_eq!(answer["req_id"], req_id.to_string(), "{answer}");
        answer
    }

    /// The same, where the server may be killed meanwhile: none then.
    pub(crate) async fn try_call(&mut self, pkg_id: i64, data: Value) -> Option<Value> {
        let request = json!({ "pkg_id": pkg_id, "req_id": Uuid::new_v4(), "data": data });
        self.socket.send(Message::text(request.to_string())).await.ok()?;
        let Ok(Message::Text(text)) = self.next().await else { return None };
        Some(serde_json::from_str(&text).unwrap())
    }

    /// The next frame that is not a ping or pong, as JSON.
    pub(crate) async fn receive(&mut self) -> Value {
        match self.next().await {
            Ok(Message::Text(text)) => serde_json::from_str(&text).unwrap(),
            other => panic!("a text frame was expected: {other:?}"),
        }
    }

    /// The next frame that is not a ping or pong, or how the connection ended. Closes the socket then.
    pub(crate) async fn next(&mut self) -> Result<Message, Closed> {
        let closed = loop {
            let frame = timeout(PATIENCE, self.socket.next()).await.expect("nothing arrived");
            match frame {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(Some(frame)))) => break Closed::Code(frame.code.into()),
                Some(Ok(Message::Close(None)) | Err(_)) | None => break Closed::Abnormal,
                Some(Ok(frame)) => return Ok(frame),
            }
        };
        drop(self.socket.get_mut().shutdown().await);
        Err(closed)
    }

    /// Reads until the connection ends; returns the JSON seen before, and how it ended.
    pub(crate) async fn until_closed(&mut self) -> (Vec<Value>, Closed) {
        let mut seen = Vec::new();
        loop {
            match self.next().await {
                Ok(Message::Text(text)) => seen.push(serde_json::from_str(&text).unwrap()),
                Ok(_) => {}
                Err(closed) => return (seen, closed),
            }
        }
    }

    /// Expects nothing for a while.
    pub(crate) async fn silent_for(&mut self, time: Duration) {
        if let Ok(frame) = timeout(time, self.socket.next()).await {
            panic!("silence was expected: {frame:?}");
        }
    }

    /// Expects no data for a while, and answers pings meanwhile.
    pub(crate) async fn silent_for_data(&mut self, time: Duration) {
        if let Ok(frame) = timeout(time, self.next()).await {
            panic!("silence was expected: {frame:?}");
        }
    }

    /// Closes with 1000 and waits for the server's answer.
    pub(crate) async fn close(self) {
        assert_eq!(self.close_and_see().await, Closed::Code(1000));
    }

    /// Closes with 1000 and returns how the server answered.
    pub(crate) async fn close_and_see(mut self) -> Closed {
        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        self.socket.close(Some(frame)).await.unwrap();
        self.until_closed().await.1
    }

    /// Reads one big frame from the server, so many bytes at a time with a pause after each; returns
    /// how many bytes it had.
    pub(crate) async fn read_slowly(&mut self, bytes: usize, pause: Duration) -> u64 {
        let tcp = self.socket.get_mut();
        let mut head = [0; 10];
        tcp.read_exact(&mut head).await.unwrap();
        assert_eq!(head[..2], [0x81, 127], "a text frame with a length of 64 bits was expected");
        let length = u64::from_be_bytes(head[2..].try_into().unwrap());
        let mut left = usize::try_from(length).unwrap();
        let mut part = vec![0; bytes];
        while left > 0 {
            let want = left.min(bytes);
            tcp.read_exact(&mut part[..want]).await.unwrap();
            left -= want;
            tokio::time::sleep(pause).await;
        }
        length
    }

    /// The TCP connection without the WebSocket, blocking, for a thread of its own.
    pub(crate) fn into_std(self) -> std::net::TcpStream {
        let MaybeTlsStream::Plain(tcp) = self.socket.into_inner() else { panic!("no TLS here") };
        let tcp = tcp.into_std().unwrap();
        tcp.set_nonblocking(false).unwrap();
        tcp
    }

    /// The stream itself, for what only a rude client does.
    pub(crate) fn socket(&mut self) -> &mut WebSocketStream<MaybeTlsStream<TcpStream>> {
        &mut self.socket
    }
}
