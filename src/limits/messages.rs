//! The messages of a user. Each node limits them in-process, by its own copy of the budget that all
//! nodes share in Redis: it pays for what it lets through, some at a time, and goes on from what is left.
//!
//! While a user is busy a node pays ahead, and gives back what is not used. Beyond that it lets through
//! what it can pay later, up to a bound; there sessions read nothing more until Redis has answered, or was
//! too slow and is done without.

use std::{
    mem,
    sync::{
        Arc, PoisonError,
        atomic::Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use super::shared::{Shared, Units};
use crate::{
    config::FailMode,
    metrics::RedisOperation,
    protocol::ErrorBody,
    sync::{AtomicBool, AtomicI64, AtomicU64, Mutex, MutexGuard, sleep, spawn},
};
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock, Reference},
    nanos::Nanos,
    state::{NotKeyed, StateStore},
};
use serde_json::json;

/// Parts of a minute's limit that a node may owe, and one message at least. With what comes back within
/// [`IDLE`], four nodes are a tenth over the limit at most.
const OWED: i64 = 48;
/// Parts of a minute's limit that are paid ahead, and messages at least: half of what is left at most.
const AHEAD: u32 = 40;
const LEAST_AHEAD: u32 = 16;
/// Parts of a minute's limit that are owed before they are paid: by who is busy no more, and by who has
/// used up all, and may hear of what others gave back.
const DUE: i64 = 80;
const DUE_AT_THE_END: i64 = 600;
/// Due whatever is owed: messages were let through of which Redis may not know.
const AT_ONCE: i64 = i64::MIN;
/// The same, while the payment is on its way that tells Redis of those.
const TOLD: i64 = AT_ONCE + 1;
/// What was paid ahead is looked at twice in a second, and given back if nothing of it was used since.
const IDLE: Duration = Duration::from_millis(500);

/// Why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// There are too many; one may be tried again after this time.
    TooMany(Duration),
    /// Nobody can say now whether there are too many.
    Unavailable,
}

impl Refused {
    /// What the client is told.
    pub(crate) fn error(self) -> ErrorBody {
        let wait = match self {
            Self::TooMany(wait) => wait,
            Self::Unavailable => {
                return ErrorBody::new("unavailable", "Limits cannot be checked now");
            }
        };
        // Rounded up: a message that comes back a moment too early would be refused again.
        let retry_after_ms =
            u64::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u64::MAX).max(1);
        ErrorBody::new("rate_limit_exceeded", "Too many messages")
            .with(json!({ "retry_after_ms": retry_after_ms }))
    }
}

/// The messages that a user may send, over all connections.
pub(crate) struct MessageBudget {
    limit: Option<Limit>,
}

struct Limit {
    limiter: RateLimiter<NotKeyed, Full, DefaultClock>,
    account: Option<Account>,
}

/// When the budget is full again, in nanoseconds since the limiter was made.
struct Full(Arc<AtomicU64>);

impl StateStore for Full {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _: &NotKeyed, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut before = self.0.load(Relaxed);
        loop {
            let (outcome, after) = measure(Some(before.into()))?;
            match self.0.compare_exchange_weak(before, after.into(), Relaxed, Relaxed) {
                Ok(_) => return Ok(outcome),
                Err(changed) => before = changed,
            }
        }
    }
}

/// What this node has with the budget in Redis.
struct Account {
    shared: Arc<Shared>,
    key: String,
    quota: Quota,
    /// Messages that were let through and are not paid; below 0: paid ahead.
    owed: AtomicI64,
    /// What may be owed.
    most: i64,
    /// From here on it is time to pay.
    due: AtomicI64,
    /// A payment is on its way.
    paying: AtomicBool,
    /// Those that wait until it has arrived.
    waiting: Mutex<Vec<Waker>>,
    /// Somebody looks after what was paid ahead.
    watched: AtomicBool,
    /// The limiter's state, and the time it counts from.
    full: Arc<AtomicU64>,
    clock: DefaultClock,
    start: <DefaultClock as Clock>::Instant,
}

