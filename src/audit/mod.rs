//! The audit trail: who did what, or was kept from it.
//!
//! Whoever answers a request or ends a connection records an [`Event`] and goes on at once. The events
//! wait in a bounded queue; what was asked is redacted before (`document`, `secrets`). The `writer`, an
//! actor, makes rows of them (`redact`) and writes them in batches to the database, or to the `spool` on
//! disk while the database is away or slow. A request that must be recorded takes `room` in the queue
//! before it begins.

mod disk;
mod document;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod logins;
mod own;
mod redact;
mod retention;
mod room;
mod secrets;
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
use tokio::{sync::Notify, time::timeout_at};
use uuid::Uuid;

pub(crate) use document::{Recorded, UNKNOWN};
pub(crate) use logins::session_data;
pub(crate) use own::{Deed, leave, leave_migrated};
pub(crate) use redact::cut;
pub(crate) use secrets::path_without_secrets;
pub(crate) use spool::has_spooled_rows;
pub(crate) use summary::NAME_BYTES;
pub(crate) use writer::AuditWriter;

use crate::{
    auth::{Identity, Remote},
    config::AuditConfig,
    metrics::{AuditMetrics, AuditOutcome},
    protocol::CloseReason,
};
use disk::Disk;
use document::MAX_DATA;
use logins::Sessions;
use room::{Part, Room, Space};
use summary::{Scope, Summary};

/// Bytes of a request's row beside its data, until they are known: names, roles, what the client was told.
const ESTIMATE: usize = 512;
/// Time that a request waits for room in the queue. It gets some as soon as the disk has taken what waits.
pub(crate) const ROOM_PATIENCE: Duration = Duration::from_secs(1);
/// What the row says of a request that ends with the server.
pub(crate) const CUT_OFF: &str =
    "The server stopped before the request was through: what came of it is unknown";

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
    pub(crate) data: Option<Recorded>,
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
    /// No client: the server itself, or an operator.
    Server,
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

    /// Whether nobody known is behind it, or behind what it sums up.
    fn is_unknown(&self, scope: Option<Scope>) -> bool {
        let failed = || self.user.is_none() && self.outcome != AuditOutcome::Success;
        scope.map_or_else(|| failed() && self.cause != Cause::Server, Scope::is_unknown)
    }

    /// Bytes that the event keeps in memory. The user is shared with others, but may outlive them.
    fn bytes(&self) -> usize {
        let of_user = |user: &Identity| {
            let roles: usize = user.roles.iter().map(|role| role.len()).sum();
            user.subject.len() + user.username.len() + roles
        };
        let texts = [self.claimed.as_deref(), self.error.as_deref(), self.data.as_deref()];
        let texts: usize = texts.into_iter().flatten().map(str::len).sum();
        texts + self.resource.len() + self.user.as_deref().map_or(0, of_user)
    }

    /// Whether a user was kept from something.
    fn is_denial(&self) -> bool {
        matches!(self.cause, Cause::User | Cause::Breach)
            || self.outcome == AuditOutcome::PermissionDenied
    }
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
        Self::with_id(Uuid::now_v7(), event, scope)
    }

    fn with_id(id: Uuid, event: Event, scope: Option<Scope>) -> Arc<Self> {
        let unknown = event.is_unknown(scope);
        let (at, since) = (Timestamp::now(), Instant::now());
        Arc::new(Self { id, at, since, event, scope, unknown })
    }
}

/// An entry that waits in memory, and the room that it takes.
struct Waiting {
    entry: Arc<Entry>,
    _room: Room,
}

/// What a request that must be recorded has in hand before it begins: room for its row. None where the row
/// needs none, or where no room can be had and the row may be lost.
#[derive(Default)]
pub(crate) struct Reserved(Option<Room>);

