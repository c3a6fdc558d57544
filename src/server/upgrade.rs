//! `GET /web`: what is refused before the upgrade, the upgrade, and the way to the registry.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::{borrow::Cow, sync::Arc, time::Duration};

use axum::{
    body::{Body, HttpBody},
    extract::State,
    http::{Extensions, HeaderMap, Method, Request, StatusCode, Uri, header, request::Parts},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::FutureExt;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use uuid::Uuid;

use super::stream::Stream;
use crate::{
    audit::Event,
    auth::{Identity, Remote},
    cluster::Cluster,
    config::HttpConfig,
    connection::{
        Admission, Shared,
        handshake::{self, Refusal},
        socket::{self, Socket},
    },
    http::{Problem, remote},
    hub::Outbox,
    limits::{Full, Pool, Share},
    metrics::{AuditOutcome, ConnectionOutcome, LimitType},
    protocol::{CloseReason, ErrorBody, Format},
    registry::{RegistryAddress, RegistryMessage},
};

const NO_PLACE: &str = "This node takes no more connections";
const IGNORED_TOKEN: &str = "authentication timeout: no auth frame came, and the token in the address does not count, \
     as WS_QUERY_TOKEN is false";
/// When a client may try again that came beside too many others of its address.
const SOON: Duration = Duration::from_secs(1);

/// What `/web` works with.
pub(super) struct Web {
    pub(super) shared: Arc<Shared>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) registry: Arc<RegistryAddress>,
    pub(super) http: HttpConfig,
    /// One for each authenticated connection that may be open.
    pub(super) places: Arc<Semaphore>,
    /// The sockets that are still to authenticate.
    pub(super) pending: Arc<Pool>,
    /// Those that are refused, while they are told why.
    pub(super) farewells: Arc<Pool>,
}

/// What a client asked for, checked.
struct Accepted {
    format: Format,
    entry: Entry,
    remote: Arc<Remote>,
}

/// How a client comes in.
enum Entry {
    /// A token came with the upgrade, and its user has a place.
    Known(Arc<Identity>, OwnedSemaphorePermit),
    /// The token is to come, and the socket may wait for it.
    Pending(Waiting),
}

/// A socket that is still to authenticate.
struct Waiting {
    /// Its place among those that wait.
    _share: Share,
    /// Whether there is a token in the address, which counts with `WS_QUERY_TOKEN` alone.
    ignored_token: bool,
}

pub(super) async fn web(
    State(web): State<Arc<Web>>,
    mut request: Request<Body>,
) -> Result<Response, Problem> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers();
    if !is_upgrade(request.method(), headers) {
        let body = ErrorBody::new("upgrade_required", "This is a WebSocket endpoint");
        let upgrade = [(header::UPGRADE, "websocket"), (header::CONNECTION, "Upgrade")];
        return Ok((upgrade, Problem::new(StatusCode::UPGRADE_REQUIRED, body)).into_response());
    }
    let key =
        accept_key(&request).map_err(|problem| refused(&web, request.extensions(), problem))?;
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

fn is_upgrade(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::GET && has_token(headers, header::UPGRADE, "websocket")
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
fn accept_key(request: &Request<impl HttpBody>) -> Result<String, Problem> {
    let headers = request.headers();
    // Its bytes would be taken for frames, and a proxy before us takes them for a body.
    if !request.body().is_end_stream() {
        return Err(bad_request("a WebSocket request has no body"));
    }
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

/// Takes a refused upgrade from the budget of its address. Over it the client is told that alone, and
/// nothing is recorded.
fn refused(web: &Web, request: &Extensions, problem: Problem) -> Problem {
    let address = remote(request).address;
    match web.shared.limits.refusals.refusal(address) {
        Some(wait) => too_many(web, "Too many refused requests", wait),
        None => {
            web.shared.limits.refusals.count(address);
            problem
        }
    }
}

fn too_many(web: &Web, msg: &'static str, wait: Duration) -> Problem {
    web.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedLimit);
    web.shared.metrics.rate_limit_hits.inc(LimitType::Connection);
    Problem::too_many(msg, wait)
}

async fn check(web: &Web, request: &Parts) -> Result<Accepted, Problem> {
    let config = &web.shared.config;
    check_origin(web, request)?;
    let query = Query::of(&request.uri);
    let format =
        format(&query).map_err(|msg| refused(web, &request.extensions, bad_request(&msg)))?;
    let remote = remote(&request.extensions);
    if web.shared.draining.is_cancelled() || web.places.available_permits() == 0 {
        return Err(no_place(web));
    }
    let entry = match authorization(&request.headers, &query, config.query_token) {
        None => Entry::Pending(Waiting {
            _share: pending(web, &remote)?,
            ignored_token: query.token().is_some(),
        }),
        Some(text) => {
            let identity = presented(web, &text, &remote).await?;
            if let Some(wait) = web.shared.limits.expulsions.refusal(&identity.subject) {
                return Err(too_many(web, CloseReason::TooManyExpulsions.text(), wait));
            }
            let place = Arc::clone(&web.places).try_acquire_owned();
            Entry::Known(identity, place.map_err(|_| no_place(web))?)
        }
    };
    Ok(Accepted { format, entry, remote })
}

/// The parameters of the address, without their percent-encoding.
struct Query<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Query<'a> {
    fn of(uri: &'a Uri) -> Self {
        Self(form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_ref())
    }

    /// The token with its scheme.
    fn token(&self) -> Option<String> {
        let token = self.get("token").map(|token| format!("Bearer {token}"));
        token.or_else(|| self.get("Authorization").map(ToOwned::to_owned))
    }
}

