//! How much a user may ask for: messages over WebSocket, requests over REST. By GCRA, in-process and,
//! where there are other nodes, over Redis.
//!
//! A session holds its user's [`MessageBudget`], shared by all of the user's connections and kept
//! while it is not full again, so that a reconnect brings no fresh one. An [`AddressBudget`] limits what an
//! address does wrong, and [`Pool`]s bound what clients hold at once, on each node by itself.

mod budget;
mod failures;
mod http;
mod messages;
mod pool;
#[cfg_attr(all(test, feature = "models"), path = "shared/model.rs")]
mod shared;

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use dashmap::{DashMap, Entry};
use governor::{Quota, clock::DefaultClock};

use budget::{AddressBudget, Budget};
pub(crate) use failures::Failures;
pub(crate) use http::{HttpBudget, HttpKey};
pub(crate) use messages::{MessageBudget, Refused};
pub(crate) use pool::{Full, Pool, Share};

use crate::{
    auth,
    config::{Config, FailMode},
    redis::Redis,
};
use http::HttpLimit;
use shared::Shared;

/// Sockets of one address that may send no token within a minute, before each counts as a failed
/// authentication: a network that loses packets is no attack.
const SILENCES_PER_MINUTE: u32 = 10;
/// Expulsions an address may have for each that a user may have.
const EXPULSIONS_OF_ADDRESS: u32 = 5;
/// A quota a minute is full again after this long.
const WINDOW: Duration = Duration::from_secs(60);

/// Redis does not answer, and `RATE_LIMIT_FAIL_MODE` has what it would have to allow refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unavailable;

/// The limits, as this node knows them.
pub(crate) struct Limits {
    /// Bad tokens and passwords.
    pub(crate) failures: Failures,
    /// What is refused before anybody tries a token: expired ones, foreign origins, broken upgrades.
    pub(crate) refusals: AddressBudget,
    /// Logout tokens that were refused. Apart: any website can have its visitors send some.
    pub(crate) backchannel: AddressBudget,
    /// Sockets that were opened and sent no token.
    silences: AddressBudget,
    /// Sockets that broke the rules before they sent a token.
    pub(crate) breaches: AddressBudget,
    /// Connections of a user that were closed for what their client did.
    pub(crate) expulsions: Budget<Arc<str>>,
    /// Those of all users of an address.
    address_expulsions: AddressBudget,
    /// Metrics that were asked for: each time they are gathered and written anew.
    pub(crate) scrapes: AddressBudget,
    http: Option<HttpLimit>,
    /// This node's own for operators, who need their routes most while Redis is away.
    operators: Option<HttpLimit>,
    message_quota: Option<Quota>,
    messages: DashMap<Arc<str>, UserMessages>,
    clock: DefaultClock,
    shared: Option<Arc<Shared>>,
    /// Without it this node refuses what clients ask for.
    needed: Option<Needed>,
}

/// A Redis without which limits fail closed.
struct Needed {
    redis: Arc<Redis>,
    /// How long the node counts as ready without it.
    ready_after: Duration,
}

struct UserMessages {
    budget: Arc<MessageBudget>,
    idle_since: Option<Instant>,
}

impl Limits {
    /// Limits as configured; 0 stands for none. Without Redis they are this node's own.
    pub(crate) fn new(config: &Config, redis: Option<Arc<Redis>>) -> Self {
        let clock = DefaultClock::default();
        let failures = config.auth.failures_per_minute;
        let failures = Failures::new(failures, clock.clone(), redis.as_ref());
        let needed = redis.as_ref().filter(|_| fails_closed(config)).map(|redis| Needed {
            redis: Arc::clone(redis),
            ready_after: config.server.ready_after,
        });
        let shared = redis.map(|redis| Arc::new(Shared::new(redis, &config.cluster)));
        Self {
            failures,
            refusals: AddressBudget::new(config.auth.refusals_per_minute, clock.clone()),
            backchannel: AddressBudget::new(
                config.auth.backchannel_failures_per_minute,
                clock.clone(),
            ),
            silences: AddressBudget::new(SILENCES_PER_MINUTE, clock.clone()),
            breaches: AddressBudget::new(config.auth.refusals_per_minute, clock.clone()),
            expulsions: Budget::new(config.ws.expulsions_per_minute, clock.clone()),
            address_expulsions: AddressBudget::new(
                config.ws.expulsions_per_minute.saturating_mul(EXPULSIONS_OF_ADDRESS),
                clock.clone(),
            ),
            scrapes: AddressBudget::new(config.http.scrapes_per_minute, clock.clone()),
            http: HttpLimit::new(&config.http, clock.clone(), shared.clone()),
            operators: HttpLimit::new(&config.http, clock.clone(), None),
            message_quota: NonZeroU32::new(config.ws.message_rate_limit).map(Quota::per_minute),
            messages: DashMap::new(),
            clock,
            shared,
            needed,
        }
    }

    /// The time for which a token of an address is not to be examined; none: it may be.
    pub(crate) fn refusal(&self, address: IpAddr, token: &str) -> Option<Duration> {
        self.failures.refusal(address).or_else(|| {
            let wait = self.refusals.refusal(address)?;
            // A crowd behind one address comes back with expired tokens, and then with fresh ones.
            auth::claims_to_be_expired(token).then_some(wait)
        })
    }

    /// Counts a socket that sent no token. One that does it again and again fails to authenticate.
    pub(crate) fn count_silence(&self, address: IpAddr) {
        if self.silences.count(address) {
            self.failures.count(address);
        }
    }

    /// Counts a connection that was closed for what its client did. Beyond what is allowed to an address each
    /// is the user's last for a minute: others behind the same address are honest.
    pub(crate) fn count_expulsion(&self, subject: &Arc<str>, address: IpAddr) {
        self.expulsions.count(subject);
        if self.address_expulsions.count(address) {
            self.expulsions.refuse(subject, WINDOW);
        }
    }

