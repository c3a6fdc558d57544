//! The cheapest fan-out there is: one `send` of the same bytes to each connection.
//!
//! What a push of Switchboard costs above this is what queues, tasks and metrics cost.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::Context as _;

use crate::frame;

/// Serves until its input ends. Whatever comes in there, a length and so many bytes, goes to everyone.
pub(crate) fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address);
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    let sockets = Arc::new(Mutex::new(Vec::new()));
    let accepted = Arc::clone(&sockets);
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            // How a connection ends is the client's affair.
            if welcome(&mut socket).is_ok() {
                accepted.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
            }
        }
    });
    let mut input = io::stdin().lock();
    let mut length = [0; 4];
    while input.read_exact(&mut length).is_ok() {
        let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
        input.read_exact(&mut bytes)?;
        let mut sockets = sockets.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.retain_mut(|socket| socket.write_all(&bytes).is_ok());
    }
    Ok(())
}

/// What a client waits for, whatever it has said.
fn welcome(socket: &mut TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut answer = b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec();
    answer.extend(frame::of_server(frame::TEXT, br#"{"type":"auth_ok"}"#));
    socket.write_all(&answer)
}
