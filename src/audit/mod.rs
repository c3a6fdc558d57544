//! The audit trail: who did what, or was kept from it.
//!
//! Whoever answers a request or ends a connection records an [`Event`] and goes on at once. The events
//! wait in a bounded queue; the `writer`, an actor, makes rows of them (`redact`) and writes them in
//! batches to the database, or to the `spool` on disk while the database is away or slow.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod redact;
mod retention;
mod spool;
mod summary;
mod writer;

use std::{
    borrow::Cow,
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::Notify;
use uuid::Uuid;

pub(crate) use writer::AuditWriter;

use crate::{
    auth::{Identity, Remote},
    config::AuditConfig,
    metrics::{AuditErrorKind, AuditMetrics, AuditOutcome},
    protocol::CloseReason,
};
use spool::{AppendError, Spool};
use summary::{Scope, Summary};

/// Bytes of request data that are taken along. More is left out, but for its size.
const MAX_DATA: usize = 16 * 1024;

/// Something that belongs into the trail.
pub(crate) struct Event {
    /// The user, if a valid token said who it is.
    pub(crate) user: Option<Arc<Identity>>,
    /// The name that somebody without a token gave.
    pub(crate) claimed: Option<String>,
    pub(crate) remote: Arc<Remote>,
    /// The `req_id` of a message; else the correlation id counts.
    pub(crate) req_id: Option<Uuid>,
    /// A method of HTTP, or `WS:` and a name.
    pub(crate) action: Arc<str>,
    /// A path, the name of a package, or the id of a connection.
    pub(crate) resource: Arc<str>,
    /// The resource without what a caller chooses of it: there are few of these.
    pub(crate) route: Arc<str>,
    pub(crate) outcome: AuditOutcome,
    /// JSON as it came, from [`taken_along`].
    pub(crate) data: Option<Box<str>>,
    pub(crate) status: i32,
    /// What the client was told.
    pub(crate) error: Option<Cow<'static, str>>,
    pub(crate) took: Option<Duration>,
    /// Who can cause it again and again.
    pub(crate) cause: Cause,
}

/// What makes an event happen, besides a request that is carried out or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A user can cause as many as it likes, though no role was missing.
    User,
    /// Likewise, and honest clients cause none: an attacker with many users may, from one address.
    Breach,
    /// Requests, and what administrators and logouts do to connections.
    Other,
}

impl Event {
    /// Something that happened to a connection, or on the way to one: `name` follows `WS:`.
    pub(crate) fn of_connection(
        name: &str,
        resource: String,
        outcome: AuditOutcome,
        remote: &Arc<Remote>,
        reason: CloseReason,
    ) -> Self {
        Self {
            user: None,
            claimed: None,
            remote: Arc::clone(remote),
            req_id: None,
            action: format!("WS:{name}").into(),
            resource: resource.into(),
            route: "/web".into(),
            outcome,
            data: None,
            status: reason.code().into(),
            error: Some(reason.text().into()),
            took: None,
            cause: match reason {
                CloseReason::SessionRevoked => Cause::Other,
                reason if reason.is_expulsion() => Cause::Breach,
                _ => Cause::User,
            },
        }
    }

    /// Who caused it, as far as anybody said.
    fn name(&self) -> Option<&str> {
        self.user.as_deref().map(|user| &*user.username).or(self.claimed.as_deref())
    }

    /// Whether a user was kept from something.
    fn is_denial(&self) -> bool {
        self.cause != Cause::Other || self.outcome == AuditOutcome::PermissionDenied
    }
}

/// Request data for an [`Event`]: a copy, unless it is too large.
pub(crate) fn taken_along(data: &str) -> Box<str> {
    if data.len() > MAX_DATA { redact::omitted(data.len()).into() } else { data.into() }
}

/// An event with its place in time, made once: whatever happens to it, it is one row.
struct Entry {
    id: Uuid,
    at: Timestamp,
    since: Instant,
    event: Event,
    /// Of a row that sums up many events.
    scope: Option<Scope>,
    /// Nobody known is behind it: a part of queue and spool is closed to it.
    unknown: bool,
}

