//! The budgets of a connection for what costs nothing of its user's message limit: control frames, small
//! fragments, refreshes. By GCRA in one `Instant` each, since an idle connection keeps them.

use std::time::{Duration, Instant};

/// Control frames a message of `WS_MESSAGE_RATE_LIMIT`.
const FACTOR: u32 = 2;
/// Control frames a minute at least: a client that pings every second is honest whatever its message limit.
const LEAST: u32 = 600;
/// Control frames a minute where messages have no limit: [`FACTOR`] times the default of that.
const WITHOUT_LIMIT: u32 = 12_000;
/// Frames that can be sent at once. Few, since a thousand connections may spend them together.
const AT_ONCE: u32 = 100;
/// The frames of so much time can be sent at once where those are more: the network may hold them back, and
/// then they come together.
const HELD_BACK: Duration = Duration::from_millis(500);
/// Reading pauses no longer than this for what was sent over the budget.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Five refreshes at once, then one in this time.
const REFRESH: Duration = Duration::from_secs(2);
const REFRESHES_AT_ONCE: u32 = 5;

/// What a connection may send beside its requests.
pub(super) struct ControlBudget {
    frames: Budget,
    refreshes: Budget,
    /// Nanoseconds that one frame takes.
    cost: u32,
    /// Pings of ours whose pongs have not come. Those are free.
    pongs_owed: u8,
    paused: bool,
}

impl ControlBudget {
    /// `message_limit` is a minute's; 0: none.
    pub(super) fn new(now: Instant, message_limit: u32) -> Self {
        let a_minute = match message_limit {
            0 => WITHOUT_LIMIT,
            limit => limit.saturating_mul(FACTOR).max(LEAST),
        };
        Self {
            frames: Budget(now),
            refreshes: Budget(now),
            cost: (Duration::from_secs(60) / a_minute).subsec_nanos(),
            pongs_owed: 0,
            paused: false,
        }
    }

    fn rate(&self) -> Rate {
        let cost = Duration::from_nanos(self.cost.into());
        Rate { cost, depth: (cost * AT_ONCE).max(HELD_BACK) }
    }

    /// Takes frames; how many there was no room for.
    pub(super) fn take(&mut self, now: Instant, frames: u32) -> u32 {
        self.frames.take(now, frames, self.rate())
    }

    /// Takes a pong, which costs nothing if it was asked for; how many there was no room for.
    pub(super) fn take_pong(&mut self, now: Instant) -> u32 {
        if self.pongs_owed > 0 {
            self.pongs_owed -= 1;
            return 0;
        }
        self.take(now, 1)
    }

    /// A ping goes out.
    pub(super) fn ping(&mut self) {
        self.pongs_owed = self.pongs_owed.saturating_add(1);
    }

    /// Takes one refresh; whether there was room for it.
    pub(super) fn take_refresh(&mut self, now: Instant) -> bool {
        self.refreshes.take(now, 1, REFRESHES) == 0
    }

    /// The time until there is room for a frame.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.frames.room_at(self.rate()).saturating_duration_since(now)
    }

    /// The time until there is room for a refresh.
    pub(super) fn wait_for_refresh(&self, now: Instant) -> Duration {
        self.refreshes.room_at(REFRESHES).saturating_duration_since(now)
    }

    /// Takes frames whether there is room or not. Where there is none reading pauses until they are paid for,
    /// though not for longer than [`LONGEST_PAUSE`]; whether it does.
    pub(super) fn owe(&mut self, now: Instant, frames: u32) -> bool {
        let rate = self.rate();
        self.frames.owe(now, frames, rate);
        self.paused = self.frames.room_at(rate) > now;
        self.paused
    }

    /// Whether reading pauses.
    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// When reading goes on, if it pauses.
    pub(super) fn resumes(&self) -> Option<Instant> {
        self.paused.then(|| self.frames.room_at(self.rate()))
    }

    /// Ends a pause that is over.
    pub(super) fn resume(&mut self, now: Instant) {
        self.paused = self.resumes().is_some_and(|end| now < end);
    }
}

/// How a budget refills.
#[derive(Clone, Copy)]
struct Rate {
    /// What one unit takes.
    cost: Duration,
    /// An empty budget is full again after this long.
    depth: Duration,
}

const REFRESHES: Rate = Rate { cost: REFRESH, depth: REFRESH.saturating_mul(REFRESHES_AT_ONCE) };

/// When it is full.
struct Budget(Instant);

