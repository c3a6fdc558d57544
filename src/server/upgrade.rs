//! `GET /web`: what is refused before the upgrade, the upgrade, and the way to the registry.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, Method, Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    audit::Event,
    auth::{Identity, Remote, Validator},
    cluster::Cluster,
    connection::{
        Admission, Shared,
        handshake::{self, Refusal},
        socket::{self, Socket},
    },
    http::{Problem, remote},
    hub::Outbox,
    limits::Limits,
    metrics::{AuditOutcome, ConnectionOutcome, LimitType},
    protocol::{CloseReason, ErrorBody, Format},
    registry::{RegistryAddress, RegistryMessage},
};

/// What `/web` works with.
pub(super) struct Web {
    pub(super) shared: Arc<Shared>,
    pub(super) validator: Arc<Validator>,
    pub(super) limits: Arc<Limits>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) registry: Arc<RegistryAddress>,
    /// One for each connection that may be open, those in their handshake included.
    pub(super) places: Arc<Semaphore>,
    /// Cancelled when the server drains.
    pub(super) draining: CancellationToken,
}

/// What a client asked for, checked.
struct Accepted {
    format: Format,
    presented: Option<Arc<Identity>>,
    place: OwnedSemaphorePermit,
    remote: Arc<Remote>,
}

pub(super) async fn web(
    State(web): State<Arc<Web>>,
    mut request: Request<Body>,
) -> Result<Response, Problem> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers();
    if *request.method() != Method::GET || !has_token(headers, header::UPGRADE, "websocket") {
        let body = ErrorBody::new("upgrade_required", "This is a WebSocket endpoint");
        let upgrade = [(header::UPGRADE, "websocket"), (header::CONNECTION, "Upgrade")];
        return Ok((upgrade, Problem::new(StatusCode::UPGRADE_REQUIRED, body)).into_response());
    }
    let key = accept_key(headers)?;
    let (request, _) = request.into_parts();
    let accepted = check(&web, &request).await?;
    let Some(upgrade) = upgrade else {
        return Err(bad_request("this connection cannot be upgraded"));
    };
    let shared = Arc::clone(&web);
    web.shared.tasks.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => admit(&shared, upgraded, accepted).await,
            Err(error) => tracing::debug!(%error, "an upgrade broke"),
        }
    });
    let switch = [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_ACCEPT, &key),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, switch).into_response())
}

/// Whether a header that is a list has a token, in any case.
fn has_token(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| item.trim().eq_ignore_ascii_case(token))
}

/// The answer to the client's key, if the request is as RFC 6455 wants it.
fn accept_key(headers: &HeaderMap) -> Result<String, Problem> {
    if !has_token(headers, header::CONNECTION, "upgrade") {
        return Err(bad_request("a WebSocket request has `Connection: Upgrade`"));
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(bad_request("Sec-WebSocket-Version must be 13"));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(|key| key.as_bytes()).unwrap_or_default();
    match BASE64_STANDARD.decode(key) {
        Ok(nonce) if nonce.len() == 16 => Ok(derive_accept_key(key)),
        _ => Err(bad_request("Sec-WebSocket-Key must be 16 bytes in base64")),
    }
}

async fn check(web: &Web, request: &Parts) -> Result<Accepted, Problem> {
    let config = &web.shared.config;
    let connections = &web.shared.metrics.ws.connections;
    let origin = request.headers.get(header::ORIGIN);
    let allowed = |origin: &header::HeaderValue| {
        origin.to_str().is_ok_and(|origin| config.allowed_origins.allows(origin))
    };
    if !origin.is_none_or(allowed) {
        connections.inc(ConnectionOutcome::RejectedOrigin);
        refused_origin(web, request);
        let body = ErrorBody::new("permission_denied", "This origin may not connect");
        return Err(Problem::new(StatusCode::FORBIDDEN, body));
    }
    let query: Vec<_> =
        form_urlencoded::parse(request.uri.query().unwrap_or_default().as_bytes()).collect();
    let parameter =
        |name: &str| query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_ref());
    let format = match parameter("format") {
        None => Format::Json,
        Some(name) => Format::parse(name).map_err(|msg| bad_request(&msg))?,
    };
    let remote = remote(&request.extensions);
    // Also who would send its token later: after the upgrade there is no refusing it with a status.
    if let Some(wait) = web.limits.failures.refusal(remote.address) {
        connections.inc(ConnectionOutcome::RejectedLimit);
        web.shared.metrics.rate_limit_hits.inc(LimitType::Connection);
        return Err(Problem::too_many("Too many failed authentications", wait));
    }
    let free = Arc::clone(&web.places).try_acquire_owned().ok();
    let Some(place) = free.filter(|_| !web.draining.is_cancelled()) else {
        connections.inc(ConnectionOutcome::RejectedCapacity);
        return Err(Problem::unavailable("This node takes no more connections"));
    };
    let header = request.headers.get(header::AUTHORIZATION);
    let authorization = match header {
        Some(value) => Some(value.to_str().unwrap_or_default().to_owned()),
        None if config.query_token => parameter("token")
            .map(|token| format!("Bearer {token}"))
            .or_else(|| parameter("Authorization").map(ToOwned::to_owned)),
        None => None,
    };
    let presented = match authorization {
        None => None,
        Some(text) => Some(presented(web, &text, &remote).await?),
    };
    Ok(Accepted { format, presented, place, remote })
}

