//! What waits to be sent to the other nodes: nobody who puts something in ever waits.

use std::{
    collections::VecDeque,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::value::RawValue;
use tokio::sync::Notify;

use crate::auth::Logout;

/// Bytes that wait at most; one more, and the oldest is dropped.
const BOUND: usize = 16 * 1024 * 1024;
/// Time after which an event is dropped: what was meant for those who were there is not for those who
/// came later.
const STALE: Duration = Duration::from_secs(30);

/// Bytes of events that are sent at once, unless one alone is larger.
const BATCH: usize = 64 * 1024;

/// Something to send.
pub(super) enum Item {
    /// An event, encoded.
    Event(Box<RawValue>),
    /// A logout, which is kept in Redis as well, and its time.
    LogOut((Logout, Duration)),
}

impl Item {
    fn size(&self) -> usize {
        let text = match self {
            Self::Event(event) => event.get().len(),
            Self::LogOut((logout, _)) => logout.name().len(),
        };
        text + mem::size_of::<(Instant, Self)>()
    }
}

/// What is sent at once.
pub(super) enum Batch {
    /// Events that follow each other.
    Events(Vec<Box<RawValue>>),
    /// A logout.
    LogOut((Logout, Duration)),
}

/// Oldest first.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Notify,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Instant, Item)>,
    bytes: usize,
    /// What was taken last is on its way.
    sending: bool,
    /// How much of it is.
    on_its_way: Dropped,
}

/// What the queue had to give up.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) events: u64,
    /// These are still in the node's memory.
    pub(super) logouts: u64,
}

impl Dropped {
    fn add(&mut self, item: &Item) {
        match item {
            Item::Event(_) => self.events += 1,
            Item::LogOut(_) => self.logouts += 1,
        }
    }
}

impl Queue {
    /// Puts something in, and drops what is too much.
    pub(super) fn push(&self, item: Item) -> Dropped {
        let mut dropped = Dropped::default();
        let mut state = self.state();
        state.bytes += item.size();
        state.waiting.push_back((Instant::now(), item));
        while state.bytes > BOUND {
            let Some((_, oldest)) = state.take() else { break };
            dropped.add(&oldest);
        }
        drop(state);
        self.filled.notify_one();
        dropped
    }

    /// Waits for the next that are not too old: as many as fit, so that a sender that is slower than
    /// those who put in catches up. None: all that waited was too old. The sender's alone to call; what
    /// it took before is done.
    pub(super) async fn next(&self) -> (Option<Batch>, Dropped) {
        let mut dropped = Dropped::default();
        loop {
            let batch = self.state().batch(&mut dropped);
            if batch.is_some() || dropped.events > 0 {
                return (batch, dropped);
            }
            self.filled.notified().await;
        }
    }

    /// Gives up what is on its way. It may have arrived: events that were sent again could arrive twice.
    pub(super) fn give_up(&self) -> Dropped {
        mem::take(&mut self.state().on_its_way)
    }

    /// Whether all is sent.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state();
        state.waiting.is_empty() && !state.sending
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that panics happens while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self) -> Option<(Instant, Item)> {
        let taken = self.waiting.pop_front()?;
        self.bytes -= taken.1.size();
        Some(taken)
    }

    fn batch(&mut self, dropped: &mut Dropped) -> Option<Batch> {
        let (mut events, mut bytes) = (Vec::new(), 0);
        self.on_its_way = Dropped::default();
        while let Some((since, item)) = self.waiting.front() {
            let fits =
                events.is_empty() || matches!(item, Item::Event(_)) && bytes + item.size() <= BATCH;
            if !fits {
                break;
            }
            let stale = since.elapsed() > STALE;
            let Some((_, item)) = self.take() else { break };
            bytes += item.size();
            match item {
                Item::Event(_) if stale => dropped.add(&item),
                Item::Event(event) => {
                    self.on_its_way.events += 1;
                    events.push(event);
                }
                // It never grows old: Redis has to know it.
                Item::LogOut(revocation) => {
                    self.on_its_way.logouts = 1;
                    self.sending = true;
                    return Some(Batch::LogOut(revocation));
                }
            }
        }
        self.sending = !events.is_empty();
        if self.waiting.is_empty() {
            self.waiting.shrink_to(64);
        }
        self.sending.then_some(Batch::Events(events))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(bytes: usize) -> Item {
        Item::Event(RawValue::from_string("1".repeat(bytes)).unwrap())
    }

    async fn next(queue: &Queue) -> Vec<usize> {
        match queue.next().await {
            (Some(Batch::Events(events)), dropped) if dropped == Dropped::default() => {
                events.iter().map(|event| event.get().len()).collect()
            }
            _ => panic!("fresh events were expected"),
        }
    }

    #[tokio::test]
    async fn what_is_put_in_comes_out_in_its_order() {
        let queue = Queue::default();
        assert!(queue.is_idle());
        for bytes in 1..=3 {
            assert_eq!(queue.push(event(bytes)), Dropped::default());
        }
        assert_eq!(next(&queue).await, [1, 2, 3]);
        assert!(!queue.is_idle(), "they are on their way");
        assert_eq!(queue.give_up(), Dropped { events: 3, logouts: 0 });
        assert_eq!(queue.give_up(), Dropped::default());
        for bytes in [BATCH / 2, BATCH / 3, BATCH / 2, 2 * BATCH, 7] {
            queue.push(event(bytes));
        }
        assert_eq!(next(&queue).await, [BATCH / 2, BATCH / 3]);
        assert_eq!(next(&queue).await, [BATCH / 2]);
        assert_eq!(next(&queue).await, [2 * BATCH]);
        assert_eq!(next(&queue).await, [7]);
        assert!(!queue.is_idle());
        assert!(tokio::time::timeout(Duration::ZERO, queue.next()).await.is_err());
        assert!(queue.is_idle());
    }

    #[tokio::test]
    async fn a_full_queue_drops_the_oldest() {
        let queue = Queue::default();
        let half = BOUND / 2 - 1000;
        for bytes in [half, half + 1] {
            assert_eq!(queue.push(event(bytes)).events, 0);
        }
        assert_eq!(queue.push(event(half + 2)), Dropped { events: 1, logouts: 0 });
        assert_eq!((next(&queue).await, next(&queue).await), (vec![half + 1], vec![half + 2]));
        assert_eq!(queue.push(event(BOUND)).events, 1, "what never fits does not wait");
    }

    #[tokio::test]
    async fn what_waited_too_long_is_dropped_but_for_logouts() {
        let queue = Queue::default();
        let Some(past) = Instant::now().checked_sub(2 * STALE) else { return };
        let logout = crate::auth::Logout::Session("s1".into());
        queue.push(event(1));
        queue.push(Item::LogOut((logout, Duration::ZERO)));
        queue.push(event(1));
        queue.state().waiting.iter_mut().for_each(|(since, _)| *since = past);
        let one = Dropped { events: 1, logouts: 0 };
        assert!(matches!(queue.next().await, (Some(Batch::LogOut(_)), dropped) if dropped == one));
        assert!(matches!(queue.next().await, (None, dropped) if dropped == one));
        queue.push(event(2));
        assert_eq!(next(&queue).await, [2]);
    }
}
