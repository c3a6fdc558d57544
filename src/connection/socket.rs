//! A WebSocket over TCP with small buffers, and the two things tungstenite does not do for us: noticing
//! that a write makes no progress, and ending so that the close frame arrives.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{Role, WebSocketConfig},
    },
};

use crate::protocol::CloseReason;

/// A client's socket after the upgrade.
pub(crate) type Socket = WebSocketStream<Counted>;

/// Bytes. tungstenite fills it with zeros before every read, and an idle connection keeps it.
const READ_BUFFER: usize = 1536;
/// Bytes that may gather before a write; one batch of small answers.
const WRITE_BUFFER: usize = 4096;
/// Time for a client to take a close frame and answer it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes over an upgraded stream; `read_already` came behind the upgrade request.
pub(crate) async fn accept(tcp: TcpStream, read_already: &[u8], max_message: usize) -> Socket {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_message_size(Some(max_message))
        .max_frame_size(Some(max_message));
    let tcp = Counted { tcp, written: 0, drained: false };
    WebSocketStream::from_partially_read(tcp, read_already.to_vec(), Role::Server, Some(config))
        .await
}

/// The next frame. A socket that was read empty is not read again before it is readable: most wake-ups are
/// for something to write, and tungstenite fills its buffer with zeros even for a read that finds nothing.
pub(crate) fn poll_next(
    socket: &mut Socket,
    cx: &mut Context<'_>,
) -> Poll<Option<tungstenite::Result<Message>>> {
    let stream = socket.get_mut();
    if stream.drained {
        // What is wrong with it is what reading says.
        drop(ready!(stream.tcp.poll_read_ready(cx)));
    }
    socket.poll_next_unpin(cx)
}

/// Sends the error frame and the close frame of a reason, and waits a little for the client to read
/// them: a socket dropped with unread input is reset, and the client would lose the close frame.
pub(crate) async fn close(mut socket: Socket, reason: CloseReason, error: Option<Message>) {
    if reason == CloseReason::Normal {
        // Reading on lets tungstenite answer the client's close frame.
        let answered = async { while let Some(Ok(_)) = socket.next().await {} };
        drop(timeout(CLOSE_TIMEOUT, answered).await);
    }
    let Some(frame) = reason.frame() else { return };
    let farewell = async {
        if let Some(error) = error {
            socket.feed(error).await?;
        }
        socket.send(Message::Close(Some(frame))).await
    };
    if let Ok(Ok(())) = timeout(CLOSE_TIMEOUT, farewell).await {
        let tcp = &mut socket.get_mut().tcp;
        // What the client still sends is not looked at, its close frame included.
        let until_end = async {
            tcp.shutdown().await?;
            let mut scrap = [0; 1024];
            while tcp.read(&mut scrap).await? > 0 {}
            io::Result::Ok(())
        };
        drop(timeout(CLOSE_TIMEOUT, until_end).await);
    }
}

/// A TCP stream that counts what it has written, and knows whether it was read empty.
pub(crate) struct Counted {
    tcp: TcpStream,
    written: u64,
    drained: bool,
}

impl Counted {
    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.tcp).poll_read(context, buffer);
        self.drained = polled.is_pending();
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = &polled {
            self.written += *written as u64;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}