impl Entry {
    fn new(event: Event, scope: Option<Scope>) -> Arc<Self> {
        let failed = || event.user.is_none() && event.outcome != AuditOutcome::Success;
        let unknown = scope.map_or_else(failed, Scope::is_unknown);
        let (id, at, since) = (Uuid::now_v7(), Timestamp::now(), Instant::now());
        Arc::new(Self { id, at, since, event, scope, unknown })
    }
}

/// The trail as its recorders see it.
pub(crate) struct Audit {
    config: AuditConfig,
    metrics: AuditMetrics,
    /// What shares rows, until its interval ends.
    summary: Summary,
    /// Oldest first. An entry leaves when it is safe: in the database or in the spool.
    queue: Mutex<VecDeque<Arc<Entry>>>,
    /// Told of a first entry and of each full batch.
    filled: Notify,
    /// Told of rows in the spool.
    spooled: Notify,
    /// The database does not take rows.
    away: AtomicBool,
    /// The spool has refused rows, and none have left the queue since: the whole queue is not encoded
    /// for each entry that finds no room in it.
    cramped: AtomicBool,
    /// The server stops: entries go straight to the spool.
    closed: AtomicBool,
    /// Counts the looks into the spool. What was read before the last one is not confirmed: a replayer
    /// that was ended may still be at it when its successor reads the same rows.
    turn: AtomicU64,
    /// None where there is no trail.
    spool: Option<Mutex<Spool>>,
    /// Rows lost and not complained about yet.
    lost: AtomicU64,
}

impl Audit {
    /// Opens the spool, with what an earlier process left in it.
    pub(crate) fn open(config: &AuditConfig, metrics: AuditMetrics) -> io::Result<Self> {
        let spool = match config.enabled {
            true => Some(Mutex::new(Spool::open(&config.spool, config.spool_limit)?)),
            false => None,
        };
        Ok(Self {
            config: config.clone(),
            metrics,
            summary: Summary::new(config),
            queue: Mutex::default(),
            filled: Notify::new(),
            spooled: Notify::new(),
            away: AtomicBool::new(false),
            cramped: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            spool,
            lost: AtomicU64::new(0),
        })
    }

    /// Whether there is a trail.
    pub(crate) fn is_on(&self) -> bool {
        self.spool.is_some()
    }

    /// Whether reads belong into it.
    pub(crate) fn has_reads(&self) -> bool {
        self.is_on() && self.config.reads
    }

    /// Records an event: as a row, or as a part of one that sums up many. Waits for nothing, unless the
    /// queue is full: then for the disk, so that whoever acts faster than can be written down is slowed
    /// down and nothing is lost.
    pub(crate) fn record(&self, event: Event) {
        if !self.is_on() {
            return;
        }
        self.metrics.actions.inc(event.outcome);
        match self.summary.take(event) {
            Some(event) => self.enter(Entry::new(event, None)),
            None => self.metrics.aggregated.inc(),
        }
    }

    /// Makes rows of what was summed up. In the worst case it waits for the disk.
    fn sum_up(&self) {
        for sum in self.summary.end() {
            let scope = sum.scope;
            self.enter(Entry::new(sum.into_event(), Some(scope)));
        }
    }

    fn enter(&self, entry: Arc<Entry>) {
        if let Some(entry) = self.push(entry) {
            self.make_room(entry);
        }
    }

    /// Puts an entry into the queue; gives it back where there is no room.
    fn push(&self, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let reserved = if entry.unknown { self.config.queue.div_ceil(4) } else { 0 };
        let mut queue = self.queue();
        if queue.len() >= self.config.queue - reserved || self.closed.load(Ordering::Relaxed) {
            return Some(entry);
        }
        queue.push_back(entry);
        let waiting = queue.len();
        drop(queue);
        if waiting == 1 || waiting.is_multiple_of(self.config.batch_size) {
            self.filled.notify_one();
        }
        None
    }

