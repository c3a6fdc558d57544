//! The actors of one package, one for each worker thread. An actor polls a handler once in place: one that
//! never waits costs no task. One that waits takes a place ([`Places`]) and goes on in a task of its own, so
//! that a slow query never stalls the package.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use serde_json::value::RawValue;
use smallvec::SmallVec;
use tokio::{runtime::Handle, time::sleep_until};

use super::{Responder, overloaded, places::Places, responder::Late};
use crate::{
    config::HandlerConfig,
    handlers::{Caller, Context, Effect, HandlerError, Outcome, Package},
    metrics::{AuditOutcome, Metrics},
    protocol::{ErrorBody, ReplyHead, Status},
    sync::{spawn, yield_now},
    traces::{Trace, within},
};

/// A request on its way to a handler.
pub(super) struct Job {
    pub(super) data: Option<Box<RawValue>>,
    pub(super) caller: Arc<Caller>,
    pub(super) responder: Responder,
    /// Each job has one of these until it begins; its lane counts them.
    pub(super) queued: Arc<()>,
}

impl Job {
    pub(super) fn user(&self) -> &Arc<str> {
        &self.caller.identity.subject
    }
}

/// Most often one; more where a client sends ahead.
pub(super) type Jobs = SmallVec<[Job; 1]>;

pub(super) struct HandlerActor(pub(super) Arc<Work>);

/// What is needed to carry out the requests of a package.
pub(super) struct Work {
    pub(super) package: Package,
    pub(super) context: Arc<Context>,
    pub(super) config: HandlerConfig,
    pub(super) metrics: Arc<Metrics>,
    pub(super) places: Places,
}

/// None where the handler panicked.
type Running = Pin<Box<dyn Future<Output = Option<Outcome>> + Send>>;

impl Actor for HandlerActor {
    type Msg = Jobs;
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Jobs>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<Jobs>,
        jobs: Jobs,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        if let Some(rest) = self.0.arrive(jobs) {
            // In a box: a batch that does not wait is not to pay for it.
            Box::pin(self.0.arrive_in_turn(rest)).await;
        }
        Ok(())
    }
}

/// A place that a request holds. Whatever ends it, the place goes to the next.
struct Place {
    work: Arc<Work>,
    user: Arc<str>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.work.places.give_back(&self.user) && Handle::try_current().is_ok() {
            spawn(Arc::clone(&self.work).begin_ready());
        }
    }
}

impl Work {
    /// Begins jobs in their order; those that find no place wait for their turn. Gives those back that find no
    /// room for their rows in the audit trail, and what came after them.
    pub(super) fn arrive(self: &Arc<Self>, jobs: Jobs) -> Option<Vec<Job>> {
        let mut now = Instant::now();
        let mut jobs = jobs.into_iter();
        while let Some(mut job) = jobs.next() {
            if !job.responder.has_room() {
                return Some([job].into_iter().chain(jobs).collect());
            }
            now = self.admit(job, now);
        }
        None
    }

    /// The same for jobs that wait for room: the actor waits with them, since they are to begin in their order.
    pub(super) async fn arrive_in_turn(self: &Arc<Self>, jobs: Vec<Job>) {
        for mut job in jobs {
            if !job.responder.has_room() {
                job.responder.until_room(self.config.timeout).await;
            }
            if job.responder.has_room() {
                self.admit(job, Instant::now());
            } else {
                self.find_no_room(job.responder, Instant::now());
            }
        }
    }

    /// Begins a job where there is a place for it, and returns the time after it.
    fn admit(self: &Arc<Self>, job: Job, now: Instant) -> Instant {
        if self.places.are_free() {
            return self.begin(job, now, None);
        }
        if let Some(job) = self.places.admit(job) {
            return self.begin(job, now, None);
        }
        if self.places.are_unwatched() {
            tokio::spawn(Self::watch(Arc::downgrade(self), self.config.timeout));
        }
        now
    }

    /// Refuses a request before it begins: there would be no row of it, and so there is none of this.
    fn find_no_room(&self, mut responder: Responder, now: Instant) {
        responder.leave_unrecorded();
        if now.saturating_duration_since(responder.received()) >= self.config.timeout {
            return self.time_out(responder);
        }
        responder.refuse(Status::Error, overloaded("The audit trail is slow: nothing was done"));
    }

    /// Begins a job at `begun`, and returns the time after it: one clock read for each. One that has waited for
    /// its turn has its place already.
    fn begin(self: &Arc<Self>, job: Job, begun: Instant, place: Option<Place>) -> Instant {
        let Job { data, caller, mut responder, queued } = job;
        drop(queued);
        let waited = begun.saturating_duration_since(responder.received());
        self.metrics.ws.phase_queue.observe(waited.as_secs_f64());
        responder.dequeued(self.package.name, begun);
        if waited >= self.config.timeout {
            self.time_out(responder);
            return begun;
        }
        let handler = Arc::clone(&self.package.handler);
        let mut running = handler.start(Arc::clone(&self.context), caller, responder.head(), data);
        if let Some(trace) = responder.handling(begun) {
            running = Box::pin(within(Some(trace), running));
        }
        let mut running = AssertUnwindSafe(running).catch_unwind();
        let outcome = (&mut running).now_or_never();
        let now = Instant::now();
        match outcome {
            Some(outcome) => self.finish(responder, (begun, now), outcome.ok()),
            None => {
                let running = Box::pin(running.map(Result::ok));
                let place = place.unwrap_or_else(|| self.place(responder.user()));
                spawn(self.wait(running, responder, begun, place));
            }
        }
        now
    }

