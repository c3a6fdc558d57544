//! The circuit breaker in front of a service: after some failures in a row nobody waits for it any more,
//! until a call is let through to see whether it is back. `auth` has one for the identity provider,
//! `redis` one for Redis.

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
/// As the gauge shows them.
const CLOSED: i64 = 0;
const HALF_OPEN: i64 = 1;

type Machine = StateMachine<ConsecutiveFailures<Exponential>, Shown>;

pub(crate) struct Breaker {
    /// The library tells of a change after it let go of its own lock: without this one, two changes
    /// could be told in the wrong order, and the gauge would show the older.
    machine: Mutex<Machine>,
    /// When the call went out that is to show whether the service is back.
    probe: Mutex<Option<Instant>>,
    /// How long it stays open at first.
    shortest: Duration,
    series: BreakerSeries,
}

impl Breaker {
    /// Once open, it stays so for the shorter time at first; it is doubled each time the call after that
    /// fails, up to the longer. The library takes whole seconds.
    pub(crate) fn new(
        service: &'static str,
        (shortest, longest): (Duration, Duration),
        series: BreakerSeries,
    ) -> Self {
        let policy =
            failure_policy::consecutive_failures(FAILURES, backoff::exponential(shortest, longest));
        let shown = Shown { service, series: series.clone() };
        let machine = Config::new().failure_policy(policy).instrument(shown).build();
        Self { machine: Mutex::new(machine), probe: Mutex::default(), shortest, series }
    }

    /// Whether a call may go out. What became of it is to be told by one of the others.
    pub(crate) fn permits(&self) -> bool {
        self.with(|machine| machine.is_call_permitted())
            && (!self.is_half_open() || self.is_first())
    }

    /// Whether the last calls were answered.
    pub(crate) fn is_closed(&self) -> bool {
        self.series.state.get() == CLOSED
    }

    fn is_half_open(&self) -> bool {
        self.series.state.get() == HALF_OPEN
    }

    /// One call at a time shows whether the service is back: the others do not wait for it too. One
    /// that was given up has said nothing, and another goes after a while.
    fn is_first(&self) -> bool {
        let mut probe = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        let free = probe.is_none_or(|sent| sent.elapsed() >= self.shortest);
        if free {
            *probe = Some(Instant::now());
        }
        free
    }

    fn probed(&self) {
        *self.probe.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn succeeded(&self) {
        self.probed();
        self.with(|machine| machine.on_success());
    }

    pub(crate) fn failed(&self) {
        self.probed();
        self.series.failures.inc();
        self.with(|machine| machine.on_error());
    }

    fn with<T>(&self, act: impl FnOnce(&Machine) -> T) -> T {
        act(&self.machine.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Shows the state in the metrics.
struct Shown {
    service: &'static str,
    series: BreakerSeries,
}

impl Shown {
    fn enter(&self, state: i64, name: &str) {
        // A new machine says that it is closed.
        if self.series.state.get() != state {
            self.series.state.set(state);
            self.series.changes.inc();
            tracing::warn!(service = self.service, state = name, "circuit breaker");
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
        self.enter(CLOSED, "closed");
    }
}
