//! The way of a push to its connections: in the order in which pushes were accepted, and in chunks, between
//! which the sessions and everybody else on the core get their turn.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, PoisonError},
    thread,
};

use tokio::sync::Notify;
use uuid::Uuid;

use super::{Hub, Outbox};
use crate::{
    protocol::Push,
    sync::{Mutex, MutexGuard, spawn, yield_now},
};

/// Connections of a chunk. Each session that was woken makes a system call: 64 take less than a millisecond.
pub(super) const CHUNK: usize = 64;
/// Pushes that wait, before a change that would bring one more waits to begin.
const WAITING: usize = 64;
/// Bytes of pushes that wait, before those of other nodes are dropped.
const MOST_BYTES: usize = 32 * 1024 * 1024;

/// Whom a push is for.
#[derive(Debug, Clone)]
pub(crate) enum Recipients {
    /// Every connection but one.
    All { except: Option<Uuid> },
    /// Every connection of a user, by `sub`.
    User(Arc<str>),
}

/// The pushes that are on their way.
#[derive(Default)]
pub(super) struct Fanout {
    waiting: Mutex<Waiting>,
    /// Told of each push that is taken out.
    taken: Notify,
}

#[derive(Default)]
struct Waiting {
    pushes: VecDeque<(Push, Recipients)>,
    bytes: usize,
    /// Somebody delivers.
    running: bool,
}

impl Fanout {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hub {
    /// Waits while too many pushes are on their way. To be called before a change begins: once it is carried out
    /// its push must not wait, since nobody may be left to wait for it.
    pub(crate) async fn room(&self) {
        loop {
            let taken = self.fanout.taken.notified();
            if self.fanout.waiting().pushes.len() < WAITING {
                return;
            }
            taken.await;
        }
    }

    /// Has a push delivered after all that were accepted before.
    pub(crate) fn push(self: &Arc<Self>, push: Push, to: Recipients) {
        let mut waiting = self.fanout.waiting();
        waiting.bytes += push.bytes();
        waiting.pushes.push_back((push, to));
        self.run(waiting);
    }

    /// The same for a push of another node, which cannot wait. False: too many bytes are on their way already,
    /// and it is dropped.
    pub(crate) fn offer(self: &Arc<Self>, push: Push, to: Recipients) -> bool {
        let has_room = self.fanout.waiting().bytes < MOST_BYTES;
        if has_room {
            self.push(push, to);
        }
        has_room
    }

    /// Has somebody deliver, unless somebody does.
    fn run(self: &Arc<Self>, mut waiting: MutexGuard<'_, Waiting>) {
        if !mem::replace(&mut waiting.running, true) {
            drop(waiting);
            let running = Running { hub: Arc::clone(self), delivers: false };
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
    /// True while it runs. A panic at any other time is not its own.
    delivers: bool,
}

impl Running {
    async fn deliver(mut self) {
        self.delivers = true;
        while let Some((push, to)) = self.next() {
            let recipients = self.hub.recipients(&to);
            for chunk in recipients.chunks(CHUNK) {
                for outbox in chunk {
                    self.hub.deliver(outbox, &push);
                }
                // Also after the last: many small pushes would fill the lane of a client that is quick enough.
                self.delivers = false;
                yield_now().await;
                self.delivers = true;
            }
        }
    }

    fn next(&mut self) -> Option<(Push, Recipients)> {
        let mut waiting = self.hub.fanout.waiting();
        let next = waiting.pushes.pop_front();
        self.delivers = next.is_some();
        waiting.running = self.delivers;
        waiting.bytes -= next.as_ref().map_or(0, |(push, _)| push.bytes());
        drop(waiting);
        self.hub.fanout.taken.notify_waiters();
        next
    }
}

/// After a panic of its own, a new task delivers the rest. When the runtime ends, none does.
impl Drop for Running {
    fn drop(&mut self) {
        if self.delivers && thread::panicking() {
            let mut waiting = self.hub.fanout.waiting();
            waiting.running = false;
            if !waiting.pushes.is_empty() {
                self.hub.run(waiting);
            }
        }
    }
}

#[cfg(test)]
mod tests;
