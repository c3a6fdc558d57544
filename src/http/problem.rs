//! The one shape of every error: `{"error":{"code","msg","details"}}`.

use std::{borrow::Cow, time::Duration};

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::{handlers::HandlerError, protocol::ErrorBody};

/// Seconds after which a client may ask again for what was not available.
const RETRY_AFTER: &str = "5";

/// An error answer.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    body: Box<ErrorBody>,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// A status and what the client is told.
    pub(crate) fn new(status: StatusCode, body: ErrorBody) -> Self {
        Self { status, body: Box::new(body), header: None }
    }

    /// A panic: the hook has logged it.
    pub(super) fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorBody::internal())
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// Adds the header that the status asks for.
    pub(crate) fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.header = Some((name, HeaderValue::from_static(value)));
        self
    }

    /// 503: what the request needs is away for now.
    pub(crate) fn unavailable(msg: impl Into<String>) -> Self {
        let body = ErrorBody::new("unavailable", msg.into());
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body)
            .with_header(header::RETRY_AFTER, RETRY_AFTER)
    }

    /// 503: it was not begun.
    pub(crate) fn overloaded(msg: &'static str) -> Self {
        let body = ErrorBody::new("overloaded", msg);
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body)
            .with_header(header::RETRY_AFTER, RETRY_AFTER)
    }

    /// 429, with the time to wait.
    pub(crate) fn too_many(msg: &'static str, wait: Duration) -> Self {
        let retry_after_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
        let body = ErrorBody::new("rate_limit_exceeded", msg)
            .with(json!({ "retry_after_ms": retry_after_ms }));
        let header = Some((header::RETRY_AFTER, seconds(wait)));
        Self { header, ..Self::new(StatusCode::TOO_MANY_REQUESTS, body) }
    }

    /// 401, with the scheme that is wanted.
    pub(crate) fn unauthorized(code: &'static str, msg: impl Into<String>) -> Self {
        let body = ErrorBody::new(code, msg.into());
        Self::new(StatusCode::UNAUTHORIZED, body).with_header(header::WWW_AUTHENTICATE, "Bearer")
    }
}

/// Whole seconds, rounded up.
pub(super) fn seconds(time: Duration) -> HeaderValue {
    HeaderValue::from(time.as_secs() + u64::from(time.subsec_nanos() > 0))
}

impl From<HandlerError> for Problem {
    fn from(error: HandlerError) -> Self {
        let status = match &error {
            HandlerError::NotFound(_) => StatusCode::NOT_FOUND,
            HandlerError::Conflict(_) => StatusCode::CONFLICT,
            HandlerError::InvalidData { .. } | HandlerError::TooManyRows(_) => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            HandlerError::Unavailable(_) | HandlerError::Unknown(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            HandlerError::OutOfIds(_) => StatusCode::INSUFFICIENT_STORAGE,
            HandlerError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            // The request's span adds which one.
            tracing::error!(%error, "a request failed");
        }
        Self::new(status, error.body())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let ErrorBody { code, msg, details } = *self.body;
        let body = Json(json!({ "error": { "code": code, "msg": &msg, "details": details } }));
        let mut response = (self.status, body).into_response();
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response.extensions_mut().insert(Told { code, msg });
        response
    }
}

/// What an error answer says, for the metrics and the audit trail.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) code: &'static str,
    pub(super) msg: Cow<'static, str>,
}
