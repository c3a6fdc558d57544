//! Names that are remembered for a while, so many at most.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

/// What was said of names, each for the same time. At its bound the oldest are forgotten first.
pub(super) struct Memory<V> {
    lifetime: Duration,
    bound: usize,
    known: HashMap<Arc<str>, (Instant, V)>,
    /// When each was said, also of names that were said again: it is this that has the bound.
    order: VecDeque<(Instant, Arc<str>)>,
}

impl<V> Memory<V> {
    pub(super) fn new(lifetime: Duration, bound: usize) -> Self {
        Self { lifetime, bound, known: HashMap::new(), order: VecDeque::new() }
    }

    /// What was last said of a name.
    pub(super) fn get(&self, name: &str, now: Instant) -> Option<&V> {
        let (said, value) = self.known.get(name)?;
        (now.duration_since(*said) < self.lifetime).then_some(value)
    }

    /// What is remembered, and for how long it still will be.
    pub(super) fn all(&self, now: Instant) -> impl Iterator<Item = (&Arc<str>, &V, Duration)> {
        let left = move |said: Instant| self.lifetime.saturating_sub(now.duration_since(said));
        let all = self.known.iter().map(move |(name, (said, value))| (name, value, left(*said)));
        all.filter(|(_, _, left)| !left.is_zero())
    }

    /// Remembers something that was said of a name; what was said of it later keeps its time. False:
    /// something else had to be forgotten before its time.
    pub(super) fn insert(&mut self, name: Arc<str>, value: V, said: Instant) -> bool {
        self.forget(said, usize::MAX);
        if let Some((last, known)) = self.known.get_mut(&name)
            && *last >= said
        {
            *known = value;
            return true;
        }
        let forgotten = self.forget(said, self.bound - 1);
        self.order.push_back((said, Arc::clone(&name)));
        self.known.insert(name, (said, value));
        !forgotten
    }

    /// Forgets what is over, and the oldest until no more than `keep` are left; whether one of these
    /// still was in force.
    fn forget(&mut self, now: Instant, keep: usize) -> bool {
        let mut early = false;
        while let Some((said, name)) = self.order.front() {
            let over = now.duration_since(*said) >= self.lifetime;
            if !over && self.order.len() <= keep {
                break;
            }
            if self.known.get(name).is_some_and(|(last, _)| last == said) {
                self.known.remove(name);
                early |= !over;
            }
            self.order.pop_front();
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
        let (mut memory, begun) = (Memory::new(MINUTE, 10), Instant::now());
        assert!(memory.insert("a".into(), 1, begun));
        assert_eq!(memory.get("a", begun + MINUTE / 2), Some(&1));
        assert_eq!(memory.get("b", begun), None);
        assert_eq!(memory.get("a", begun + MINUTE), None);
        assert!(memory.insert("b".into(), 2, begun + MINUTE));
        assert_eq!((memory.known.len(), memory.order.len()), (1, 1));
    }

    #[test]
    fn a_name_that_is_said_again_stays_longer() {
        let (mut memory, begun) = (Memory::new(MINUTE, 10), Instant::now());
        memory.insert("a".into(), 1, begun);
        memory.insert("a".into(), 2, begun + MINUTE / 2);
        memory.insert("b".into(), 3, begun + MINUTE);
        assert_eq!(memory.get("a", begun + MINUTE), Some(&2));
    }

    #[test]
    fn what_is_heard_of_late_is_forgotten_in_time_and_takes_nothing_from_what_came_later() {
        let (mut memory, begun) = (Memory::new(MINUTE, 10), Instant::now());
        let now = begun + MINUTE / 2;
        memory.insert("new".into(), 1, now);
        memory.insert("new".into(), 1, begun);
        memory.insert("late".into(), 2, begun);
        let mut all: Vec<_> = memory.all(now).map(|(name, _, left)| (&**name, left)).collect();
        all.sort_unstable();
        assert_eq!(all, [("late", MINUTE / 2), ("new", MINUTE)]);
        assert_eq!(memory.order.len(), 2);
        assert_eq!(memory.all(begun + MINUTE).count(), 1);
        assert_eq!(memory.get("late", begun + MINUTE), None);
        assert_eq!(memory.get("new", begun + MINUTE), Some(&1));
    }

    #[test]
    fn at_the_bound_the_oldest_goes_and_that_is_told() {
        let (mut memory, now) = (Memory::new(MINUTE, 2), Instant::now());
        assert!(memory.insert("a".into(), (), now));
        assert!(memory.insert("b".into(), (), now));
        assert!(!memory.insert("c".into(), (), now));
        assert!(memory.get("a", now).is_none() && memory.get("b", now).is_some());
        for later in 1..=100 {
            memory.insert("c".into(), (), now + Duration::from_nanos(later));
        }
        assert_eq!((memory.known.len(), memory.order.len()), (1, 2));
        assert!(memory.get("c", now).is_some());
    }
}
