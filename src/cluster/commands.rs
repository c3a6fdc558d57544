//! What the link asks of Redis: the channels, and the sorted set of logouts, whose scores are the ends of
//! their times.

use std::{collections::HashMap, sync::atomic::Ordering, time::Duration};

use fred::{
    clients::{SubscriberClient, WithOptions},
    error::{Error, ErrorKind},
    interfaces::{ClientLike, PubsubInterface, SortedSetsInterface},
    types::{ClusterHash, config::Options, scripts::Script},
};

use super::{Others, event::Revocation};
use crate::{auth::Logout, limits::Failures, metrics::RedisOperation};

/// Silence after which the connection is given up.
pub(super) const SILENCE: Duration = Duration::from_secs(2);
/// Logouts in one command.
pub(super) const PAGE: usize = 1000;

/// The commands of one connection.
pub(super) struct Commands<'a> {
    pub(super) client: SubscriberClient,
    others: &'a Others,
    channel: String,
    /// Of addresses that failed to authenticate too often.
    pub(super) failures: String,
    revocations: String,
    keep: Script,
}

impl<'a> Commands<'a> {
    pub(super) fn new(others: &'a Others, client: SubscriberClient) -> Self {
        let key = |name| others.redis.key(name);
        let keep = Script::from_lua(include_str!("scripts/keep.lua"));
        let (channel, failures) = (key("events"), key(Failures::CHANNEL));
        Self { client, others, channel, failures, revocations: key("revocations"), keep }
    }

    /// For commands about the channel. All nodes ask the same one of a Redis Cluster, which alone knows how
    /// many they are; the driver would take any.
    fn at_channel(&self) -> WithOptions<SubscriberClient> {
        let cluster_hash = Some(ClusterHash::FirstKey);
        self.client.with_options(&Options { cluster_hash, ..Options::default() })
    }

    /// Takes part in the channels. The first says which node of a Redis Cluster has the subscription to both.
    pub(super) async fn subscribe(&self) -> Result<(), Error> {
        let (client, channels) = (self.at_channel(), vec![&*self.channel, &*self.failures]);
        self.others.redis.timed(RedisOperation::Subscribe, client.subscribe(channels)).await
    }

    /// Sends to every node, this one included. It has as long as the connection: one that was given up may
    /// have arrived and is lost otherwise, and nobody waits for it.
    pub(super) async fn publish(&self, text: &str) -> Result<(), Error> {
        let timeout = Some(SILENCE);
        let client = self.client.with_options(&Options { timeout, ..Options::default() });
        let publish = client.publish(&self.channel, text);
        let nodes = self.others.redis.timed(RedisOperation::Publish, publish).await?;
        self.others.nodes.store(nodes, Ordering::Relaxed);
        Ok(())
    }

    /// Asks all masters of a Redis Cluster, for any may have the keys of a limit: one may be silent while the
    /// others answer, which does not make up for it.
    pub(super) async fn sign_of_life(&self) -> Result<(), Error> {
        let ask = async {
            self.ask_for_nodes().await?;
            if self.client.is_clustered() {
                for master in self.client.active_connections() {
                    let cluster_node = Some(master);
                    let options = Options { cluster_node, ..Options::default() };
                    self.client.with_options(&options).ping::<()>(None).await?;
                }
            }
            Ok(())
        };
        self.others.redis.timed(RedisOperation::Nodes, ask).await?;
        if self.others.nodes.load(Ordering::Relaxed) == 0 {
            return Err(Error::new(ErrorKind::Cluster, "the subscription is gone"));
        }
        Ok(())
    }

    /// Asks how many nodes there are.
    pub(super) async fn count_nodes(&self) -> Result<(), Error> {
        self.others.redis.timed(RedisOperation::Nodes, self.ask_for_nodes()).await
    }

    async fn ask_for_nodes(&self) -> Result<(), Error> {
        let client = self.at_channel();
        let counts: HashMap<String, usize> = client.pubsub_numsub(&self.channel).await?;
        let nodes = counts.get(&self.channel).copied().unwrap_or(0);
        self.others.nodes.store(nodes, Ordering::Relaxed);
        Ok(())
    }

    /// Keeps logouts, each for the time that is left of it, and tells every node of them; forgets those whose time
    /// is over. All go at the latest with the key, which lasts as long as the last of them.
    pub(super) async fn keep(
        &self,
        logouts: &[(Logout, Duration)],
        text: String,
    ) -> Result<(), Error> {
        let mut arguments = vec![self.channel.clone(), text];
        for (logout, left) in logouts {
            let text = serde_json::to_string(logout).expect("a logout has nothing that JSON lacks");
            let left = (*left + Duration::from_millis(500)).as_secs();
            arguments.extend([left.to_string(), text]);
        }
        let (redis, keys) = (&self.others.redis, vec![self.revocations.clone()]);
        redis.run_on(&self.client, RedisOperation::Revoke, &self.keep, keys, arguments).await
    }

    /// The logouts that are in force. From the end, so that none is passed over while others go at
    /// the beginning.
    pub(super) async fn revocations(&self, now: Duration) -> Result<Vec<Revocation>, Error> {
        let mut all = Vec::new();
        for offset in (0i64..).step_by(PAGE) {
            let page = self.client.zrevrangebyscore(
                &self.revocations,
                f64::INFINITY,
                now.as_secs() as f64,
                true,
                Some((offset, PAGE as i64)),
            );
            let page: Vec<(String, f64)> =
                self.others.redis.timed(RedisOperation::Revocations, page).await?;
            let last = page.len() < PAGE;
            for (member, until) in page {
                match serde_json::from_str(&member) {
                    Ok(logout) => all.push(Revocation { logout, until: until as u64 }),
                    Err(error) => tracing::warn!(%error, "a logout in redis is not understood"),
                }
            }
            if last {
                break;
            }
        }
        Ok(all)
    }
}
