//! Packages that misbehave, wait, or wait to be told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use switchboard::handlers::{Answer, Caller, Context, Handler, HandlerError, Package};
use tokio::{sync::Semaphore, time::sleep};

type Outcome = Result<Answer<Value>, HandlerError>;

/// Panics: at once, or after it has waited with `{"later":true}`.
pub(crate) struct Panics;

impl Handler for Panics {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "{later?}";
    const OUTPUT: &'static str = "none";

    async fn handle(&self, _: &Context, _: &Caller, input: Value) -> Outcome {
        if input["later"] == true {
            sleep(Duration::from_millis(5)).await;
        }
        panic!("on purpose");
    }
}

/// Fails with a cause that no client may see; `{"dependency":true}` for one that is down.
pub(crate) struct Fails;

impl Handler for Fails {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "{dependency?}";
    const OUTPUT: &'static str = "none";

    async fn handle(&self, _: &Context, _: &Caller, input: Value) -> Outcome {
        let cause = "a secret cause".into();
        Err(match input["dependency"] == true {
            true => HandlerError::Unavailable(cause),
            false => HandlerError::Internal(cause),
        })
    }
}

/// Answers its input after `ms`.
pub(crate) struct Sleeps;

impl Handler for Sleeps {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "{ms}";
    const OUTPUT: &'static str = "{ms}";

    async fn handle(&self, _: &Context, _: &Caller, input: Value) -> Outcome {
        sleep(Duration::from_millis(input["ms"].as_u64().unwrap())).await;
        Ok(input.into())
    }
}

/// Holds every request until a test lets it go.
#[derive(Clone)]
pub(crate) struct Gate {
    begun: Arc<AtomicUsize>,
    passes: Arc<Semaphore>,
}

impl Gate {
    pub(crate) fn closed() -> Self {
        Self { begun: Arc::default(), passes: Arc::new(Semaphore::new(0)) }
    }

    /// Lets so many requests go.
    pub(crate) fn release(&self, requests: usize) {
        self.passes.add_permits(requests);
    }

    /// Requests that the handler has seen.
    pub(crate) fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }

    /// Waits until the handler has seen so many requests.
    pub(crate) async fn until_begun(&self, requests: usize) {
        for _ in 0..500 {
            if self.begun() >= requests {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("only {} of {requests} requests have begun", self.begun());
    }
}

impl Handler for Gate {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "any object";
    const OUTPUT: &'static str = "the same object";

    async fn handle(&self, _: &Context, _: &Caller, input: Value) -> Outcome {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.passes.acquire().await.unwrap().forget();
        Ok(input.into())
    }
}

pub(crate) const PANICS: i64 = 900;
pub(crate) const FAILS: i64 = 901;
pub(crate) const SLEEPS: i64 = 902;
pub(crate) const GATE: i64 = 903;

/// All of the above, with one gate.
pub(crate) fn misbehaving(gate: &Gate) -> Vec<Package> {
    vec![
        Package::new(900, "PANICS", &[], Panics),
        Package::new(901, "FAILS", &[], Fails),
        Package::new(902, "SLEEPS", &[], Sleeps),
        Package::new(903, "GATE", &[], gate.clone()),
    ]
}
