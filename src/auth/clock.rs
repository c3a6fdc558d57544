//! The time of this machine, by both of its clocks. The wall clock steps when somebody sets it. The monotonic
//! clock stands still while the machine is suspended. So a duration is compared on both.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A longer time cannot be added to an `Instant` on every system.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// The time since 1970, by the wall clock.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// One moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) wall: Duration,
    pub(super) monotonic: Instant,
}

impl Moment {
    /// The present.
    pub(super) fn now() -> Self {
        Self { wall: since_1970(), monotonic: Instant::now() }
    }

    /// So much later; a year at most.
    pub(super) fn after(self, time: Duration) -> Self {
        let time = time.min(LONGEST);
        Self { wall: self.wall + time, monotonic: self.monotonic + time }
    }

    /// The time from an earlier moment to this one, by the clock that went further.
    pub(super) fn since(self, earlier: Self) -> Duration {
        let monotonic = self.monotonic.saturating_duration_since(earlier.monotonic);
        self.wall.saturating_sub(earlier.wall).max(monotonic)
    }

    /// The time from this moment to a later one, by the clock that has further to go. Zero: it is over on both.
    pub(super) fn until(self, later: Self) -> Duration {
        later.since(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_stepped_and_one_that_stood_still_count_as_the_longer_time() {
        const MINUTE: Duration = Duration::from_secs(60);
        let begun = Moment::now();
        let stepped = Moment { wall: begun.wall + 60 * MINUTE, ..begun.after(MINUTE) };
        let back = Moment { wall: begun.wall - 60 * MINUTE, ..begun.after(MINUTE) };
        assert_eq!(stepped.since(begun), 60 * MINUTE);
        assert_eq!(back.since(begun), MINUTE);
        assert_eq!(stepped.until(begun.after(5 * MINUTE)), 4 * MINUTE);
        assert_eq!(back.until(begun.after(5 * MINUTE)), 65 * MINUTE);
        assert_eq!(begun.after(MINUTE).until(begun), Duration::ZERO);
    }
}
