//! The places of one package: how many of its requests wait at once (for a database, say), and whose turn
//! is next. Shared by all actors of the package.
//!
//! Users take turns. While others wait a user holds a quarter of the places at most. One who is alone leaves a
//! quarter free, so that the next user need not wait for the slow requests of the first.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, PoisonError, atomic::Ordering},
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
}

#[derive(Default)]
struct User {
    taken: usize,
    /// Oldest first.
    backlog: VecDeque<Job>,
}

/// A place that a request holds.
pub(super) struct Place {
    places: Arc<Places>,
    user: Option<Arc<str>>,
}

impl Places {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, taken: AtomicUsize::new(0), table: Mutex::default() }
    }

    /// Whether all are, as with a package that never waits.
    pub(super) fn are_free(&self) -> bool {
        self.taken.load(Ordering::Relaxed) == 0
    }

    /// Gives a job back that may begin now; else keeps it for its turn. Several may begin at the same time
    /// before one of them takes a place: the limit is exceeded by one for each actor at most.
    pub(super) fn admit(&self, job: Job) -> Option<Job> {
        let mut table = self.table();
        let user = table.users.get(job.user());
        let (held, waits) = user.map_or((0, false), |it| (it.taken, !it.backlog.is_empty()));
        // It does not overtake others of its user.
        if !waits && table.has_room(self.limit, held, !table.turns.is_empty()) {
            return Some(job);
        }
        table.keep(job);
        None
    }

    /// Takes a place for a request that has begun, and waits.
    pub(super) fn take(self: &Arc<Self>, user: &Arc<str>) -> Place {
        let mut table = self.table();
        table.take(user);
        self.taken.store(table.taken, Ordering::Relaxed);
        Place { places: Arc::clone(self), user: Some(Arc::clone(user)) }
    }

    /// Takes places for those whose turn it is.
    fn next(self: &Arc<Self>, table: &mut Table) -> Vec<(Job, Place)> {
        let mut next = Vec::new();
        while let Some(job) = table.next(self.limit) {
            table.take(job.user());
            let user = Some(Arc::clone(job.user()));
            next.push((job, Place { places: Arc::clone(self), user }));
        }
        next
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Gives the place back, and says who may begin now.
    pub(super) fn pass_on(mut self) -> Vec<(Job, Place)> {
        let places = Arc::clone(&self.places);
        let mut table = places.table();
        if let Some(user) = self.user.take() {
            table.give_back(&user);
        }
        let next = places.next(&mut table);
        places.taken.store(table.taken, Ordering::Relaxed);
        next
    }
}

/// Of a task that was cut off by the end of the server: nobody begins any more.
impl Drop for Place {
    fn drop(&mut self) {
        if let Some(user) = self.user.take() {
            let mut table = self.places.table();
            table.give_back(&user);
            self.places.taken.store(table.taken, Ordering::Relaxed);
        }
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

    /// The job whose turn it is. Its user goes to the end of the row.
    fn next(&mut self, limit: usize) -> Option<Job> {
        let others_wait = self.turns.len() > 1;
        let may = |name| {
            self.users.get(name).is_some_and(|user| self.has_room(limit, user.taken, others_wait))
        };
        let turn = self.turns.iter().position(may)?;
        let name = self.turns.remove(turn)?;
        let user = self.users.get_mut(&name)?;
        let job = user.backlog.pop_front();
        if !user.backlog.is_empty() {
            self.turns.push_back(name);
        }
        job
    }

    fn take(&mut self, user: &Arc<str>) {
        self.taken += 1;
        self.users.entry(Arc::clone(user)).or_default().taken += 1;
    }

    fn give_back(&mut self, name: &Arc<str>) {
        self.taken -= 1;
        if let Some(user) = self.users.get_mut(name) {
            user.taken -= 1;
            if user.taken == 0 && user.backlog.is_empty() {
                self.users.remove(name);
            }
        }
    }
}