    fn place(self: &Arc<Self>, user: Arc<str>) -> Place {
        self.places.take(&user);
        Place { work: Arc::clone(self), user }
    }

    /// Begins those that have waited for their places, one after the other: each connection's in their order.
    async fn begin_ready(self: Arc<Self>) {
        let mut begun = None;
        while let Some(job) = self.places.next(begun.as_ref()) {
            let user = Arc::clone(job.user());
            let place = Place { work: Arc::clone(&self), user: Arc::clone(&user) };
            if self.package.effect != Effect::Change && job.responder.is_abandoned() {
                job.responder.abandon();
            } else {
                self.begin(job, Instant::now(), Some(place));
            }
            begun = Some(user);
            yield_now().await;
        }
    }

    /// Answers those whose time is over before their turn comes, while any wait.
    async fn watch(work: Weak<Self>, timeout: Duration) {
        let mut oldest = Some(Instant::now());
        while let Some(received) = oldest {
            sleep_until((received + timeout).into()).await;
            let Some(work) = work.upgrade() else { return };
            let overdue;
            (overdue, oldest) = work.places.overdue(received);
            for Job { responder, .. } in overdue {
                work.time_out(responder);
            }
        }
    }

    /// Waits for a request that has begun.
    fn wait(
        self: &Arc<Self>,
        running: Running,
        responder: Responder,
        begun: Instant,
        place: Place,
    ) -> impl Future<Output = ()> + Send + use<> {
        let work = Arc::clone(self);
        // From here on: a stop that comes before the first poll waits too.
        let change = (self.package.effect == Effect::Change).then(|| self.context.changes.token());
        async move {
            work.complete(running, responder, begun).await;
            drop((place, change));
        }
    }

    /// Waits for the outcome. A read is given up when its time is over or its connection ends. A change is
    /// not: its client is answered in time, and its row waits for what comes of it.
    async fn complete(&self, mut running: Running, responder: Responder, begun: Instant) {
        let deadline = responder.received() + self.config.timeout;
        let is_change = self.package.effect == Effect::Change;
        tokio::select! {
            biased;
            outcome = &mut running => return self.finish(responder, (begun, Instant::now()), outcome),
            () = sleep_until(deadline.into()) => {}
            () = responder.connection_ended(), if !is_change => return responder.abandon(),
        }
        if !is_change {
            return self.time_out(responder);
        }
        self.metrics.errors.count("timeout", self.package.name);
        let late = responder.answer_before_the_end(timed_out());
        let outcome = running.await;
        self.finish_late(late, (begun, Instant::now()), outcome);
    }

    /// Answers a request whose time is over, in its handler or before it was begun.
    fn time_out(&self, responder: Responder) {
        self.metrics.errors.count("timeout", self.package.name);
        responder.refuse(Status::Error, timed_out());
    }

    /// Answers a request whose handler is through; none is the outcome of a panic.
    fn finish(
        &self,
        responder: Responder,
        (begun, ready): (Instant, Instant),
        outcome: Option<Outcome>,
    ) {
        self.metrics.ws.phase_handler.observe((ready - begun).as_secs_f64());
        // The panic hook has logged a panic.
        let Some((reply, error)) = outcome else {
            self.metrics.errors.panicked(self.package.name);
            return responder.refuse(Status::Error, ErrorBody::internal());
        };
        let Some(error) = error else { return responder.answer(reply, ready) };
        let body = error.body();
        let trace = responder.trace();
        self.report(&error, &body, responder.head(), trace);
        responder.fail(reply, body, ready);
    }

    /// Records a change whose client was told `timeout`, now that it is through.
    fn finish_late(
        &self,
        late: Late,
        (begun, ready): (Instant, Instant),
        outcome: Option<Outcome>,
    ) {
        self.metrics.ws.phase_handler.observe((ready - begun).as_secs_f64());
        let (status, error) = match outcome {
            Some((reply, error)) => (reply.status, error),
            None => {
                self.metrics.errors.panicked(self.package.name);
                (Status::Error, Some(HandlerError::Internal("a panic".into())))
            }
        };
        self.metrics.ws.late_changes.inc(AuditOutcome::from(status));
        let body = error.as_ref().map(HandlerError::body);
        if let (Some(error), Some(body)) = (&error, &body) {
            self.report(error, body, late.head(), None);
        }
        late.end(status, body, ready);
    }

    /// Logs and counts an error that is the server's fault.
    fn report(
        &self,
        error: &HandlerError,
        body: &ErrorBody,
        head: ReplyHead,
        trace: Option<Trace>,
    ) {
        if !error.is_ours() {
            return;
        }
        self.metrics.errors.count(body.code, self.package.name);
        let _trace = trace.map(Trace::attach);
        tracing::error!(request_id = %head.req_id, pkg_id = head.pkg_id, %error, "a request failed");
    }
}

fn timed_out() -> ErrorBody {
    ErrorBody::new("timeout", "The request took too long")
}
