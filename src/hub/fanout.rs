//! The way of a push to its connections: in the order in which pushes were accepted, and in chunks, between
//! which the sessions and everybody else on the core get their turn.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, PoisonError},
};

use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Hub, Outbox};
use crate::{
    protocol::Push,
    sync::{Mutex, MutexGuard, spawn, yield_now},
};

/// Connections of a chunk. Each session that was woken makes a system call: 64 take less than a millisecond.
pub(super) const CHUNK: usize = 64;
/// Pushes that wait, before whoever pushes waits.
const WAITING: usize = 64;

/// Whom a push is for.
#[derive(Debug, Clone)]
pub(crate) enum Recipients {
    /// Every connection but one.
    All { except: Option<Uuid> },
    /// Every connection of a user, by `sub`.
    User(Arc<str>),
}

/// The pushes that are on their way.
pub(super) struct Fanout {
    room: Semaphore,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    pushes: VecDeque<(Push, Recipients)>,
    /// Somebody delivers.
    running: bool,
}

impl Fanout {
    pub(super) fn new() -> Self {
        Self { room: Semaphore::new(WAITING), waiting: Mutex::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hub {
    /// Has a push delivered after all that were accepted before. Waits while too many are.
    pub(crate) async fn push(self: &Arc<Self>, push: Push, to: Recipients) {
        // Given back when it is delivered. The error is that of one that was closed, which this never is.
        if let Ok(room) = self.fanout.room.acquire().await {
            room.forget();
        }
        let mut waiting = self.fanout.waiting();
        waiting.pushes.push_back((push, to));
        if !mem::replace(&mut waiting.running, true) {
            drop(waiting);
            let running = Running { hub: Arc::clone(self), done: false };
            spawn(running.deliver());
        }
    }

    /// The connections that a push is for, in no order.
    fn recipients(&self, to: &Recipients) -> Vec<Arc<Outbox>> {
        match to {
            Recipients::All { except } => {
                let others = self.connections.iter().filter(|it| Some(*it.key()) != *except);
                others.map(|it| Arc::clone(it.value())).collect()
            }
            Recipients::User(subject) => self.connections(Some(subject)),
        }
    }
}

/// Delivers until nothing waits.
struct Running {
    hub: Arc<Hub>,
    done: bool,
}

impl Running {
    async fn deliver(mut self) {
        while let Some((push, to)) = self.next() {
            self.hub.fanout.room.add_permits(1);
            let recipients = self.hub.recipients(&to);
            let mut chunks = recipients.chunks(CHUNK).peekable();
            while let Some(chunk) = chunks.next() {
                for outbox in chunk {
                    self.hub.deliver(outbox, &push);
                }
                if chunks.peek().is_some() {
                    yield_now().await;
                }
            }
        }
    }

    fn next(&mut self) -> Option<(Push, Recipients)> {
        let mut waiting = self.hub.fanout.waiting();
        let next = waiting.pushes.pop_front();
        self.done = next.is_none();
        waiting.running = !self.done;
        next
    }
}

/// Where it was cut off the next push starts another one.
impl Drop for Running {
    fn drop(&mut self) {
        if !self.done {
            self.hub.fanout.waiting().running = false;
        }
    }
}

#[cfg(test)]
mod tests;
