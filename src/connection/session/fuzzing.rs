//! The budget of control frames under any calls: it gives no more than its rate, and a wait that it tells is true.

use std::time::{Duration, Instant};

use super::control_budget::ControlBudget;

/// Four bytes are the limit of messages; then each two a call and its number.
pub(in crate::connection) fn budget(calls: &[u8]) {
    let Some((limit, calls)) = calls.split_first_chunk() else { return };
    let limit = u32::from_be_bytes(*limit);
    let begun = Instant::now();
    let mut now = begun;
    let mut budget = ControlBudget::new(now, limit);
    let mut taken = 0;
    for call in calls.chunks_exact(2) {
        let number = u32::from(call[1]);
        match call[0] % 8 {
            0 => now += Duration::from_millis(u64::from(number)),
            1 => now += Duration::from_secs(u64::from(number)),
            2 => taken += number - budget.take(now, number),
            3 => taken += promised(&mut budget, now),
            4 => refreshed(&mut budget, now),
            5 => {
                budget.ping();
                assert_eq!(budget.take_pong(now), 0, "a pong that was asked for is free");
            }
            6 => owed(&mut budget, now, number << (number % 24)),
            _ => budget.resume(now),
        }
        if !budget.is_paused() {
            assert_eq!(budget.resumes(), None);
        }
    }
    // A burst of a hundred, or of half a second, and two a message; 10 in a second at least.
    let a_minute = if limit == 0 { 12_000 } else { u64::from(limit).saturating_mul(2).max(600) };
    let a_minute = u128::from(a_minute.min(u32::MAX.into()));
    let seconds = (now - begun).as_secs() + 1;
    let most = 100.max(a_minute / 120) + a_minute * u128::from(seconds) / 60;
    // The cost of a frame is in whole nanoseconds: over the fastest rates that is a fourteenth.
    assert!(u128::from(taken) <= most + most / 12, "{taken} of {most}");
}

/// A frame is taken when there is no wait, refused when there is, and taken after it.
fn promised(budget: &mut ControlBudget, now: Instant) -> u32 {
    let wait = budget.wait(now);
    if wait.is_zero() {
        assert_eq!(budget.take(now, 1), 0, "refused without a wait");
        return 1;
    }
    assert_eq!(budget.take(now, 1), 1, "taken before its time");
    assert_eq!(budget.wait(now + wait), Duration::ZERO, "the wait is too short");
    0
}

fn refreshed(budget: &mut ControlBudget, now: Instant) {
    let wait = budget.wait_for_refresh(now);
    assert_eq!(budget.take_refresh(now), wait.is_zero());
    assert!(wait <= Duration::from_secs(2));
}

/// A debt pauses reading, and not for ever.
fn owed(budget: &mut ControlBudget, now: Instant, frames: u32) {
    assert_eq!(budget.owe(now, frames), budget.is_paused());
    let Some(end) = budget.resumes() else { return };
    assert!(end > now && end - now <= Duration::from_millis(10_100), "{:?}", end - now);
}
