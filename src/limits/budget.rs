//! What a client may do wrong within a minute, of one kind: failed authentications, say. Over it the client is
//! refused before anything of it is looked at.

use std::{
    hash::Hash,
    net::IpAddr,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use dashmap::DashMap;
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DashMapStateStore,
};

use crate::config::network_of;

type Limiter<K> = RateLimiter<K, DashMapStateStore<K>, DefaultClock, StateInformationMiddleware>;

/// A budget a minute for each client, by what the client is known by.
pub(crate) struct Budget<K: Hash + Eq + Clone> {
    /// None: no limit.
    limiter: Option<Limiter<K>>,
    /// The clients over their limit, each with the time at which one more may come: the limiter cannot be asked
    /// without taking from it.
    refused: DashMap<K, Instant>,
    clock: DefaultClock,
}

impl<K: Hash + Eq + Clone> Budget<K> {
    /// 0 stands for no limit.
    pub(super) fn new(per_minute: u32, clock: DefaultClock) -> Self {
        let limiter = NonZeroU32::new(per_minute).map(|limit| {
            RateLimiter::dashmap_with_clock(Quota::per_minute(limit), clock.clone())
                .with_middleware::<StateInformationMiddleware>()
        });
        Self { limiter, refused: DashMap::new(), clock }
    }

    /// The time for which a client is refused; none: it may try.
    pub(crate) fn refusal(&self, client: &K) -> Option<Duration> {
        let until = *self.refused.get(client)?;
        until.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero())
    }

    /// Takes one from the budget of a client. True: it was the last one, or there was none left.
    pub(crate) fn count(&self, client: &K) -> bool {
        let Some(limiter) = &self.limiter else { return false };
        if limiter.check_key(client).is_ok_and(|state| state.remaining_burst_capacity() > 0) {
            return false;
        }
        // The last one: one more takes nothing, and tells when there will be another.
        if let Err(over) = limiter.check_key(client) {
            let wait = over.wait_time_from(self.clock.now());
            self.refuse_until(client, Instant::now() + wait);
        }
        true
    }

    /// Refuses a client whatever is left of its budget.
    pub(super) fn refuse(&self, client: &K, wait: Duration) {
        if self.limiter.is_some() {
            self.refuse_until(client, Instant::now() + wait);
        }
    }

    /// Never shorter than before: another node may have seen more of the client.
    fn refuse_until(&self, client: &K, until: Instant) {
        let mut refused = self.refused.entry(client.clone()).or_insert(until);
        *refused = until.max(*refused);
    }

    /// Clients whose budget is not full.
    pub(super) fn len(&self) -> usize {
        // Those who are refused have a budget too, unless other nodes alone have counted them.
        self.limiter.as_ref().map_or(0, RateLimiter::len).max(self.refused.len())
    }

    /// Forgets the clients whose budget is full again.
    pub(super) fn forget_idle(&self) {
        let Some(limiter) = &self.limiter else { return };
        limiter.retain_recent();
        limiter.shrink_to_fit();
        let now = Instant::now();
        self.refused.retain(|_, until| *until > now);
        self.refused.shrink_to_fit();
    }
}

/// A budget of each address, by its network.
pub(crate) struct AddressBudget(pub(super) Budget<IpAddr>);

impl AddressBudget {
    /// 0 stands for no limit.
    pub(super) fn new(per_minute: u32, clock: DefaultClock) -> Self {
        Self(Budget::new(per_minute, clock))
    }

    /// The time for which an address is refused; none: it may try.
    pub(crate) fn refusal(&self, address: IpAddr) -> Option<Duration> {
        self.0.refusal(&network_of(address))
    }

    /// Takes one from the budget of an address. True: it was the last one, or there was none left.
    pub(crate) fn count(&self, address: IpAddr) -> bool {
        self.0.count(&network_of(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(per_minute: u32) -> AddressBudget {
        AddressBudget::new(per_minute, DefaultClock::default())
    }

    #[test]
    fn an_address_is_refused_after_its_last_failure_and_others_are_not() {
        let failures = failures(3);
        let (ann, bea) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        for _ in 0..3 {
            assert_eq!(failures.refusal(ann), None);
            failures.count(ann);
        }
        let wait = failures.refusal(ann).unwrap();
        assert!(wait > Duration::from_secs(15) && wait <= Duration::from_secs(20), "{wait:?}");
        failures.0.forget_idle();
        assert!(failures.refusal(ann).is_some());
        assert_eq!(failures.refusal(bea), None);
    }

    #[test]
    fn a_client_has_one_budget_over_all_of_its_ipv6_addresses() {
        let failures = failures(1);
        failures.count("2001:db8::1".parse().unwrap());
        assert!(failures.refusal("2001:db8::2".parse().unwrap()).is_some());
        assert_eq!(failures.refusal("2001:db8:0:1::1".parse().unwrap()), None);
        failures.count("::ffff:10.0.0.1".parse().unwrap());
        assert!(failures.refusal("10.0.0.1".parse().unwrap()).is_some());
    }

    #[test]
    fn zero_is_no_limit() {
        let failures = failures(0);
        let address = "10.0.0.1".parse().unwrap();
        assert!((0..1000).all(|_| !failures.count(address)));
        assert_eq!(failures.refusal(address), None);
    }
}
