//! The leases of this node's connections. One is taken before a connection is let in, by the task of its
//! upgrade, and given back when it is dropped, which the registry does with what it knows of the connection.
//!
//! Nobody waits for a lease to be given back: the `keeper` tells Redis. What went wrong on the way, it finds
//! out by itself: the table here is the truth that Redis is brought to.

use std::{
    collections::VecDeque,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::ledger::{Entered, Ledger};
use crate::{
    config::FailMode,
    hub::{Command, Figures, Outbox},
    protocol::CloseReason,
};

/// Time for Redis to learn that all are given back.
const LAST: Duration = Duration::from_secs(1);
/// Leases that wait to be given back; of more, Redis learns when it is compared with the table.
const BOUND: usize = 10_000;

pub(super) struct Leases {
    pub(super) ledger: Ledger,
    fail_mode: FailMode,
    held: DashMap<Uuid, Held>,
    ended: Mutex<VecDeque<Arc<Outbox>>>,
    /// There is something for the keeper to do.
    pub(super) changed: Notify,
    /// Redis may know other connections than the table.
    unsynced: AtomicBool,
}

struct Held {
    outbox: Arc<Outbox>,
    /// Until then Redis alone decides whether it counts.
    admitted: bool,
    /// What administrators were told last.
    reported: Figures,
}

/// A connection's place among those of its user.
pub(crate) struct Lease {
    leases: Arc<Leases>,
    outbox: Arc<Outbox>,
    standing: Entered,
}

impl Lease {
    /// Whether the limit was asked; else the node's own table has to do.
    pub(crate) fn is_counted(&self) -> bool {
        self.standing == Entered::Counted
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let held = self.leases.held.remove(&self.outbox.id);
        if held.is_some() && self.standing != Entered::Refused {
            self.leases.end(&self.outbox);
        }
    }
}

impl Leases {
    pub(super) fn new(ledger: Ledger, fail_mode: FailMode) -> Self {
        Self {
            ledger,
            fail_mode,
            held: DashMap::new(),
            ended: Mutex::default(),
            changed: Notify::new(),
            unsynced: AtomicBool::new(false),
        }
    }

    /// Takes a lease, or says why its connection is to be refused.
    pub(super) async fn take(self: &Arc<Self>, outbox: &Arc<Outbox>) -> Result<Lease, CloseReason> {
        let held =
            Held { outbox: Arc::clone(outbox), admitted: false, reported: Figures::default() };
        self.held.insert(outbox.id, held);
        let (leases, outbox) = (Arc::clone(self), Arc::clone(outbox));
        let mut lease = Lease { leases, outbox, standing: Entered::Unknown };
        // It may have arrived where there was no answer.
        lease.standing = self.ledger.take(&lease.outbox).await.unwrap_or(Entered::Unknown);
        match lease.standing {
            Entered::Refused => return Err(CloseReason::ConnectionLimit),
            Entered::Unknown if self.ledger.is_limited() && self.fail_mode == FailMode::Closed => {
                self.compare();
                return Err(CloseReason::Unavailable);
            }
            Entered::Unknown | Entered::Counted => {}
        }
        if let Some(mut held) = self.held.get_mut(&lease.outbox.id) {
            held.admitted = true;
        }
        if !lease.is_counted() {
            self.compare();
        }
        Ok(lease)
    }

    fn end(&self, outbox: &Arc<Outbox>) {
        let mut ended = self.ended();
        if self.ledger.is_connected() && ended.len() < BOUND {
            ended.push_back(Arc::clone(outbox));
        } else {
            self.unsynced.store(true, Ordering::Release);
        }
        drop(ended);
        self.changed.notify_one();
    }

    /// Gives back those of all connections that are let in, which stay open for now, and waits until Redis
    /// knows it. One that is slow holds up nobody for long.
    pub(super) async fn give_all_back(&self) {
        for outbox in self.admitted() {
            self.held.remove(&outbox.id);
            self.end(&outbox);
        }
        let told = async {
            while self.ledger.is_connected() && !self.ended().is_empty() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        drop(timeout(LAST, told).await);
    }

    /// Ends connections whose places newer ones took, those too that are not let in yet.
    pub(super) fn replace(&self, ids: &[Uuid]) {
        for id in ids {
            if let Some(held) = self.held.get(id) {
                held.outbox.command(Command::Close(CloseReason::Replaced));
            }
        }
    }

    /// Whether a connection has a lease, or is about to get one.
    pub(super) fn has(&self, id: &str) -> bool {
        Uuid::try_parse(id).is_ok_and(|id| self.held.contains_key(&id))
    }

    /// The connections that are let in.
    pub(super) fn admitted(&self) -> Vec<Arc<Outbox>> {
        let admitted = self.held.iter().filter(|held| held.admitted);
        admitted.map(|held| Arc::clone(&held.outbox)).collect()
    }

    /// Those about which there is something new to tell.
    pub(super) fn news(&self) -> Vec<Arc<Outbox>> {
        let mut news = Vec::new();
        for mut held in self.held.iter_mut() {
            let figures = held.outbox.figures();
            if mem::replace(&mut held.reported, figures) != figures {
                news.push(Arc::clone(&held.outbox));
            }
        }
        news
    }

    /// The first that wait to be given back.
    pub(super) fn next_ended(&self, most: usize) -> Vec<Arc<Outbox>> {
        self.ended().iter().take(most).cloned().collect()
    }

    /// So many were given back. The keeper's alone to call, as nobody else takes any out.
    pub(super) fn given_back(&self, leases: usize) {
        drop(self.ended().drain(..leases));
    }

    /// Has Redis compared with the table.
    pub(super) fn compare(&self) {
        self.unsynced.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// Whether that is still to be done.
    pub(super) fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire)
    }

    /// Whether that is to be done, once.
    pub(super) fn is_to_compare(&self) -> bool {
        self.unsynced.swap(false, Ordering::AcqRel)
    }

    /// Whether none is held, and Redis was told of all.
    pub(super) fn is_idle(&self) -> bool {
        self.held.is_empty() && self.ended().is_empty() && !self.is_unsynced()
    }

    fn ended(&self) -> MutexGuard<'_, VecDeque<Arc<Outbox>>> {
        // Nothing that panics happens while the lock is held.
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
