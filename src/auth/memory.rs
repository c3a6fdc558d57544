//! Names that are remembered for a while, so many at most.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use super::clock::Moment;

/// What was said of names, each for a time of its own. It lasts until both clocks say that it is over: to forget
/// late costs memory, to forget early lets somebody in. At its bound, those whose time ends first are forgotten.
pub(super) struct Memory<V> {
    bound: usize,
    known: HashMap<Arc<str>, Kept<V>>,
    /// The ends by the wall clock.
    order: BTreeSet<(Duration, Arc<str>)>,
}

struct Kept<V> {
    value: V,
    /// For how long it was said.
    time: Duration,
    end: Moment,
}

impl<V> Kept<V> {
    /// Never more than it was said for: other nodes are told, whose clocks were not set back.
    fn left(&self, now: Moment) -> Duration {
        now.until(self.end).min(self.time)
    }
}

impl<V> Memory<V> {
    pub(super) fn new(bound: usize) -> Self {
        Self { bound, known: HashMap::new(), order: BTreeSet::new() }
    }

    /// What was last said of a name.
    pub(super) fn get(&self, name: &str, now: Moment) -> Option<&V> {
        let kept = self.known.get(name)?;
        (!kept.left(now).is_zero()).then_some(&kept.value)
    }

    /// What is remembered, and for how long it still will be.
    pub(super) fn all(&self, now: Moment) -> impl Iterator<Item = (&Arc<str>, &V, Duration)> {
        let all = self.known.iter().map(move |(name, kept)| (name, &kept.value, kept.left(now)));
        all.filter(|(_, _, left)| !left.is_zero())
    }

    /// Remembers something that was said of a name. What was said of it for longer keeps its time. False:
    /// something else had to be forgotten before its time.
    pub(super) fn insert(&mut self, name: Arc<str>, value: V, time: Duration, now: Moment) -> bool {
        let mut kept = Kept { value, time, end: now.after(time) };
        if let Some(known) = self.take(&name)
            && known.left(now) > time
        {
            (kept.time, kept.end) = (known.time, known.end);
        }
        let forgotten = self.forget(now, self.bound - 1);
        self.order.insert((kept.end.wall, Arc::clone(&name)));
        self.known.insert(name, kept);
        !forgotten
    }

    /// Forgets a name.
    pub(super) fn remove(&mut self, name: &Arc<str>) {
        drop(self.take(name));
    }

    fn take(&mut self, name: &Arc<str>) -> Option<Kept<V>> {
        let known = self.known.remove(name)?;
        self.order.remove(&(known.end.wall, Arc::clone(name)));
        Some(known)
    }

    /// Forgets what is over, and what ends first until no more than `keep` are left; whether one of these
    /// still was in force.
    fn forget(&mut self, now: Moment, keep: usize) -> bool {
        let mut early = false;
        while let Some((_, name)) = self.order.first() {
            let over = self.known.get(name).is_none_or(|kept| kept.left(now).is_zero());
            if !over && self.order.len() <= keep {
                break;
            }
            early |= !over;
            if let Some((_, name)) = self.order.pop_first() {
                self.known.remove(&name);
            }
        }
        early
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_name_is_forgotten_when_its_time_is_over() {
        let (mut memory, begun) = (Memory::new(10), Moment::now());
        assert!(memory.insert("a".into(), 1, MINUTE, begun));
        assert_eq!(memory.get("a", begun.after(MINUTE / 2)), Some(&1));
        assert_eq!(memory.get("b", begun), None);
        assert_eq!(memory.get("a", begun.after(MINUTE)), None);
        assert!(memory.insert("b".into(), 2, MINUTE, begun.after(MINUTE)));
        assert_eq!((memory.known.len(), memory.order.len()), (1, 1));
    }

    #[test]
    fn a_name_that_is_said_again_stays_longer_and_never_shorter() {
        let (mut memory, begun) = (Memory::new(10), Moment::now());
        memory.insert("a".into(), 1, MINUTE, begun);
        memory.insert("a".into(), 2, MINUTE, begun.after(MINUTE / 2));
        memory.insert("a".into(), 3, MINUTE / 4, begun.after(MINUTE / 2));
        assert_eq!(memory.get("a", begun.after(MINUTE)), Some(&3));
        let left: Vec<_> = memory.all(begun.after(MINUTE)).map(|(_, _, left)| left).collect();
        assert_eq!(left, [MINUTE / 2]);
        assert_eq!(memory.order.len(), 1);
        assert_eq!(memory.all(begun.after(2 * MINUTE)).count(), 0);
        memory.remove(&"a".into());
        assert_eq!((memory.known.len(), memory.order.len()), (0, 0));
    }

    #[test]
    fn a_clock_that_is_set_forward_or_back_forgets_nothing_early_and_tells_no_longer_time() {
        let (mut memory, begun) = (Memory::new(10), Moment::now());
        memory.insert("a".into(), 1, MINUTE, begun);
        let forward = Moment { wall: begun.wall + 100 * MINUTE, ..begun.after(MINUTE / 2) };
        assert_eq!(memory.get("a", forward), Some(&1));
        let back = Moment { wall: begun.wall - 100 * MINUTE, ..begun.after(2 * MINUTE) };
        assert_eq!(memory.get("a", back), Some(&1));
        assert_eq!(memory.all(back).next().map(|(_, _, left)| left), Some(MINUTE));
        assert_eq!(memory.get("a", begun.after(MINUTE)), None);
    }

    #[test]
    fn at_the_bound_what_ends_first_goes_and_that_is_told() {
        let (mut memory, now) = (Memory::new(2), Moment::now());
        assert!(memory.insert("a".into(), (), MINUTE, now));
        assert!(memory.insert("b".into(), (), 2 * MINUTE, now));
        assert!(!memory.insert("c".into(), (), 3 * MINUTE, now));
        assert!(memory.get("a", now).is_none() && memory.get("b", now).is_some());
        for _ in 1..=100 {
            assert!(memory.insert("c".into(), (), 3 * MINUTE, now));
        }
        assert_eq!((memory.known.len(), memory.order.len()), (2, 2));
        assert!(memory.get("c", now).is_some());
    }
}
