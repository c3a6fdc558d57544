//! Budgets that all nodes share: GCRA as in-process, in one script of Redis and by its clock.

use std::{sync::Arc, time::Duration};

use fred::{error::Error, types::scripts::Script};
use governor::Quota;

use crate::{
    config::{ClusterConfig, FailMode},
    metrics::RedisOperation,
    redis::Redis,
};

/// A key holds the microsecond since 1970 at which its budget is full again, and goes then. Takes the
/// units that are used already (or gives back, below 0), but is full in so many microseconds at least; then
/// takes more if they are there. Returns how many more, and the microseconds until the budget is full.
const GCRA: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local used, more, share = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local full = math.max(tonumber(redis.call('GET', KEYS[1])) or now, now)
full = math.max(full + used * interval, now + tonumber(ARGV[6]))
local free = burst - (full - now) / interval
more = math.max(math.min(more, math.floor(free / share)), 0)
full = full + more * interval
if full > now then
  redis.call('SET', KEYS[1], string.format('%.3f', full), 'PX', math.ceil((full - now) / 1000))
else
  redis.call('DEL', KEYS[1])
end
return {more, full - now}
";

/// What is taken of a budget.
pub(super) struct Units {
    /// Used already, whether they are there or not; below 0: given back.
    pub(super) used: i64,
    /// More, if they are there.
    pub(super) more: u32,
    /// The part of what is there that may be taken: all, a half, …
    pub(super) share: u32,
    /// The budget is full no sooner: what a node knows, and Redis perhaps not.
    pub(super) full_in: Duration,
}

/// The limits of a cluster.
pub(super) struct Shared {
    redis: Arc<Redis>,
    gcra: Script,
    /// What to do while Redis does not answer.
    pub(super) fail_mode: FailMode,
}

impl Shared {
    pub(super) fn new(redis: Arc<Redis>, config: &ClusterConfig) -> Self {
        Self { redis, gcra: Script::from_lua(GCRA), fail_mode: config.fail_mode }
    }

    /// Whether an answer is to be expected.
    pub(super) fn answers(&self) -> bool {
        self.redis.answers()
    }

    /// Takes units of what a quota allows. Returns how many more there were, and the time until the
    /// budget is full.
    pub(super) async fn take(
        &self,
        operation: RedisOperation,
        key: &str,
        quota: Quota,
        units: Units,
    ) -> Result<(u32, Duration), Error> {
        let interval = quota.replenish_interval().as_secs_f64() * 1e6;
        let Units { used, more, share, full_in } = units;
        let arguments = vec![
            interval.to_string(),
            quota.burst_size().to_string(),
            used.to_string(),
            more.to_string(),
            share.to_string(),
            full_in.as_micros().to_string(),
        ];
        let keys = vec![self.redis.key(key)];
        let (more, full): (u32, u64) =
            self.redis.run(operation, &self.gcra, keys, arguments).await?;
        Ok((more, Duration::from_micros(full)))
    }
}
