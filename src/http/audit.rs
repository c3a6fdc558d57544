//! Records what requests did: every change that was tried, every denial, every token that was refused;
//! reads where `AUDIT_READS` says so. What a limit refused was not looked at, and is not recorded.

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
    thread,
    time::Instant,
};

use axum::{
    body::Body,
    extract::State,
    http::{Method, Request, StatusCode, header},
    middleware::Next,
    response::Response,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Api, guard::User, problem::Told, remote};
use crate::{
    audit::{self, Audit, Event},
    auth::{Identity, Remote},
    metrics::AuditOutcome,
};

/// The body of a request, for its audit row. Noted by whoever reads it.
#[derive(Debug, Clone, Default)]
pub(super) struct Asked(Arc<OnceLock<Box<str>>>);

impl Asked {
    pub(super) fn note(&self, json: &str) {
        self.0.get_or_init(|| audit::taken_along(json));
    }
}

pub(super) async fn audit(
    State(api): State<Arc<Api>>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    if !api.context.audit.is_on() {
        return next.run(request).await;
    }
    let asked = Asked::default();
    if let Some(query) = request.uri().query() {
        asked.note(&parameters(query));
    }
    let mut recording = Recording {
        audit: Arc::clone(&api.context.audit),
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        remote: remote(request.extensions()),
        presented: request.headers().contains_key(header::AUTHORIZATION),
        asked: asked.clone(),
        begun: Some(Instant::now()),
    };
    request.extensions_mut().insert(asked);
    let response = next.run(request).await;
    let extensions = response.extensions();
    let user = extensions.get::<User>().map(|user| Arc::clone(&user.0));
    let told = extensions.get::<Told>().map(|told| told.msg.clone());
    recording.end(response.status(), user, told);
    response
}

fn parameters(query: &str) -> String {
    let pairs = form_urlencoded::parse(query.as_bytes());
    let members: Map<_, _> =
        pairs.map(|(name, value)| (name.into_owned(), Value::from(value))).collect();
    Value::from(members).to_string()
}

/// A request until it is recorded. One whose client left is dropped with it, and was tried nevertheless.
struct Recording {
    audit: Arc<Audit>,
    method: Method,
    path: String,
    remote: Arc<Remote>,
    /// A token came along.
    presented: bool,
    asked: Asked,
    /// Taken by the end.
    begun: Option<Instant>,
}

impl Recording {
    fn end(
        &mut self,
        status: StatusCode,
        user: Option<Arc<Identity>>,
        error: Option<Cow<'static, str>>,
    ) {
        let Some(begun) = self.begun.take() else { return };
        let outcome = match status {
            StatusCode::FORBIDDEN => AuditOutcome::PermissionDenied,
            status if status.is_success() => AuditOutcome::Success,
            _ => AuditOutcome::Error,
        };
        let read = matches!(self.method, Method::GET | Method::HEAD);
        let belongs = match status {
            StatusCode::TOO_MANY_REQUESTS => false,
            StatusCode::FORBIDDEN => true,
            StatusCode::UNAUTHORIZED if self.presented => true,
            _ => !read || self.audit.has_reads(),
        };
        if !belongs || self.method == Method::OPTIONS {
            return;
        }
        let data = self.asked.0.get().cloned();
        self.audit.record(Event {
            claimed: data.as_deref().filter(|_| user.is_none()).and_then(username),
            user,
            remote: Arc::clone(&self.remote),
            req_id: None,
            action: self.method.to_string(),
            resource: self.path.clone(),
            outcome,
            data,
            status: status.as_u16().into(),
            error,
            took: Some(begun.elapsed()),
        });
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if thread::panicking() {
            return self.end(StatusCode::INTERNAL_SERVER_ERROR, None, Some("a bug".into()));
        }
        // The status that proxies log for this.
        let gone = StatusCode::from_u16(499).expect("a status has three digits");
        self.end(gone, None, Some("the client left before the answer".into()));
    }
}

/// Who somebody without a token says to be, as in a login.
fn username(data: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Claim {
        username: String,
    }
    serde_json::from_str(data).ok().map(|Claim { username }| username)
}