fn format(query: &Query<'_>) -> Result<Format, String> {
    query.get("format").map_or(Ok(Format::Json), Format::parse)
}

/// The token that came with the request, with its scheme: in the header, or where there is none in the query.
fn authorization(headers: &HeaderMap, query: &Query<'_>, query_token: bool) -> Option<String> {
    match headers.get(header::AUTHORIZATION) {
        Some(value) => Some(value.to_str().unwrap_or_default().to_owned()),
        None if query_token => query.token(),
        None => None,
    }
}

fn check_origin(web: &Web, request: &Parts) -> Result<(), Problem> {
    let allowed = |origin: &header::HeaderValue| {
        origin.to_str().is_ok_and(|origin| web.shared.config.allowed_origins.allows(origin))
    };
    if request.headers.get(header::ORIGIN).is_none_or(allowed) {
        return Ok(());
    }
    let remote = remote(&request.extensions);
    if web.shared.limits.refusals.refusal(remote.address).is_none() {
        web.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedOrigin);
        record_foreign_origin(web, &remote);
    }
    let body = ErrorBody::new("permission_denied", "This origin may not connect");
    Err(refused(web, &request.extensions, Problem::new(StatusCode::FORBIDDEN, body)))
}

fn no_place(web: &Web) -> Problem {
    web.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedCapacity);
    Problem::unavailable(NO_PLACE)
}

/// A place among the sockets that are still to authenticate.
fn pending(web: &Web, remote: &Remote) -> Result<Share, Problem> {
    if let Some(wait) = web.shared.limits.breaches.refusal(remote.address) {
        return Err(too_many(web, "Too many broken connections", wait));
    }
    web.pending.take(web.http.counted(remote.address), 1).map_err(|full| match full {
        Full::Pool => no_place(web),
        Full::Address => {
            too_many(web, "Too many connections of this address are not authenticated", SOON)
        }
    })
}

/// The user of a token that came with the upgrade.
async fn presented(
    web: &Web,
    authorization: &str,
    remote: &Arc<Remote>,
) -> Result<Arc<Identity>, Problem> {
    let found = handshake::presented(&web.shared, authorization, remote.address).await;
    found.map_err(|refusal| {
        failed(web, &refusal, remote);
        match refusal.reason {
            CloseReason::Unavailable => Problem::unavailable(refusal.msg),
            CloseReason::TooManyFailures => {
                let limits = &web.shared.limits;
                let wait = limits.failures.refusal(remote.address);
                let wait = wait.or_else(|| limits.refusals.refusal(remote.address)).unwrap_or(SOON);
                Problem::too_many("Too many failed authentications", wait)
            }
            reason => {
                Problem::unauthorized(reason.error_code().unwrap_or("unauthorized"), refusal.msg)
            }
        }
    })
}

/// Counts and records a token that did not do.
fn failed(web: &Web, refusal: &Refusal, remote: &Arc<Remote>) {
    handshake::charge(&web.shared.limits, refusal, remote.address);
    if refusal.reason == CloseReason::TooManyFailures {
        web.shared.metrics.rate_limit_hits.inc(LimitType::Connection);
    }
    if refusal.is_failure() {
        let (resource, outcome) = ("/web".to_owned(), AuditOutcome::Error);
        web.shared.audit.record(Event {
            error: Some(refusal.msg.clone().into()),
            ..Event::of_connection("AUTH", resource, outcome, remote, refusal.reason)
        });
    }
}

