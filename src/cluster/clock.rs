//! The clock that nodes share. Clocks of machines differ, and moments of several nodes are compared: when a
//! connection was opened, and until when an administrator ended those of its user. So each node asks Redis for the
//! time twice a second. Before Redis was heard, the database's time does. A node without Redis has its own.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use fred::{
    clients::SubscriberClient,
    error::{Error, ErrorKind},
    types::scripts::Script,
};

use crate::{auth::since_1970, metrics::RedisOperation, redis::Redis};

/// The answer that took least says most, but clocks drift: it is replaced after this time at the latest.
const GOOD_FOR: Duration = Duration::from_secs(30);

/// A clock that is never set, only read from elsewhere.
pub(super) struct Clock {
    redis: Option<(Arc<Redis>, Script)>,
    heard: Mutex<Option<Heard>>,
}

/// A time that was read elsewhere between two moments of this node.
#[derive(Clone, Copy)]
struct Heard {
    time: Duration,
    asked: Instant,
    answered: Instant,
}

impl Heard {
    fn earliest(&self) -> Duration {
        self.time + self.answered.elapsed()
    }

    fn latest(&self) -> Duration {
        self.time + self.asked.elapsed()
    }

    /// Whether this answer is still better than a later one. Not where they contradict each other: a clock stepped, or
    /// this machine was suspended.
    fn says_more_than(&self, later: &Self) -> bool {
        let took = |heard: &Self| heard.answered - heard.asked;
        took(self) < took(later)
            && self.answered.elapsed() < GOOD_FOR
            && self.earliest() <= later.latest()
            && later.earliest() <= self.latest()
    }
}

impl Clock {
    pub(super) fn new(redis: Option<Arc<Redis>>) -> Self {
        let script = |redis| (redis, Script::from_lua(include_str!("scripts/clock.lua")));
        Self { redis: redis.map(script), heard: Mutex::default() }
    }

    /// The time since 1970, or a little less. The time since the last answer is that of the monotonic clock, which no
    /// step moves. After a suspension it lags until Redis answers.
    pub(super) fn now(&self) -> Duration {
        self.last().map_or_else(since_1970, |heard| heard.earliest())
    }

    /// The time since 1970, no less: all that happened before has an earlier [`Self::now`].
    pub(super) async fn ask_or_guess(&self) -> Duration {
        match self.ask(None).await {
            Ok(Some(time)) => time,
            // Without an answer, the time since the last one does.
            _ => self.last().map_or_else(since_1970, |heard| heard.latest()),
        }
    }

    /// The time since a moment, in milliseconds since 1970.
    pub(super) fn since(&self, moment: u64) -> Duration {
        self.now().saturating_sub(Duration::from_millis(moment))
    }

    /// Asks Redis, over a connection that may not be shared yet, or over the shared one.
    /// None: there is none.
    pub(super) async fn ask(
        &self,
        client: Option<&SubscriberClient>,
    ) -> Result<Option<Duration>, Error> {
        let Some((redis, script)) = &self.redis else { return Ok(None) };
        let (keys, operation) = (vec![redis.key("revocations")], RedisOperation::Clock);
        let asked = Instant::now();
        let time: Vec<u64> = match client {
            Some(client) => redis.run_on(client, operation, script, keys, Vec::new()).await?,
            None => redis.run(operation, script, keys, Vec::new()).await?,
        };
        let [seconds, micros] = time[..] else {
            return Err(Error::new(ErrorKind::Parse, "TIME has no two numbers"));
        };
        let time = Duration::from_secs(seconds) + Duration::from_micros(micros);
        self.hear(Heard { time, asked, answered: Instant::now() });
        Ok(Some(time))
    }

    /// Takes over the database's time, which was asked for at a moment, where there is no better one.
    pub(super) fn hear_first(&self, time: Duration, asked: Instant) {
        if self.redis.is_some() && self.last().is_none() {
            self.hear(Heard { time, asked, answered: Instant::now() });
        }
    }

    fn hear(&self, heard: Heard) {
        let mut last = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if !last.is_some_and(|last| last.says_more_than(&heard)) {
            *last = Some(heard);
        }
    }

    fn last(&self) -> Option<Heard> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEARS: Duration = Duration::from_secs(1_800_000_000);

    fn heard(time: Duration, ago: Duration, took: Duration) -> Heard {
        let answered = Instant::now() - ago;
        Heard { time, asked: answered - took, answered }
    }

    #[test]
    fn the_time_lies_between_the_question_and_the_answer() {
        let (ago, took) = (Duration::from_secs(2), Duration::from_millis(80));
        let heard = heard(YEARS, ago, took);
        assert!(heard.earliest() >= YEARS + ago && heard.earliest() < YEARS + ago + took);
        assert!(heard.latest() >= YEARS + ago + took);
    }

    #[test]
    fn an_answer_that_took_less_stays_unless_it_is_old_or_a_clock_stepped() {
        let (second, slow, quick) =
            (Duration::from_secs(1), Duration::from_millis(90), Duration::from_millis(1));
        let now = |time| heard(time, Duration::ZERO, slow);
        let last = heard(YEARS, second, quick);
        assert!(last.says_more_than(&now(YEARS + second)));
        assert!(!now(YEARS + second).says_more_than(&last));
        assert!(!last.says_more_than(&now(YEARS + 60 * second)), "it stepped forward");
        assert!(!last.says_more_than(&now(YEARS - 60 * second)), "it stepped back");
        assert!(!heard(YEARS, GOOD_FOR, quick).says_more_than(&now(YEARS + GOOD_FOR)));
    }
}
