//! How much a user may ask for: messages over WebSocket, requests over REST. In-process, by GCRA.
//!
//! A session holds its user's [`MessageBudget`], shared by all of the user's connections and kept
//! while it is not full again, so that a reconnect brings no fresh one. [`Failures`] are limited by address.

mod failures;

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use dashmap::DashMap;
use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DashMapStateStore,
};

pub(crate) use failures::Failures;

use crate::config::Config;

/// A quota a minute is full again after this long.
const WINDOW: Duration = Duration::from_secs(60);

/// Whose REST budget a request takes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum HttpKey {
    /// The subject of a valid token.
    User(Arc<str>),
    /// The client's address, without one.
    Address(IpAddr),
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

type HttpLimiter =
    RateLimiter<HttpKey, DashMapStateStore<HttpKey>, DefaultClock, StateInformationMiddleware>;

/// The limits of this node.
pub(crate) struct Limits {
    pub(crate) failures: Failures,
    http: Option<HttpLimiter>,
    http_limit: u32,
    http_burst: u32,
    message_quota: Option<Quota>,
    messages: DashMap<Arc<str>, UserMessages>,
    clock: DefaultClock,
}

struct UserMessages {
    budget: Arc<MessageBudget>,
    idle_since: Option<Instant>,
}

impl Limits {
    /// Limits as configured; 0 stands for none.
    pub(crate) fn new(config: &Config) -> Self {
        let (http, ws) = (&config.http, &config.ws);
        let clock = DefaultClock::default();
        let per_minute = NonZeroU32::new(http.rate_limit_per_minute);
        Self {
            failures: Failures::new(config.auth.failures_per_minute, clock.clone()),
            http: per_minute.map(|limit| {
                let quota = Quota::per_minute(limit)
                    .allow_burst(limit.saturating_add(http.rate_limit_burst));
                RateLimiter::dashmap_with_clock(quota, clock.clone())
                    .with_middleware::<StateInformationMiddleware>()
            }),
            http_limit: http.rate_limit_per_minute,
            http_burst: http.rate_limit_burst,
            message_quota: NonZeroU32::new(ws.message_rate_limit).map(Quota::per_minute),
            messages: DashMap::new(),
            clock,
        }
    }

    /// Takes one request from a REST budget; none where there is no limit.
    pub(crate) fn http(&self, key: &HttpKey) -> Option<HttpBudget> {
        let (left, retry_after) = match self.http.as_ref()?.check_key(key) {
            Ok(state) => (state.remaining_burst_capacity(), None),
            Err(refused) => (0, Some(refused.wait_time_from(self.clock.now()))),
        };
        let full = self.http_limit.saturating_add(self.http_burst);
        Some(HttpBudget {
            limit: self.http_limit,
            remaining: left.saturating_sub(self.http_burst),
            reset: WINDOW.mul_f64(f64::from(full - left.min(full)) / f64::from(self.http_limit)),
            retry_after,
        })
    }

    /// The message budget of a user.
    pub(crate) fn messages(&self, subject: &Arc<str>) -> Arc<MessageBudget> {
        let mut user = self.messages.entry(Arc::clone(subject)).or_insert_with(|| UserMessages {
            budget: Arc::new(MessageBudget {
                limiter: self
                    .message_quota
                    .map(|quota| RateLimiter::direct_with_clock(quota, self.clock.clone())),
                clock: self.clock.clone(),
            }),
            idle_since: None,
        });
        user.idle_since = None;
        Arc::clone(&user.budget)
    }

    /// Forgets budgets that are full again. To be called once a minute.
    pub(crate) fn forget_idle(&self) {
        self.failures.forget_idle();
        if let Some(http) = &self.http {
            http.retain_recent();
            http.shrink_to_fit();
        }
        let now = Instant::now();
        self.messages.retain(|_, user| {
            if Arc::strong_count(&user.budget) > 1 {
                return true;
            }
            now - *user.idle_since.get_or_insert(now) < WINDOW
        });
        self.messages.shrink_to_fit();
    }
}

/// The messages that a user may send, over all connections.
pub(crate) struct MessageBudget {
    limiter: Option<DefaultDirectRateLimiter>,
    clock: DefaultClock,
}

impl MessageBudget {
    /// Takes one message; the error is the time after which one may be tried again.
    pub(crate) fn take(&self) -> Result<(), Duration> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        limiter.check().map_err(|refused| refused.wait_time_from(self.clock.now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn limits(settings: &[(&str, &str)]) -> Limits {
        let config = Config::read(|name| {
            settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        });
        Limits::new(&config.unwrap())
    }

    #[test]
    fn the_burst_comes_on_top_of_the_limit() {
        let limits = limits(&[("RATE_LIMIT_PER_MINUTE", "6"), ("RATE_LIMIT_BURST", "2")]);
        let key = HttpKey::User("u".into());
        let budgets: Vec<_> = (0..9).map(|_| limits.http(&key).unwrap()).collect();
        let remaining: Vec<_> = budgets.iter().map(|budget| budget.remaining).collect();
        assert_eq!(remaining, [5, 4, 3, 2, 1, 0, 0, 0, 0]);
        assert!(budgets[..8].iter().all(|budget| budget.retry_after.is_none()));
        assert!(budgets[8].retry_after.is_some_and(|wait| wait <= Duration::from_secs(10)));
        assert_eq!(budgets[8].reset.as_secs(), 80);
        assert!(limits.http(&HttpKey::User("other".into())).unwrap().retry_after.is_none());
    }

    #[test]
    fn a_reconnect_brings_no_fresh_message_budget() {
        let limits = limits(&[("WS_MESSAGE_RATE_LIMIT", "2")]);
        let subject: Arc<str> = "u".into();
        let first = limits.messages(&subject);
        assert!(first.take().is_ok() && first.take().is_ok());
        assert!(first.take().is_err_and(|wait| wait <= Duration::from_secs(30)));
        drop(first);
        limits.forget_idle();
        assert!(limits.messages(&subject).take().is_err());
    }

    #[test]
    fn zero_is_no_limit() {
        let limits = limits(&[("WS_MESSAGE_RATE_LIMIT", "0"), ("RATE_LIMIT_PER_MINUTE", "0")]);
        let budget = limits.messages(&"u".into());
        assert!((0..10_000).all(|_| budget.take().is_ok()));
        assert_eq!(limits.http(&HttpKey::User("u".into())), None);
    }
}