/// The trail as its recorders see it.
pub(crate) struct Audit {
    config: AuditConfig,
    metrics: AuditMetrics,
    /// Logins that have their row.
    sessions: Sessions,
    /// What shares rows, until its interval ends.
    summary: Summary,
    /// Oldest first. An entry leaves when it is safe: in the database or in the spool.
    queue: Mutex<VecDeque<Waiting>>,
    /// What of the queue's bounds is taken, by entries and by requests that will have one.
    space: Arc<Space>,
    /// Told of a first entry and of each full batch.
    filled: Notify,
    /// Told of rows in the spool.
    spooled: Notify,
    /// The database does not take rows.
    away: AtomicBool,
    /// The spool has refused rows, and none have left the queue since: it is offered a few at a time, and
    /// nobody waits for room.
    cramped: AtomicBool,
    /// The server stops: entries go straight to the spool.
    closed: AtomicBool,
    /// Counts the looks into the spool. What was read before the last one is not confirmed: a replayer
    /// that was ended may still be at it when its successor reads the same rows.
    turn: AtomicU64,
    /// None where there is no trail.
    disk: Option<Disk>,
    /// Rows lost and not complained about yet.
    lost: AtomicU64,
}

impl Audit {
    /// Opens the spool, with what an earlier process left in it.
    pub(crate) fn open(config: &AuditConfig, metrics: AuditMetrics) -> io::Result<Self> {
        let disk = match config.enabled {
            true => Some(Disk::open(&config.spool, config.spool_limit)?),
            false => None,
        };
        Ok(Self {
            config: config.clone(),
            metrics,
            sessions: Sessions::new(),
            summary: Summary::new(config),
            queue: Mutex::default(),
            space: Space::new(config.queue, config.queue_bytes),
            filled: Notify::new(),
            spooled: Notify::new(),
            away: AtomicBool::new(false),
            cramped: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            disk,
            lost: AtomicU64::new(0),
        })
    }

    /// Whether there is a trail.
    pub(crate) fn is_on(&self) -> bool {
        self.disk.is_some()
    }

    /// Whether reads belong into it.
    pub(crate) fn has_reads(&self) -> bool {
        self.is_on() && self.config.reads
    }

    /// Room for the row of a request with so much data, if there is some now. The request may begin with it.
    pub(crate) fn try_reserve(&self, data: usize, known: bool) -> Option<Reserved> {
        if !self.is_on() {
            return Some(Reserved(None));
        }
        let part = if known { Part::Request } else { Part::Unknown };
        match self.space.take(data.min(MAX_DATA) + ESTIMATE, part) {
            Some(room) => Some(Reserved(Some(room))),
            None => self.has_no_room_for_anybody().then_some(Reserved(None)),
        }
    }

    /// Waits for room; none where there is none in time: the request is not to begin.
    pub(crate) async fn reserve(
        &self,
        data: usize,
        known: bool,
        until: Instant,
    ) -> Option<Reserved> {
        let part = if known { Part::Request } else { Part::Unknown };
        let reserved = self.space.wait(part, || self.try_reserve(data, known));
        timeout_at(until.into(), reserved).await.ok()
    }

    /// Counts a request that is refused because it has no room.
    pub(crate) fn count_refused(&self) {
        self.metrics.refused.inc();
    }

    /// Whether waiting for room is no use: the spool refuses rows, or the server stops.
    fn has_no_room_for_anybody(&self) -> bool {
        self.is_cramped() || self.closed.load(Ordering::Relaxed)
    }

    /// Records an event that cannot wait: as a row, or as a part of one that sums up many. Where the queue is
    /// full, it is summed up too.
    pub(crate) fn record(&self, event: Event) {
        self.record_in(Reserved(None), event);
    }

    /// Records what came of a request that has reserved room.
    pub(crate) fn record_in(&self, reserved: Reserved, event: Event) {
        if !self.is_on() {
            return;
        }
        if event.cause == Cause::Server {
            return self.enter_own(Entry::new(event, None));
        }
        self.metrics.actions.inc(event.outcome);
        match self.summary.take(event) {
            Some(event) => self.enter(Uuid::now_v7(), event, None, reserved.0),
            None => self.metrics.aggregated.inc(),
        }
    }

    /// Makes rows of what was summed up. They wait for room.
    async fn sum_up(&self) {
        for sum in self.summary.end() {
            let scope = sum.scope;
            let event = sum.into_event();
            let part = if scope.is_unknown() { Part::Unknown } else { Part::Known };
            let room = self.space.wait(part, || match self.space.take(event.bytes(), part) {
                None if !self.has_no_room_for_anybody() => None,
                room => Some(room),
            });
            let room = room.await;
            self.enter(Uuid::now_v7(), event, Some(scope), room);
        }
    }