/// The user of a token that came with the upgrade.
async fn presented(
    web: &Web,
    authorization: &str,
    remote: &Arc<Remote>,
) -> Result<Arc<Identity>, Problem> {
    let found = handshake::presented(&web.validator, authorization, &web.shared.metrics).await;
    found.map_err(|refusal| {
        failed(web, &refusal, remote);
        match refusal.reason {
            CloseReason::Unavailable => Problem::unavailable(refusal.msg),
            reason => {
                Problem::unauthorized(reason.error_code().unwrap_or("unauthorized"), refusal.msg)
            }
        }
    })
}

/// Counts and records a token that did not do. One who was too slow has not failed, and one whose token
/// was good once does not guess.
fn failed(web: &Web, refusal: &Refusal, remote: &Arc<Remote>) {
    if refusal.reason == CloseReason::Unauthorized {
        web.limits.failures.count(remote.address);
    }
    if refusal.is_failure() {
        let (resource, outcome) = ("/web".to_owned(), AuditOutcome::Error);
        web.shared.audit.record(Event {
            error: Some(refusal.msg.clone().into()),
            ..Event::of_connection("AUTH", resource, outcome, remote, refusal.reason)
        });
    }
}

fn refused_origin(web: &Web, request: &Parts) {
    let (resource, outcome) = ("/web".to_owned(), AuditOutcome::PermissionDenied);
    let remote = remote(&request.extensions);
    let reason = CloseReason::Unauthorized;
    web.shared.audit.record(Event {
        status: StatusCode::FORBIDDEN.as_u16().into(),
        error: Some("This origin may not connect".into()),
        ..Event::of_connection("CONNECT", resource, outcome, &remote, reason)
    });
}

fn bad_request(msg: &str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, ErrorBody::new("bad_request", msg.to_owned()))
}

/// Authenticates the socket and hands it to the registry; a refused client is told why and closed.
async fn admit(web: &Web, upgraded: Upgraded, accepted: Accepted) {
    let Accepted { format, presented, place, remote } = accepted;
    let Ok(parts) = upgraded.downcast::<TokioIo<TcpStream>>() else {
        tracing::error!("an upgraded connection is not the TCP stream it was accepted as");
        return;
    };
    let config = &web.shared.config;
    let tcp = parts.io.into_inner();
    // Dropped here: kept, it would weigh six KiB on every connection.
    let mut socket = socket::accept(tcp, &parts.read_buf, config.max_message_bytes).await;
    drop(parts.read_buf);

    let identity = match presented {
        Some(identity) => Ok(identity),
        None => tokio::select! {
            identity = handshake::first_message(
                &mut socket, format, config, &web.validator, &web.shared.metrics,
            ) => identity,
            () = web.draining.cancelled() => Err(CloseReason::GoingAway.into()),
        },
    };
    let identity = match identity {
        Ok(identity) => identity,
        Err(refusal) => {
            failed(web, &refusal, &remote);
            return refuse(socket, refusal, &remote.correlation).await;
        }
    };
    let outbox = Arc::new(Outbox::new(
        Uuid::new_v4(),
        Arc::clone(&identity),
        format,
        config.send_queue,
        Arc::clone(&remote),
    ));
    let lease = match web.cluster.lease(&outbox).await {
        Ok(lease) => lease,
        Err(reason) => return refuse(socket, no_lease(web, reason), &remote.correlation).await,
    };
    let budget = web.limits.messages(&identity.subject).await;
    let admission = Box::new(Admission { socket, identity, outbox, budget, lease });
    let (refused, refusal) = oneshot::channel();
    let admit = RegistryMessage::Admit { admission, place, refused };
    let refused = match web.registry.tell(admit) {
        Err(RegistryMessage::Admit { admission, .. }) => {
            Some((admission, CloseReason::InternalError))
        }
        // Admitted: the sender is dropped unused.
        _ => refusal.await.ok(),
    };
    if let Some((admission, reason)) = refused {
        let Admission { socket, lease, .. } = *admission;
        // Not held while the client takes its time.
        drop(lease);
        refuse(socket, reason.into(), &remote.correlation).await;
    }
}

/// Counts and words why a connection has no place among those of its user.
fn no_lease(web: &Web, reason: CloseReason) -> Refusal {
    web.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedLimit);
    if reason == CloseReason::ConnectionLimit {
        web.shared.metrics.rate_limit_hits.inc(LimitType::Connection);
        return reason.into();
    }
    Refusal { reason, msg: "the connection limit cannot be checked".into() }
}

async fn refuse(socket: Socket, refusal: Refusal, request_id: &str) {
    tracing::info!(
        request_id,
        code = refusal.reason.code(),
        cause = refusal.msg,
        "connection refused"
    );
    socket::close(socket, refusal.reason, refusal.frame()).await;
}
