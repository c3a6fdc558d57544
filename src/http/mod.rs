//! The REST sidecar: routes, and what every request passes on its way to them.
//!
//! From the outside in: [`observe`] (correlation id, log line, metrics, security headers) → panics →
//! host → CORS → gzip → [`audit`] → [`guard`] (who asks, and how often) → the handler, which asks for its
//! role, then reads its input, then calls the same operation as the WebSocket package.

mod address;
mod admin;
mod audit;
mod audit_logs;
mod authors;
mod backchannel;
mod guard;
mod health;
mod input;
mod logins;
mod observe;
mod problem;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Request, StatusCode, Version, header, uri::Authority},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodRouter, delete, get, post, put},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower_http::{
    catch_panic::CatchPanicLayer,
    compression::{
        CompressionLayer,
        predicate::{And, DefaultPredicate, Predicate, SizeAbove},
    },
    cors::{AllowOrigin, CorsLayer},
};

#[cfg(any(test, fuzzing))]
pub(crate) use address::fuzzing;
pub(crate) use address::{Forwarding, Peer};
pub(crate) use observe::remote;
pub(crate) use problem::Problem;

use crate::{
    auth::{Logins, Validator},
    config::{AllowList, HttpConfig},
    handlers::Context,
    limits::{Limits, Pool},
    metrics::Metrics,
    protocol::ErrorBody,
    traces::Traces,
};

/// What clients hold at once.
#[derive(Clone)]
pub(crate) struct Held {
    /// HTTP connections.
    pub(crate) connections: Arc<Pool>,
    /// Those of operators, where they have a listener.
    pub(crate) ops_connections: Arc<Pool>,
    /// WebSockets that are still to authenticate.
    pub(crate) pending: Arc<Pool>,
    /// WebSockets that are refused, while they are told why.
    pub(crate) farewells: Arc<Pool>,
    /// Bytes of bodies that are being read.
    pub(crate) bodies: Arc<Pool>,
}

impl Held {
    /// Addresses that hold something, counted in each pool.
    fn holders(&self) -> usize {
        let sockets = [&self.connections, &self.ops_connections, &self.pending, &self.farewells];
        sockets.into_iter().chain([&self.bodies]).map(|pool| pool.holders()).sum()
    }
}

/// What the routes work with.
pub(crate) struct Api {
    pub(crate) context: Arc<Context>,
    pub(crate) validator: Arc<Validator>,
    /// None without an identity provider.
    pub(crate) logins: Option<Logins>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) traces: Option<Arc<Traces>>,
    pub(crate) config: HttpConfig,
    pub(crate) held: Held,
    pub(crate) forwarding: Forwarding,
    /// Cancelled when the server is to stop.
    pub(crate) leaving: CancellationToken,
}

/// Bytes; smaller bodies are not compressed.
const GZIP_ABOVE: u16 = 1024;

/// Statuses that a route with a role can answer, beside its own.
const GUARDED: &[u16] = &[401, 403, 422, 429, 500, 503];

