//! The actor that makes rows safe: a batch at a time into the database, or into the spool while the
//! database is away or slow, and from the spool into the database when it is back.
//!
//! An entry leaves the queue, and a row the spool, only when it is safe somewhere else. So an actor that
//! ends in the middle loses nothing: its successor begins the same batch again, and the database passes
//! over a row whose id it knows.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SpawnErr};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout, timeout_at},
};

use super::{Audit, Entry, redact, retention};
use crate::{
    metrics::AuditErrorKind,
    store::{Action, Store},
    task::{self, Task},
};

/// Between two tries of a database that is away, or of a disk that fails.
const RETRY: Duration = Duration::from_millis(250);
/// Time for the last rows to go into the database, when the server stops.
const LAST: Duration = Duration::from_secs(5);
/// Time for a statement of the spool, behind which nobody waits.
const PATIENCE: Duration = Duration::from_secs(10);
/// Silence after which it is looked whether a process has died and left a spool.
const ADOPTION: Duration = Duration::from_secs(30);
/// Between two lines about rows that were lost.
const COMPLAINT: Duration = Duration::from_secs(60);

/// Writes the trail, and begins anew where its predecessor ended.
pub(crate) struct AuditWriter {
    audit: Arc<Audit>,
    store: Arc<Store>,
    /// As rows of this server name it.
    node: Arc<str>,
}

/// Ends with the actor.
pub(crate) struct Tasks(#[expect(dead_code, reason = "held to be dropped")] Vec<Task>);

impl AuditWriter {
    /// Starts one under `supervisor`.
    pub(crate) async fn start(
        audit: Arc<Audit>,
        store: Arc<Store>,
        node: Arc<str>,
        supervisor: ActorCell,
    ) -> Result<ActorCell, SpawnErr> {
        let writer = Self { audit, store, node };
        let (actor, _) = Actor::spawn_linked(None, writer, (), supervisor).await?;
        Ok(actor.get_cell())
    }

    /// Writes what still waits, when the actor has been told to end: into the database as far as time
    /// allows, the rest into the spool. What is recorded later goes there too.
    pub(crate) async fn finish(audit: &Arc<Audit>, store: &Arc<Store>) {
        audit.sum_up_at_once();
        let mut writer = Writer::new(Arc::clone(audit), Arc::clone(store));
        writer.patience = LAST;
        writer.fresh = Duration::MAX;
        let all = async { while audit.waiting() > 0 && writer.write().await {} };
        drop(timeout(LAST, all).await);
        let last = Arc::clone(audit);
        drop(spawn_blocking(move || last.close()).await);
        writer.complained = None;
        writer.complain();
    }
}

impl Actor for AuditWriter {
    type Msg = ();
    type State = Tasks;
    type Arguments = ();

    async fn pre_start(&self, myself: ActorRef<()>, (): ()) -> Result<Tasks, ActorProcessingErr> {
        let parts = || (Arc::clone(&self.audit), Arc::clone(&self.store));
        let (audit, store) = parts();
        let mut tasks = vec![task::owned(&myself, Writer::new(audit, store).run())];
        tasks.push(task::owned(&myself, sum_up(Arc::clone(&self.audit))));
        let (audit, store) = parts();
        tasks.push(task::owned(&myself, Replayer(Rows { audit, store }).run()));
        let (audit, store) = parts();
        tasks.push(task::owned(&myself, relieve(Rows { audit, store })));
        if let Some(keep) = self.audit.config.retention {
            let ((audit, store), node) = (parts(), Arc::clone(&self.node));
            tasks.push(task::owned(&myself, retention::run(audit, store, node, keep)));
        }
        Ok(Tasks(tasks))
    }
}

/// Has rows made of what is summed up, an interval at a time.
async fn sum_up(audit: Arc<Audit>) {
    loop {
        audit.summary.ended().await;
        let summed = Arc::clone(&audit);
        // In a task of its own: what was summed up is in its hands alone. The panic hook has logged a panic.
        drop(tokio::spawn(async move { summed.sum_up().await }).await);
    }
}

/// Moves the queue into the spool while it is nearly full, whatever the writer waits for.
async fn relieve(rows: Rows) {
    loop {
        rows.audit.space.until_pressed().await;
        if rows.audit.waiting() == 0 {
            // Requests that run have all of it.
            continue;
        }
        let few = rows.audit.config.batch_size;
        let moved = rows.spool(move |audit| audit.move_to_spool(few)).await.unwrap_or(false);
        rows.audit.spooled.notify_one();
        if !moved {
            sleep(RETRY).await;
        }
    }
}

/// The way into the database.
struct Rows {
    audit: Arc<Audit>,
    store: Arc<Store>,
}

/// Why rows are not in the database.
enum Refused {
    /// It is away, or too slow.
    Away,
    /// One of them is not to its liking.
    Data(String),
}

impl Rows {
    async fn insert(&self, rows: Vec<Action>, patience: Duration) -> Result<(), Refused> {
        let metrics = &self.audit.metrics;
        let (count, started) = (rows.len(), Instant::now());
        let insert = self.store.insert_actions(rows, self.audit.config.batch_size);
        let error = match timeout(patience, insert).await {
            Ok(Ok(())) => {
                metrics.written.inc_by(count as u64);
                metrics.batch_size.observe(count as f64);
                metrics.duration.observe(started.elapsed().as_secs_f64());
                self.is_back();
                return Ok(());
            }
            Ok(Err(error)) if error.is_about_data() => {
                metrics.errors.inc(AuditErrorKind::Refused);
                self.is_back();
                return Err(Refused::Data(error.to_string()));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {patience:?}"),
        };
        metrics.errors.inc(AuditErrorKind::Database);
        if !self.audit.away.swap(true, Ordering::Relaxed) {
            tracing::warn!(error, "audit rows go to the spool until the database takes them");
        }
        Err(Refused::Away)
    }

    fn is_back(&self) {
        if self.audit.away.swap(false, Ordering::Relaxed) {
            tracing::info!("the database takes audit rows again");
        }
    }

    /// Does something to the spool, which blocks.
    async fn spool<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Audit) -> T + Send + 'static,
    ) -> Option<T> {
        let audit = Arc::clone(&self.audit);
        // The panic hook has logged a panic.
        spawn_blocking(move || work(&audit)).await.ok()
    }
}

