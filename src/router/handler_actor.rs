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
use tokio::task::JoinSet;

use super::Responder;
use crate::{
    config::HandlerConfig,
    handlers::{Caller, Context, HandlerError, Outcome, Package},
    metrics::Metrics,
    protocol::{ErrorBody, Status},
};

/// A request on its way to a handler.
pub(super) struct Job {
    pub(super) data: Option<Box<RawValue>>,
    pub(super) caller: Caller,
    pub(super) responder: Responder,
}

/// What the actor is told.
pub(super) enum Work {
    Run(Job),
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
            Work::Run(job) => state.backlog.push_back(job),
            Work::Finished => {
                state.waiting -= 1;
                while state.tasks.try_join_next().is_some() {}
            }
        }
        while state.waiting < self.config.concurrency
            && let Some(job) = state.backlog.pop_front()
        {
            self.begin(job, &myself, state);
        }
        Ok(())
    }
}

impl HandlerActor {
    fn begin(&self, job: Job, myself: &ActorRef<Work>, state: &mut State) {
        let begun = Instant::now();
        self.queued.fetch_sub(1, Ordering::Relaxed);
        let Job { data, caller, responder } = job;
        let ws = &self.metrics.ws;
        ws.phase_queue.observe((begun - responder.received()).as_secs_f64());
        let handler = Arc::clone(&self.package.handler);
        let running = handler.start(Arc::clone(&self.context), caller, responder.head(), data);
        let mut running = AssertUnwindSafe(running).catch_unwind();
        let done = Finish {
            package: self.package.name,
            metrics: Arc::clone(&self.metrics),
            responder,
            begun,
        };
        match (&mut running).now_or_never() {
            Some(outcome) => done.finish(outcome.ok()),
            None => {
                state.waiting += 1;
                let slot = Slot(myself.clone());
                self.spawn(Box::pin(running.map(Result::ok)), done, slot, &mut state.tasks);
            }
        }
    }

    fn spawn(&self, running: Running, done: Finish, slot: Slot, tasks: &mut JoinSet<()>) {
        let deadline = done.responder.received() + self.config.timeout;
        tasks.spawn(async move {
            match tokio::time::timeout_at(deadline.into(), running).await {
                Ok(outcome) => done.finish(outcome),
                Err(_) => done.time_out(),
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

/// What is left to do when a handler is through.
struct Finish {
    package: &'static str,
    metrics: Arc<Metrics>,
    responder: Responder,
    begun: Instant,
}

impl Finish {
    fn finish(self, outcome: Option<Outcome>) {
        let ready = Instant::now();
        self.metrics.ws.phase_handler.observe((ready - self.begun).as_secs_f64());
        match outcome {
            Some((reply, error)) => {
                if let Some(error) = error {
                    self.log(&error);
                }
                self.responder.answer(reply, ready);
            }
            // The panic hook has logged it; dropping the responder answers.
            None => self.metrics.errors.panicked(self.package),
        }
    }

    fn time_out(self) {
        self.metrics.errors.count("timeout", self.package);
        let error = ErrorBody::new("timeout", "The request took too long");
        self.responder.refuse(Status::Error, &error);
    }

    fn log(&self, error: &HandlerError) {
        self.metrics.errors.count(error.body().code, self.package);
        let head = self.responder.head();
        tracing::error!(request_id = %head.req_id, pkg_id = head.pkg_id, %error, "a request failed");
    }
}