impl Budget {
    /// Takes as many units as there is room for, and returns the rest.
    fn take(&mut self, now: Instant, units: u32, Rate { cost, depth }: Rate) -> u32 {
        let full = self.0.max(now);
        let room = (now + depth).saturating_duration_since(full).as_nanos() / cost.as_nanos();
        let taken = units.min(u32::try_from(room).unwrap_or(u32::MAX));
        self.0 = full + cost * taken;
        units - taken
    }

    /// Goes below empty, as far as [`LONGEST_PAUSE`] fills it again.
    fn owe(&mut self, now: Instant, units: u32, Rate { cost, depth }: Rate) {
        let debt = cost.saturating_mul(units).min(LONGEST_PAUSE);
        self.0 = (self.0.max(now) + debt).min(now + depth + LONGEST_PAUSE);
    }

    fn room_at(&self, Rate { cost, depth }: Rate) -> Instant {
        self.0.checked_sub(depth - cost).unwrap_or(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn budget(now: Instant, message_limit: u32) -> ControlBudget {
        ControlBudget::new(now, message_limit)
    }

    #[test]
    fn a_hundred_frames_are_taken_at_once_or_those_of_half_a_second() {
        let now = Instant::now();
        for (limit, at_once) in [(6000, 100), (60_000, 1000), (300, 100), (1, 100), (0, 100)] {
            assert_eq!(budget(now, limit).take(now, 100_000), 100_000 - at_once, "{limit}");
        }
        assert_eq!(budget(now, u32::MAX).take(now, 30_000_000), 0);
    }

    #[test]
    fn a_budget_refills_evenly_and_to_the_brim_only() {
        let now = Instant::now();
        let mut budget = budget(now, 300);
        assert_eq!(budget.take(now, 110), 10);
        assert_eq!(budget.wait(now), SECOND / 10);
        assert_eq!(budget.take(now + SECOND / 11, 1), 1);
        assert_eq!(budget.take(now + SECOND, 11), 1);
        assert_eq!(budget.take(now + 3600 * SECOND, 101), 1);
    }

    #[test]
    fn a_client_that_pings_every_second_is_never_over_it() {
        let now = Instant::now();
        for limit in [0, 1, 60, 6000] {
            let mut budget = budget(now, limit);
            assert!(
                (0..100_000).all(|second| budget.take(now + second * SECOND, 1) == 0),
                "{limit}"
            );
        }
    }

    #[test]
    fn five_refreshes_at_once_then_one_in_two_seconds() {
        let now = Instant::now();
        let mut budget = budget(now, 0);
        assert!((0..5).all(|_| budget.take_refresh(now)));
        assert!(!budget.take_refresh(now));
        assert_eq!(budget.wait_for_refresh(now), 2 * SECOND);
        assert!(!budget.take_refresh(now + SECOND));
        assert!((1..100).all(|n| budget.take_refresh(now + 2 * n * SECOND)));
        assert!(!budget.take_refresh(now + 2 * 99 * SECOND));
    }

    #[test]
    fn a_pong_is_free_once_for_each_ping() {
        let now = Instant::now();
        let mut budget = budget(now, 1);
        budget.ping();
        budget.ping();
        assert_eq!(budget.take(now, 100), 0);
        assert_eq!([0; 4].map(|_: u8| budget.take_pong(now)), [0, 0, 1, 1]);
    }

    #[test]
    fn a_pause_ends_when_its_frames_are_paid_for_and_after_its_depth() {
        let now = Instant::now();
        let mut owing = budget(now, 1);
        assert_eq!(owing.resumes(), None);
        assert_eq!(owing.take(now, 120), 20);
        assert!(owing.owe(now, 20));
        assert_eq!(owing.resumes(), Some(now + SECOND * 21 / 10));
        owing.resume(now + 2 * SECOND);
        assert!(owing.is_paused());
        owing.resume(now + SECOND * 21 / 10);
        assert_eq!((owing.is_paused(), owing.resumes()), (false, None));
        assert_eq!(owing.take(now + SECOND * 21 / 10, 2), 1);
        assert!(owing.owe(now, u32::MAX));
        assert!(owing.resumes().unwrap() <= now + LONGEST_PAUSE + owing.rate().cost);
    }

    #[test]
    fn reading_goes_on_while_there_is_room() {
        let now = Instant::now();
        let mut budget = budget(now, 1);
        assert!((0..99).all(|_| !budget.owe(now, 1)));
        assert!(budget.owe(now, 1));
    }
}
