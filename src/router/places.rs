//! The places of one package: how many of its requests wait at once (for a database, say), and whose turn
//! is next. Shared by all actors of the package.
//!
//! Users take turns. While others wait a user holds a quarter of the places at most. One who is alone leaves a
//! quarter free, so that the next user need not wait for the slow requests of the first.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Instant,
};

use super::handler_actor::Job;
use crate::sync::{AtomicUsize, Mutex, MutexGuard};

/// One of so many parts is what a user may hold while others wait, and what is kept for others.
const PARTS: usize = 4;

pub(super) struct Places {
    limit: usize,
    /// `Table::taken`, to be read without the lock: most handlers never wait.
    taken: AtomicUsize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    taken: usize,
    users: HashMap<Arc<str>, User>,
    /// Users whose requests wait for a place, the next first.
    turns: VecDeque<Arc<str>>,
    /// Requests that have got a place and are about to begin, in this order.
    ready: VecDeque<Job>,
    /// Somebody begins them.
    beginning: bool,
    /// Somebody looks after those whose time is over before their turn comes.
    watched: bool,
}

#[derive(Default)]
struct User {
    taken: usize,
    /// Of `Table::ready`.
    ready: usize,
    /// Oldest first.
    backlog: VecDeque<Job>,
}

impl Places {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, taken: AtomicUsize::new(0), table: Mutex::default() }
    }

    /// Whether nobody holds a place, as with a package whose handlers never wait.
    pub(super) fn are_free(&self) -> bool {
        self.taken.load(Ordering::Relaxed) == 0
    }

    /// Gives a job back that may begin now; else keeps it for its turn. Several may begin at the same time
    /// before one of them takes a place: the limit is exceeded by one for each actor at most.
    pub(super) fn admit(&self, job: Job) -> Option<Job> {
        let mut table = self.table();
        let (held, waits) = match table.users.get(job.user()) {
            Some(user) => (user.taken, user.ready > 0 || !user.backlog.is_empty()),
            None => (0, false),
        };
        // It does not overtake others of its user.
        if !waits && table.has_room(self.limit, held, !table.turns.is_empty()) {
            return Some(job);
        }
        table.keep(job);
        None
    }

    /// Takes a place for a request that has begun, and waits.
    pub(super) fn take(&self, user: &Arc<str>) {
        let mut table = self.table();
        table.take(user);
        self.taken.store(table.taken, Ordering::Relaxed);
    }

    /// Gives a place back, and gives places to those whose turn it is. True: some are about to begin, and
    /// nobody begins them yet. The caller has to, with [`Places::next`].
    pub(super) fn give_back(&self, user: &Arc<str>) -> bool {
        let mut table = self.table();
        table.give_back(user);
        table.turn(self.limit);
        self.taken.store(table.taken, Ordering::Relaxed);
        let idle = !table.beginning && !table.ready.is_empty();
        table.beginning |= idle;
        idle
    }

    /// The next request to begin, which has its place. `begun` is the user of the one before. None: that was
    /// the last.
    pub(super) fn next(&self, begun: Option<&Arc<str>>) -> Option<Job> {
        let mut table = self.table();
        if let Some(user) = begun {
            table.begun(user);
        }
        let next = table.ready.pop_front();
        table.beginning = next.is_some();
        next
    }

    /// Whether requests wait for their turn and nobody looks after their time. The caller has to, with
    /// [`Places::overdue`].
    pub(super) fn are_unwatched(&self) -> bool {
        let mut table = self.table();
        let unwatched = !table.watched && !table.turns.is_empty();
        table.watched |= unwatched;
        unwatched
    }

    /// Takes out the requests that arrived until then, and says when the oldest of the others did. None: no
    /// others wait.
    pub(super) fn overdue(&self, until: Instant) -> (Vec<Job>, Option<Instant>) {
        let mut table = self.table();
        let mut overdue = Vec::new();
        let mut oldest = None;
        let Table { users, turns, .. } = &mut *table;
        turns.retain(|name| {
            let Some(user) = users.get_mut(name) else { return false };
            while let Some(job) = user.backlog.pop_front() {
                let received = job.responder.received();
                if received <= until {
                    overdue.push(job);
                    continue;
                }
                user.backlog.push_front(job);
                oldest = Some(oldest.map_or(received, |oldest: Instant| oldest.min(received)));
                return true;
            }
            if user.is_gone() {
                users.remove(name);
            }
            false
        });
        table.watched = oldest.is_some();
        (overdue, oldest)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Whether a user who holds so many places may have one more.
    fn has_room(&self, limit: usize, held: usize, others_wait: bool) -> bool {
        let free = limit.saturating_sub(self.taken);
        free > 0 && (held < limit.div_ceil(PARTS) || !others_wait && free > limit / PARTS)
    }

    fn keep(&mut self, job: Job) {
        let name = Arc::clone(job.user());
        let user = self.users.entry(Arc::clone(&name)).or_default();
        if user.backlog.is_empty() {
            self.turns.push_back(name);
        }
        user.backlog.push_back(job);
    }

    /// Gives the free places to those whose turn it is. A user who had a turn goes to the end of the row.
    fn turn(&mut self, limit: usize) {
        loop {
            let others_wait = self.turns.len() > 1;
            let may = |name| {
                let user = self.users.get(name);
                user.is_some_and(|user| self.has_room(limit, user.taken, others_wait))
            };
            let Some(turn) = self.turns.iter().position(may) else { return };
            let Some(name) = self.turns.remove(turn) else { return };
            let Some(user) = self.users.get_mut(&name) else { return };
            let Some(job) = user.backlog.pop_front() else { return };
            user.taken += 1;
            user.ready += 1;
            self.taken += 1;
            if !user.backlog.is_empty() {
                self.turns.push_back(name);
            }
            self.ready.push_back(job);
        }
    }

    fn take(&mut self, user: &Arc<str>) {
        self.taken += 1;
        self.users.entry(Arc::clone(user)).or_default().taken += 1;
    }

    fn give_back(&mut self, name: &Arc<str>) {
        self.taken -= 1;
        self.change(name, |user| user.taken -= 1);
    }

    fn begun(&mut self, name: &Arc<str>) {
        self.change(name, |user| user.ready -= 1);
    }

    fn change(&mut self, name: &Arc<str>, change: impl FnOnce(&mut User)) {
        if let Some(user) = self.users.get_mut(name) {
            change(user);
            if user.is_gone() {
                self.users.remove(name);
            }
        }
    }
}

impl User {
    fn is_gone(&self) -> bool {
        self.taken == 0 && self.ready == 0 && self.backlog.is_empty()
    }
}
