//! Who asks, and how often: the token is checked and a budget taken before a route is entered.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{Api, Peer, Problem};
use crate::{
    auth::{self, AuthError, Identity},
    handlers::Caller,
    limits::{HttpBudget, HttpKey},
    metrics::{AuthOutcome, LimitType},
    protocol::ErrorBody,
};

pub(super) const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
pub(super) const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
pub(super) const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// What the guard found out about the user, for the route.
type Found = Result<Arc<Identity>, AuthError>;

/// The user of a response, for its log line.
#[derive(Clone)]
pub(super) struct UserId(pub(super) Arc<str>);

pub(super) async fn guard(
    State(api): State<Arc<Api>>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    let found = authenticate(&api, request.headers()).await;
    let key = match &found {
        Ok(identity) => HttpKey::User(Arc::clone(&identity.subject)),
        Err(_) => HttpKey::Address(client_address(&api, &request)),
    };
    let user = found.as_ref().ok().map(|identity| UserId(Arc::clone(&identity.subject)));
    let budget = api.limits.http(&key);
    let mut response = match budget.and_then(|budget| budget.retry_after) {
        Some(wait) => too_many(&api, wait),
        None => {
            request.extensions_mut().insert(found);
            next.run(request).await
        }
    };
    if let Some(budget) = budget {
        add_headers(response.headers_mut(), budget);
    }
    if let Some(user) = user {
        response.extensions_mut().insert(user);
    }
    response
}

/// The caller of a request, who must have `role`. To be asked before any input is read.
pub(super) fn caller(request: &Request<Body>, role: &'static str) -> Result<Caller, Problem> {
    let found = request.extensions().get::<Found>().expect("the route is behind the guard");
    let identity = found.clone().map_err(|error| match error {
        AuthError::Expired => Problem::unauthorized("token_expired", error.to_string()),
        AuthError::Invalid(msg) => Problem::unauthorized("unauthorized", msg),
        AuthError::Unavailable => Problem::unavailable(error.to_string()),
    })?;
    if !identity.has(&[role]) {
        let body = ErrorBody::new("permission_denied", "A role is missing")
            .with(json!({ "required_roles": [role] }));
        return Err(Problem::new(StatusCode::FORBIDDEN, body));
    }
    Ok(Caller { identity, connection: None })
}

async fn authenticate(api: &Api, headers: &HeaderMap) -> Found {
    let Some(authorization) = headers.get(header::AUTHORIZATION) else {
        return Err(AuthError::Invalid("a token is needed: Authorization: Bearer <jwt>"));
    };
    let token = authorization.to_str().ok().and_then(auth::bearer);
    let found = match token {
        Some(token) => api.validator.validate(token).await,
        None => {
            Err(AuthError::Invalid("the Authorization header must have the form `Bearer <jwt>`"))
        }
    };
    api.metrics.auth.attempts.inc(match &found {
        Ok(_) => AuthOutcome::Success,
        Err(AuthError::Expired) => AuthOutcome::Expired,
        Err(AuthError::Invalid(_)) => AuthOutcome::Failed,
        Err(AuthError::Unavailable) => return found.map(Arc::new),
    });
    found.map(Arc::new)
}

/// The client's address: the last one in `X-Forwarded-For` that is not a trusted proxy's, counted from
/// the right, where our own proxies wrote.
fn client_address(api: &Api, request: &Request<Body>) -> IpAddr {
    let trusted =
        |address: IpAddr| api.config.trusted_proxies.iter().any(|net| net.contains(address));
    let peer = request.extensions().get::<Peer>().expect("the accept loop sets the peer").0;
    let forwarded = request.headers().get_all("x-forwarded-for");
    let hops: Vec<_> = forwarded
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|hop| hop.trim().parse::<IpAddr>())
        .collect();
    let mut client = peer;
    for hop in hops.into_iter().rev() {
        let (true, Ok(hop)) = (trusted(client), hop) else { break };
        client = hop.to_canonical();
    }
    client
}

fn too_many(api: &Api, wait: Duration) -> Response {
    api.metrics.rate_limit_hits.inc(LimitType::Http);
    let retry_after_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
    let body = ErrorBody::new("rate_limit_exceeded", "Too many requests")
        .with(json!({ "retry_after_ms": retry_after_ms }));
    let mut response = Problem::new(StatusCode::TOO_MANY_REQUESTS, body).into_response();
    response.headers_mut().insert(header::RETRY_AFTER, seconds(wait));
    response
}

fn add_headers(headers: &mut HeaderMap, budget: HttpBudget) {
    headers.insert(LIMIT, HeaderValue::from(budget.limit));
    headers.insert(REMAINING, HeaderValue::from(budget.remaining));
    headers.insert(RESET, seconds(budget.reset));
}

/// Whole seconds, rounded up.
fn seconds(time: Duration) -> HeaderValue {
    HeaderValue::from(time.as_secs() + u64::from(time.subsec_nanos() > 0))
}