/// From the queue into the database or into the spool.
struct Writer {
    rows: Rows,
    /// Time for the database.
    patience: Duration,
    /// The age up to which rows are tried on the database. What waited longer goes to the spool, or the
    /// promise of `AUDIT_BATCH_TIMEOUT` would be broken.
    fresh: Duration,
    /// Rows that are written at once.
    full: usize,
    complained: Option<Instant>,
}

impl Writer {
    fn new(audit: Arc<Audit>, store: Arc<Store>) -> Self {
        // A row waits half of the time for others, and may then take a quarter in the database: the
        // last quarter is for the row that came while a statement before it was running.
        let limit = audit.config.batch_timeout;
        let (batch, queue) = (audit.config.batch_size, audit.config.queue);
        // As many as leave half of the queue to those that come meanwhile.
        let batches = store.batches_at_once().min(queue / 2 / batch).max(1);
        Self {
            rows: Rows { audit, store },
            full: batch * batches,
            patience: limit / 4,
            fresh: limit * 5 / 8,
            complained: None,
        }
    }

    async fn run(mut self) {
        loop {
            self.until_due().await;
            if !self.write().await {
                sleep(RETRY).await;
            }
            self.complain();
        }
    }

    /// Waits for all that are written at once, or for a row that has waited long enough.
    async fn until_due(&self) {
        let audit = &self.rows.audit;
        let linger = audit.config.batch_timeout / 2;
        while audit.waiting() < self.full {
            match audit.oldest_since() {
                None => audit.filled.notified().await,
                Some(since) => {
                    let due = since + linger;
                    if timeout_at(due.into(), audit.filled.notified()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Makes the oldest rows safe; false where nothing takes them.
    async fn write(&mut self) -> bool {
        let audit = &self.rows.audit;
        let batch = audit.oldest(self.full);
        let Some(first) = batch.first() else { return true };
        let fresh = first.since.elapsed() < self.fresh;
        if fresh && self.insert(&batch).await {
            return true;
        }
        // All that wait, since one more of them costs next to nothing.
        let size = batch.len();
        let kept = self.rows.spool(move |audit| audit.move_to_spool(size)).await.unwrap_or(false);
        // Also where it failed: the replayer finds out that the database is back.
        audit.spooled.notify_one();
        // Late is better than never.
        kept || (!fresh && self.insert(&batch).await)
    }

    /// Inserts a batch. Where the database refuses a row, the batch is halved until that row is alone and
    /// can be set aside: the others need not go through the disk. The oldest are always first, as they
    /// leave the queue in their order.
    async fn insert(&self, batch: &[Arc<Entry>]) -> bool {
        let audit = &self.rows.audit;
        let is_fresh = |part: &[Arc<Entry>]| part[0].since.elapsed() < self.fresh;
        let began_fresh = is_fresh(batch);
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            let late = began_fresh && !is_fresh(part);
            if late || audit.away.load(Ordering::Relaxed) {
                return false;
            }
            let rows = part.iter().map(|entry| redact::row(entry)).collect();
            match self.rows.insert(rows, self.patience).await {
                Ok(()) => audit.forget(part),
                Err(Refused::Away) => return false,
                Err(Refused::Data(why)) if part.len() == 1 => {
                    let row = text(&part[0]);
                    let set_aside = self.rows.spool(move |audit| audit.reject(&row, &why)).await;
                    if set_aside != Some(true) {
                        return false;
                    }
                    audit.forget(part);
                }
                Err(Refused::Data(_)) => {
                    let (older, younger) = part.split_at(part.len() / 2);
                    parts.extend([younger, older]);
                }
            }
        }
        true
    }

    fn complain(&mut self) {
        if self.complained.is_some_and(|at| at.elapsed() < COMPLAINT) {
            return;
        }
        let rows = self.rows.audit.lost.swap(0, Ordering::Relaxed);
        if rows > 0 {
            self.complained = Some(Instant::now());
            tracing::error!(rows, "audit rows are lost: neither database nor spool takes them");
        }
    }
}

/// From the spool into the database, in their order.
struct Replayer(Rows);

impl Replayer {
    async fn run(self) {
        let audit = &self.0.audit;
        loop {
            if audit.is_spool_empty() {
                self.leave_it_to_the_writer();
                if timeout(ADOPTION, audit.spooled.notified()).await.is_err() {
                    self.0.spool(Audit::adopt).await;
                }
            } else if !self.replay().await {
                sleep(RETRY).await;
            }
        }
    }

    /// To find out that the database is back, where no row can be written here that would tell.
    fn leave_it_to_the_writer(&self) {
        self.0.audit.away.store(false, Ordering::Relaxed);
    }

    /// Replays a batch; false where that cannot go on yet.
    async fn replay(&self) -> bool {
        let size = self.0.audit.config.batch_size;
        let next = self.0.spool(move |audit| audit.next_spooled(size)).await;
        let Some((turn, rows)) = next else { return false };
        if rows.is_empty() {
            self.leave_it_to_the_writer();
            return false;
        }
        let settled = match self.insert(&rows).await {
            Ok(()) => rows.len(),
            Err(Refused::Away) => 0,
            Err(Refused::Data(_)) => self.one_by_one(&rows).await,
        };
        self.0.spool(move |audit| audit.confirm(turn, settled)).await;
        settled > 0
    }

    async fn insert(&self, rows: &[String]) -> Result<(), Refused> {
        let read = rows.iter().map(|row| serde_json::from_str(row)).collect::<Result<_, _>>();
        let rows = read.map_err(|error| {
            self.0.audit.metrics.errors.inc(AuditErrorKind::Refused);
            Refused::Data(error.to_string())
        })?;
        self.0.insert(rows, PATIENCE).await
    }

    /// Keeps a row that the database refuses from holding up the others; returns how many are settled.
    async fn one_by_one(&self, rows: &[String]) -> usize {
        for (settled, row) in rows.iter().enumerate() {
            match self.insert(std::slice::from_ref(row)).await {
                Ok(()) => {}
                Err(Refused::Away) => return settled,
                Err(Refused::Data(why)) => {
                    let row = row.clone();
                    let kept = self.0.spool(move |audit| audit.reject(&row, &why)).await;
                    if kept != Some(true) {
                        self.leave_it_to_the_writer();
                        return settled;
                    }
                }
            }
        }
        rows.len()
    }
}

/// A row as it is stored: JSON in one line.
pub(super) fn text(entry: &Entry) -> String {
    serde_json::to_string(&redact::row(entry)).expect("a row has nothing that JSON lacks")
}
