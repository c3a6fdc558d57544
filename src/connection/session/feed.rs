//! The write of a session: what it took out of its outbox, and its control answers, with one flush.

use std::{collections::VecDeque, future::poll_fn};

use futures_util::SinkExt;
use tokio_tungstenite::tungstenite::{self, Message};

use super::Socket;
use crate::hub::{Batch, Ready};

/// Feeds everything and flushes once. Can be dropped and called again: a frame is taken from its queue
/// when the socket has room for it.
pub(super) async fn feed(
    socket: &mut Socket,
    control: &mut VecDeque<Message>,
    batch: &mut Batch,
    fed: &mut Vec<Ready>,
) -> tungstenite::Result<()> {
    loop {
        poll_fn(|cx| socket.poll_ready_unpin(cx)).await?;
        let next = control.pop_front();
        let next = next.or_else(|| {
            let (frame, ready) = batch.replies.pop_front()?;
            fed.push(ready);
            Some(frame)
        });
        match next.or_else(|| batch.pushes.pop_front()) {
            Some(frame) => socket.start_send_unpin(frame)?,
            None => break,
        }
    }
    poll_fn(|cx| socket.poll_flush_unpin(cx)).await
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use futures_util::StreamExt;
    use tokio::{
        net::{TcpListener, TcpStream},
        time::timeout,
    };
    use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

    use super::*;
    use crate::connection::socket;

    #[tokio::test]
    async fn a_write_that_is_given_up_and_begun_again_loses_and_repeats_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut client = WebSocketStream::from_raw_socket(tcp, Role::Client, None).await;
        let mut socket = socket::accept(listener.accept().await.unwrap().0, &[], 1024).await;

        let mut control = VecDeque::from([Message::text("0")]);
        let mut batch = Batch::default();
        let ready = || Ready { at: Instant::now(), trace: None };
        batch.replies.extend((1..10).map(|n: u8| (Message::text(n.to_string()), ready())));
        let mut fed = Vec::new();
        // More than the buffers of both sockets take.
        batch.pushes.extend((0..24).map(|n| Message::binary(vec![n; 500_000])));
        for _ in 0..5 {
            let write = feed(&mut socket, &mut control, &mut batch, &mut fed);
            timeout(Duration::from_millis(30), write).await.unwrap_err();
        }
        let write = async { feed(&mut socket, &mut control, &mut batch, &mut fed).await.unwrap() };
        let read = async {
            for n in 0..10 {
                let frame = client.next().await.unwrap().unwrap();
                assert_eq!(frame, Message::text(n.to_string()));
            }
            for n in 0..24 {
                let Message::Binary(bytes) = client.next().await.unwrap().unwrap() else {
                    panic!()
                };
                assert_eq!((bytes[0], bytes.len()), (n, 500_000));
            }
        };
        let both = futures_util::future::join(write, read);
        timeout(Duration::from_secs(10), both).await.expect("a frame was lost");
    }
}