impl MessageBudget {
    pub(super) fn new(
        quota: Option<Quota>,
        clock: &DefaultClock,
        shared: Option<&Arc<Shared>>,
        subject: &str,
    ) -> Self {
        let limit = quota.map(|quota| {
            let full = Arc::new(AtomicU64::new(0));
            let start = clock.now();
            let limiter = RateLimiter::new(quota, Full(Arc::clone(&full)), clock.clone());
            let account = shared.map(|shared| Account {
                shared: Arc::clone(shared),
                key: format!("limit:messages:{subject}"),
                quota,
                owed: AtomicI64::new(0),
                most: (i64::from(quota.burst_size().get()) / OWED).max(1),
                due: AtomicI64::new(1),
                paying: AtomicBool::new(false),
                waiting: Mutex::default(),
                watched: AtomicBool::new(false),
                full,
                clock: clock.clone(),
                start,
            });
            Limit { limiter, account }
        });
        Self { limit }
    }

    /// Ready: a message may be taken. Else this node owes too many, and it takes as long as Redis does to
    /// answer, or until that is given up.
    pub(crate) fn poll_ready(self: &Arc<Self>, cx: &Context<'_>) -> Poll<()> {
        let Some(Limit { account: Some(account), .. }) = &self.limit else {
            return Poll::Ready(());
        };
        if account.may_owe() {
            return Poll::Ready(());
        }
        account.wake_later(cx.waker());
        // Once more: the payment may have arrived just before.
        if account.may_owe() {
            return Poll::Ready(());
        }
        self.pay_soon(account);
        Poll::Pending
    }

    /// Takes one message.
    pub(crate) fn take(self: &Arc<Self>) -> Result<(), Refused> {
        let Some(limit) = &self.limit else { return Ok(()) };
        let Some(account) = &limit.account else { return limit.check() };
        if !account.shared.answers() {
            return match account.shared.fail_mode {
                FailMode::Open => {
                    let taken = limit.check();
                    // Only then: a payment that finds it tells of this message.
                    account.due.store(AT_ONCE, Release);
                    taken
                }
                FailMode::Closed => Err(Refused::Unavailable),
            };
        }
        let owed = account.owed.fetch_add(1, Relaxed) + 1;
        let taken = limit.check();
        if taken.is_err() {
            account.owed.fetch_sub(1, Relaxed);
        } else if account.is_due(owed) {
            self.pay_soon(account);
        }
        taken
    }

    fn pay_soon(self: &Arc<Self>, account: &Account) {
        // Asked first: a payment on its way costs other messages nothing but this.
        if !account.paying.load(Relaxed) {
            let budget = Arc::clone(self);
            spawn(async move { budget.settle().await });
        }
    }

    /// Pays what is owed and some ahead, and learns what is left.
    pub(super) async fn settle(self: &Arc<Self>) {
        let Some(account) = self.limit.as_ref().and_then(|limit| limit.account.as_ref()) else {
            return;
        };
        // What is let through meanwhile may be due as well, with nobody who comes after it.
        while account.pay(account.ahead()).await && account.is_due(account.owed.load(Relaxed)) {}
        if account.owed.load(Relaxed) < 0 && !account.watched.swap(true, AcqRel) {
            let budget = Arc::clone(self);
            spawn(async move {
                if let Some(Limit { account: Some(account), .. }) = &budget.limit {
                    account.watch().await;
                }
            });
        }
    }
}

impl Limit {
    fn check(&self) -> Result<(), Refused> {
        self.limiter
            .check()
            .map_err(|refused| Refused::TooMany(refused.wait_time_from(self.limiter.clock().now())))
    }
}

impl Account {
    /// Whether one more may be let through before Redis has answered.
    fn may_owe(&self) -> bool {
        self.owed.load(Relaxed) < self.most || !self.shared.answers() || self.does_without()
    }

    /// Whether Redis was too slow the last time, and this node goes by what it knows.
    fn does_without(&self) -> bool {
        self.shared.fail_mode == FailMode::Open && self.due.load(Relaxed) <= TOLD
    }