    /// Writes the whole queue to the spool at once, with an entry that found no room in it: one by one,
    /// each would wait for the disk.
    fn make_room(&self, entry: Arc<Entry>) {
        let row = texts(std::slice::from_ref(&entry));
        let Some(mut spool) = self.spool() else { return };
        // Another may have made room, while this one waited for the spool.
        if self.push(entry).is_none() {
            return;
        }
        if !self.is_cramped() {
            let waiting = self.oldest(usize::MAX);
            let mut rows = texts(&waiting);
            rows.extend_from_slice(&row);
            if self.append(&mut spool, &rows) {
                self.forget(&waiting);
                self.spooled.notify_one();
                return;
            }
        }
        // One may fit where all do not.
        if self.append(&mut spool, &row) {
            self.spooled.notify_one();
        } else {
            self.lose(1);
        }
    }

    /// Counts rows that are lost.
    fn lose(&self, rows: u64) {
        self.metrics.dropped.inc_by(rows);
        self.lost.fetch_add(rows, Ordering::Relaxed);
    }

    /// Writes what waits to the spool, and from now on whatever comes: a request that was cut off may end
    /// later than all else.
    fn close(&self) {
        {
            // With the queue locked: what does not see it has been put in, and is taken out below.
            let _queue = self.queue();
            self.closed.store(true, Ordering::Relaxed);
        }
        let waiting = self.oldest(usize::MAX);
        let lost = (waiting.len() - self.keep_oldest(&waiting)) as u64;
        self.forget(&waiting);
        self.lose(lost);
    }

    /// Writes as many entries to the spool as it takes, the oldest first; returns how many.
    fn keep_oldest(&self, entries: &[Arc<Entry>]) -> usize {
        if self.keep(entries) {
            return entries.len();
        }
        if entries.len() < 2 {
            return 0;
        }
        let (older, younger) = entries.split_at(entries.len() / 2);
        let kept = self.keep_oldest(older);
        if kept < older.len() { kept } else { kept + self.keep_oldest(younger) }
    }

    /// Sets the gauges.
    pub(crate) fn measure(&self) {
        let spooled = self.spool().map_or(0, |spool| spool.rows());
        self.metrics.queue.set(i64::try_from(self.waiting()).unwrap_or(i64::MAX));
        self.metrics.spool.set(i64::try_from(spooled).unwrap_or(i64::MAX));
    }

    /// What is in memory to sum events up.
    pub(crate) fn sums(&self) -> usize {
        self.summary.entries()
    }

    /// How many entries wait.
    fn waiting(&self) -> usize {
        self.queue().len()
    }

    /// Since when the oldest entry has waited.
    fn oldest_since(&self) -> Option<Instant> {
        self.queue().front().map(|entry| entry.since)
    }

    /// The oldest entries, which stay until [`Audit::forget`].
    fn oldest(&self, count: usize) -> Vec<Arc<Entry>> {
        self.queue().iter().take(count).map(Arc::clone).collect()
    }

    /// Takes entries that are safe out of the queue: the oldest ones, or what is left of them, since
    /// the writer and one that makes room may have made the same ones safe.
    fn forget(&self, entries: &[Arc<Entry>]) {
        let mut queue = self.queue();
        for entry in entries {
            if queue.front().is_some_and(|oldest| Arc::ptr_eq(oldest, entry)) {
                queue.pop_front();
            }
        }
        self.cramped.store(false, Ordering::Relaxed);
    }

    /// Writes entries to the spool, and waits for the disk; false where they are not there.
    fn keep(&self, entries: &[Arc<Entry>]) -> bool {
        // Before the spool is taken: whoever makes room waits for it.
        let rows = texts(entries);
        self.spool().is_some_and(|mut spool| self.append(&mut spool, &rows))
    }