    /// Takes one request from a REST budget; none where there is no limit.
    pub(crate) async fn http(&self, key: &HttpKey) -> Result<Option<HttpBudget>, Unavailable> {
        match &self.http {
            Some(limit) => limit.take(key).await.map(Some),
            None => Ok(None),
        }
    }

    /// Takes one request from a budget of the operators' routes, which is asked of this node alone.
    pub(crate) fn operators(&self, key: &HttpKey) -> Option<HttpBudget> {
        self.operators.as_ref().map(|limit| limit.of_this_node(key))
    }

    /// Whether clients are served while Redis is away.
    pub(crate) fn serve_without_redis(&self) -> bool {
        self.needed.is_none()
    }

    /// Whether clients are served: not where Redis has been away for long and limits fail closed.
    pub(crate) fn serve(&self) -> bool {
        let Some(Needed { redis, ready_after }) = &self.needed else { return true };
        redis.outage().is_none_or(|outage| outage < *ready_after)
    }

    /// The message budget of a user. One that is new here may have been used on other nodes.
    pub(crate) async fn messages(&self, subject: &Arc<str>) -> Arc<MessageBudget> {
        let (budget, is_new) = self.of_user(subject);
        if is_new {
            budget.settle().await;
        }
        budget
    }

    fn of_user(&self, subject: &Arc<str>) -> (Arc<MessageBudget>, bool) {
        match self.messages.entry(Arc::clone(subject)) {
            Entry::Occupied(mut user) => {
                user.get_mut().idle_since = None;
                (Arc::clone(&user.get().budget), false)
            }
            Entry::Vacant(place) => {
                let (quota, shared) = (self.message_quota, self.shared.as_ref());
                let budget = Arc::new(MessageBudget::new(quota, &self.clock, shared, subject));
                place.insert(UserMessages { budget: Arc::clone(&budget), idle_since: None });
                (budget, true)
            }
        }
    }

    /// Entries of the tables of messages, of REST and of failures.
    pub(crate) fn entries(&self) -> [usize; 3] {
        let http = [&self.http, &self.operators].into_iter().flatten().map(HttpLimit::len).sum();
        let wrongs: usize = self.of_addresses().map(|budget| budget.0.len()).iter().sum();
        [self.messages.len(), http, wrongs + self.expulsions.len()]
    }

    fn of_addresses(&self) -> [&AddressBudget; 7] {
        let Self { failures, refusals, backchannel, silences, breaches, scrapes, .. } = self;
        let expulsions = &self.address_expulsions;
        [failures.here(), refusals, backchannel, silences, breaches, scrapes, expulsions]
    }

    /// Forgets budgets that are full again. To be called once a minute.
    pub(crate) fn forget_idle(&self) {
        self.of_addresses().into_iter().for_each(|budget| budget.0.forget_idle());
        self.expulsions.forget_idle();
        [&self.http, &self.operators].into_iter().flatten().for_each(HttpLimit::forget_idle);
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

/// Whether there is a limit that clients cannot pass while Redis does not answer.
fn fails_closed(config: &Config) -> bool {
    let (http, ws) = (config.http.rate_limit_per_minute, &config.ws);
    config.cluster.fail_mode == FailMode::Closed
        && [http, ws.message_rate_limit, ws.max_connections_per_user].iter().any(|limit| *limit > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn limits(settings: &[(&str, &str)]) -> Limits {
        let config = Config::read(|name| {
            settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        });
        Limits::new(&config.unwrap(), None)
    }

    #[tokio::test]
    async fn the_burst_comes_on_top_of_the_limit() {
        let limits = limits(&[("RATE_LIMIT_PER_MINUTE", "6"), ("RATE_LIMIT_BURST", "2")]);
        let key = HttpKey::User("u".into());
        let mut budgets = Vec::new();
        for _ in 0..9 {
            budgets.push(limits.http(&key).await.unwrap().unwrap());
        }
        let remaining: Vec<_> = budgets.iter().map(|budget| budget.remaining).collect();
        assert_eq!(remaining, [5, 4, 3, 2, 1, 0, 0, 0, 0]);
        assert!(budgets[..8].iter().all(|budget| budget.retry_after.is_none()));
        assert!(budgets[8].retry_after.is_some_and(|wait| wait <= Duration::from_secs(10)));
        assert_eq!(budgets[8].reset.as_secs(), 80);
        assert!(
            limits
                .http(&HttpKey::User("other".into()))
                .await
                .unwrap()
                .unwrap()
                .retry_after
                .is_none()
        );
    }

    #[tokio::test]
    async fn a_reconnect_brings_no_fresh_message_budget() {
        let limits = limits(&[("WS_MESSAGE_RATE_LIMIT", "2")]);
        let subject: Arc<str> = "u".into();
        let first = limits.messages(&subject).await;
        assert!(first.take().is_ok() && first.take().is_ok());
        assert!(
            matches!(first.take(), Err(Refused::TooMany(wait)) if wait <= Duration::from_secs(30))
        );
        drop(first);
        limits.forget_idle();
        assert!(limits.messages(&subject).await.take().is_err());
    }

    #[tokio::test]
    async fn zero_is_no_limit() {
        let limits = limits(&[("WS_MESSAGE_RATE_LIMIT", "0"), ("RATE_LIMIT_PER_MINUTE", "0")]);
        let budget = limits.messages(&"u".into()).await;
        assert!((0..10_000).all(|_| budget.take().is_ok()));
        assert_eq!(limits.http(&HttpKey::User("u".into())).await, Ok(None));
    }
}