/// The routes for clients, with `web` under `/web`, and those for operators: on the same listener, or
/// on one of their own.
pub(crate) fn routes(api: &Arc<Api>, web: MethodRouter, ops_apart: bool) -> (Router, Router) {
    declare(&api.metrics);
    let audited = |routes: Router<Arc<Api>>| {
        routes.route_layer(from_fn_with_state(Arc::clone(api), audit::audit))
    };
    let guarded = |routes: Router<Arc<Api>>| {
        audited(routes.route_layer(from_fn_with_state(Arc::clone(api), guard::clients)))
    };
    let operated = |routes: Router<Arc<Api>>| {
        audited(routes.route_layer(from_fn_with_state(Arc::clone(api), guard::operators)))
    };
    let authors = Router::new()
        .route("/authors", get(authors::list).post(authors::create))
        .route("/authors/paginated", get(authors::page))
        .route(
            "/authors/{id}",
            get(authors::read).merge(put(authors::update)).merge(delete(authors::remove)),
        );
    let logs = Router::new()
        .route("/audit-logs", get(audit_logs::list))
        .route("/audit-logs/{id}", get(audit_logs::read))
        .route("/audit-logs/user/{user_id}", get(audit_logs::of_user));
    let admin = Router::new()
        .route("/admin/broadcast", post(admin::broadcast))
        .route("/admin/connections", get(admin::connections))
        .route("/admin/connections/{id}", delete(admin::disconnect))
        .route("/admin/users/{user}/connections", delete(admin::disconnect_user))
        .route("/admin/keys/refresh", post(admin::refresh_keys));
    let health = Router::new()
        .route("/health", get(health::health))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(health::metrics));
    let logins = Router::new()
        .route("/auth/login", post(logins::login))
        .route("/auth/refresh", post(logins::refresh))
        .route("/auth/logout", post(logins::logout))
        .route_layer(from_fn_with_state(Arc::clone(api), guard::by_address));
    let signed = Router::new().route("/auth/backchannel-logout", post(backchannel::logout));
    let logs = operated(logs);
    let clients = guarded(authors).merge(logs.clone()).merge(audited(logins.merge(signed)));
    let ops = operated(admin).merge(health);
    // The audit trail is at both: clients have always read it there, and operators need it where no node is ready.
    let (clients, ops) = match ops_apart {
        true => (clients, ops.merge(logs)),
        false => (clients.merge(ops), Router::new()),
    };
    let finish = |routes: Router<Arc<Api>>| finish(routes.with_state(Arc::clone(api)), api);
    // An upgrade has its own ways with origins and sizes; only the outermost layer is for it too.
    (finish(clients.route("/web", web.with_state(()))), finish(ops))
}

fn declare(metrics: &Metrics) {
    let routes: &[(&str, &str, &[u16])] = &[
        ("GET", "/authors", &[200]),
        ("POST", "/authors", &[201, 409, 413, 415]),
        ("GET", "/authors/paginated", &[200]),
        ("GET", "/authors/{id}", &[200, 404]),
        ("PUT", "/authors/{id}", &[200, 404, 409, 413, 415]),
        ("DELETE", "/authors/{id}", &[204, 404]),
        ("GET", "/audit-logs", &[200]),
        ("GET", "/audit-logs/{id}", &[200, 404]),
        ("GET", "/audit-logs/user/{user_id}", &[200]),
        ("POST", "/admin/broadcast", &[202, 409, 413, 415]),
        ("GET", "/admin/connections", &[200, 409]),
        ("DELETE", "/admin/connections/{id}", &[204, 404]),
        ("DELETE", "/admin/users/{user}/connections", &[204, 409]),
        ("POST", "/admin/keys/refresh", &[200]),
    ];
    for (method, route, statuses) in routes {
        metrics.http.declare(method, route, &[*statuses, GUARDED].concat());
    }
    for (route, status) in [("/auth/login", 200), ("/auth/refresh", 200), ("/auth/logout", 204)] {
        metrics.http.declare("POST", route, &[status, 401, 413, 415, 422, 429, 500, 503]);
    }
    let backchannel = &[200, 400, 403, 413, 429, 500, 503];
    metrics.http.declare("POST", "/auth/backchannel-logout", backchannel);
    for (route, statuses) in [
        ("/health", &[200, 503][..]),
        ("/health/live", &[200]),
        ("/health/ready", &[200, 503]),
        ("/metrics", &[200, 429]),
        ("/web", &[101, 400, 401, 403, 426, 429, 503]),
        ("unmatched", &[404]),
    ] {
        metrics.http.declare("GET", route, statuses);
    }
}

