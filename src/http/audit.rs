//! Records what requests did: every change that was tried, every denial, every token that was refused;
//! reads where `AUDIT_READS` says so. Room for the row is taken before anything is done. What a limit refused was not looked at, and is not recorded.

use std::{
    borrow::Cow,
    mem,
    panic::resume_unwind,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use axum::{
    body::{Body, HttpBody},
    extract::{MatchedPath, State},
    http::{Method, Request, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::Serializer;
use serde_json::json;

use super::{Api, Problem, input::Parameter, problem::Told, remote};
use crate::{
    audit::{self, Audit, Cause, Event, Recorded, Reserved, UNKNOWN, path_without_secrets},
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
    body: OnceLock<Recorded>,
    session: OnceLock<Recorded>,
    parameters: OnceLock<&'static [Parameter]>,
    /// Nobody waits for the answer any more.
    left: AtomicBool,
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
            self.0.session.get_or_init(|| Recorded::own(json!({ "sid": sid })));
        }
    }

    /// Who somebody without a token says to be.
    pub(super) fn claim(&self, username: &str) {
        self.0.claimed.get_or_init(|| username.to_owned());
    }

    /// What is asked.
    pub(super) fn body(&self, body: Recorded) {
        self.0.body.get_or_init(|| body);
    }

    /// What its query may say.
    pub(super) fn parameters(&self, parameters: &'static [Parameter]) {
        self.0.parameters.get_or_init(|| parameters);
    }
}

/// Notes that nobody waits any more, where it is dropped before the answer.
struct Waits(Option<Noted>);

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(noted) = &self.0 {
            noted.0.left.store(true, Ordering::Relaxed);
        }
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
        begun: None,
        reserved: Reserved::default(),
    };
    let arrived = Instant::now();
    if recording.always_belongs() {
        // Before anything is done: what is done has its row, and what is dropped until then has none.
        let (audit, data) = (&recording.audit, data_bytes(&request));
        match audit.reserve(data, recording.seems_known(), arrived + audit::ROOM_PATIENCE).await {
            Some(reserved) => recording.reserved = reserved,
            None => {
                audit.count_refused();
                return Problem::overloaded("The audit trail is slow: nothing was done")
                    .into_response();
            }
        }
    }
    recording.begun = Some(arrived);
    let noted = recording.noted.clone();
    request.extensions_mut().insert(noted.clone());
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
    let mut waits = Waits(Some(noted));
    // In a task of its own: a change goes on when its client leaves, and its row is to say how it ended.
    let change = api.context.changes.track_future(answer);
    let ended = traces::spawn(change).await;
    waits.0 = None;
    match ended {
        Ok(response) => response,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // Only the end of the runtime cancels it, and nobody waits then.
            Err(_) => Problem::unavailable("the server stops").into_response(),
        },
    }
}

/// What was asked: the body, or the query where there is none. Of a login or a logout nothing but the name
/// that was given, or the session: all else there may be a password or a token.
fn data(route: &str, query: Option<&str>, notes: &Notes) -> Option<Recorded> {
    if let Some(session) = notes.session.get() {
        return Some(session.clone());
    }
    if route.starts_with("/auth/") {
        let name = notes.claimed.get()?;
        return Some(Recorded::document(&json!({ "username": name }).to_string()));
    }
    notes.body.get().cloned().or_else(|| {
        let known = notes.parameters.get().copied().unwrap_or_default();
        query.map(|query| parameters(query, known))
    })
}

/// A query with the values of the parameters that its route knows. One that stands twice is there twice.
fn parameters(query: &str, known: &[Parameter]) -> Recorded {
    let pairs = form_urlencoded::parse(query.as_bytes()).map(|(name, value)| {
        let is_known = known.iter().any(|parameter| parameter.0 == name);
        (name, if is_known { value } else { UNKNOWN.into() })
    });
    let mut json = serde_json::Serializer::new(Vec::new());
    json.collect_map(pairs).expect("texts are written as JSON");
    Recorded::document(&String::from_utf8_lossy(&json.into_inner()))
}

