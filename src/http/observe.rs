//! What every request gets, whatever becomes of it: a correlation id, a log line, its place in the
//! metrics, a span where there are traces, and the security headers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{MatchedPath, State},
    http::{Extensions, HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header},
    middleware::Next,
    response::Response,
};
use tracing::Instrument;
use uuid::Uuid;

use super::{Api, Peer, address::is_secure, guard::User, problem::Told};
use crate::{
    auth::Remote,
    metrics::Endpoint,
    traces::{Trace, answered, span_context, within},
};

pub(super) const CORRELATION_HEADER: HeaderName = HeaderName::from_static("x-correlation-id");

/// Characters of a user agent that are kept: it may lie about for as long as a connection.
const MAX_USER_AGENT: usize = 256;

/// Where a request comes from.
pub(crate) fn remote(extensions: &Extensions) -> Arc<Remote> {
    Arc::clone(extensions.get::<Arc<Remote>>().expect("every request passes `observe`"))
}

/// The client's id, or one made here: it links the lines and rows of a request.
fn correlation(headers: &HeaderMap) -> Arc<str> {
    let fits = |id: &&str| {
        (1..=64).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
    };
    let given = headers.get(CORRELATION_HEADER).and_then(|id| id.to_str().ok()).filter(fits);
    given.map_or_else(|| Uuid::new_v4().simple().to_string()[..8].into(), Into::into)
}

fn user_agent(headers: &HeaderMap) -> Option<Box<str>> {
    let text = String::from_utf8_lossy(headers.get(header::USER_AGENT)?.as_bytes());
    Some(text.chars().take(MAX_USER_AGENT).collect::<String>().into())
}

pub(super) async fn observe(
    State(api): State<Arc<Api>>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    let started = Instant::now();
    let correlation = correlation(request.headers());
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let quiet = route.as_ref().is_some_and(|it| it == "/metrics" || it.starts_with("/health"));
    let endpoint = Endpoint::new(request.method().as_str(), route.as_deref());
    let peer = request.extensions().get::<Peer>().expect("the accept loop sets the peer").0;
    let secure = is_secure(&api.config, request.headers(), peer);
    let traces = api.traces.as_ref().filter(|_| !quiet);
    let trace = traces.map(|it| it.request(&request, route.as_deref(), secure, &correlation));
    let span = tracing::info_span!(
        "request",
        request_id = &*correlation,
        method = request.method().as_str(),
        // The path without its query, which may hold a token.
        endpoint = request.uri().path(),
        // The label of its metrics: leads from a graph to the lines.
        route = endpoint.route(),
    );
    let (config, metrics) = (&api.config, &api.metrics.http);
    let remote = Remote {
        address: api.forwarding.client(config, metrics, request.headers(), peer),
        user_agent: user_agent(request.headers()),
        correlation: Arc::clone(&correlation),
        trace: trace.as_ref().map(|trace| Box::new(span_context(trace))),
    };
    request.extensions_mut().insert(Arc::new(remote));

    let in_progress = api.metrics.http.begin(&endpoint);
    let mut response = within(trace.clone(), next.run(request)).instrument(span.clone()).await;
    drop(in_progress);

    let took = started.elapsed();
    let status = response.status();
    api.metrics.http.finish(&endpoint, status.as_u16(), took);
    if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
        let code = response.extensions().get::<Told>().map_or("internal_error", |told| told.code);
        api.metrics.errors.count(code, "http");
    }
    span.in_scope(|| report(&response, trace, took, quiet));
    add_headers(response.headers_mut(), &correlation, secure);
    // Who has the connection open learns with an answer that it ends, not while it sends the next request.
    // A stranger over its budget has to connect for every further try.
    let stranger = response.extensions().get::<User>().is_none();
    let over = response.status() == StatusCode::TOO_MANY_REQUESTS && stranger;
    let leaving = api.leaving.is_cancelled();
    if over || (leaving && response.status() != StatusCode::SWITCHING_PROTOCOLS) {
        response.headers_mut().append(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Ends the span and writes the line.
fn report(response: &Response, trace: Option<Trace>, took: Duration, quiet: bool) {
    let user_id = response.extensions().get::<User>().map(|user| &*user.0.subject);
    if let Some(trace) = &trace {
        answered(trace, response.status(), user_id);
    }
    let _current = trace.map(Trace::attach);
    let (status_code, duration_ms) = (response.status().as_u16(), took.as_secs_f64() * 1000.0);
    if quiet {
        tracing::debug!(status_code, duration_ms, user_id, "request");
    } else {
        tracing::info!(status_code, duration_ms, user_id, "request");
    }
}

fn add_headers(headers: &mut HeaderMap, correlation: &str, secure: bool) {
    let correlation = HeaderValue::from_str(correlation).expect("a correlation id is plain ASCII");
    headers.insert(CORRELATION_HEADER, correlation);
    for (name, value) in [
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=()"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    if secure {
        let year = HeaderValue::from_static("max-age=31536000; includeSubDomains");
        headers.insert(header::STRICT_TRANSPORT_SECURITY, year);
    }
}
