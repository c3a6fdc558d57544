//! The accept loop of a listener: one hyper connection for each client, until its WebSocket upgrade.

use std::{io, net::IpAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, response::Response};
use hyper::{
    Request, StatusCode,
    body::{Body as _, Incoming},
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use super::stream::{Exchange, Patience, Stream};
use crate::{
    config::HttpConfig,
    http::Peer,
    limits::{Full, Pool, Share},
    machine,
    metrics::{HttpMetrics, HttpRefusal},
};

/// Bytes of a request's head at most, and of hyper's buffers.
const MAX_HEAD: usize = 32 * 1024;
/// For a connection that there is no room for. Written if the socket takes it at once.
const NO_ROOM: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// A listener, and what its connections go by.
pub(super) struct Entrance {
    pub(super) listener: TcpListener,
    pub(super) routes: Router,
    pub(super) config: Arc<HttpConfig>,
    pub(super) patience: Patience,
    /// The connections that are no WebSockets yet.
    pub(super) pool: Arc<Pool>,
    pub(super) metrics: HttpMetrics,
}

/// Accepts until `stop`; connections then finish the request they are at.
pub(super) async fn accept(entrance: Entrance, stop: CancellationToken, tasks: TaskTracker) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = entrance.listener.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                let address = peer.ip().to_canonical();
                if let Some(share) = entrance.admit(&tcp, address) {
                    let connection = Connection {
                        share: Arc::new(share),
                        address,
                        routes: entrance.routes.clone(),
                        patience: entrance.patience,
                    };
                    tasks.spawn(connection.serve(tcp, stop.clone()));
                }
            }
            Err(error) => {
                // Out of file descriptors, as a rule: others have to close first.
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

impl Entrance {
    /// Room for one more connection; a client for which there is none is told so.
    fn admit(&self, tcp: &TcpStream, address: IpAddr) -> Option<Share> {
        let refusal = match self.pool.take(self.config.counted(address), 1) {
            Ok(share) => return Some(share),
            Err(Full::Pool) => HttpRefusal::Capacity,
            Err(Full::Address) => HttpRefusal::Address,
        };
        self.metrics.refused.inc(refusal);
        drop(tcp.try_write(NO_ROOM));
        None
    }
}

struct Connection {
    /// Held until the connection ends, or is upgraded.
    share: Arc<Share>,
    address: IpAddr,
    routes: Router,
    patience: Patience,
}

impl Connection {
    async fn serve(self, tcp: TcpStream, stop: CancellationToken) {
        // Small answers must not wait for an acknowledgement. A socket that refuses works all the same.
        drop(tcp.set_nodelay(true));
        let exchange = Arc::new(Exchange::default());
        let stream = Stream::new(tcp, Arc::clone(&exchange), self.patience);
        let service = service_fn(move |mut request: Request<Incoming>| {
            exchange.begin(!request.body().is_end_stream());
            request.extensions_mut().insert(Peer(self.address));
            let answer = self.routes.clone().oneshot(request);
            let (exchange, share) = (Arc::clone(&exchange), Arc::clone(&self.share));
            async move {
                let mut response = answer.await?;
                exchange.answer(is_stream(&response));
                // Where room gets scarce, nobody keeps any between two requests.
                if response.status() != StatusCode::SWITCHING_PROTOCOLS && share.is_scarce() {
                    response
                        .headers_mut()
                        .insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, std::convert::Infallible>(response)
            }
        });
        let connection = http().serve_connection(TokioIo::new(stream), service).with_upgrades();
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
}

/// How requests are read.
pub(super) fn http() -> http1::Builder {
    let mut http = http1::Builder::new();
    // A client may say that it sends no more, and wait for its answer.
    http.half_close(true).max_buf_size(MAX_HEAD);
    http
}

/// Whether an answer has no end of its own.
fn is_stream(response: &Response) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

/// Has every socket of a listener notice that its peer is gone: after silence, and with data on its way.
pub(super) fn watch_peers(listener: &impl std::os::fd::AsFd, write: Duration) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(listener, true)?;
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        sockopt::set_tcp_keepidle(listener, KEEPALIVE)?;
        sockopt::set_tcp_keepintvl(listener, KEEPALIVE / 4)?;
        sockopt::set_tcp_keepcnt(listener, 4)?;
    }
    #[cfg(target_os = "linux")]
    {
        // Also ends a peer that acknowledges and takes nothing: not before the server's own rule.
        let time = (write * 2).max(KEEPALIVE);
        let time = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(listener, time)?;
        machine::bound_unsent(listener.as_fd(), UNSENT)?;
    }
    Ok(())
}

/// Bytes that the kernel takes of a socket beside those on their way: a write goes on when half of them are gone.
/// By default it takes megabytes at once, and a client who reads some at a time would seem to read nothing.
#[cfg(target_os = "linux")]
const UNSENT: i32 = 16 * 1024;
/// Silence before the kernel asks whether the peer is there, and the time for an acknowledgement.
const KEEPALIVE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use rustix::net::sockopt;

    use super::*;

    #[tokio::test]
    async fn accepted_sockets_notice_that_their_peer_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        watch_peers(&listener, Duration::from_secs(90)).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        assert!(sockopt::socket_keepalive(&tcp).unwrap());
        #[cfg(target_os = "linux")]
        {
            assert_eq!(sockopt::tcp_keepidle(&tcp).unwrap(), KEEPALIVE);
            assert_eq!(sockopt::tcp_user_timeout(&tcp).unwrap(), 180_000);
        }
    }
}
