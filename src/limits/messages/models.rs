//! Models of the budget: sessions that wait for a payment always go on, and every message is paid once.

use std::{future::poll_fn, num::NonZeroU32};

use shuttle::future::{block_on, spawn};

use super::*;
use crate::sync::{explore, until_alone, yield_now};

const SESSIONS: usize = 2;
/// Of each session: more than are paid ahead at a time.
const MESSAGES: usize = 12;

fn budget(per_minute: u32, fail_mode: FailMode, fails: u32) -> (Arc<MessageBudget>, Arc<Shared>) {
    let shared = Arc::new(Shared { redis: None, fail_mode, fails, used: Mutex::new(0) });
    let quota = NonZeroU32::new(per_minute).map(Quota::per_minute);
    let budget = MessageBudget::new(quota, &DefaultClock::default(), Some(&shared), "ann");
    (Arc::new(budget), shared)
}

fn account(budget: &MessageBudget) -> &Account {
    budget.limit.as_ref().unwrap().account.as_ref().unwrap()
}

/// Sends as a session does, and returns how many messages were let through.
async fn session(budget: Arc<MessageBudget>) -> i64 {
    let mut taken = 0;
    for _ in 0..MESSAGES {
        poll_fn(|cx| budget.poll_ready(cx)).await;
        taken += i64::from(budget.take().is_ok());
        // Each session may be past its check when another takes.
        let account = account(&budget);
        let (owed, most) = (account.owed.load(Relaxed), account.most + SESSIONS as i64 - 1);
        assert!(owed <= most || account.shared.fails > 0, "{owed} are owed, {most} at most");
    }
    taken
}

/// Runs the sessions to their end. Returns how many messages were let through.
async fn sessions(budget: &Arc<MessageBudget>) -> i64 {
    let sessions: Vec<_> = (0..SESSIONS).map(|_| spawn(session(Arc::clone(budget)))).collect();
    let mut taken = 0;
    for session in sessions {
        taken += session.await.unwrap();
    }
    until_alone(budget).await;
    taken
}

#[test]
fn a_session_that_waits_for_a_payment_goes_on_and_what_was_paid_ahead_is_given_back() {
    explore(1500, || {
        block_on(async {
            let (budget, shared) = budget(192, FailMode::Open, 0);
            let taken = sessions(&budget).await;
            let owed = account(&budget).owed.load(Relaxed);
            assert!(owed >= 0, "{} messages stay paid ahead", -owed);
            assert_eq!(*shared.used.lock().unwrap() + owed, taken, "paid and owed, and taken");
        });
    });
}

#[test]
fn a_session_goes_on_however_payments_end() {
    explore(1500, || {
        for fail_mode in [FailMode::Open, FailMode::Closed] {
            block_on(async {
                let (budget, _shared) = budget(192, fail_mode, 4);
                // A newcomer whose handshake is cut off while it pays.
                let newcomer = Arc::clone(&budget);
                let newcomer = spawn(async move { newcomer.settle().await });
                let cut_off = spawn(async move { newcomer.abort() });
                sessions(&budget).await;
                cut_off.await.unwrap();
            });
        }
    });
}

/// Whoever looks after what was paid ahead may be about to stop when more is paid.
#[test]
fn what_is_paid_ahead_is_given_back_whenever_it_is_paid() {
    explore(5000, || {
        block_on(async {
            // Little, so that each message after a return is due.
            let (budget, shared) = budget(48, FailMode::Open, 0);
            for _ in 0..3 {
                poll_fn(|cx| budget.poll_ready(cx)).await;
                budget.take().unwrap();
                while account(&budget).owed.load(Relaxed) < 0 {
                    yield_now().await;
                }
            }
            until_alone(&budget).await;
            let owed = account(&budget).owed.load(Relaxed);
            assert!(owed >= 0, "{} messages stay paid ahead", -owed);
            assert_eq!(*shared.used.lock().unwrap() + owed, 3);
        });
    });
}