/// Bytes of what was asked, as far as they are known before it is read.
fn data_bytes(request: &Request<Body>) -> usize {
    let body = request.body().size_hint().exact().unwrap_or(u64::MAX);
    let query = request.uri().query().map_or(0, str::len);
    let data = usize::try_from(body).unwrap_or(usize::MAX).max(query);
    data.saturating_add(request.uri().path().len())
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
    /// Room for the row.
    reserved: Reserved,
}

impl Recording {
    fn is_read(&self) -> bool {
        matches!(self.method, Method::GET | Method::HEAD | Method::OPTIONS)
    }

    fn route(&self) -> &str {
        self.route.as_ref().map_or("unmatched", MatchedPath::as_str)
    }

    /// Whether a user may be behind it. Of `/auth` a body is read before anybody is known.
    fn seems_known(&self) -> bool {
        self.presented && !self.route().starts_with("/auth/")
    }

    /// Whether it is recorded, whatever its status but 429.
    fn always_belongs(&self) -> bool {
        !self.is_read() || self.audit.has_reads()
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
            _ => self.always_belongs(),
        };
        if !belongs {
            return;
        }
        let notes = &self.noted.0;
        let error = match notes.left.load(Ordering::Relaxed) {
            true if !self.is_read() => Some(late(error.as_deref())),
            _ => error,
        };
        self.audit.record_in(
            mem::take(&mut self.reserved),
            Event {
                user: notes.user.get().cloned(),
                claimed: notes.claimed.get().cloned(),
                remote: Arc::clone(&self.remote),
                req_id: None,
                action: self.method.as_str().into(),
                resource: path_without_secrets(self.uri.path()).into(),
                route: self.route().into(),
                outcome,
                data: data(self.route(), self.uri.query(), notes),
                status: status.as_u16().into(),
                error,
                took: Some(begun.elapsed()),
                cause: Cause::Other,
            },
        );
    }
}

/// What the row of a change says that went on without its client.
fn late(error: Option<&str>) -> Cow<'static, str> {
    const LATE: &str = "The client had left, or was told `timeout`";
    match error {
        None => format!("{LATE}, then it was done").into(),
        Some(error) => format!("{LATE}, then: {error}").into(),
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if thread::panicking() {
            return self.end(StatusCode::INTERNAL_SERVER_ERROR, Some("a bug".into()));
        }
        if !self.is_read() {
            // A change goes on without its client: only the end of the server drops it.
            return self.end(StatusCode::SERVICE_UNAVAILABLE, Some(audit::CUT_OFF.into()));
        }
        // The status that proxies log for this.
        let gone = StatusCode::from_u16(499).expect("a status has three digits");
        self.end(gone, Some("nobody waited for the answer".into()));
    }
}

#[cfg(test)]
mod tests {
    use super::{super::input::Kind, *};

    fn shown(route: &str, query: &str, notes: &Notes) -> Option<serde_json::Value> {
        data(route, Some(query), notes).map(|data| serde_json::from_str(&data).unwrap())
    }

    #[test]
    fn of_a_login_nothing_but_the_name_is_recorded_whatever_came() {
        let notes = Notes::default();
        notes.body.set(Recorded::document(r#"{"passwd":"hush","hint":"hush"}"#)).unwrap();
        for route in ["/auth/login", "/auth/refresh", "/auth/logout", "/auth/backchannel-logout"] {
            assert_eq!(shown(route, "password=hush&x=hush", &notes), None, "{route}");
        }
        notes.claimed.set("ann".to_owned()).unwrap();
        let name = Some(json!({ "username": "ann" }));
        assert_eq!(shown("/auth/login", "password=hush", &notes), name);
    }

    #[test]
    fn of_a_query_what_the_route_does_not_know_is_recorded_by_name_alone() {
        let notes = Notes::default();
        let query = "name=a+b&name=&hint=hush&otp=hush&page=1";
        let unknown = json!({ "name": "…", "name#2": "…", "hint": "…", "otp": "***", "page": "…" });
        assert_eq!(shown("/authors", query, &notes), Some(unknown));
        const KNOWN: &[Parameter] =
            &[Parameter("name", "name", Kind::Text), Parameter("page", "page", Kind::Number)];
        notes.parameters.set(KNOWN).unwrap();
        let known = json!({ "name": "a b", "name#2": "", "hint": "…", "otp": "***", "page": "1" });
        assert_eq!(shown("/authors", query, &notes), Some(known));
    }
}