    /// Near the limit of the spool rows of unknown callers are left out, and lost: what is left is for
    /// rows of users.
    fn append(&self, spool: &mut Spool, rows: &[Text]) -> bool {
        let all = || rows.iter().map(|row| &*row.json);
        let is_short = spool.is_short_of(all().map(str::len).sum());
        let kept: Vec<_> = match is_short {
            true => rows.iter().filter(|row| !row.unknown).map(|row| &*row.json).collect(),
            false => all().collect(),
        };
        match spool.append(&kept) {
            Ok(()) => {
                self.metrics.spooled.inc_by(kept.len() as u64);
                if kept.len() < rows.len() {
                    self.lose((rows.len() - kept.len()) as u64);
                }
                true
            }
            Err(error) => {
                self.cramped.store(true, Ordering::Relaxed);
                self.metrics.errors.inc(AuditErrorKind::Spool);
                tracing::debug!(%error, "the spool takes no rows");
                false
            }
        }
    }

    /// Whether the spool is not worth being offered the whole queue.
    fn is_cramped(&self) -> bool {
        self.cramped.load(Ordering::Relaxed)
    }

    /// The oldest rows of the spool, which come again until they are confirmed, and the number of this
    /// look at them.
    fn next_spooled(&self, count: usize) -> (u64, Vec<String>) {
        let Some(mut spool) = self.spool() else { return (0, Vec::new()) };
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) + 1;
        let rows = spool.next(count);
        let damaged = spool.take_damaged();
        self.lose(spool.take_unkept());
        if damaged > 0 {
            self.metrics.errors.inc(AuditErrorKind::Damaged);
            tracing::error!(rows = damaged, "audit rows were damaged on disk and set aside");
        }
        let rows = rows.unwrap_or_else(|error| {
            self.metrics.errors.inc(AuditErrorKind::Spool);
            tracing::error!(%error, "the spool of the audit trail cannot be read");
            Vec::new()
        });
        (turn, rows)
    }

    /// The first rows of a look are settled.
    fn confirm(&self, turn: u64, count: usize) {
        let Some(mut spool) = self.spool() else { return };
        // Once, and only the last look.
        if self.turn.compare_exchange(turn, turn + 1, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        if let Err(error) = spool.confirm(count) {
            self.metrics.errors.inc(AuditErrorKind::Spool);
            tracing::error!(%error, "a file of the spool of the audit trail cannot be deleted");
        }
    }

    /// Sets a row aside that the database refuses for good, or loses it where too many are set aside;
    /// false where the disk does not take it.
    fn reject(&self, row: &str, why: &str) -> bool {
        let Some(rejected) = self.spool().map(|spool| spool.reject(row, why)) else { return false };
        match rejected {
            Ok(()) => tracing::error!(
                error = why,
                "the database refuses an audit row, which is set aside"
            ),
            // Counted, and told of once a minute.
            Err(AppendError::Full { .. }) => self.lose(1),
            Err(AppendError::Io(_)) => return false,
        }
        self.metrics.rejected.inc();
        true
    }

    /// Takes over what processes have left that died.
    fn adopt(&self) {
        if let Some(Err(error)) = self.spool().map(|mut spool| spool.adopt()) {
            self.metrics.errors.inc(AuditErrorKind::Spool);
            tracing::error!(%error, "the spool of the audit trail cannot be read");
        }
    }

    fn is_spool_empty(&self) -> bool {
        self.spool().is_none_or(|spool| spool.is_empty())
    }

    fn spool(&self) -> Option<MutexGuard<'_, Spool>> {
        self.spool.as_ref().map(|spool| spool.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Arc<Entry>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A row as the spool has it.
#[derive(Clone)]
struct Text {
    json: String,
    unknown: bool,
}

fn texts(entries: &[Arc<Entry>]) -> Vec<Text> {
    let text = |entry: &Arc<Entry>| Text { json: writer::text(entry), unknown: entry.unknown };
    entries.iter().map(text).collect()
}
