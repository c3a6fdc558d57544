//! The one shape of every error: `{"error":{"code","msg","details"}}`.

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
    header: Option<(HeaderName, &'static str)>,
}

impl Problem {
    /// A status and what the client is told.
    pub(crate) fn new(status: StatusCode, body: ErrorBody) -> Self {
        Self { status, body: Box::new(body), header: None }
    }

    /// Adds the header that the status asks for.
    pub(crate) fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.header = Some((name, value));
        self
    }

    /// 503: what the request needs is away for now.
    pub(crate) fn unavailable(msg: impl Into<String>) -> Self {
        let body = ErrorBody::new("unavailable", msg.into());
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body)
            .with_header(header::RETRY_AFTER, RETRY_AFTER)
    }

    /// 401, with the scheme that is wanted.
    pub(crate) fn unauthorized(code: &'static str, msg: impl Into<String>) -> Self {
        let body = ErrorBody::new(code, msg.into());
        Self::new(StatusCode::UNAUTHORIZED, body).with_header(header::WWW_AUTHENTICATE, "Bearer")
    }
}

impl From<HandlerError> for Problem {
    fn from(error: HandlerError) -> Self {
        let status = match &error {
            HandlerError::NotFound(_) => StatusCode::NOT_FOUND,
            HandlerError::Conflict(_) => StatusCode::CONFLICT,
            HandlerError::InvalidData { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            HandlerError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
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
        let body = Json(json!({ "error": { "code": code, "msg": msg, "details": details } }));
        let mut response = (self.status, body).into_response();
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response.extensions_mut().insert(ErrorCode(code));
        response
    }
}

/// The code of an error answer, for the metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct ErrorCode(pub(super) &'static str);