fn record_foreign_origin(web: &Web, remote: &Arc<Remote>) {
    let (resource, outcome) = ("/web".to_owned(), AuditOutcome::PermissionDenied);
    web.shared.audit.record(Event {
        status: StatusCode::FORBIDDEN.as_u16().into(),
        error: Some("This origin may not connect".into()),
        ..Event::of_connection("CONNECT", resource, outcome, remote, CloseReason::Unauthorized)
    });
}

fn bad_request(msg: &str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, ErrorBody::new("bad_request", msg.to_owned()))
}

/// Authenticates the socket and hands it to the registry; a refused client is told why and closed.
async fn admit(web: &Web, upgraded: Upgraded, accepted: Accepted) {
    let Accepted { format, entry, remote } = accepted;
    let Ok(parts) = upgraded.downcast::<TokioIo<Stream>>() else {
        tracing::error!("an upgraded connection is not the TCP stream it was accepted as");
        return;
    };
    let config = &web.shared.config;
    let tcp = parts.io.into_inner().into_tcp();
    // Dropped here: kept, it would weigh six KiB on every connection.
    let mut socket = socket::accept(tcp, &parts.read_buf, config.max_message_bytes).await;
    drop(parts.read_buf);

    let known = match entry {
        Entry::Known(identity, place) => Ok((identity, place)),
        // Its place among those that wait is free before it is told why it is refused.
        Entry::Pending(waiting) => authenticate(web, &mut socket, format, &remote, waiting).await,
    };
    let (identity, place) = match known {
        Ok(known) => known,
        Err(refusal) => return refuse(web, socket, refusal, &remote).await,
    };
    let outbox = Arc::new(Outbox::new(
        Uuid::new_v4(),
        Arc::clone(&identity),
        format,
        config.send_queue,
        Arc::clone(&remote),
        web.cluster.now(),
    ));
    let lease = match web.cluster.lease(&outbox).await {
        Ok(lease) => lease,
        Err(reason) => {
            drop(place);
            return refuse(web, socket, no_lease(web, reason), &remote).await;
        }
    };
    let budget = web.shared.limits.messages(&identity.subject).await;
    let (user, connection) = (Arc::clone(&identity), outbox.id);
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
    let Some((admission, reason)) = refused else {
        return web.shared.audit.logged_in(&user, &remote, connection);
    };
    let Admission { socket, lease, .. } = *admission;
    // Not held while the client takes its time.
    drop(lease);
    refuse(web, socket, reason.into(), &remote).await;
}

/// Waits for the token of a socket, which holds its place among those that wait until then.
async fn authenticate(
    web: &Web,
    socket: &mut Socket,
    format: Format,
    remote: &Arc<Remote>,
    waiting: Waiting,
) -> Result<(Arc<Identity>, OwnedSemaphorePermit), Refusal> {
    let identity = tokio::select! {
        identity = handshake::first_message(socket, format, &web.shared, remote.address) => identity,
        () = web.shared.draining.cancelled() => Err(CloseReason::GoingAway.into()),
    };
    let identity = identity.map_err(|mut refusal| {
        if waiting.ignored_token && refusal.reason == CloseReason::AuthTimeout {
            refusal.msg = IGNORED_TOKEN.into();
        }
        failed(web, &refusal, remote);
        refusal
    })?;
    if web.shared.limits.expulsions.refusal(&identity.subject).is_some() {
        web.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedLimit);
        web.shared.metrics.rate_limit_hits.inc(LimitType::Connection);
        return Err(CloseReason::TooManyExpulsions.into());
    }
    match Arc::clone(&web.places).try_acquire_owned() {
        Ok(place) => Ok((identity, place)),
        Err(_) => {
            web.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedCapacity);
            Err(Refusal { reason: CloseReason::Unavailable, msg: NO_PLACE.into() })
        }
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

/// Tells a client why it is refused, and closes the socket. Clients that take their time are few: beyond
/// that the socket is closed without waiting for anything.
async fn refuse(web: &Web, socket: Socket, refusal: Refusal, remote: &Remote) {
    tracing::info!(
        request_id = &*remote.correlation,
        code = refusal.reason.code(),
        cause = refusal.msg,
        "connection refused"
    );
    let farewell = web.farewells.take(web.http.counted(remote.address), 1);
    let closing = socket::close(socket, refusal.reason, refusal.frame());
    match farewell {
        Ok(_share) => closing.await,
        Err(_) => drop(closing.now_or_never()),
    }
}
