//! The keys in force. One task fetches them: when their lifetime ends, and when a token names one that
//! is not known. Nobody whose key is known ever waits for it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

use super::{
    AuthError,
    jwks::{Key, KeySet},
    provider::{Provider, ProviderError},
};
use crate::metrics::{CallOutcome, Counters};

/// Unknown keys cause one fetch in this time, however many tokens name them.
const ASK_INTERVAL: Duration = Duration::from_secs(10);
/// After a failed fetch: the first pause, doubled each time up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// The keys of the issuer.
pub(super) struct Keys {
    shared: Arc<Shared>,
    /// None where the keys are never fetched.
    fetching: Option<Fetching>,
}

#[derive(Default)]
struct Shared {
    /// None until the first fetch. Stale keys stay: tokens are valid while the provider is down.
    set: ArcSwapOption<KeySet>,
    turn: Mutex<Turn>,
    asked: Notify,
}

/// Whose turn it is.
#[derive(Default)]
struct Turn {
    running: bool,
    asked: bool,
    last_asked: Option<Instant>,
}

impl Turn {
    /// Whoever asked gets this fetch, also one that came of itself.
    fn begin(&mut self) {
        self.running = true;
        self.asked = false;
    }
}

struct Fetching {
    /// Changes with the end of every fetch, and closes with the task.
    ends: watch::Receiver<()>,
    _task: AbortOnDropHandle<()>,
}

impl Keys {
    /// Keys that stay as they are, or none at all.
    pub(super) fn fixed(set: Option<KeySet>) -> Self {
        let shared = Shared { set: ArcSwapOption::from_pointee(set), ..Shared::default() };
        Self { shared: Arc::new(shared), fetching: None }
    }

    /// The keys of a provider, fetched from now on until this is dropped.
    pub(super) fn of(
        provider: Arc<Provider>,
        lifetime: Duration,
        outcomes: Counters<CallOutcome>,
    ) -> Self {
        let shared = Arc::<Shared>::default();
        // From the start: who comes before the first fetch waits for it.
        shared.turn().running = true;
        let (ended, ends) = watch::channel(());
        let task = Arc::clone(&shared).keep(provider, lifetime, outcomes, ended);
        let task = AbortOnDropHandle::new(tokio::spawn(task));
        Self { shared, fetching: Some(Fetching { ends, _task: task }) }
    }

    /// A key of the current set.
    pub(super) fn known(&self, kid: &str) -> Option<Arc<Key>> {
        self.shared.set.load().as_ref()?.get(kid)
    }

    /// A key of the current set, or else of the one that is being fetched or may be fetched now.
    pub(super) async fn find(&self, kid: &str) -> Result<Arc<Key>, AuthError> {
        // Twice: a fetch that was running may have begun before the key was there.
        for _ in 0..2 {
            if let Some(key) = self.known(kid) {
                return Ok(key);
            }
            let fetched = self.fetched().await;
            if self.shared.set.load().is_none() {
                return Err(AuthError::Unavailable);
            }
            if !fetched {
                break;
            }
        }
        self.known(kid).ok_or(AuthError::Invalid("the token's key is not known"))
    }

    /// Waits for the end of a fetch. False: none is running, and none may be had yet.
    async fn fetched(&self) -> bool {
        let Some(fetching) = &self.fetching else { return false };
        let mut ends = fetching.ends.clone();
        // Before the turn is looked at, so that no end is missed.
        ends.mark_unchanged();
        if !self.shared.ask() {
            return false;
        }
        ends.changed().await.is_ok()
    }
}

impl Shared {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a fetch is running or about to.
    fn ask(&self) -> bool {
        let mut turn = self.turn();
        if turn.running || turn.asked {
            return true;
        }
        if turn.last_asked.is_some_and(|last| last.elapsed() < ASK_INTERVAL) {
            return false;
        }
        turn.asked = true;
        turn.last_asked = Some(Instant::now());
        self.asked.notify_one();
        true
    }

    /// Fetches for ever.
    async fn keep(
        self: Arc<Self>,
        provider: Arc<Provider>,
        lifetime: Duration,
        outcomes: Counters<CallOutcome>,
        ended: watch::Sender<()>,
    ) {
        let mut failures = 0;
        loop {
            self.turn().begin();
            let pause = match self.fetch(&provider).await {
                Ok(keys) => {
                    tracing::info!(keys, "the keys of the identity provider are fetched");
                    outcomes.inc(CallOutcome::Success);
                    failures = 0;
                    lifetime
                }
                Err(error) => {
                    tracing::warn!(%error, "the keys of the identity provider cannot be fetched");
                    outcomes.inc(CallOutcome::Error);
                    failures += 1;
                    retry(failures)
                }
            };
            self.turn().running = false;
            ended.send_replace(());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.until_asked() => {}
            }
        }
    }

    async fn fetch(&self, provider: &Provider) -> Result<usize, ProviderError> {
        let text = provider.keys().await?;
        let known = self.set.load_full().unwrap_or_default();
        let set = KeySet::parse(&text, &known).map_err(ProviderError::Malformed)?;
        let keys = set.len();
        self.set.store(Some(Arc::new(set)));
        Ok(keys)
    }

    async fn until_asked(&self) {
        while !self.turn().asked {
            self.asked.notified().await;
        }
    }
}

/// The pause after failures in a row. Not the same for all nodes, or they would come back at once.
fn retry(failures: u32) -> Duration {
    let pause = FIRST_RETRY.saturating_mul(1 << (failures - 1).min(10)).min(LAST_RETRY);
    pause.mul_f64(0.75 + fastrand::f64() / 4.0)
}
