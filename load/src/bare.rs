//! The baseline: the same protocol with nothing around it.
//!
//! tokio-tungstenite on one thread, and each connection's task answers its own requests: no actors, no
//! tokens, no limits, no metrics. What Switchboard costs above this is what its features cost.

use std::{env, net::SocketAddr};

use anyhow::Context as _;
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{
    WebSocketStream, accept_async_with_config,
    tungstenite::{self, Message, protocol::WebSocketConfig},
};
use uuid::Uuid;

/// Bytes of each connection's read buffer, and of its write buffer.
const BUFFER: usize = 4096;

#[derive(Deserialize)]
struct Request<'a> {
    pkg_id: i32,
    req_id: Uuid,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

/// Serves until the process is ended.
pub(crate) fn serve(address: SocketAddr) -> anyhow::Result<()> {
    // As Switchboard does, where it is told a number of threads.
    let mut builder = match env::var_os("TOKIO_WORKER_THREADS") {
        Some(_) => tokio::runtime::Builder::new_multi_thread(),
        None => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = builder.enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
        loop {
            let (tcp, _) = listener.accept().await.context("cannot accept a connection")?;
            // How a connection ends is the client's affair.
            tokio::spawn(async move { drop(connection(tcp).await) });
        }
    })
}

async fn connection(tcp: TcpStream) -> Result<(), tungstenite::Error> {
    tcp.set_nodelay(true)?;
    let config = WebSocketConfig::default().read_buffer_size(BUFFER).write_buffer_size(BUFFER);
    let mut socket = accept_async_with_config(tcp, Some(config)).await?;
    while let Some(message) = socket.next().await {
        handle(&mut socket, message?).await?;
        // Everything that has arrived by now is answered with one write.
        while let Some(message) = socket.next().now_or_never() {
            let Some(message) = message else { return Ok(()) };
            handle(&mut socket, message?).await?;
        }
        socket.flush().await?;
    }
    Ok(())
}

async fn handle(
    socket: &mut WebSocketStream<TcpStream>,
    message: Message,
) -> Result<(), tungstenite::Error> {
    match message {
        Message::Text(text) => socket.feed(Message::text(answer(&text))).await,
        _ => Ok(()),
    }
}

/// Echoes a request; whatever is none is taken for the auth frame.
fn answer(text: &str) -> String {
    let Ok(request) = serde_json::from_str::<Request<'_>>(text) else {
        return r#"{"type":"auth_ok"}"#.to_owned();
    };
    let Request { pkg_id, req_id, data } = request;
    let data = data.map_or("null", RawValue::get);
    format!(
        r#"{{"pkg_id":{pkg_id},"req_id":"{req_id}","status_code":0,"meta":null,"data":{data}}}"#
    )
}
