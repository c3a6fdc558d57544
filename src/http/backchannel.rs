//! `/auth/backchannel-logout`: the identity provider tells of a session that ended. Its signature is the
//! guard: the route has no budget, since a provider sends one token for each session, all from one
//! address, and waits for every answer.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Request, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::{Api, Problem, input, remote};
use crate::{
    auth::{AuthError, Logout},
    protocol::ErrorBody,
};

pub(super) async fn logout(State(api): State<Arc<Api>>, request: Request<Body>) -> Response {
    let address = remote(request.extensions()).address;
    let mut answer = match read(&api, request).await {
        Ok(logout) => {
            api.context.cluster.log_out(&logout);
            StatusCode::OK.into_response()
        }
        Err(problem) => {
            if problem.status() == StatusCode::BAD_REQUEST {
                api.limits.failures.count(address);
            }
            problem.into_response()
        }
    };
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

async fn read(api: &Api, request: Request<Body>) -> Result<Logout, Problem> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        return Err(refused("the body is no form"));
    }
    let body =
        input::bytes(request.into_body(), api.config.max_body_bytes, input::BODY_TIMEOUT).await?;
    let mut tokens = form_urlencoded::parse(&body)
        .filter_map(|(name, value)| (name == "logout_token").then_some(value));
    let (Some(token), None) = (tokens.next(), tokens.next()) else {
        return Err(refused("the form needs one logout_token"));
    };
    api.validator.logout(&token).await.map_err(|error| match error {
        AuthError::Unavailable => Problem::unavailable(error.to_string()),
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
