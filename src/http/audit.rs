//! Records what requests did: every change that was tried, every denial, every token that was refused;
//! reads where `AUDIT_READS` says so. What a limit refused was not looked at, and is not recorded.

use std::{
    borrow::Cow,
    panic::resume_unwind,
    sync::{Arc, OnceLock},
    thread,
    time::Instant,
};

use axum::{
    body::Body,
    extract::{MatchedPath, State},
    http::{Method, Request, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{Api, Problem, problem::Told, remote};
use crate::{
    audit::{self, Audit, Cause, Event},
    auth::{Identity, Remote},
    metrics::AuditOutcome,
    traces,
};

/// What is found out about a request on its way, for its audit row.
#[derive(Debug, Clone, Default)]
pub(super) struct Noted(Arc<Notes>);

#[derive(Debug, Default)]
struct Notes {
    user: OnceLock<Arc<Identity>>,
    claimed: OnceLock<String>,
    body: OnceLock<Box<str>>,
    session: OnceLock<Box<str>>,
}

impl Noted {
    /// Who asks.
    pub(super) fn user(&self, user: &Arc<Identity>) {
        self.0.user.get_or_init(|| Arc::clone(user));
    }

    /// Whose session a request refreshes or ends: the user as a connection knows it, or else by `sub` alone.
    pub(super) fn session(
        &self,
        sid: Option<&Arc<str>>,
        subject: Option<&Arc<str>>,
        known: Option<Identity>,
    ) {
        let by_subject = || {
            subject.map(|subject| Identity {
                subject: Arc::clone(subject),
                issuer: "".into(),
                session: None,
                username: Arc::clone(subject),
                roles: Arc::default(),
                issued_at: 0,
                expires_at: 0,
            })
        };
        if let Some(user) = known.or_else(by_subject) {
            self.user(&Arc::new(user));
        }
        if let Some(sid) = sid {
            self.0.session.get_or_init(|| json!({ "sid": sid }).to_string().into());
        }
    }

    /// Who somebody without a token says to be.
    pub(super) fn claim(&self, username: &str) {
        self.0.claimed.get_or_init(|| username.to_owned());
    }

    /// What is asked.
    pub(super) fn body(&self, json: &str) {
        self.0.body.get_or_init(|| audit::taken_along(json));
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
    let mut recording = Recording {
        audit: Arc::clone(&api.context.audit),
        method: request.method().clone(),
        uri: request.uri().clone(),
        route: request.extensions().get().cloned(),
        remote: remote(request.extensions()),
        presented: request.headers().contains_key(header::AUTHORIZATION),
        noted: Noted::default(),
        begun: Some(Instant::now()),
    };
    request.extensions_mut().insert(recording.noted.clone());
    let is_read = recording.is_read();
    let answer = async move {
        let response = next.run(request).await;
        let told = response.extensions().get::<Told>().map(|told| told.msg.clone());
        recording.end(response.status(), told);
        response
    };
    if is_read {
        return answer.await;
    }
    // In a task of its own: a change goes on when its client leaves, and its row is to say how it ended.
    match traces::spawn(answer).await {
        Ok(response) => response,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // Only the end of the runtime cancels it, and nobody waits then.
            Err(_) => Problem::unavailable("the server stops").into_response(),
        },
    }
}

fn parameters(query: &str) -> String {
    let pairs = form_urlencoded::parse(query.as_bytes());
    let members: Map<_, _> =
        pairs.map(|(name, value)| (name.into_owned(), Value::from(value))).collect();
    Value::from(members).to_string()
}

/// A request until it is recorded.
struct Recording {
    audit: Arc<Audit>,
    method: Method,
    uri: Uri,
    /// None where no route matched, which this is not laid around.
    route: Option<MatchedPath>,
    remote: Arc<Remote>,
    /// A token came along.
    presented: bool,
    noted: Noted,
    /// Taken by the end.
    begun: Option<Instant>,
}

impl Recording {
    fn is_read(&self) -> bool {
        matches!(self.method, Method::GET | Method::HEAD | Method::OPTIONS)
    }

    fn end(&mut self, status: StatusCode, error: Option<Cow<'static, str>>) {
        let Some(begun) = self.begun.take() else { return };
        let outcome = match status {
            StatusCode::FORBIDDEN => AuditOutcome::PermissionDenied,
            status if status.is_success() => AuditOutcome::Success,
            _ => AuditOutcome::Error,
        };
        let belongs = match status {
            StatusCode::TOO_MANY_REQUESTS => false,
            StatusCode::FORBIDDEN => true,
            StatusCode::UNAUTHORIZED if self.presented => true,
            _ => !self.is_read() || self.audit.has_reads(),
        };
        if !belongs {
            return;
        }
        let notes = &self.noted.0;
        let query = self.uri.query().map(|query| audit::taken_along(&parameters(query)));
        self.audit.record(Event {
            user: notes.user.get().cloned(),
            claimed: notes.claimed.get().cloned(),
            remote: Arc::clone(&self.remote),
            req_id: None,
            action: self.method.as_str().into(),
            resource: self.uri.path().into(),
            route: self.route.as_ref().map_or("unmatched", MatchedPath::as_str).into(),
            outcome,
            data: notes.session.get().or_else(|| notes.body.get()).cloned().or(query),
            status: status.as_u16().into(),
            error,
            took: Some(begun.elapsed()),
            cause: Cause::Other,
        });
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if thread::panicking() {
            return self.end(StatusCode::INTERNAL_SERVER_ERROR, Some("a bug".into()));
        }
        // The status that proxies log for this.
        let gone = StatusCode::from_u16(499).expect("a status has three digits");
        self.end(gone, Some("nobody waited for the answer".into()));
    }
}
