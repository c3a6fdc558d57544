//! One answer for one request, by construction.

use std::{sync::Arc, time::Instant};

use crate::{
    hub::Outbox,
    metrics::PackageMetrics,
    protocol::{ErrorBody, Reply, ReplyHead, Status},
};

/// Answers a request once. Dropped unanswered (a panic, a dead actor), it answers `internal_error`.
pub(crate) struct Responder {
    head: ReplyHead,
    received: Instant,
    metrics: Arc<PackageMetrics>,
    /// Taken by the answer.
    outbox: Option<Arc<Outbox>>,
}

impl Responder {
    /// For a request that was decoded at `received`.
    pub(crate) fn new(
        head: ReplyHead,
        received: Instant,
        metrics: Arc<PackageMetrics>,
        outbox: Arc<Outbox>,
    ) -> Self {
        Self { head, received, metrics, outbox: Some(outbox) }
    }

    /// What the answer repeats.
    pub(crate) fn head(&self) -> ReplyHead {
        self.head
    }

    /// When the request was decoded.
    pub(crate) fn received(&self) -> Instant {
        self.received
    }

    /// Answers. `ready` is now, read once for all the metrics of a message.
    pub(crate) fn answer(mut self, reply: Reply, ready: Instant) {
        self.send(reply, ready);
    }

    /// Answers with an error, before any handler saw the request.
    pub(crate) fn refuse(mut self, status: Status, error: &ErrorBody) {
        let reply = self.head.error(status, error);
        self.send(reply, Instant::now());
    }

    fn send(&mut self, reply: Reply, ready: Instant) {
        if let Some(outbox) = self.outbox.take() {
            self.metrics.processing.observe((ready - self.received).as_secs_f64());
            self.metrics.answered(reply.status);
            outbox.reply(reply.frame, ready);
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if self.outbox.is_some() {
            let reply = self.head.error(Status::Error, &ErrorBody::internal());
            self.send(reply, Instant::now());
        }
    }
}
