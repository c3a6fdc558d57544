//! Traces by OpenTelemetry, for whoever sets `OTEL_EXPORTER_OTLP_ENDPOINT`; else there is no [`Traces`].
//!
//! A span each for a request and for a call (`http`), for a message and its phases ([`MessageSpan`]),
//! and for a statement. What a statement or a call belongs to is the current [`Trace`], which [`within`]
//! makes current. Spans that have ended wait in a bounded queue for the SDK's thread, which hands them
//! to the `collector`; a full queue drops them.

mod collector;
mod http;
mod message;

use std::{
    future::poll_fn,
    pin::pin,
    time::{Duration, SystemTime},
};

pub(crate) use opentelemetry::{Context as Trace, trace::SpanContext};
use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, TraceState, Tracer as _,
        TracerProvider as _,
    },
};
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    resource::TelemetryResourceDetector,
    trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider},
};
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::Instrument as _;

use crate::config::{Environment, TracesConfig};
use collector::Collector;
pub(crate) use http::{answered, called};
pub(crate) use message::{Message, MessageSpan};

/// Spans that wait for the collector; one more is dropped.
const MAX_QUEUED: usize = 8192;
/// How long the first of them waits at most.
const DELAY: Duration = Duration::from_secs(1);
/// At the end: time for the last ones.
const FLUSH: Duration = Duration::from_secs(5);

/// Makes spans. One belongs to one server: it is passed, never global.
pub(crate) struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// Why no traces can be exported.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The client.
    #[error("cannot make an HTTP client: {0}")]
    Client(#[from] reqwest::Error),
    /// The exporter, which looks at further variables of OpenTelemetry.
    #[error(transparent)]
    Exporter(#[from] ExporterBuildError),
}

/// A statement on the database that has ended.
pub(crate) struct Query<'a> {
    /// By the name that OpenTelemetry has for it.
    pub(crate) system: &'static str,
    pub(crate) operation: &'static str,
    /// With `$N` where the parameters are.
    pub(crate) text: &'a str,
    pub(crate) took: Duration,
    pub(crate) error: Option<&'static str>,
}

impl Traces {
    /// Exports from now on, on the runtime that this is called in. Whether the collector is there shows
    /// with the first spans.
    pub(crate) fn open(
        config: &TracesConfig,
        environment: Environment,
    ) -> Result<Self, TracesError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", config.endpoint))
            .with_timeout(collector::TIMEOUT)
            .with_http_client(Collector::new(config)?)
            .build()?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(MAX_QUEUED)
            .with_scheduled_delay(DELAY);
        let batches =
            BatchSpanProcessor::builder(exporter).with_batch_config(batches.build()).build();
        let version = env!("CARGO_PKG_VERSION");
        let resource = Resource::builder_empty()
            .with_detector(Box::new(TelemetryResourceDetector))
            .with_attributes([
                KeyValue::new("service.name", config.service.clone()),
                KeyValue::new("service.version", version),
                KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()),
                KeyValue::new("deployment.environment.name", environment.as_str()),
            ])
            .build();
        let sampler = Sampler::TraceIdRatioBased(config.ratio);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(batches)
            .with_sampler(Sampler::ParentBased(Box::new(sampler)))
            .with_resource(resource)
            .build();
        let scope = InstrumentationScope::builder("switchboard").with_version(version).build();
        let tracer = provider.tracer_with_scope(scope);
        Ok(Self { provider, tracer })
    }

    /// A span for a statement. One that belongs to no request and no message gets none.
    pub(crate) fn query(&self, query: &Query<'_>) {
        let parent = Trace::current();
        if !parent.span().span_context().is_sampled() {
            return;
        }
        let ended = SystemTime::now();
        let operation = query.operation.to_ascii_uppercase();
        let mut span = SpanBuilder::from_name(operation.clone())
            .with_kind(SpanKind::Client)
            .with_start_time(ended - query.took)
            .with_attributes([
                KeyValue::new("db.system.name", query.system),
                KeyValue::new("db.operation.name", operation),
                KeyValue::new("db.query.text", query.text.to_owned()),
            ])
            .start_with_context(&self.tracer, &parent);
        if let Some(kind) = query.error {
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(kind));
        }
        span.end_with_timestamp(ended);
    }

    /// Exports what there is, within a bound. Nothing is exported after that.
    pub(crate) async fn finish(&self) {
        let provider = self.provider.clone();
        // It blocks, and its thread sends on this runtime.
        let finished = spawn_blocking(move || provider.shutdown_with_timeout(FLUSH)).await;
        if !matches!(finished, Ok(Ok(()))) {
            tracing::warn!("the last spans are lost");
        }
    }

    fn begin(&self, span: SpanBuilder, parent: &Trace) -> Trace {
        parent.with_span(self.tracer.build_with_context(span, parent))
    }
}

/// Runs a future in a trace, if there is one: what it begins belongs there.
pub(crate) async fn within<F: Future>(trace: Option<Trace>, future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let _current = trace.clone().map(Trace::attach);
        future.as_mut().poll(cx)
    })
    .await
}

/// Starts a task that goes on with the current request, in its lines and its trace, whatever becomes of
/// whoever waits for it.
pub(crate) fn spawn<F>(work: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    let trace = Trace::map_current(|trace| trace.has_active_span().then(|| trace.clone()));
    tokio::spawn(within(trace, work).in_current_span())
}

/// What others may link to, without what the caller's systems say to each other: it is kept for as long
/// as a connection.
pub(crate) fn span_context(trace: &Trace) -> SpanContext {
    let span = trace.span();
    let span = span.span_context();
    let state = TraceState::default();
    SpanContext::new(span.trace_id(), span.span_id(), span.trace_flags(), span.is_remote(), state)
}

/// The id of the current trace, if it is exported.
pub(crate) fn current_id() -> Option<String> {
    Trace::map_current(|trace| {
        let span = trace.span();
        let span = span.span_context();
        span.is_sampled().then(|| span.trace_id().to_string())
    })
}
