//! What the trail does to its spool. All of it waits for the disk, or for others that do: it is called on
//! threads that may block, never on a worker.

use std::{
    io,
    ops::{Deref, DerefMut},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    Audit, Entry,
    spool::{AppendError, Spool},
    writer,
};
use crate::metrics::AuditErrorKind;

/// The spool, and what can be seen of it without waiting for its lock.
pub(super) struct Disk {
    spool: Mutex<Spool>,
    /// Held by the one that moves the queue: two would move the same rows.
    moving: Mutex<()>,
    rows: AtomicU64,
    empty: AtomicBool,
}

impl Disk {
    /// Opens the spool, with what an earlier process left in it.
    pub(super) fn open(folder: &Path, limit: u64) -> io::Result<Self> {
        let spool = Spool::open(folder, limit)?;
        let (rows, empty) = (AtomicU64::new(spool.rows()), AtomicBool::new(spool.is_empty()));
        Ok(Self { spool: Mutex::new(spool), moving: Mutex::default(), rows, empty })
    }

    /// Rows that wait in it.
    pub(super) fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Whether none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.empty.load(Ordering::Acquire)
    }

    fn lock(&self) -> Held<'_> {
        Held { spool: self.spool.lock().unwrap_or_else(PoisonError::into_inner), disk: self }
    }
}

/// The spool while it is locked; afterwards its sizes are known again.
struct Held<'a> {
    spool: MutexGuard<'a, Spool>,
    disk: &'a Disk,
}

impl Deref for Held<'_> {
    type Target = Spool;

    fn deref(&self) -> &Spool {
        &self.spool
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Spool {
        &mut self.spool
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.disk.rows.store(self.spool.rows(), Ordering::Relaxed);
        self.disk.empty.store(self.spool.is_empty(), Ordering::Release);
    }
}

/// A row as the spool has it.
struct Text {
    json: String,
    unknown: bool,
}

fn texts(entries: &[Arc<Entry>]) -> Vec<Text> {
    let text = |entry: &Arc<Entry>| Text { json: writer::text(entry), unknown: entry.unknown };
    entries.iter().map(text).collect()
}

impl Audit {
    /// Moves the whole queue into the spool, or else the oldest few: near its limit it may take a few where
    /// it does not take all. False where nothing fits.
    pub(super) fn move_to_spool(&self, few: usize) -> bool {
        let Some(disk) = &self.disk else { return false };
        let _alone = disk.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.oldest(usize::MAX);
        let few = &waiting[..few.min(waiting.len())];
        // The whole queue is not encoded again and again for a spool that is full.
        let parts: &[&[_]] = if self.is_cramped() { &[few] } else { &[&waiting, few] };
        let kept = parts.iter().find(|part| self.keep(part));
        kept.map(|part| self.forget(part)).is_some()
    }

    /// Writes as many entries to the spool as it takes, the oldest first; returns how many.
    pub(super) fn keep_oldest(&self, entries: &[Arc<Entry>]) -> usize {
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

    /// Writes entries to the spool, and waits for the disk; false where they are not there.
    pub(super) fn keep(&self, entries: &[Arc<Entry>]) -> bool {
        // Before the spool is locked: others wait for it.
        let rows = texts(entries);
        self.spool().is_some_and(|mut spool| self.append(&mut spool, &rows))
    }

    /// Near the limit of the spool rows of unknown callers are left out, and lost: what is left is for
    /// rows of users.
    fn append(&self, spool: &mut Held<'_>, rows: &[Text]) -> bool {
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
                // They need not wait for room: there is none.
                self.space.wake();
                self.metrics.errors.inc(AuditErrorKind::Spool);
                tracing::debug!(%error, "the spool takes no rows");
                false
            }
        }
    }

    /// The oldest rows of the spool, which come again until they are confirmed, and the number of this
    /// look at them.
    pub(super) fn next_spooled(&self, count: usize) -> (u64, Vec<String>) {
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
    pub(super) fn confirm(&self, turn: u64, count: usize) {
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
    pub(super) fn reject(&self, row: &str, why: &str) -> bool {
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
    pub(super) fn adopt(&self) {
        if let Some(Err(error)) = self.spool().map(|mut spool| spool.adopt()) {
            self.metrics.errors.inc(AuditErrorKind::Spool);
            tracing::error!(%error, "the spool of the audit trail cannot be read");
        }
    }

    fn spool(&self) -> Option<Held<'_>> {
        self.disk.as_ref().map(Disk::lock)
    }
}
