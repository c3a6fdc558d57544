//! The circuit breaker in front of the identity provider: after some failures in a row nobody waits for
//! it any more, until a call is let through to see whether it is back.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use failsafe::{
    Config, Instrument, StateMachine,
    backoff::{self, Exponential},
    failure_policy::{self, ConsecutiveFailures},
};

use crate::metrics::BreakerSeries;

/// Failures in a row that open it.
const FAILURES: u32 = 5;
/// How long it stays open at first; doubled each time the call after that fails, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(30);
/// As the gauge shows it.
const HALF_OPEN: i64 = 1;

type Machine = StateMachine<ConsecutiveFailures<Exponential>, Shown>;

pub(super) struct Breaker {
    /// The library tells of a change after it let go of its own lock: without this one, two changes
    /// could be told in the wrong order, and the gauge would show the older.
    machine: Mutex<Machine>,
    /// When the call went out that is to show whether the provider is back.
    probe: Mutex<Option<Instant>>,
    series: BreakerSeries,
}

impl Breaker {
    pub(super) fn new(series: BreakerSeries) -> Self {
        let policy =
            failure_policy::consecutive_failures(FAILURES, backoff::exponential(SHORTEST, LONGEST));
        let machine = Config::new().failure_policy(policy).instrument(Shown(series.clone()));
        Self { machine: Mutex::new(machine.build()), probe: Mutex::default(), series }
    }

    /// Whether a call may go out. What became of it is to be told by one of the others.
    pub(super) fn permits(&self) -> bool {
        self.with(|machine| machine.is_call_permitted())
            && (!self.is_half_open() || self.is_first())
    }

    fn is_half_open(&self) -> bool {
        self.series.state.get() == HALF_OPEN
    }

    /// One call at a time shows whether the provider is back: the others do not wait for it too. One
    /// that was given up has said nothing, and another goes after a while.
    fn is_first(&self) -> bool {
        let mut probe = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        let free = probe.is_none_or(|sent| sent.elapsed() >= SHORTEST);
        if free {
            *probe = Some(Instant::now());
        }
        free
    }

    fn probed(&self) {
        *self.probe.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn succeeded(&self) {
        self.probed();
        self.with(|machine| machine.on_success());
    }

    pub(super) fn failed(&self) {
        self.probed();
        self.series.failures.inc();
        self.with(|machine| machine.on_error());
    }

    fn with<T>(&self, act: impl FnOnce(&Machine) -> T) -> T {
        act(&self.machine.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Shows the state in the metrics.
struct Shown(BreakerSeries);

impl Shown {
    fn enter(&self, state: i64, name: &str) {
        // A new machine says that it is closed.
        if self.0.state.get() != state {
            self.0.state.set(state);
            self.0.changes.inc();
            tracing::warn!(state = name, "circuit breaker of the identity provider");
        }
    }
}

impl Instrument for Shown {
    fn on_call_rejected(&self) {}

    fn on_open(&self) {
        self.enter(2, "open");
    }

    fn on_half_open(&self) {
        self.enter(HALF_OPEN, "half-open");
    }

    fn on_closed(&self) {
        self.enter(0, "closed");
    }
}
