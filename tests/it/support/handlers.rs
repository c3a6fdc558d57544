//! Packages that misbehave, wait, or wait to be told.

use std::{
    hint,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use switchboard::handlers::{Answer, Caller, Context, Effect, Handler, HandlerError, Package};
use tokio::{sync::Semaphore, time::sleep};

type Outcome = Result<Answer<Value>, HandlerError>;

/// Panics: at once, or after it has waited, for 5 ms with `{"later":true}` or for so many.
pub(crate) struct Panics;

impl Handler for Panics {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "{later?}";
    const OUTPUT: &'static str = "none";

    async fn handle(&self, _: &Context, _: &Caller, input: Value) -> Outcome {
        if input["later"] != Value::Null && input["later"] != false {
            sleep(Duration::from_millis(input["later"].as_u64().unwrap_or(5))).await;
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
    /// The users whose requests have begun, in their order, with the `n` of the input if it has one.
    begun: Arc<Mutex<Vec<String>>>,
    cancelled: Arc<AtomicUsize>,
    passes: Arc<Semaphore>,
}

impl Gate {
    pub(crate) fn closed() -> Self {
        let passes = Arc::new(Semaphore::new(0));
        Self { begun: Arc::default(), cancelled: Arc::default(), passes }
    }

    /// Lets so many requests go.
    pub(crate) fn release(&self, requests: usize) {
        self.passes.add_permits(requests);
    }

    /// Requests that the handler has seen.
    pub(crate) fn begun(&self) -> usize {
        self.users().len()
    }

    /// The users whose requests the handler has seen, in their order.
    pub(crate) fn users(&self) -> Vec<String> {
        self.begun.lock().unwrap().clone()
    }

    /// Waits until so many requests were given up while they waited.
    pub(crate) async fn until_cancelled(&self, requests: usize) {
        for _ in 0..500 {
            if self.cancelled() >= requests {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("only {} of {requests} requests were cancelled", self.cancelled());
    }

    /// Requests that were given up while they waited.
    pub(crate) fn cancelled(&self) -> usize {
        self.cancelled.load(Ordering::SeqCst)
    }

    async fn pass(&self, caller: &Caller, input: &Value) {
        let user = &caller.identity.username;
        let begun = match &input["n"] {
            Value::Null => user.to_string(),
            n => format!("{user} {n}"),
        };
        self.begun.lock().unwrap().push(begun);
        let waiting = Waiting(&self.cancelled);
        self.passes.acquire().await.unwrap().forget();
        std::mem::forget(waiting);
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

    async fn handle(&self, _: &Context, caller: &Caller, input: Value) -> Outcome {
        self.pass(caller, &input).await;
        Ok(input.into())
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The gate for one that changes nothing.
pub(crate) struct Reads(Gate);

impl Handler for Reads {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "any object";
    const OUTPUT: &'static str = "the same object";
    const EFFECT: Effect = Effect::Read;

    async fn handle(&self, _: &Context, caller: &Caller, input: Value) -> Outcome {
        self.0.pass(caller, &input).await;
        Ok(input.into())
    }
}

/// Keeps its thread for `ms`, idle or with `"spin":true` busy; answers how many did that at the same time at most.
#[derive(Default)]
pub(crate) struct Computes {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Handler for Computes {
    type Input = Value;
    type Output = usize;
    const INPUT: &'static str = "{ms}";
    const OUTPUT: &'static str = "number";

    async fn handle(
        &self,
        _: &Context,
        _: &Caller,
        input: Value,
    ) -> Result<Answer<usize>, HandlerError> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let time = Duration::from_millis(input["ms"].as_u64().unwrap());
        if input["spin"] == true {
            let begun = Instant::now();
            while begun.elapsed() < time {
                hint::spin_loop();
            }
        } else {
            #[expect(clippy::disallowed_methods, reason = "it is to keep its thread")]
            thread::sleep(time);
        }
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(self.most.load(Ordering::SeqCst).into())
    }
}

pub(crate) const PANICS: i64 = 900;
pub(crate) const FAILS: i64 = 901;
pub(crate) const SLEEPS: i64 = 902;
pub(crate) const GATE: i64 = 903;
pub(crate) const READS: i64 = 904;
pub(crate) const COMPUTES: i64 = 905;

/// All of the above, with one gate.
pub(crate) fn misbehaving(gate: &Gate) -> Vec<Package> {
    vec![
        Package::new(900, "PANICS", &[], Panics),
        Package::new(901, "FAILS", &[], Fails),
        Package::new(902, "SLEEPS", &[], Sleeps),
        Package::new(903, "GATE", &[], gate.clone()),
        Package::new(904, "READS", &[], Reads(gate.clone())),
        Package::new(905, "COMPUTES", &[], Computes::default()),
    ]
}
