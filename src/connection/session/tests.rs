//! What a session writes while its client does not read.

use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

use super::*;

#[tokio::test]
async fn a_write_that_is_given_up_and_begun_again_loses_and_repeats_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let mut client = WebSocketStream::from_raw_socket(tcp, Role::Client, None).await;
    let mut socket = socket::accept(listener.accept().await.unwrap().0, &[], 1024).await;

    let mut control = VecDeque::from([Message::text("0")]);
    let mut batch = Batch::default();
    batch.replies.extend((1..10).map(|n: u8| (Message::text(n.to_string()), Instant::now())));
    // More than the buffers of both sockets take.
    batch.pushes.extend((0..24).map(|n| Message::binary(vec![n; 500_000])));
    for _ in 0..5 {
        let write = feed(&mut socket, &mut control, &mut batch);
        timeout(Duration::from_millis(30), write).await.unwrap_err();
    }
    let write = async { feed(&mut socket, &mut control, &mut batch).await.unwrap() };
    let read = async {
        for n in 0..10 {
            let frame = client.next().await.unwrap().unwrap();
            assert_eq!(frame, Message::text(n.to_string()));
        }
        for n in 0..24 {
            let Message::Binary(bytes) = client.next().await.unwrap().unwrap() else { panic!() };
            assert_eq!((bytes[0], bytes.len()), (n, 500_000));
        }
    };
    let both = futures_util::future::join(write, read);
    timeout(Duration::from_secs(10), both).await.expect("a frame was lost");
}
