//! axum's WebSocket echo, on one thread: what comes goes back, but for the auth frame.

use axum::{
    Router,
    extract::ws::{Message, WebSocket, WebSocketUpgrade},
    routing::any,
    serve::ListenerExt as _,
};
use tokio::net::TcpListener;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).ok_or("usage: axum-echo ADDRESS")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await?;
        let listener = listener.tap_io(|tcp| drop(tcp.set_nodelay(true)));
        let upgrade = async |upgrade: WebSocketUpgrade| upgrade.on_upgrade(echo);
        axum::serve(listener, Router::new().route("/web", any(upgrade))).await?;
        Ok(())
    })
}

async fn echo(mut socket: WebSocket) {
    if socket.recv().await.is_none() {
        return;
    }
    if socket.send(Message::text(r#"{"type":"auth_ok"}"#)).await.is_err() {
        return;
    }
    while let Some(Ok(message)) = socket.recv().await {
        if matches!(message, Message::Text(_)) && socket.send(message).await.is_err() {
            return;
        }
    }
}
