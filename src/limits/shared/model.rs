//! What stands for Redis in the models: a budget that answers after a while, or not.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use fred::error::{Error, ErrorKind};
use governor::Quota;
use shuttle::rand::{Rng, thread_rng};

use crate::{
    config::{ClusterConfig, FailMode},
    metrics::RedisOperation,
    redis::Redis,
    sync::{Mutex, yield_now},
};

pub(super) struct Units {
    pub(super) used: i64,
    pub(super) more: u32,
    pub(super) share: u32,
    pub(super) full_in: Duration,
}

pub(super) struct Shared {
    /// None in the models.
    pub(super) redis: Option<Arc<Redis>>,
    pub(super) fail_mode: FailMode,
    /// One call of so many is not answered; 0: all are.
    pub(super) fails: u32,
    /// Units that are taken. Time does not pass: none comes back.
    pub(super) used: Mutex<i64>,
}

impl Shared {
    pub(super) fn new(redis: Arc<Redis>, config: &ClusterConfig) -> Self {
        Self { redis: Some(redis), fail_mode: config.fail_mode, fails: 0, used: Mutex::new(0) }
    }

    pub(super) fn answers(&self) -> bool {
        self.redis.as_ref().is_none_or(|redis| redis.answers()) && !self.fails()
    }

    pub(super) async fn take(
        &self,
        _: RedisOperation,
        _: &str,
        quota: Quota,
        units: Units,
    ) -> Result<(u32, Duration), Error> {
        let lost = || Error::new(ErrorKind::Timeout, "lost");
        yield_now().await;
        if self.fails() {
            return Err(lost());
        }
        let interval = quota.replenish_interval();
        let (more, full) = {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            let full_in = units.full_in.as_nanos() / interval.as_nanos();
            *used = (*used + units.used).max(full_in.try_into().unwrap());
            let free = i64::from(quota.burst_size().get()) - *used;
            let more = i64::from(units.more).min(free / i64::from(units.share)).max(0);
            *used += more;
            (more.try_into().unwrap(), interval * u32::try_from((*used).max(0)).unwrap())
        };
        yield_now().await;
        if self.fails() { Err(lost()) } else { Ok((more, full)) }
    }

    fn fails(&self) -> bool {
        self.fails > 0 && thread_rng().gen_range(0..self.fails) == 0
    }
}
