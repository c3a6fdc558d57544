//! `/auth/backchannel-logout`: the identity provider tells of a session that ended. Its signature is the
//! guard: a provider sends one token for each session, all from one address, and waits for every answer. So
//! only tokens that are refused take from a budget, which is this route's own.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderName, HeaderValue, Request, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::{Api, Problem, audit::Noted, input, remote};
use crate::{
    auth::{AuthError, Logout, LogoutToken},
    metrics::LimitType,
    protocol::ErrorBody,
    traces,
};

/// Bytes of a form, at most: a logout token is smaller than an access token.
const MAX_BODY: usize = 16 * 1024;
/// What browsers send along. A provider is none: a page would have its visitors post here.
const OF_BROWSERS: [HeaderName; 2] = [header::ORIGIN, HeaderName::from_static("sec-fetch-site")];

pub(super) async fn logout(State(api): State<Arc<Api>>, request: Request<Body>) -> Response {
    let address = remote(request.extensions()).address;
    let noted = request.extensions().get::<Noted>().cloned();
    // Not counted: visitors of such a page may share the provider's address.
    if OF_BROWSERS.iter().any(|name| request.headers().contains_key(name)) {
        let body = ErrorBody::new("permission_denied", "This route is for identity providers");
        return Problem::new(StatusCode::FORBIDDEN, body).into_response();
    }
    let mut answer = match api.limits.backchannel.refusal(address) {
        Some(wait) => {
            api.metrics.rate_limit_hits.inc(LimitType::Http);
            Problem::too_many("Too many refused logout tokens", wait).into_response()
        }
        None => match read(&api, request).await {
            // To its end, also where the provider hangs up: a token that was not kept may come again.
            Ok(token) => traces::spawn(end(Arc::clone(&api), token, noted))
                .await
                .unwrap_or_else(|_| Problem::internal().into_response()),
            Err(problem) => {
                if problem.status().is_client_error() {
                    api.limits.backchannel.count(address);
                }
                problem.into_response()
            }
        },
    };
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// Ends what a token names.
async fn end(api: Arc<Api>, token: LogoutToken, noted: Option<Noted>) -> Response {
    let (user, kept) = api.context.cluster.log_out(&token.logout).await;
    let sid = match &token.logout {
        Logout::Session(sid) => Some(sid),
        _ => None,
    };
    if let Some(noted) = noted {
        noted.session(sid, token.subject.as_ref(), user);
    }
    match kept {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => {
            api.validator.take_again(&token);
            Problem::unavailable(error.to_string()).into_response()
        }
    }
}

/// The token of a request.
async fn read(api: &Api, request: Request<Body>) -> Result<LogoutToken, Problem> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        return Err(refused("the body is no form"));
    }
    let mut memory = input::memory(api, &request)?;
    let limit = MAX_BODY.min(api.config.max_body_bytes);
    let body = input::bytes(request.into_body(), limit, input::BODY_TIMEOUT, &mut memory).await?;
    let mut tokens = form_urlencoded::parse(&body)
        .filter_map(|(name, value)| (name == "logout_token").then_some(value));
    let (Some(token), None) = (tokens.next(), tokens.next()) else {
        return Err(refused("the form needs one logout_token"));
    };
    api.validator.logout(&token).await.map_err(|error| match error {
        AuthError::Unavailable | AuthError::TooMany(_) => Problem::unavailable(error.to_string()),
        AuthError::Expired => refused("the token is too old"),
        AuthError::Invalid(cause) => refused(cause),
    })
}

/// Whatever is wrong, the sender is told no more: who forges tokens is to learn nothing.
fn refused(cause: &'static str) -> Problem {
    tracing::warn!(cause, "a logout token was refused");
    let body = ErrorBody::new("invalid_request", "This is no valid logout request");
    Problem::new(StatusCode::BAD_REQUEST, body)
}