fn finish(routes: Router, api: &Arc<Api>) -> Router {
    let big_enough: And<DefaultPredicate, SizeAbove> =
        DefaultPredicate::new().and(SizeAbove::new(GZIP_ABOVE));
    let routes = routes
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CompressionLayer::new().gzip(true).compress_when(big_enough));
    // Left out, it leaves OPTIONS to the routes: it would answer 200 for every path.
    let routes = match &api.config.cors_allowed_origins {
        AllowList::Only(origins) if origins.is_empty() => routes,
        origins => routes.layer(cors(origins)),
    };
    routes
        .layer(from_fn_with_state(Arc::clone(api), enter))
        .layer(CatchPanicLayer::custom({
            let metrics = Arc::clone(&api.metrics);
            move |_| {
                metrics.errors.panicked("http");
                Problem::internal().into_response()
            }
        }))
        .layer(from_fn_with_state(Arc::clone(api), observe::observe))
}

fn cors(origins: &AllowList) -> CorsLayer {
    let origins = match origins {
        AllowList::All => AllowOrigin::any(),
        AllowList::Only(_) => {
            let origins = origins.clone();
            AllowOrigin::predicate(move |origin, _| {
                origin.to_str().is_ok_and(|origin| origins.allows(origin))
            })
        }
    };
    use axum::http::Method;
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, observe::CORRELATION_HEADER])
        .expose_headers([
            header::LOCATION,
            header::RETRY_AFTER,
            observe::CORRELATION_HEADER,
            guard::LIMIT,
            guard::REMAINING,
            guard::RESET,
        ])
}

/// Refuses a request that does not say once which host it is for (RFC 9112, 3.2), or names another; bounds the
/// time of every other one. One layer for both: each costs an allocation for every request.
async fn enter(State(api): State<Arc<Api>>, request: Request<Body>, next: Next) -> Response {
    let fault = match host(&request) {
        Ok(host) if is_allowed(&api, host.as_ref(), request.uri().path()) => None,
        Ok(_) => Some("this Host is not served here"),
        Err(fault) => Some(fault),
    };
    let Some(fault) = fault else {
        return in_time(api.config.request_timeout, next.run(request)).await;
    };
    let body = ErrorBody::new("bad_request", fault);
    Problem::new(StatusCode::BAD_REQUEST, body).into_response()
}

/// The host that a request is for; none where HTTP/1.0 names none.
fn host(request: &Request<Body>) -> Result<Option<Authority>, &'static str> {
    let mut given = request.headers().get_all(header::HOST).iter();
    let (given, more) = (given.next(), given.next());
    if more.is_some() {
        return Err("a request has one Host");
    }
    let given = match given {
        Some(host) => match Authority::try_from(host.as_bytes()) {
            Ok(host) if is_host_and_port(&host) => Some(host),
            // As clients send it for a target without an authority.
            _ if host.is_empty() => None,
            _ => return Err("the Host is no host with a port or without"),
        },
        None if request.version() == Version::HTTP_10 => None,
        None => return Err("a request has a Host"),
    };
    // The target, where it names a host, counts, and a client has to repeat it.
    match (request.uri().authority(), given) {
        (Some(target), Some(given)) if *target != given => {
            Err("the Host is not that of the request's target")
        }
        (Some(target), _) => Ok(Some(target.clone())),
        (None, given) => Ok(given),
    }
}

fn is_host_and_port(authority: &Authority) -> bool {
    let port = authority.as_str().strip_prefix(authority.host());
    port.is_some_and(|port| {
        port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())
    })
}

/// Whether a host is served. Probes and Prometheus come by address.
fn is_allowed(api: &Api, host: Option<&Authority>, path: &str) -> bool {
    let host = host.map_or("", Authority::host);
    api.config.allowed_hosts.allows(host)
        || matches!(path, "/metrics" | "/health" | "/health/live" | "/health/ready")
}

/// Bounds the time until the answer begins. A change that was begun goes on in its own task.
async fn in_time(limit: Duration, answer: impl Future<Output = Response>) -> Response {
    timeout(limit, answer).await.unwrap_or_else(|_| {
        let body = ErrorBody::new("timeout", "The request took too long");
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, body).into_response()
    })
}

async fn not_found() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, ErrorBody::new("not_found", "There is nothing here"))
}

async fn method_not_allowed() -> Problem {
    let body = ErrorBody::new("method_not_allowed", "This path does not take this method");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, body)
}
