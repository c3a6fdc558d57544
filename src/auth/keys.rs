//! The keys in force. One task fetches them: when their lifetime ends, when a token names one that is not
//! known, and when an administrator says so. Nobody whose key is known ever waits for it.
//!
//! The provider's latest key set is in force: a key that it withdrew is not trusted any more. Without an answer of
//! the provider, its last keys serve on until they are too old.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

use super::{
    AuthError,
    clock::Moment,
    jwks::{Key, KeySet},
    provider::{Provider, ProviderError},
};
use crate::{
    config::AuthConfig,
    metrics::{CallOutcome, Counters},
};

/// Unknown keys cause one fetch in this time, however many tokens name them.
const ASK_INTERVAL: Duration = Duration::from_secs(10);
/// After a failed fetch: the first pause, doubled each time up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// After an empty key set, which may be a mistake of the provider's: the pause before a second one counts. No
/// longer than the keys' lifetime.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Why keys were not fetched when an administrator said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RefreshError {
    /// The development issuer has one key, which stays.
    #[error("no identity provider is configured, so there are no keys to fetch")]
    Fixed,
    /// The cause is logged.
    #[error("the identity provider gave no keys: those from before stay in force")]
    Failed,
}

/// The keys of the issuer.
pub(super) struct Keys {
    shared: Arc<Shared>,
    /// None where the keys are never fetched.
    fetching: Option<Fetching>,
}

struct Shared {
    /// None until the first fetch. They serve on while the provider is down.
    fetched: ArcSwapOption<Fetched>,
    /// Older keys are not used; none: keys that are never fetched.
    max_age: Option<Duration>,
    since: Moment,
    turn: Mutex<Turn>,
    asked: Notify,
}

struct Fetched {
    keys: KeySet,
    /// When the provider was asked.
    at: Moment,
}

/// Whose turn it is.
#[derive(Default)]
struct Turn {
    running: bool,
    asked: bool,
    last_asked: Option<Instant>,
    /// Fetches that have begun.
    begun: u64,
}

impl Turn {
    /// Whoever asked gets this fetch, also one that came of itself.
    fn begin(&mut self) -> u64 {
        self.running = true;
        self.asked = false;
        self.begun += 1;
        self.begun
    }
}

/// The end of a fetch.
#[derive(Default)]
struct Ended {
    /// Which it was, from 1.
    number: u64,
    succeeded: bool,
}

struct Fetching {
    /// Changes with the end of every fetch, and closes with the task.
    ends: watch::Receiver<Ended>,
    _task: AbortOnDropHandle<()>,
}

impl Keys {
    /// Keys that stay as they are, or none at all.
    pub(super) fn fixed(set: Option<KeySet>) -> Self {
        let shared = Shared::new(None);
        let fetched = set.map(|keys| Arc::new(Fetched { keys, at: shared.since }));
        shared.fetched.store(fetched);
        Self { shared: Arc::new(shared), fetching: None }
    }

    /// The keys of a provider, fetched from now on until this is dropped.
    pub(super) fn of(
        provider: Arc<Provider>,
        config: &AuthConfig,
        outcomes: Counters<CallOutcome>,
    ) -> Self {
        let shared = Arc::new(Shared::new(Some(config.keys_max_age)));
        // From the start: who comes before the first fetch waits for it.
        shared.turn().running = true;
        let (ended, ends) = watch::channel(Ended::default());
        let task = Arc::clone(&shared).keep(provider, config.keys_lifetime, outcomes, ended);
        let task = AbortOnDropHandle::new(tokio::spawn(task));
        Self { shared, fetching: Some(Fetching { ends, _task: task }) }
    }

    /// A key of the current set; none where that is too old.
    pub(super) fn known(&self, kid: &str) -> Option<Arc<Key>> {
        let fetched = self.shared.fetched.load();
        fetched.as_ref().filter(|fetched| self.shared.is_current(fetched))?.keys.get(kid)
    }

    /// Whether tokens can be checked: there are keys, and they are not too old. Keys that are too old are fetched now:
    /// the clock may have been set, and a node that is not ready gets no token whose check would fetch them.
    pub(super) fn are_usable(&self) -> bool {
        let fetched = self.shared.fetched.load();
        let Some(fetched) = &*fetched else { return false };
        let current = self.shared.is_current(fetched);
        if !current {
            self.shared.ask();
        }
        current && fetched.keys.len() > 0
    }

