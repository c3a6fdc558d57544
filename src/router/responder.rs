//! One answer for one request, by construction; and one row of the audit trail, where it has one.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    audit::{Audit, Cause, Event, Recorded},
    handlers::Caller,
    hub::{Outbox, Ready},
    metrics::{AuditOutcome, PackageMetrics},
    protocol::{ErrorBody, Reply, ReplyHead, Status},
    traces::{MessageSpan, Trace},
};

/// A message that took longer leaves a line, which a graph of latencies leads to.
const SLOW: Duration = Duration::from_millis(100);

/// What the audit trail is to have of a request, beside its answer.
pub(super) struct Audited {
    pub(super) audit: Arc<Audit>,
    pub(super) caller: Arc<Caller>,
    pub(super) action: Arc<str>,
    pub(super) resource: Arc<str>,
    pub(super) data: Option<Recorded>,
}

/// Answers a request once. Dropped unanswered (a panic, a dead actor), it answers `internal_error`.
pub(crate) struct Responder {
    head: ReplyHead,
    received: Instant,
    metrics: Arc<PackageMetrics>,
    /// Taken by the answer.
    outbox: Option<Arc<Outbox>>,
    audited: Option<Box<Audited>>,
    trace: Option<Box<MessageSpan>>,
}

impl Responder {
    /// For a request that was decoded at `received`.
    pub(crate) fn new(
        head: ReplyHead,
        received: Instant,
        metrics: Arc<PackageMetrics>,
        outbox: Arc<Outbox>,
        trace: Option<Box<MessageSpan>>,
    ) -> Self {
        Self { head, received, metrics, outbox: Some(outbox), audited: None, trace }
    }

    /// What the answer repeats.
    pub(crate) fn head(&self) -> ReplyHead {
        self.head
    }

    /// When the request was decoded.
    pub(crate) fn received(&self) -> Instant {
        self.received
    }

    /// Who asks.
    pub(super) fn user(&self) -> Arc<str> {
        self.outbox.as_ref().map_or_else(|| "".into(), |outbox| Arc::clone(outbox.subject()))
    }

    /// Waits for the end of the connection.
    pub(super) async fn connection_ended(&self) {
        if let Some(outbox) = &self.outbox {
            outbox.until_ended().await;
        }
    }

    /// Whether there is nobody to answer any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.outbox.as_ref().is_none_or(|outbox| outbox.ended().is_some())
    }

    /// Has the request recorded with its answer.
    pub(super) fn record(&mut self, audited: Audited) {
        self.audited = Some(Box::new(audited));
    }

    /// Notes in the trace that the handler's turn has come.
    pub(super) fn dequeued(&self, package: &'static str, begun: Instant) {
        if let Some(trace) = &self.trace {
            trace.dequeued(package, begun);
        }
    }

    /// The trace that the handler is to run in, if there is one.
    pub(super) fn handling(&mut self, begun: Instant) -> Option<Trace> {
        self.trace.as_mut().map(|trace| trace.handling(begun))
    }

    /// The trace of the request, if there is one.
    pub(super) fn trace(&self) -> Option<Trace> {
        self.trace.as_ref().map(|trace| trace.trace())
    }

    /// Answers. `ready` is now, read once for all the metrics of a message.
    pub(crate) fn answer(mut self, reply: Reply, ready: Instant) {
        self.send(reply, None, ready);
    }

    /// Answers with an error of the handler, which `reply` tells of.
    pub(crate) fn fail(mut self, reply: Reply, error: ErrorBody, ready: Instant) {
        self.send(reply, Some(error), ready);
    }

    /// Answers with an error, before any handler saw the request.
    pub(crate) fn refuse(mut self, status: Status, error: ErrorBody) {
        self.send_error(status, error);
    }

    /// Ends a request whose connection has ended: it is no error of the server, and no metric counts it.
    pub(super) fn abandon(mut self) {
        self.outbox = None;
        let took = self.received.elapsed();
        let error = "The connection ended before the answer";
        self.enter(AuditOutcome::Error, Status::Error, Some(error.into()), took);
    }

    fn send_error(&mut self, status: Status, error: ErrorBody) {
        let reply = self.head.error(status, &error);
        self.send(reply, Some(error), Instant::now());
    }

    fn send(&mut self, reply: Reply, error: Option<ErrorBody>, ready: Instant) {
        let Some(outbox) = self.outbox.take() else { return };
        let took = ready - self.received;
        self.metrics.processing.observe(took.as_secs_f64());
        self.metrics.answered(reply.status);
        let mut trace = self.trace.take();
        if took > SLOW {
            log_slow(self.head, &outbox, took, trace.as_deref());
        }
        if let Some(trace) = &mut trace {
            let error = error.as_ref().map(|error| (error.code, error.is_ours()));
            trace.answered(reply.status as i32, error, ready);
        }
        // First: who has seen the answer can rely on the row.
        let outcome = match reply.status {
            Status::Ok => AuditOutcome::Success,
            Status::PermissionDenied => AuditOutcome::PermissionDenied,
            Status::Error | Status::InvalidData => AuditOutcome::Error,
        };
        self.enter(outcome, reply.status, error.map(|error| error.msg), took);
        outbox.reply(reply.frame, Ready { at: ready, trace });
    }

    /// Has the audit trail know what came of the request, where it is to.
    fn enter(
        &mut self,
        outcome: AuditOutcome,
        status: Status,
        error: Option<Cow<'static, str>>,
        took: Duration,
    ) {
        let Some(audited) = self.audited.take() else { return };
        audited.audit.record(Event {
            user: Some(Arc::clone(&audited.caller.identity)),
            claimed: None,
            remote: Arc::clone(&audited.caller.remote),
            req_id: Some(self.head.req_id),
            action: audited.action,
            route: Arc::clone(&audited.resource),
            resource: audited.resource,
            outcome,
            data: audited.data,
            status: status as i32,
            error,
            took: Some(took),
            cause: Cause::Other,
        });
    }
}

#[cold]
fn log_slow(head: ReplyHead, outbox: &Outbox, took: Duration, trace: Option<&MessageSpan>) {
    let _trace = trace.map(|trace| trace.trace().attach());
    tracing::info!(
        connection_id = %outbox.id, request_id = %head.req_id, user_id = &*outbox.identity().subject,
        pkg_id = head.pkg_id, duration_ms = took.as_secs_f64() * 1000.0, "slow message"
    );
}

impl Drop for Responder {
    fn drop(&mut self) {
        if self.outbox.is_some() {
            self.send_error(Status::Error, ErrorBody::internal());
        }
    }
}