    /// Makes rows of the last sums. These are few, and nobody would come back for them.
    fn sum_up_at_once(&self) {
        self.summary.close();
        for sum in self.summary.end() {
            let scope = sum.scope;
            let event = sum.into_event();
            let room = self.space.take_over(event.bytes());
            self.enter(Uuid::now_v7(), event, Some(scope), Some(room));
        }
    }

    /// Puts an entry into the queue, in the room that it has or finds.
    fn enter(&self, id: Uuid, event: Event, scope: Option<Scope>, room: Option<Room>) {
        let unknown = event.is_unknown(scope);
        let bytes = event.bytes();
        let room = match room {
            Some(mut room) => {
                room.fit(bytes);
                Some(room)
            }
            None => self.space.take(bytes, if unknown { Part::Unknown } else { Part::Known }),
        };
        if room.is_none() && !self.closed.load(Ordering::Relaxed) {
            return self.overflow(event, scope);
        }
        self.push(Entry::with_id(id, event, scope), room);
    }

    /// Enters a server's own row, whatever waits: these are few.
    fn enter_own(&self, entry: Arc<Entry>) {
        let room = self.space.take_over(entry.event.bytes());
        self.push(entry, Some(room));
    }

    fn push(&self, entry: Arc<Entry>, room: Option<Room>) {
        let mut queue = self.queue();
        let room = room.filter(|_| !self.closed.load(Ordering::Relaxed));
        let Some(room) = room else {
            drop(queue);
            // The server has stopped, and nobody is kept waiting.
            let kept = self.keep(&[entry]);
            return self.lose(u64::from(!kept));
        };
        queue.push_back(Waiting { entry, _room: room });
        let waiting = queue.len();
        drop(queue);
        if waiting == 1 || waiting.is_multiple_of(self.config.batch_size) {
            self.filled.notify_one();
        }
    }

    /// What becomes of an event for which there is no room: while the disk is slow it is summed up, and lost
    /// where the spool refuses rows.
    fn overflow(&self, event: Event, scope: Option<Scope>) {
        if scope.is_some() || self.is_cramped() {
            return self.lose(1);
        }
        match self.summary.absorb(event) {
            None => self.metrics.aggregated.inc(),
            // The server is about to stop.
            Some(event) => {
                let room = self.space.take_over(event.bytes());
                self.enter(Uuid::now_v7(), event, None, Some(room));
            }
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
        self.space.wake();
        let waiting = self.oldest(usize::MAX);
        let lost = (waiting.len() - self.keep_oldest(&waiting)) as u64;
        self.forget(&waiting);
        self.lose(lost);
    }

    /// Sets the gauges. Waits for no disk.
    pub(crate) fn measure(&self) {
        let count = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
        self.metrics.queue.set(count(self.waiting() as u64));
        self.metrics.queue_bytes.set(count(self.space.taken().1));
        self.metrics.spool.set(count(self.disk.as_ref().map_or(0, Disk::rows)));
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
        self.queue().front().map(|waiting| waiting.entry.since)
    }

    /// The oldest entries, which stay until [`Audit::forget`].
    fn oldest(&self, count: usize) -> Vec<Arc<Entry>> {
        self.queue().iter().take(count).map(|waiting| Arc::clone(&waiting.entry)).collect()
    }

    /// Takes entries that are safe out of the queue: the oldest ones, or what is left of them, since
    /// the writer and the one that makes room may have made the same ones safe.
    fn forget(&self, entries: &[Arc<Entry>]) {
        let mut gone = Vec::with_capacity(entries.len());
        let mut queue = self.queue();
        for entry in entries {
            let is_oldest = |oldest: &mut Waiting| Arc::ptr_eq(&oldest.entry, entry);
            gone.extend(queue.pop_front_if(is_oldest));
        }
        drop(queue);
        if !gone.is_empty() {
            self.cramped.store(false, Ordering::Relaxed);
        }
        // Gives their room back, which wakes others: not while they would find the queue locked.
        drop(gone);
    }

    /// Whether the spool refuses rows.
    fn is_cramped(&self) -> bool {
        self.cramped.load(Ordering::Relaxed)
    }

    fn is_spool_empty(&self) -> bool {
        self.disk.as_ref().is_none_or(Disk::is_empty)
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
