//! The accept loop of a listener: one hyper connection for each client, until its WebSocket upgrade.

use std::{net::SocketAddr, pin::pin, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use crate::http::Peer;

/// Time for a client to send the head of a request, the first one or the next.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's head at most, and of hyper's buffers.
const MAX_HEAD: usize = 32 * 1024;

/// Accepts until `stop`; connections then finish the request they are at.
pub(super) async fn accept(
    listener: TcpListener,
    routes: Router,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                tasks.spawn(serve(tcp, peer, routes.clone(), stop.clone()));
            }
            Err(error) => {
                // Out of file descriptors, as a rule: others have to close first.
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(tcp: TcpStream, peer: SocketAddr, routes: Router, stop: CancellationToken) {
    // Small answers must not wait for an acknowledgement. A socket that refuses works all the same.
    drop(tcp.set_nodelay(true));
    let service = routes.map_request(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer.ip().to_canonical()));
        request
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(tcp), TowerToHyperService::new(service))
        .with_upgrades();
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP connection broke");
    }
}
