//! The span of a message, with one below it for each phase: `queue`, `handler`, `write`.
//!
//! It goes along with the message, from the session through the router and the outbox back to the
//! session, and takes the times that are read for the metrics. A phase that is not reached has no span.

use std::time::{Instant, SystemTime};

use opentelemetry::{
    KeyValue,
    trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::SdkTracer;
use uuid::Uuid;

use super::{SpanContext, Trace, Traces};

/// A message that has arrived.
pub(crate) struct Message<'a> {
    pub(crate) received: Instant,
    pub(crate) pkg_id: i32,
    pub(crate) req_id: Uuid,
    pub(crate) connection_id: Uuid,
    pub(crate) user_id: &'a str,
    /// The request that opened the connection.
    pub(crate) upgrade: Option<&'a SpanContext>,
}

/// Ends with the write, or when the message is given up.
pub(crate) struct MessageSpan {
    tracer: SdkTracer,
    message: Trace,
    handler: Option<Trace>,
    received: Instant,
    /// The same on the clock of spans.
    started: SystemTime,
}

impl Traces {
    /// Begins the trace of a message: one of its own, for a connection may last for days. None where
    /// it is not one that is exported.
    pub(crate) fn message(&self, message: &Message<'_>) -> Option<Box<MessageSpan>> {
        let started = SystemTime::now() - message.received.elapsed();
        let span =
            SpanBuilder::from_name("message").with_kind(SpanKind::Server).with_start_time(started);
        let mut span = self.tracer.build_with_context(span, &Trace::new());
        if !span.is_recording() {
            return None;
        }
        span.set_attributes([
            KeyValue::new("network.protocol.name", "websocket"),
            KeyValue::new("switchboard.pkg_id", i64::from(message.pkg_id)),
            KeyValue::new("switchboard.request_id", message.req_id.to_string()),
            KeyValue::new("switchboard.connection_id", message.connection_id.to_string()),
            KeyValue::new("user.id", message.user_id.to_owned()),
        ]);
        if let Some(upgrade) = message.upgrade {
            span.add_link(upgrade.clone(), Vec::new());
        }
        Some(Box::new(MessageSpan {
            tracer: self.tracer.clone(),
            message: Trace::new().with_span(span),
            handler: None,
            received: message.received,
            started,
        }))
    }
}

impl MessageSpan {
    /// Its wait for the handler is over.
    pub(crate) fn dequeued(&self, package: &'static str, begun: Instant) {
        self.message.span().update_name(package);
        self.message.span().set_attribute(KeyValue::new("rpc.method", package));
        self.phase("queue", self.received, begun);
    }

    /// The handler begins, in the trace that is returned.
    pub(crate) fn handling(&mut self, begun: Instant) -> Trace {
        let span = SpanBuilder::from_name("handler").with_start_time(self.at(begun));
        let span = span.start_with_context(&self.tracer, &self.message);
        self.handler.insert(self.message.with_span(span)).clone()
    }

    /// The answer is ready: its status, the code of its error, and whether that is the server's fault.
    pub(crate) fn answered(
        &mut self,
        status: i32,
        error: Option<(&'static str, bool)>,
        ready: Instant,
    ) {
        if let Some(handler) = self.handler.take() {
            handler.span().end_with_timestamp(self.at(ready));
        }
        let span = self.message.span();
        span.set_attribute(KeyValue::new("switchboard.status", i64::from(status)));
        let Some((code, ours)) = error else { return };
        span.set_attribute(KeyValue::new("error.type", code));
        if ours {
            span.set_status(Status::error(code));
        }
    }

    /// The answer, which was ready then, is with the client's side of the socket.
    pub(crate) fn written(self, ready: Instant, flushed: Instant) {
        self.phase("write", ready, flushed);
        self.message.span().end_with_timestamp(self.at(flushed));
    }

    /// The trace, for log lines.
    pub(crate) fn trace(&self) -> Trace {
        self.message.clone()
    }

    fn phase(&self, name: &'static str, from: Instant, to: Instant) {
        SpanBuilder::from_name(name)
            .with_start_time(self.at(from))
            .start_with_context(&self.tracer, &self.message)
            .end_with_timestamp(self.at(to));
    }

    fn at(&self, time: Instant) -> SystemTime {
        self.started + time.saturating_duration_since(self.received)
    }
}
