//! The refused messages of a connection, which end it when they come too close together.

use std::time::{Duration, Instant};

/// Strikes are counted over this long.
const WINDOW: Duration = Duration::from_secs(60);

/// When they were, for as long as they count. Allocated by the first.
#[derive(Default)]
pub(super) struct Strikes(Vec<Instant>);

impl Strikes {
    /// Counts one at `now`; whether it is the last of `limit`. A limit of 0 is never reached.
    pub(super) fn add(&mut self, now: Instant, limit: usize) -> bool {
        if limit == 0 {
            return false;
        }
        self.0.retain(|at| now - *at <= WINDOW);
        self.0.push(now);
        self.0.len() >= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds a strike at each of the seconds; which of them was the last of `limit`.
    fn last(limit: usize, seconds: &[u64]) -> Option<usize> {
        let begun = Instant::now();
        let mut strikes = Strikes::default();
        seconds.iter().position(|at| strikes.add(begun + Duration::from_secs(*at), limit))
    }

    #[test]
    fn strikes_within_a_minute_add_up() {
        assert_eq!(last(3, &[0, 30, 60]), Some(2));
        assert_eq!(last(3, &[0, 0, 0]), Some(2));
        assert_eq!(last(1, &[0]), Some(0));
    }

    #[test]
    fn strikes_fall_out_of_the_window_one_by_one() {
        // The third is too late for the first, the fourth is a third within a minute of the second.
        assert_eq!(last(3, &[0, 30, 61, 89]), Some(3));
        assert_eq!(last(3, &[0, 30, 61, 92, 122]), None);
    }

    #[test]
    fn strikes_that_are_over_take_no_room() {
        let begun = Instant::now();
        let mut strikes = Strikes::default();
        for minute in 0..100 {
            assert!(!strikes.add(begun + minute * (WINDOW + Duration::from_millis(1)), 2));
        }
        assert_eq!(strikes.0.len(), 1);
    }

    #[test]
    fn without_a_limit_nothing_is_counted() {
        let mut strikes = Strikes::default();
        assert!((0..1000).all(|_| !strikes.add(Instant::now(), 0)));
        assert!(strikes.0.is_empty());
    }
}
