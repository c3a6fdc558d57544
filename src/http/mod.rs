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

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Request, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodRouter, delete, get, post, put},
};
use tokio_util::sync::CancellationToken;
use tower_http::{
    catch_panic::CatchPanicLayer,
    compression::{
        CompressionLayer,
        predicate::{And, DefaultPredicate, Predicate, SizeAbove},
    },
    cors::{AllowOrigin, CorsLayer},
};

pub(crate) use address::Peer;
pub(crate) use observe::remote;
pub(crate) use problem::Problem;

use crate::{
    auth::{Logins, Validator},
    config::{AllowList, HttpConfig},
    handlers::Context,
    limits::Limits,
    metrics::Metrics,
    protocol::ErrorBody,
    traces::Traces,
};

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
        audited(routes.route_layer(from_fn_with_state(Arc::clone(api), guard::guard)))
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
        .route("/admin/users/{user}/connections", delete(admin::disconnect_user));
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
    let clients = guarded(authors.merge(logs)).merge(audited(logins.merge(signed)));
    let ops = guarded(admin).merge(health);
    let (clients, ops) =
        if ops_apart { (clients, ops) } else { (clients.merge(ops), Router::new()) };
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
        ("POST", "/admin/broadcast", &[202, 413, 415]),
        ("GET", "/admin/connections", &[200]),
        ("DELETE", "/admin/connections/{id}", &[204, 404]),
        ("DELETE", "/admin/users/{user}/connections", &[204]),
    ];
    for (method, route, statuses) in routes {
        metrics.http.declare(method, route, &[*statuses, GUARDED].concat());
    }
    for (route, status) in [("/auth/login", 200), ("/auth/refresh", 200), ("/auth/logout", 204)] {
        metrics.http.declare("POST", route, &[status, 401, 413, 415, 422, 429, 500, 503]);
    }
    metrics.http.declare("POST", "/auth/backchannel-logout", &[200, 400, 413, 500, 503]);
    for (route, statuses) in [
        ("/health", &[200, 503][..]),
        ("/health/live", &[200]),
        ("/health/ready", &[200, 503]),
        ("/metrics", &[200]),
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
        .layer(from_fn_with_state(Arc::clone(api), check_host))
        .layer(CatchPanicLayer::custom({
            let metrics = Arc::clone(&api.metrics);
            move |_| {
                metrics.errors.panicked("http");
                Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorBody::internal())
                    .into_response()
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

async fn check_host(State(api): State<Arc<Api>>, request: Request<Body>, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let name = host.map(without_port).unwrap_or_default();
    if api.config.allowed_hosts.allows(name) || is_probe(request.uri().path()) {
        return next.run(request).await;
    }
    let body = ErrorBody::new("bad_request", "this Host is not served here");
    Problem::new(StatusCode::BAD_REQUEST, body).into_response()
}

/// Balancers and Prometheus ask by address.
fn is_probe(path: &str) -> bool {
    matches!(path, "/health" | "/health/live" | "/health/ready" | "/metrics")
}

/// `example.com:8000` and `[::1]:8000` without their ports.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

async fn not_found() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, ErrorBody::new("not_found", "There is nothing here"))
}

async fn method_not_allowed() -> Problem {
    let body = ErrorBody::new("method_not_allowed", "This path does not take this method");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, body)
}
