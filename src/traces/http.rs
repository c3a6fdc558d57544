//! Spans of HTTP, requests that come in and calls that go out, and the `traceparent` of both.

use hyper::{HeaderMap, Method, Request, StatusCode};
use opentelemetry::{
    KeyValue,
    propagation::TextMapPropagator as _,
    trace::{SpanBuilder, SpanKind, Status, TraceContextExt as _},
};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_sdk::propagation::TraceContextPropagator;

use super::{Trace, Traces, span_context};

/// Bytes of a text of the client that a span has at most: spans wait in memory.
const MAX_TEXT: usize = 512;

const METHODS: &[Method] = &[
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::PATCH,
    Method::DELETE,
    Method::OPTIONS,
];

impl Traces {
    /// Begins the span of a request, below the one that its headers name. It ends with [`answered`], or
    /// when the request is given up.
    pub(crate) fn request<B>(
        &self,
        request: &Request<B>,
        route: Option<&str>,
        secure: bool,
        request_id: &str,
    ) -> Trace {
        let path = request.uri().path();
        let method = METHODS.iter().find(|known| *known == request.method());
        let method = method.map_or("_OTHER", Method::as_str).to_owned();
        let name = match route {
            Some(route) => format!("{method} {route}"),
            None => method.clone(),
        };
        let mut attributes = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("url.scheme", if secure { "https" } else { "http" }),
            // Without the query, which may hold a token.
            KeyValue::new("url.path", path[..path.floor_char_boundary(MAX_TEXT)].to_owned()),
            KeyValue::new("switchboard.request_id", request_id.to_owned()),
        ];
        attributes.extend(route.map(|route| KeyValue::new("http.route", route.to_owned())));
        let span =
            SpanBuilder::from_name(name).with_kind(SpanKind::Server).with_attributes(attributes);
        self.begin(span, &parent(request.headers()))
    }

    /// Begins the span of a call, of which it tells the other side. It ends with [`called`].
    pub(crate) fn call(&self, request: &mut reqwest::Request) -> Trace {
        let (method, url) = (request.method().as_str().to_owned(), request.url());
        let mut attributes = vec![
            KeyValue::new("http.request.method", method.clone()),
            KeyValue::new("url.full", url.to_string()),
            KeyValue::new("server.address", url.host_str().unwrap_or_default().to_owned()),
        ];
        let port = url.port_or_known_default();
        attributes.extend(port.map(|port| KeyValue::new("server.port", i64::from(port))));
        let span =
            SpanBuilder::from_name(method).with_kind(SpanKind::Client).with_attributes(attributes);
        let trace = self.begin(span, &Trace::current());
        inject(&trace, request.headers_mut());
        trace
    }
}

/// The span of the caller; an empty trace where there is none.
fn parent(headers: &HeaderMap) -> Trace {
    let extractor = HeaderExtractor(headers);
    let parent = TraceContextPropagator::new().extract_with_context(&Trace::new(), &extractor);
    let state = headers.get("tracestate").map_or(0, |state| state.len());
    match state > MAX_TEXT {
        true => Trace::new().with_remote_span_context(span_context(&parent)),
        false => parent,
    }
}

fn inject(trace: &Trace, headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(trace, &mut HeaderInjector(headers));
    // Empty where nobody before us has said anything.
    if headers.get("tracestate").is_some_and(|state| state.is_empty()) {
        headers.remove("tracestate");
    }
}

/// Ends the span of a request.
pub(crate) fn answered(trace: &Trace, status: StatusCode, user_id: Option<&str>) {
    let user_id = user_id.map(|id| KeyValue::new("user.id", id.to_owned()));
    trace.span().set_attributes(user_id);
    end(trace, status, status.is_server_error());
}

/// Ends the span of a call; without a status where there was no answer that could be read.
pub(crate) fn called(trace: &Trace, status: Option<StatusCode>) {
    let Some(status) = status else {
        trace.span().set_attribute(KeyValue::new("error.type", "_OTHER"));
        trace.span().set_status(Status::error("no answer"));
        return trace.span().end();
    };
    end(trace, status, status.is_client_error() || status.is_server_error());
}

fn end(trace: &Trace, status: StatusCode, failed: bool) {
    let span = trace.span();
    span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
    if failed {
        span.set_attribute(KeyValue::new("error.type", status.as_str().to_owned()));
        span.set_status(Status::error(""));
    }
    span.end();
}
