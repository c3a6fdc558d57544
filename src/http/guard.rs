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

use super::{Api, Problem, audit::Noted, problem::seconds, remote};
use crate::{
    auth::{self, AuthError, Identity},
    handlers::Caller,
    limits::{HttpBudget, HttpKey, Unavailable},
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
pub(super) struct User(pub(super) Arc<Identity>);

/// For the routes of clients, whose limit all nodes share.
pub(super) async fn clients(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    guard(&api, Whose::Clients, request, next).await
}

/// For the routes of operators, whose limit is this node's own: they are needed while Redis is away.
pub(super) async fn operators(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    guard(&api, Whose::Operators, request, next).await
}

/// Whose routes are asked for.
enum Whose {
    Clients,
    Operators,
}

async fn guard(api: &Api, whose: Whose, mut request: Request<Body>, next: Next) -> Response {
    let address = remote(request.extensions()).address;
    let found = match request.headers().get(header::AUTHORIZATION) {
        Some(authorization) => authenticate(api, authorization, address).await,
        // No attempt, so nothing that could have failed.
        None => Err(AuthError::Invalid("a token is needed: Authorization: Bearer <jwt>")),
    };
    let refusal = match &found {
        Err(AuthError::TooMany(wait)) => Some(*wait),
        _ => None,
    };
    let key = match &found {
        Ok(identity) => HttpKey::User(Arc::clone(&identity.subject)),
        Err(_) => HttpKey::of(address),
    };
    let user = found.as_ref().ok().map(|identity| User(Arc::clone(identity)));
    if let (Some(noted), Some(user)) = (request.extensions().get::<Noted>(), &user) {
        noted.user(&user.0);
    }
    request.extensions_mut().insert(found);
    let budget = match whose {
        Whose::Clients => api.limits.http(&key).await,
        Whose::Operators => Ok(api.limits.operators(&key)),
    };
    let mut response = within_limits(api, budget, refusal, request, next).await;
    if let Some(user) = user {
        response.extensions_mut().insert(user);
    }
    response
}

/// For routes without a token, such as the login: a header that came along is not looked at.
pub(super) async fn by_address(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let address = remote(request.extensions()).address;
    let refusal = api.limits.failures.refusal(address);
    let budget = api.limits.http(&HttpKey::of(address)).await;
    within_limits(&api, budget, refusal, request, next).await
}

/// Goes on with a request for which there is a budget. It was taken also where there is another reason to refuse.
async fn within_limits(
    api: &Api,
    budget: Result<Option<HttpBudget>, Unavailable>,
    refusal: Option<Duration>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let Ok(budget) = budget else {
        return Problem::unavailable("Limits cannot be checked now").into_response();
    };
    let wait = refusal.or_else(|| budget.and_then(|budget| budget.retry_after));
    let mut response = match wait {
        Some(wait) => too_many(api, wait),
        None => next.run(request).await,
    };
    if let Some(budget) = budget {
        add_headers(response.headers_mut(), budget);
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
        AuthError::TooMany(wait) => Problem::too_many("Too many failed authentications", wait),
    })?;
    if !identity.has(&[role]) {
        let body = ErrorBody::new("permission_denied", "A role is missing")
            .with(json!({ "required_roles": [role] }));
        return Err(Problem::new(StatusCode::FORBIDDEN, body));
    }
    Ok(Caller { identity, connection: None, remote: remote(request.extensions()) })
}

async fn authenticate(api: &Api, authorization: &HeaderValue, address: IpAddr) -> Found {
    let token = authorization.to_str().ok().and_then(auth::bearer);
    let found = match token {
        Some(token) => {
            api.validator.validate(token, |token| api.limits.refusal(address, token)).await
        }
        None => match api.limits.failures.refusal(address) {
            Some(wait) => Err(AuthError::TooMany(wait)),
            None => Err(AuthError::Invalid(
                "the Authorization header must have the form `Bearer <jwt>`",
            )),
        },
    };
    let attempts = &api.metrics.auth.attempts;
    match &found {
        Ok(_) => attempts.inc(AuthOutcome::Success),
        // It was good once, so nobody guesses: this is how a client finds out that it needs another.
        Err(AuthError::Expired) => {
            attempts.inc(AuthOutcome::Expired);
            api.limits.refusals.count(address);
        }
        Err(AuthError::Invalid(_)) => {
            attempts.inc(AuthOutcome::Failed);
            api.limits.failures.count(address);
        }
        Err(AuthError::Unavailable | AuthError::TooMany(_)) => {}
    }
    found
}

fn too_many(api: &Api, wait: Duration) -> Response {
    api.metrics.rate_limit_hits.inc(LimitType::Http);
    Problem::too_many("Too many requests", wait).into_response()
}

fn add_headers(headers: &mut HeaderMap, budget: HttpBudget) {
    headers.insert(LIMIT, HeaderValue::from(budget.limit));
    headers.insert(REMAINING, HeaderValue::from(budget.remaining));
    headers.insert(RESET, seconds(budget.reset));
}
