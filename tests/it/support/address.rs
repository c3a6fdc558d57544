//! An address that moves from one server to another, as a virtual address or a name in DNS does.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

/// Leads new connections to where it points. Those that are there stay where they are.
pub(crate) struct Address {
    pub(crate) addr: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
}

impl Address {
    pub(crate) async fn of(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(target));
        let current = Arc::clone(&target);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let target = *current.lock().unwrap();
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(target).await else { return };
                    drop(copy_bidirectional(&mut client, &mut server).await);
                });
            }
        });
        Self { addr, target }
    }

    pub(crate) fn move_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }
}
