//! What has happened on the connections of a [`Client`](crate::client::Client), counted.
//!
//! Links write it, modes read it. Nothing is allocated for a message that is answered.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::ensure;
use hdrhistogram::Histogram;

/// Nanoseconds that latencies are told apart by, and the longest.
const FINEST: u64 = 1_000;
const LONGEST: u64 = 600_000_000_000;

/// Latencies in nanoseconds, to three digits.
pub(crate) type Latencies = Histogram<u64>;

pub(crate) fn latencies() -> Latencies {
    Histogram::new_with_bounds(FINEST, LONGEST, 3).expect("the bounds are in order")
}

/// How often each reason was seen.
pub(crate) type Reasons = BTreeMap<String, u64>;

pub(crate) struct Tally {
    /// Of answers that are a success, by package of the mix.
    pub(crate) answered: Vec<Latencies>,
    /// The same over all packages, since a timeline took them.
    pub(crate) recent: Latencies,
    /// From the first packet to being authenticated.
    pub(crate) connected: Latencies,
    /// Answers that are no success, by code.
    pub(crate) refused: Reasons,
    /// Connections that did not come to be.
    pub(crate) failed: Reasons,
    /// Connections that ended after they were authenticated.
    pub(crate) lost: Reasons,
    /// Requests that were under way on them.
    pub(crate) unanswered: u64,
    /// Requests sent.
    pub(crate) sent: u64,
    /// Connections that were told to reconnect.
    pub(crate) drains: u64,
    /// The name of whoever was authenticated last.
    pub(crate) user: String,
    pub(crate) pushes: Pushes,
}

/// Pushes that came, since they were last reset.
#[derive(Default)]
pub(crate) struct Pushes {
    pub(crate) count: u64,
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    /// The payload of the latest.
    pub(crate) payload: Vec<u8>,
}

impl Pushes {
    /// Counts anew; the payload stays, to be compared with.
    pub(crate) fn restart(&mut self) {
        (self.count, self.first, self.last) = (0, None, None);
    }
}

impl Tally {
    /// For a mix of so many packages.
    pub(crate) fn new(packages: usize) -> Self {
        Self {
            answered: (0..packages).map(|_| latencies()).collect(),
            recent: latencies(),
            connected: latencies(),
            refused: Reasons::new(),
            failed: Reasons::new(),
            lost: Reasons::new(),
            unanswered: 0,
            sent: 0,
            drains: 0,
            user: String::new(),
            pushes: Pushes::default(),
        }
    }

    /// Successes so far.
    pub(crate) fn answers(&self) -> u64 {
        self.answered.iter().map(Histogram::len).sum()
    }

    /// Latencies over all packages.
    pub(crate) fn overall(&self) -> Latencies {
        let mut all = latencies();
        for one in &self.answered {
            all.add(one).expect("all have the same bounds");
        }
        all
    }

    pub(crate) fn answer(&mut self, package: u8, latency: Duration) {
        let nanos = nanos(latency);
        self.answered[usize::from(package)].saturating_record(nanos);
        self.recent.saturating_record(nanos);
    }

    pub(crate) fn push(&mut self, payload: &[u8], now: Instant) {
        let pushes = &mut self.pushes;
        pushes.count += 1;
        pushes.first.get_or_insert(now);
        pushes.last = Some(now);
        if pushes.payload != payload {
            payload.clone_into(&mut pushes.payload);
        }
    }

    /// Whether everything that was asked for went well.
    pub(crate) fn ensure_flawless(&self) -> anyhow::Result<()> {
        for (what, reasons) in
            [("failed", &self.failed), ("lost", &self.lost), ("refused", &self.refused)]
        {
            let first = reasons.first_key_value();
            ensure!(first.is_none(), "{what}: {}", first.map_or("", |(reason, _)| reason));
        }
        Ok(())
    }
}

pub(crate) fn count(reasons: &mut Reasons, reason: &str) {
    match reasons.get_mut(reason) {
        Some(count) => *count += 1,
        None => drop(reasons.insert(reason.to_owned(), 1)),
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