    /// The time since the keys were fetched, or since the start where they never were; none where they stay.
    pub(super) fn age(&self) -> Option<Duration> {
        self.shared.max_age?;
        let fetched = self.shared.fetched.load();
        let at = fetched.as_ref().map_or(self.shared.since, |fetched| fetched.at);
        Some(Moment::now().since(at))
    }

    /// Fetches the keys now, and waits for it; returns their names.
    pub(super) async fn refresh(&self) -> Result<Vec<String>, RefreshError> {
        let Some(fetching) = &self.fetching else { return Err(RefreshError::Fixed) };
        // One that runs may have begun before the provider's keys changed.
        let begun = self.ask_now();
        let mut ends = fetching.ends.clone();
        let ended = ends.wait_for(|ended| ended.number > begun).await;
        if !ended.is_ok_and(|ended| ended.succeeded) {
            return Err(RefreshError::Failed);
        }
        let fetched = self.shared.fetched.load();
        let keys = fetched.iter().flat_map(|fetched| fetched.keys.iter());
        let mut names: Vec<_> = keys.map(|key| key.kid().to_owned()).collect();
        names.sort();
        Ok(names)
    }

    /// Has the keys fetched now, however lately they were; returns how many fetches had begun before.
    pub(super) fn ask_now(&self) -> u64 {
        let mut turn = self.shared.turn();
        turn.asked = true;
        self.shared.asked.notify_one();
        turn.begun
    }

    /// A key of the current set, or else of the one that is being fetched or may be fetched now.
    pub(super) async fn find(&self, kid: &str) -> Result<Arc<Key>, AuthError> {
        // Twice: a fetch that was running may have begun before the key was there.
        for _ in 0..2 {
            if let Some(key) = self.known(kid) {
                return Ok(key);
            }
            let fetched = self.fetched().await;
            if !self.shared.fetched.load().as_ref().is_some_and(|it| self.shared.is_current(it)) {
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
    fn new(max_age: Option<Duration>) -> Self {
        Self {
            fetched: ArcSwapOption::empty(),
            max_age,
            since: Moment::now(),
            turn: Mutex::default(),
            asked: Notify::new(),
        }
    }

    fn is_current(&self, fetched: &Fetched) -> bool {
        self.max_age.is_none_or(|max_age| Moment::now().since(fetched.at) < max_age)
    }

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
        ended: watch::Sender<Ended>,
    ) {
        let look_again = LOOK_AGAIN.min(lifetime);
        let (mut failures, mut empty) = (0, None);
        loop {
            let number = self.turn().begin();
            let fetched = self.fetch(&provider, &mut empty, look_again).await;
            let succeeded = fetched.is_ok();
            let pause = match fetched {
                Ok(0) => {
                    tracing::error!(
                        "the identity provider has withdrawn all its keys: no token is good"
                    );
                    outcomes.inc(CallOutcome::Success);
                    failures = 0;
                    lifetime
                }
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
                    match error {
                        ProviderError::NoKeys if empty.is_some() => look_again,
                        _ => retry(failures),
                    }
                }
            };
            self.turn().running = false;
            ended.send_replace(Ended { number, succeeded });
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.until_asked() => {}
            }
        }
    }

    /// Puts the provider's keys in force. `empty` is when it first had none, if it has none since: these are put
    /// in force when it still has none `look_again` later.
    async fn fetch(
        &self,
        provider: &Provider,
        empty: &mut Option<Instant>,
        look_again: Duration,
    ) -> Result<usize, ProviderError> {
        let at = Moment::now();
        let text = provider.keys().await?;
        let known = self.fetched.load_full();
        let none = KeySet::default();
        let keys = KeySet::parse(&text, known.as_ref().map_or(&none, |known| &known.keys));
        let keys = keys.map_err(ProviderError::Malformed)?;
        let count = keys.len();
        if count > 0 {
            *empty = None;
        } else if known.is_none() || empty.get_or_insert_with(Instant::now).elapsed() < look_again {
            return Err(ProviderError::NoKeys);
        }
        self.fetched.store(Some(Arc::new(Fetched { keys, at })));
        Ok(count)
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
