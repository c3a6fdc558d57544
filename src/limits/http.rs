//! The REST budget of a user or an address: exact over all nodes, by asking Redis for each request.

use std::{net::IpAddr, num::NonZeroU32, sync::Arc, time::Duration};

use fred::error::Error;
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DashMapStateStore,
};

use super::{
    Unavailable,
    shared::{Shared, Units},
};
use crate::{
    config::{FailMode, HttpConfig, network_of},
    metrics::RedisOperation,
};

/// Whose REST budget a request takes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum HttpKey {
    /// The subject of a valid token.
    User(Arc<str>),
    /// The network of the client's address, without one.
    Address(IpAddr),
}

impl HttpKey {
    /// The budget of a client without a token.
    pub(crate) fn of(address: IpAddr) -> Self {
        Self::Address(network_of(address))
    }
}

/// What a REST client is told of its budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HttpBudget {
    /// Requests a minute.
    pub(crate) limit: u32,
    /// Requests left before the burst is touched.
    pub(crate) remaining: u32,
    /// Time until the budget is full again.
    pub(crate) reset: Duration,
    /// None: the request may go on. Else: the time after which one may be tried again.
    pub(crate) retry_after: Option<Duration>,
}

type Limiter =
    RateLimiter<HttpKey, DashMapStateStore<HttpKey>, DefaultClock, StateInformationMiddleware>;

/// The REST limit.
pub(super) struct HttpLimit {
    limit: u32,
    burst: u32,
    quota: Quota,
    limiter: Limiter,
    clock: DefaultClock,
    shared: Option<Arc<Shared>>,
}

impl HttpLimit {
    /// None where there is no limit.
    pub(super) fn new(
        config: &HttpConfig,
        clock: DefaultClock,
        shared: Option<Arc<Shared>>,
    ) -> Option<Self> {
        let (limit, burst) = (config.rate_limit_per_minute, config.rate_limit_burst);
        let quota = Quota::per_minute(NonZeroU32::new(limit)?)
            .allow_burst(NonZeroU32::new(limit.saturating_add(burst))?);
        let limiter = RateLimiter::dashmap_with_clock(quota, clock.clone()).with_middleware();
        Some(Self { limit, burst, quota, limiter, clock, shared })
    }

    /// Takes one request.
    pub(super) async fn take(&self, key: &HttpKey) -> Result<HttpBudget, Unavailable> {
        let Some(shared) = &self.shared else { return Ok(self.of_this_node(key)) };
        match (self.of_all_nodes(shared, key).await, shared.fail_mode) {
            (Ok(budget), _) => Ok(budget),
            (Err(_), FailMode::Open) => Ok(self.of_this_node(key)),
            (Err(_), FailMode::Closed) => Err(Unavailable),
        }
    }

    /// The same by what this node alone has counted.
    pub(super) fn of_this_node(&self, key: &HttpKey) -> HttpBudget {
        match self.limiter.check_key(key) {
            Ok(state) => self.budget(state.remaining_burst_capacity(), None),
            Err(refused) => self.budget(0, Some(refused.wait_time_from(self.clock.now()))),
        }
    }

    async fn of_all_nodes(&self, shared: &Shared, key: &HttpKey) -> Result<HttpBudget, Error> {
        let key = match key {
            HttpKey::User(subject) => format!("limit:http:user:{subject}"),
            HttpKey::Address(address) => format!("limit:http:address:{address}"),
        };
        let one = Units { used: 0, more: 1, share: 1, full_in: Duration::ZERO };
        let (taken, full) = shared.take(RedisOperation::HttpLimit, &key, self.quota, one).await?;
        let (interval, burst) = (self.quota.replenish_interval(), self.quota.burst_size().get());
        let used = (full.as_secs_f64() / interval.as_secs_f64()).ceil();
        Ok(match taken {
            // The cast is exact: there are no more than the burst.
            1 => self.budget((f64::from(burst) - used).max(0.0) as u32, None),
            _ => self.budget(0, Some((full + interval).saturating_sub(interval * burst))),
        })
    }

    fn budget(&self, left: u32, retry_after: Option<Duration>) -> HttpBudget {
        let full = self.quota.burst_size().get();
        HttpBudget {
            limit: self.limit,
            remaining: left.saturating_sub(self.burst),
            reset: self.quota.replenish_interval() * (full - left.min(full)),
            retry_after,
        }
    }

    /// Clients whose budgets are known.
    pub(super) fn len(&self) -> usize {
        self.limiter.len()
    }

    /// Forgets budgets that are full again.
    pub(super) fn forget_idle(&self) {
        self.limiter.retain_recent();
        self.limiter.shrink_to_fit();
    }
}
