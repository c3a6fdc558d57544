//! A WebSocket over TCP with small buffers, and what tungstenite does not do for us: noticing that a write
//! makes no progress, bounding what a client may hide in its framing, and ending so that the close frame
//! arrives.

use std::{
    io::{self, Cursor},
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

use super::frames::Frames;
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
    let tcp = Counted {
        tcp,
        read_already: (!read_already.is_empty())
            .then(|| Box::new(Cursor::new(read_already.to_vec()))),
        frames: Frames::default(),
        written: 0,
        heard: false,
        drained: false,
    };
    WebSocketStream::from_raw_socket(tcp, Role::Server, Some(config)).await
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

/// A TCP stream that counts what it has written, follows the frames it reads, and knows whether it was read
/// empty.
pub(crate) struct Counted {
    tcp: TcpStream,
    /// What came behind the upgrade request, until it is read: its frames are followed too. Boxed, since most
    /// connections have none, and never keep it.
    read_already: Option<Box<Cursor<Vec<u8>>>>,
    frames: Frames,
    written: u64,
    /// Bytes have arrived since this was looked at.
    heard: bool,
    drained: bool,
}

impl Counted {
    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Whether bytes have arrived since the last call.
    #[inline]
    pub(super) fn take_heard(&mut self) -> bool {
        std::mem::take(&mut self.heard)
    }

    /// Whether a message has arrived in part; see [`Frames::arriving`].
    #[inline]
    pub(super) fn arriving(&mut self) -> Option<bool> {
        self.frames.arriving()
    }

    /// Bounds what arrives up to the end of the first message. More fails with a [`Breach`].
    ///
    /// [`Breach`]: super::frames::Breach
    pub(super) fn bound_first_message(&mut self) {
        self.frames.bound_first_message();
    }

    /// Whether there is one to take.
    #[inline]
    pub(super) fn has_small_fragments(&self) -> bool {
        self.frames.has_small_fragments()
    }

    /// The fragments since the last call that carried almost nothing.
    pub(super) fn take_small_fragments(&mut self) -> u32 {
        self.frames.take_small_fragments()
    }

    #[inline]
    fn poll_bytes(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(already) = &mut self.read_already else {
            return Pin::new(&mut self.tcp).poll_read(cx, buffer);
        };
        ready!(Pin::new(&mut **already).poll_read(cx, buffer))?;
        if already.position() == already.get_ref().len() as u64 {
            self.read_already = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = self.poll_bytes(context, buffer);
        self.drained = polled.is_pending();
        if let Poll::Ready(Ok(())) = &polled {
            let arrived = &buffer.filled()[before..];
            self.heard |= !arrived.is_empty();
            self.frames.follow(arrived).map_err(io::Error::other)?;
        }
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
