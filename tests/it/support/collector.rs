//! A receiver of traces: OTLP over HTTP in protobuf, as a collector takes it.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message as _;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::bytes::Bytes;

/// A span, with its ids as headers and log lines have them.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) trace_id: String,
    pub(crate) id: String,
    /// Empty: none.
    pub(crate) parent: String,
    pub(crate) name: String,
    pub(crate) kind: SpanKind,
    pub(crate) failed: bool,
    /// Trace and span.
    pub(crate) links: Vec<(String, String)>,
    pub(crate) nanos: (u64, u64),
    attributes: Vec<KeyValue>,
}

impl Seen {
    /// An attribute as text; empty where there is none.
    pub(crate) fn attribute(&self, name: &str) -> String {
        attribute(&self.attributes, name)
    }

    /// Whether it lies within another in time.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        other.nanos.0 <= self.nanos.0
            && self.nanos.0 <= self.nanos.1
            && self.nanos.1 <= other.nanos.1
    }
}

fn attribute(all: &[KeyValue], name: &str) -> String {
    let found = all.iter().find(|attribute| attribute.key == name);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        None => String::new(),
        other => panic!("{name} is {other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Default)]
struct State {
    spans: Mutex<Vec<Seen>>,
    authorization: Mutex<Option<String>>,
    service: Mutex<String>,
}

/// The receiver. It ends with the test.
pub(crate) struct Collector {
    addr: SocketAddr,
    state: Arc<State>,
    running: JoinHandle<()>,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, state) = (listener.local_addr().unwrap(), Arc::<State>::default());
        let shared = Arc::clone(&state);
        let running = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                let service = service_fn(move |request| take(Arc::clone(&state), request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(tcp), service));
            }
        });
        Self { addr, state, running }
    }

    /// What `OTEL_EXPORTER_OTLP_ENDPOINT` is to be.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Everything that has arrived.
    pub(crate) fn spans(&self) -> Vec<Seen> {
        self.state.spans.lock().unwrap().clone()
    }

    /// The `Authorization` of the last batch, and the service that it is of.
    pub(crate) fn told(&self) -> (Option<String>, String) {
        let authorization = self.state.authorization.lock().unwrap().clone();
        (authorization, self.state.service.lock().unwrap().clone())
    }

    /// The first span that is such; waits for it.
    pub(crate) async fn span(&self, what: &str, is: impl Fn(&Seen) -> bool) -> Seen {
        for _ in 0..500 {
            if let Some(span) = self.spans().into_iter().find(&is) {
                return span;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let names: Vec<_> = self.spans().into_iter().map(|span| span.name).collect();
        panic!("no span {what} arrived: {names:?}");
    }

    /// The first span of a name; waits for it.
    pub(crate) async fn named(&self, name: &str) -> Seen {
        self.span(name, |span| span.name == name).await
    }

    /// The span of a name below another; waits for it.
    pub(crate) async fn below(&self, parent: &Seen, name: &str) -> Seen {
        let is = |span: &Seen| span.name == name && span.parent == parent.id;
        let span = self.span(name, is).await;
        assert_eq!(span.trace_id, parent.trace_id, "{span:?}");
        span
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.running.abort();
    }
}

async fn take(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/v1/traces"));
    assert_eq!(request.headers()["content-type"], "application/x-protobuf");
    let authorization = request.headers().get("authorization");
    *state.authorization.lock().unwrap() =
        authorization.map(|value| value.to_str().unwrap().to_owned());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    for resource in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
        let attributes = resource.resource.unwrap().attributes;
        *state.service.lock().unwrap() = attribute(&attributes, "service.name");
        let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
        state.spans.lock().unwrap().extend(spans.map(seen));
    }
    Ok(Response::new(Full::default()))
}

fn seen(span: Span) -> Seen {
    let link = |trace: &[u8], span: &[u8]| (hex(trace), hex(span));
    Seen {
        kind: span.kind(),
        failed: span.status.is_some_and(|status| status.code() == StatusCode::Error),
        trace_id: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        name: span.name,
        links: span.links.iter().map(|it| link(&it.trace_id, &it.span_id)).collect(),
        nanos: (span.start_time_unix_nano, span.end_time_unix_nano),
        attributes: span.attributes,
    }
}
