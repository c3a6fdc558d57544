//! Room in the queue of the audit trail, counted in rows and in bytes.
//!
//! A request that must be recorded takes its room before it begins, so that its row always fits. Where
//! nothing waits, that is one atomic operation. An entry gives its room back when it leaves the queue.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

/// Bytes of a row beside those that its event counts: the ids, the client, the place in the queue.
const ROW: usize = 768;
/// `Space::taken` counts bytes in this many bits, and rows above them.
const BYTE_BITS: u32 = 40;
const ONE_ROW: u64 = 1 << BYTE_BITS;
/// More rows than this do not fit into the bytes that can be configured.
const MOST_ROWS: u64 = 1 << 23;

/// Who may fill how much of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Rows that cannot wait, of users: all.
    Known,
    /// Requests of users, which can wait: seven eighths.
    Request,
    /// Rows of unknown callers: three quarters.
    Unknown,
}

/// The bounds of the queue, and what of it is taken.
pub(super) struct Space {
    rows: u64,
    bytes: u64,
    taken: AtomicU64,
    waiting: AtomicUsize,
    /// Told of room that was given back, while anybody waits: those of each part by themselves, since one
    /// may find enough where another does not.
    freed: [Notify; 3],
    /// Told when the queue is nearly full.
    pressed: Notify,
}

/// Room for one row.
pub(super) struct Room {
    space: Arc<Space>,
    bytes: u64,
}

impl Space {
    pub(super) fn new(rows: usize, bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            rows: (rows as u64).min(MOST_ROWS),
            bytes: bytes as u64,
            taken: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            freed: Default::default(),
            pressed: Notify::new(),
        })
    }

    /// Takes room for a row with so many bytes of its own, if there is any.
    pub(super) fn take(self: &Arc<Self>, bytes: usize, part: Part) -> Option<Room> {
        let (rows, limit) = self.limits(part);
        let bytes = (bytes + ROW) as u64;
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let after = taken + ONE_ROW + bytes;
            if after / ONE_ROW > rows || after % ONE_ROW > limit {
                self.pressed.notify_one();
                return None;
            }
            let order = Ordering::SeqCst;
            match self.taken.compare_exchange_weak(taken, after, order, Ordering::Relaxed) {
                Ok(_) => {
                    if self.is_pressed() {
                        self.pressed.notify_one();
                    }
                    return Some(Room { space: Arc::clone(self), bytes });
                }
                Err(now) => taken = now,
            }
        }
    }

    /// Takes room over the limit, for the few rows that are made at the end.
    pub(super) fn take_over(self: &Arc<Self>, bytes: usize) -> Room {
        let bytes = (bytes + ROW) as u64;
        self.taken.fetch_add(ONE_ROW + bytes, Ordering::SeqCst);
        Room { space: Arc::clone(self), bytes }
    }

    /// Waits until `attempt` gives something, which it is asked for whenever there may be room for a part.
    pub(super) async fn wait<T>(&self, part: Part, attempt: impl Fn() -> Option<T>) -> T {
        let _counted = Counted::new(&self.waiting);
        let notify = &self.freed[part as usize];
        loop {
            let mut freed = pin!(notify.notified());
            // Before it looks: what changes after the look is told of.
            freed.as_mut().enable();
            if let Some(found) = attempt() {
                // There may be room for the next one too.
                if self.waiting.load(Ordering::SeqCst) > 1 {
                    notify.notify_one();
                }
                return found;
            }
            freed.await;
        }
    }

    /// Has one of each part look again, since there is more room.
    fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.iter().for_each(Notify::notify_one);
        }
    }

    /// Has all look again that wait: something else than the room has changed.
    pub(super) fn wake(&self) {
        self.freed.iter().for_each(Notify::notify_waiters);
    }

    /// Waits until the queue is nearly full, or somebody found no room in it.
    pub(super) async fn until_pressed(&self) {
        loop {
            self.pressed.notified().await;
            if self.is_pressed() || self.waiting.load(Ordering::SeqCst) > 0 {
                return;
            }
        }
    }

    /// Whether the last quarter is being filled.
    pub(super) fn is_pressed(&self) -> bool {
        let (rows, bytes) = self.taken();
        rows >= self.rows - self.rows / 4 || bytes >= self.bytes - self.bytes / 4
    }

    /// Rows and bytes that are taken.
    pub(super) fn taken(&self) -> (u64, u64) {
        let taken = self.taken.load(Ordering::Relaxed);
        (taken / ONE_ROW, taken % ONE_ROW)
    }

    /// Rows and bytes at most.
    fn limits(&self, part: Part) -> (u64, u64) {
        let most = |all: u64| match part {
            Part::Known => all,
            Part::Request => all - all / 8,
            Part::Unknown => (all - all.div_ceil(4)).max(1),
        };
        (most(self.rows), most(self.bytes))
    }
}

impl Room {
    /// Corrects an estimate, now that the row is there with so many bytes of its own.
    pub(super) fn fit(&mut self, bytes: usize) {
        let bytes = (bytes + ROW) as u64;
        if bytes < self.bytes {
            self.space.taken.fetch_sub(self.bytes - bytes, Ordering::SeqCst);
            self.space.tell();
        } else {
            self.space.taken.fetch_add(bytes - self.bytes, Ordering::SeqCst);
        }
        self.bytes = bytes;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.space.taken.fetch_sub(ONE_ROW + self.bytes, Ordering::SeqCst);
        self.space.tell();
    }
}

/// Counts one that waits.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn requests_leave_an_eighth_to_rows_that_cannot_wait_and_strangers_a_quarter() {
        for (part, most) in [(Part::Unknown, 12), (Part::Request, 14), (Part::Known, 16)] {
            let space = Space::new(16, 1 << 20);
            let rooms: Vec<_> = std::iter::from_fn(|| space.take(0, part)).collect();
            assert_eq!(rooms.len(), most, "{part:?}");
            drop(rooms);
            assert_eq!(space.taken(), (0, 0));
        }
        let least = Space::new(1, 1 << 20);
        for part in [Part::Unknown, Part::Request, Part::Known] {
            assert!(least.take(0, part).is_some(), "{part:?}");
        }
    }

    #[test]
    fn bytes_bound_the_queue_as_rows_do() {
        let space = Space::new(1000, 1 << 20);
        let rooms: Vec<_> = std::iter::from_fn(|| space.take(100_000, Part::Known)).collect();
        assert_eq!(rooms.len(), 10);
        assert!(space.taken().1 <= 1 << 20);
    }

    #[tokio::test]
    async fn room_that_is_given_back_goes_to_all_that_wait_and_fit() {
        let space = Space::new(4, 1 << 20);
        let held: Vec<_> = std::iter::from_fn(|| space.take(0, Part::Known)).collect();
        let wait = |_| {
            let space = Arc::clone(&space);
            tokio::spawn(async move {
                let _room = space.wait(Part::Known, || space.take(0, Part::Known)).await;
                tokio::task::yield_now().await;
            })
        };
        let waiting: Vec<_> = (0..40).map(wait).collect();
        tokio::task::yield_now().await;
        drop(held);
        for one in waiting {
            timeout(Duration::from_secs(5), one).await.unwrap().unwrap();
        }
        assert_eq!(space.taken(), (0, 0));
    }
}
