//! What probes and Prometheus ask for. Open to all, not logged at info; scrapes have a budget by address.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{Request, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use tokio::runtime::Handle;

use super::{Api, Problem, remote};
use crate::metrics::Table;

fn word(healthy: bool) -> &'static str {
    if healthy { "healthy" } else { "unhealthy" }
}

fn status(healthy: bool) -> StatusCode {
    if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) async fn health(State(api): State<Arc<Api>>) -> Response {
    let database = api.context.store.is_healthy().await;
    let body = json!({
        "status": word(database),
        "database": word(database),
        "redis": api.context.cluster.is_connected().map_or("disabled", word),
        "websocket": {
            "status": word(!api.leaving.is_cancelled()),
            "active_connections": api.context.hub.len(),
        },
    });
    (status(database), Json(body)).into_response()
}

/// The process runs.
pub(super) async fn live() -> Json<serde_json::Value> {
    Json(json!({ "status": "healthy" }))
}

/// New clients may be sent here.
pub(super) async fn ready(State(api): State<Arc<Api>>) -> Response {
    match unready(&api).await {
        None => Json(json!({ "status": word(true) })).into_response(),
        Some(reason) => {
            let body = json!({ "status": word(false), "reason": reason });
            (status(false), Json(body)).into_response()
        }
    }
}

/// Why new clients are to be sent elsewhere; none: they are served here.
async fn unready(api: &Api) -> Option<&'static str> {
    if api.leaving.is_cancelled() {
        return Some("the node drains");
    }
    if !api.validator.has_keys() {
        return Some(
            "there are no keys to check tokens with: the provider does not answer, or has none",
        );
    }
    if !api.context.store.is_healthy().await {
        return Some(
            "the database does not answer, or takes no changes: the log and `switchboard doctor` say more",
        );
    }
    let closed = "Redis does not answer, and RATE_LIMIT_FAIL_MODE is closed";
    (!api.limits.serve()).then_some(closed)
}

pub(super) async fn metrics(State(api): State<Arc<Api>>, request: Request<Body>) -> Response {
    let address = remote(request.extensions()).address;
    if let Some(wait) = api.limits.scrapes.refusal(address) {
        return Problem::too_many("Too many scrapes", wait).into_response();
    }
    api.limits.scrapes.count(address);
    api.context.store.measure().await;
    api.context.audit.measure();
    let in_flight = i64::try_from(api.context.hub.in_flight()).unwrap_or(i64::MAX);
    api.metrics.ws.requests_in_flight.set(in_flight);
    let tasks = Handle::current().metrics().num_alive_tasks();
    let runtime = &api.metrics.runtime;
    runtime.tasks_alive.set(i64::try_from(tasks).unwrap_or(i64::MAX));
    let held = &api.held;
    let count = |amount: usize| i64::try_from(amount).unwrap_or(i64::MAX);
    let open = held.connections.taken() + held.ops_connections.taken();
    api.metrics.http.connections_active.set(count(open));
    api.metrics.http.body_bytes.set(count(held.bodies.taken()));
    api.metrics.ws.connections_pending.set(count(held.pending.taken()));
    runtime.set_entries(Table::Holders, held.holders());
    let [connections, users, names] = api.context.hub.entries();
    let [messages, http, failures] = api.limits.entries();
    runtime.set_entries(Table::Connections, connections);
    runtime.set_entries(Table::Users, users);
    runtime.set_entries(Table::Names, names);
    runtime.set_entries(Table::MessageLimits, messages);
    runtime.set_entries(Table::HttpLimits, http);
    runtime.set_entries(Table::Failures, failures);
    runtime.set_entries(Table::Tokens, api.validator.tokens_known());
    if let Some(age) = api.validator.keys_age() {
        api.metrics.auth.keys_age.set(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
    }
    runtime.set_entries(Table::AuditSums, api.context.audit.sums());
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, api.metrics.render()).into_response()
}
