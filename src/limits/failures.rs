//! Failed authentications of an address on all nodes. Each node counts its own at once; Redis adds them up, and
//! tells every node the addresses that have used up their budget. Nobody waits for that, and without Redis each
//! node goes by what it has counted itself.

use std::{
    collections::{HashMap, hash_map::Entry},
    mem,
    net::IpAddr,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fred::{error::Error, types::scripts::Script};
use governor::{Quota, clock::DefaultClock};
use serde::Deserialize;

use super::{AddressBudget, WINDOW};
use crate::{config::network_of, metrics::RedisOperation, redis::Redis};

/// Addresses that wait to be told to Redis; failures of more count on their node alone.
const BOUND: usize = 10_000;
/// No node is told to refuse an address for longer, whatever the other nodes saw of it.
const LONGEST: Duration = WINDOW.saturating_mul(2);

/// A budget that nodes overdraw: what they let through before they heard of each other is owed, up to as much
/// again. The key is as in `shared`. Whoever finds nothing left tells all nodes.
const FAILED: &str = r#"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst, failed = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local full = math.max(tonumber(redis.call('GET', KEYS[1])) or now, now)
full = math.min(full + failed * interval, now + 2 * burst * interval)
redis.call('SET', KEYS[1], string.format('%.3f', full), 'PX', math.ceil((full - now) / 1000))
local wait = full - now - (burst - 1) * interval
if wait > 0 then
  local text = '{"address":"%s","wait_ms":%.0f}'
  redis.call('PUBLISH', ARGV[4], string.format(text, ARGV[5], math.ceil(wait / 1000)))
end
return 0
"#;

/// An address that has used up its budget, as nodes are told of it.
#[derive(Debug, Deserialize)]
pub(crate) struct Blocked {
    address: IpAddr,
    wait_ms: u64,
}

/// The failures of each address.
pub(crate) struct Failures {
    here: AddressBudget,
    everywhere: Option<Arc<Everywhere>>,
}

impl Failures {
    /// The channel that nodes are told on. Nodes that do not know it yet never hear of it.
    pub(crate) const CHANNEL: &str = "failures";

    /// 0 stands for no limit.
    pub(super) fn new(per_minute: u32, clock: DefaultClock, redis: Option<&Arc<Redis>>) -> Self {
        let everywhere = redis.zip(NonZeroU32::new(per_minute)).map(|(redis, limit)| Everywhere {
            redis: Arc::clone(redis),
            quota: Quota::per_minute(limit),
            script: Script::from_lua(FAILED),
            waiting: Mutex::default(),
        });
        Self { here: AddressBudget::new(per_minute, clock), everywhere: everywhere.map(Arc::new) }
    }

    /// The time for which an address is refused; none: it may try.
    pub(crate) fn refusal(&self, address: IpAddr) -> Option<Duration> {
        self.here.refusal(address)
    }

    /// Counts a failure of an address.
    pub(crate) fn count(&self, address: IpAddr) {
        self.here.count(address);
        if let Some(everywhere) = &self.everywhere {
            everywhere.add(network_of(address));
        }
    }

    /// Refuses an address that failed too often on all nodes together.
    pub(crate) fn block(&self, blocked: &Blocked) {
        let wait = Duration::from_millis(blocked.wait_ms).min(LONGEST);
        self.here.0.refuse(&network_of(blocked.address), wait);
    }

    /// What this node has counted.
    pub(super) fn here(&self) -> &AddressBudget {
        &self.here
    }
}

/// The way to the sums in Redis.
struct Everywhere {
    redis: Arc<Redis>,
    quota: Quota,
    script: Script,
    waiting: Mutex<Waiting>,
}

/// Failures of which Redis is yet to be told.
#[derive(Default)]
struct Waiting {
    failed: HashMap<IpAddr, u32>,
    /// A task tells of them.
    telling: bool,
}

impl Everywhere {
    fn add(self: &Arc<Self>, network: IpAddr) {
        let mut waiting = self.waiting();
        let full = waiting.failed.len() >= BOUND;
        match waiting.failed.entry(network) {
            Entry::Vacant(_) if full => {}
            failed => *failed.or_default() += 1,
        }
        if !mem::replace(&mut waiting.telling, true) {
            tokio::spawn(tell(Arc::clone(self)));
        }
    }

    /// All that wait; none: the task that tells of them is to end.
    fn next(&self) -> Option<HashMap<IpAddr, u32>> {
        let mut waiting = self.waiting();
        waiting.telling = !waiting.failed.is_empty();
        waiting.telling.then(|| mem::take(&mut waiting.failed))
    }

    async fn fail(&self, network: IpAddr, times: u32) -> Result<(), Error> {
        let arguments = vec![
            (self.quota.replenish_interval().as_secs_f64() * 1e6).to_string(),
            self.quota.burst_size().to_string(),
            times.to_string(),
            self.redis.key(Failures::CHANNEL),
            network.to_string(),
        ];
        let keys = vec![self.redis.key(&format!("limit:failures:{network}"))];
        self.redis.run::<()>(RedisOperation::Failures, &self.script, keys, arguments).await
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that panics happens while the lock is held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells Redis of all failures that wait, one address after the other.
async fn tell(everywhere: Arc<Everywhere>) {
    while let Some(failed) = everywhere.next() {
        for (network, times) in failed {
            if let Err(error) = everywhere.fail(network, times).await {
                tracing::debug!(%error, "failed authentications count on this node alone");
            }
        }
    }
}
