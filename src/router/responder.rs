//! One answer for one request, by construction; and one row of the audit trail, where it has one.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    audit::{Audit, CUT_OFF, Cause, Event, ROOM_PATIENCE, Recorded, Reserved},
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
    /// Room for the row, before the request begins.
    pub(super) reserved: Option<Reserved>,
}

impl Audited {
    fn bytes(&self) -> usize {
        self.data.as_deref().map_or(0, str::len)
    }

    /// Has the trail know what came of the request.
    fn enter(
        self,
        head: ReplyHead,
        status: Status,
        error: Option<Cow<'static, str>>,
        took: Duration,
    ) {
        let event = Event {
            user: Some(Arc::clone(&self.caller.identity)),
            claimed: None,
            remote: Arc::clone(&self.caller.remote),
            req_id: Some(head.req_id),
            action: self.action,
            route: Arc::clone(&self.resource),
            resource: self.resource,
            outcome: status.into(),
            data: self.data,
            status: status as i32,
            error,
            took: Some(took),
            cause: Cause::Other,
        };
        self.audit.record_in(self.reserved.unwrap_or_default(), event);
    }
}

/// Answers a request once. Dropped unanswered (a dead actor, a server that stops), it answers `internal_error`.
pub(crate) struct Responder {
    head: ReplyHead,
    received: Instant,
    metrics: Arc<PackageMetrics>,
    /// Taken by the answer.
    outbox: Option<Arc<Outbox>>,
    audited: Option<Box<Audited>>,
    trace: Option<Box<MessageSpan>>,
    /// A handler has seen it.
    begun: bool,
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
        Self { head, received, metrics, outbox: Some(outbox), audited: None, trace, begun: false }
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

    /// Whether the audit trail has room for the row of the request, where it is to have one.
    pub(super) fn has_room(&mut self) -> bool {
        let Some(audited) = &mut self.audited else { return true };
        if audited.reserved.is_none() {
            audited.reserved = audited.audit.try_reserve(audited.bytes(), true);
        }
        audited.reserved.is_some()
    }

    /// Waits for room, but not past the time of the handler.
    pub(super) async fn until_room(&mut self, timeout: Duration) {
        let until = self.received + timeout.min(ROOM_PATIENCE);
        let Some(audited) = &mut self.audited else { return };
        audited.reserved = audited.audit.reserve(audited.bytes(), true, until).await;
    }

    /// Has no row made of a request for which there is no room.
    pub(super) fn leave_unrecorded(&mut self) {
        if let Some(audited) = self.audited.take() {
            audited.audit.count_refused();
        }
    }

    /// Notes that the handler's turn has come.
    pub(super) fn dequeued(&mut self, package: &'static str, begun: Instant) {
        self.begun = true;
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

    /// Answers with an error while the handler goes on. What comes of it is recorded then.
    pub(super) fn answer_before_the_end(mut self, error: ErrorBody) -> Late {
        let (head, received, audited) = (self.head, self.received, self.audited.take());
        let told = error.code;
        self.send_error(Status::Error, error);
        Late { head, received, told, audited }
    }

    /// Ends a request whose connection has ended: it is no error of the server, and no metric counts it.
    pub(super) fn abandon(mut self) {
        self.outbox = None;
        let took = self.received.elapsed();
        let error = "The connection ended before the answer";
        self.enter(Status::Error, Some(error.into()), took);
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
        self.enter(reply.status, error.map(|error| error.msg), took);
        outbox.reply(reply.frame, Ready { at: ready, trace });
    }

    /// Has the audit trail know what came of the request, where it is to.
    fn enter(&mut self, status: Status, error: Option<Cow<'static, str>>, took: Duration) {
        if let Some(audited) = self.audited.take() {
            audited.enter(self.head, status, error, took);
        }
    }
}

impl From<Status> for AuditOutcome {
    fn from(status: Status) -> Self {
        match status {
            Status::Ok => Self::Success,
            Status::PermissionDenied => Self::PermissionDenied,
            Status::Error | Status::InvalidData => Self::Error,
        }
    }
}

/// A change that goes on, though its client was told an error. Its row is made when it ends.
pub(super) struct Late {
    head: ReplyHead,
    received: Instant,
    /// The code.
    told: &'static str,
    audited: Option<Box<Audited>>,
}

impl Late {
    pub(super) fn head(&self) -> ReplyHead {
        self.head
    }

    /// Records what came of it, and what the client was told.
    pub(super) fn end(mut self, status: Status, error: Option<ErrorBody>, ready: Instant) {
        let text = match error {
            None => format!("The client was told `{}`, then it was done", self.told),
            Some(error) => format!("The client was told `{}`, then: {}", self.told, error.msg),
        };
        if let Some(audited) = self.audited.take() {
            audited.enter(self.head, status, Some(text.into()), ready - self.received);
        }
    }
}

impl Drop for Late {
    /// The server stops, and waits no longer.
    fn drop(&mut self) {
        if let Some(audited) = self.audited.take() {
            audited.enter(self.head, Status::Error, Some(CUT_OFF.into()), self.received.elapsed());
        }
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
        if self.outbox.is_none() {
            return;
        }
        let error = match self.begun {
            true => ErrorBody { msg: CUT_OFF.into(), ..ErrorBody::internal() },
            false => ErrorBody::internal(),
        };
        self.send_error(Status::Error, error);
    }
}
