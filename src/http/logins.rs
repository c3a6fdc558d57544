//! `/auth/login`, `/auth/refresh`, `/auth/logout`: passwords and refresh tokens, on their way to the
//! identity provider. No error and no log line repeats them.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{Request, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::{Api, Problem, audit::Noted, input, remote};
use crate::{
    auth::{self, LoginError, Logins, Logout, SessionOf, Tokens},
    handlers::HandlerError,
    metrics::AuthOutcome,
    protocol::ErrorBody,
    traces,
};

/// Bytes of a text that is passed on, at most.
const MAX_TEXT: usize = 16 * 1024;

/// Bytes of a body here, at most.
const MAX_BODY: usize = 32 * 1024;

fn max_body(api: &Api) -> usize {
    MAX_BODY.min(api.config.max_body_bytes)
}

/// A text that no error repeats, as those of strings would.
struct Hidden(String);

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) if (1..=MAX_TEXT).contains(&text.len()) => Ok(Self(text)),
            _ => Err(de::Error::custom("a text of 1 to 16384 bytes is needed")),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Credentials {
    username: Hidden,
    password: Hidden,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefreshToken {
    refresh_token: Hidden,
}

pub(super) async fn login(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<Response, Problem> {
    let logins = logins(&api)?;
    let remote = remote(request.extensions());
    let noted = request.extensions().get::<Noted>().cloned();
    let Credentials { username: Hidden(username), password: Hidden(password) } =
        input::unrecorded_body(&api, request, max_body(&api)).await?;
    if let Some(noted) = noted {
        noted.claim(&username);
    }
    // A database that cannot store them fails on these, and five failures open the circuit breaker.
    if username.contains(char::is_control) {
        let msg = "a name has no control characters".into();
        return Err(HandlerError::InvalidData { path: "username".into(), msg }.into());
    }
    let attempts = &api.metrics.auth.attempts;
    match logins.login(&username, &password, &remote.correlation).await {
        Ok(tokens) => {
            attempts.inc(AuthOutcome::Success);
            Ok(answer(tokens))
        }
        Err(error) => {
            if error == LoginError::Refused {
                attempts.inc(AuthOutcome::Failed);
                api.limits.failures.count(remote.address);
            }
            // A user who is locked out gets the same words, or guessing would be rewarded.
            Err(refused(error, "The username or the password is wrong"))
        }
    }
}

pub(super) async fn refresh(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<Response, Problem> {
    let logins = logins(&api)?;
    let correlation = Arc::clone(&remote(request.extensions()).correlation);
    let noted = request.extensions().get::<Noted>().cloned();
    let RefreshToken { refresh_token: Hidden(token) } =
        input::unrecorded_body(&api, request, max_body(&api)).await?;
    // Not a failed authentication of the address: nobody guesses one of these, and a session that
    // ended overnight is no attack.
    let granted = logins.refresh(&token, &correlation).await;
    let tokens = granted.map_err(|error| refused(error, ENDED))?;
    // Whose they are stands in the access token, which is signed.
    if let (Some(noted), Some(user)) = (noted, api.validator.bearer(tokens.access()).await) {
        noted.session(user.session.as_ref(), Some(&user.subject), None);
    }
    Ok(answer(tokens))
}

pub(super) async fn logout(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<StatusCode, Problem> {
    logins(&api)?;
    let correlation = Arc::clone(&remote(request.extensions()).correlation);
    let noted = request.extensions().get::<Noted>().cloned();
    let authorization = request.headers().get(header::AUTHORIZATION).cloned();
    let RefreshToken { refresh_token: Hidden(token) } =
        input::unrecorded_body(&api, request, max_body(&api)).await?;
    // In a task of its own: a page that logs out is often gone before the answer, and a handler ends
    // with its client.
    let ending = async move {
        let access = authorization.as_ref().and_then(|it| it.to_str().ok()).and_then(auth::bearer);
        let ended = logins(&api)?.logout(&token, access, &api.validator, &correlation).await;
        if let Some(SessionOf { sid, subject }) = ended.map_err(|error| refused(error, ENDED))? {
            let logout = Logout::Session(Arc::clone(&sid));
            let (user, kept) = api.context.cluster.log_out(&logout).await;
            if let Some(noted) = noted {
                noted.session(Some(&sid), subject.as_ref(), user);
            }
            kept.map_err(|error| Problem::unavailable(error.to_string()))?;
        }
        Ok(StatusCode::NO_CONTENT)
    };
    traces::spawn(ending).await.unwrap_or_else(|_| Err(Problem::internal()))
}

const ENDED: &str = "The refresh token is not valid, or its session has ended";

fn logins(api: &Api) -> Result<&Logins, Problem> {
    api.logins.as_ref().ok_or_else(|| {
        let msg = "No identity provider is configured, so nobody can log in: \
                   `switchboard token` issues development tokens";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, ErrorBody::new("unavailable", msg))
    })
}

/// Tokens are for whoever asked, and no cache on the way (RFC 6749, 5.1).
fn answer(tokens: Tokens) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(tokens)).into_response()
}

fn refused(error: LoginError, msg: &'static str) -> Problem {
    match error {
        LoginError::Refused => Problem::unauthorized("unauthorized", msg),
        LoginError::Unavailable => Problem::unavailable(error.to_string()),
    }
}
