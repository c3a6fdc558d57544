//! The actor of one package. It polls a handler once in place: one that never waits costs no task, and
//! one that waits goes on in a task of its own, so that a slow query never stalls the package.

use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use futures_util::FutureExt;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use serde_json::value::RawValue;
use smallvec::SmallVec;
use tokio::task::JoinSet;

use super::Responder;
use crate::{
    config::HandlerConfig,
    handlers::{Caller, Context, Outcome, Package},
    metrics::Metrics,
    protocol::{ErrorBody, Status},
    traces::{Trace, within},
};

/// A request on its way to a handler.
pub(super) struct Job {
    pub(super) data: Option<Box<RawValue>>,
    pub(super) caller: Arc<Caller>,
    pub(super) responder: Responder,
}

/// Most often one; more where a client sends ahead.
pub(super) type Jobs = SmallVec<[Job; 1]>;

/// What the actor is told.
pub(super) enum Work {
    Run(Jobs),
    /// A task ended: there is room for one more.
    Finished,
}

pub(super) struct HandlerActor {
    pub(super) package: Package,
    pub(super) context: Arc<Context>,
    pub(super) config: HandlerConfig,
    pub(super) metrics: Arc<Metrics>,
    pub(super) queued: Arc<AtomicUsize>,
}

/// Ends with the actor: its tasks are cancelled, and their responders and those of the backlog answer.
#[derive(Default)]
pub(super) struct State {
    /// Tasks that have not said that they are through. `tasks` may hold some that have.
    waiting: usize,
    tasks: JoinSet<()>,
    backlog: VecDeque<Job>,
}

/// None where the handler panicked.
type Running = Pin<Box<dyn Future<Output = Option<Outcome>> + Send>>;

impl Actor for HandlerActor {
    type Msg = Work;
    type State = State;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Work>, (): ()) -> Result<State, ActorProcessingErr> {
        Ok(State::default())
    }

    async fn handle(
        &self,
        myself: ActorRef<Work>,
        work: Work,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match work {
            Work::Run(jobs) => state.backlog.extend(jobs),
            Work::Finished => {
                state.waiting -= 1;
                while state.tasks.try_join_next().is_some() {}
            }
        }
        let mut now = Instant::now();
        while state.waiting < self.config.concurrency
            && let Some(job) = state.backlog.pop_front()
        {
            now = self.begin(job, now, &myself, state);
        }
        Ok(())
    }
}

impl HandlerActor {
    /// Begins a job at `begun` and returns the time after it: one clock read for each.
    fn begin(
        &self,
        job: Job,
        begun: Instant,
        myself: &ActorRef<Work>,
        state: &mut State,
    ) -> Instant {
        self.queued.fetch_sub(1, Ordering::Relaxed);
        let Job { data, caller, mut responder } = job;
        let waited = begun.saturating_duration_since(responder.received());
        self.metrics.ws.phase_queue.observe(waited.as_secs_f64());
        responder.dequeued(self.package.name, begun);
        if waited >= self.config.timeout {
            time_out(self.package.name, &self.metrics, responder);
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
            Some(outcome) => {
                finish(self.package.name, &self.metrics, responder, (begun, now), outcome.ok());
            }
            None => {
                state.waiting += 1;
                let slot = Slot(myself.clone());
                let running = Box::pin(running.map(Result::ok));
                self.spawn(running, responder, begun, slot, &mut state.tasks);
            }
        }
        now
    }

    fn spawn(
        &self,
        running: Running,
        responder: Responder,
        begun: Instant,
        slot: Slot,
        tasks: &mut JoinSet<()>,
    ) {
        let deadline = responder.received() + self.config.timeout;
        let (package, metrics) = (self.package.name, Arc::clone(&self.metrics));
        tasks.spawn(async move {
            match tokio::time::timeout_at(deadline.into(), running).await {
                Ok(outcome) => {
                    finish(package, &metrics, responder, (begun, Instant::now()), outcome);
                }
                Err(_) => time_out(package, &metrics, responder),
            }
            drop(slot);
        });
    }
}

/// A place among the tasks that wait; its end tells the actor, whatever ended the task.
struct Slot(ActorRef<Work>);

impl Drop for Slot {
    fn drop(&mut self) {
        drop(self.0.cast(Work::Finished));
    }
}

/// Answers a request whose time is over, in its handler or before it was begun.
fn time_out(package: &str, metrics: &Metrics, responder: Responder) {
    metrics.errors.count("timeout", package);
    responder.refuse(Status::Error, ErrorBody::new("timeout", "The request took too long"));
}

/// Answers a request whose handler is through; none is the outcome of a panic.
fn finish(
    package: &str,
    metrics: &Metrics,
    responder: Responder,
    (begun, ready): (Instant, Instant),
    outcome: Option<Outcome>,
) {
    metrics.ws.phase_handler.observe((ready - begun).as_secs_f64());
    // The panic hook has logged a panic; dropping the responder answers.
    let Some((reply, error)) = outcome else { return metrics.errors.panicked(package) };
    let Some(error) = error else { return responder.answer(reply, ready) };
    let body = error.body();
    if error.is_ours() {
        metrics.errors.count(body.code, package);
        let head = responder.head();
        let _trace = responder.trace().map(Trace::attach);
        tracing::error!(request_id = %head.req_id, pkg_id = head.pkg_id, %error, "a request failed");
    }
    responder.fail(reply, body, ready);
}