    fn wake_later(&self, waker: &Waker) {
        let mut waiting = self.waiting();
        if !waiting.iter().any(|known| known.will_wake(waker)) {
            waiting.push(waker.clone());
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waker>> {
        // Nothing that panics happens while the lock is held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is paid ahead.
    fn ahead(&self) -> u32 {
        (self.quota.burst_size().get() / AHEAD).max(LEAST_AHEAD)
    }

    fn is_due(&self, owed: i64) -> bool {
        owed >= self.due.load(Relaxed)
    }

    /// One payment at a time; whether this was one, and was answered. Without an answer what was owed is
    /// owed no more, and what was to be given back lapses: it may have arrived, and nobody pays twice. What
    /// Redis does not know it learns from the next one: no budget is fuller there than it is here.
    async fn pay(&self, ahead: u32) -> bool {
        let Some(_payment) = Payment::begin(self) else { return false };
        let used = match ahead {
            // Messages that come while it is on its way must not use what is given back.
            0 => self.owed.swap(0, Relaxed),
            _ => self.owed.load(Relaxed),
        };
        let before = self.due.fetch_max(TOLD, Acquire).max(TOLD);
        let full_in = if before == TOLD { self.full_in() } else { Duration::ZERO };
        let units = Units { used, more: ahead, share: 2, full_in };
        let operation = RedisOperation::MessageLimit;
        let paid = self.shared.take(operation, &self.key, self.quota, units).await;
        let more = paid.as_ref().map_or(0, |(more, _)| i64::from(*more));
        let settled = match &paid {
            _ if ahead == 0 => 0,
            Ok(_) => used + more,
            Err(_) => used.max(0),
        };
        let owed = self.owed.fetch_sub(settled, Relaxed) - settled;
        let limit = i64::from(self.quota.burst_size().get());
        let due = match (&paid, ahead, more) {
            (Err(_), ..) => AT_ONCE,
            (_, 0, _) => (limit / DUE).max(1),
            (_, _, 0 | 1) => (limit / DUE_AT_THE_END).max(1),
            _ => -more / 2,
        };
        // Else messages were let through meanwhile of which the answer knows nothing.
        let knows_all = self.due.compare_exchange(before, due, Relaxed, Relaxed).is_ok();
        if let Ok((_, full)) = &paid
            && knows_all
        {
            self.correct(*full, owed);
        }
        paid.is_ok()
    }

    /// The time until the budget is full, as far as this node knows.
    fn full_in(&self) -> Duration {
        let now = self.clock.now().duration_since(self.start).as_u64();
        Duration::from_nanos(self.full.load(Relaxed).saturating_sub(now))
    }

    /// Goes on from what Redis says, with what it does not know yet.
    fn correct(&self, full: Duration, owed: i64) {
        let nanos = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        let full = nanos(full) + nanos(self.quota.replenish_interval()) * i128::from(owed);
        let now = self.clock.now().duration_since(self.start);
        let full = i128::from(now.as_u64()) + full;
        self.full.store(u64::try_from(full.max(0)).unwrap_or(u64::MAX), Relaxed);
    }

    /// Gives back what was paid ahead once nothing of it is used for a while.
    async fn watch(&self) {
        loop {
            let before = self.owed.load(Relaxed);
            if before < 0 {
                sleep(IDLE).await;
                if self.owed.load(Relaxed) == before {
                    self.pay(0).await;
                }
                continue;
            }
            // Who pays ahead just before this counts on the one who watches, and gets another look.
            self.watched.swap(false, AcqRel);
            if self.owed.load(Relaxed) >= 0 || self.watched.swap(true, AcqRel) {
                return;
            }
        }
    }
}

/// A payment on its way. However it ends, those that wait for it go on.
struct Payment<'a>(&'a Account);

impl<'a> Payment<'a> {
    /// None: there is one.
    fn begin(account: &'a Account) -> Option<Self> {
        // Made only then: one that is dropped has ended.
        (!account.paying.swap(true, Relaxed)).then(|| Self(account))
    }
}

impl Drop for Payment<'_> {
    fn drop(&mut self) {
        self.0.paying.store(false, Relaxed);
        let waiting = mem::take(&mut *self.0.waiting());
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(all(test, feature = "models"))]
mod models;
