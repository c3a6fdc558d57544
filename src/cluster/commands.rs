//! What the link asks of Redis: the channel, and the sorted set of logouts, whose scores are the ends of
//! their times.

use std::{collections::HashMap, sync::atomic::Ordering, time::Duration};

use fred::{
    clients::SubscriberClient,
    error::Error,
    interfaces::{KeysInterface, PubsubInterface, SortedSetsInterface},
};

use super::{
    Others,
    event::{Revocation, now},
};
use crate::metrics::RedisOperation;

/// Logouts in one command.
pub(super) const PAGE: usize = 1000;

/// The commands of one connection.
pub(super) struct Commands<'a> {
    pub(super) client: SubscriberClient,
    others: &'a Others,
    channel: String,
    revocations: String,
}

impl<'a> Commands<'a> {
    pub(super) fn new(others: &'a Others, client: SubscriberClient) -> Self {
        let key = |name| others.redis.key(name);
        Self { client, others, channel: key("events"), revocations: key("revocations") }
    }

    /// Takes part in the channel.
    pub(super) async fn subscribe(&self) -> Result<(), Error> {
        self.others
            .redis
            .timed(RedisOperation::Subscribe, self.client.subscribe(&self.channel))
            .await
    }

    /// Sends to every node, this one included.
    pub(super) async fn publish(&self, text: &str) -> Result<(), Error> {
        let publish = self.client.publish(&self.channel, text);
        let nodes = self.others.redis.timed(RedisOperation::Publish, publish).await?;
        self.others.nodes.store(nodes, Ordering::Relaxed);
        Ok(())
    }

    /// Asks how many nodes there are, which is a sign of life too.
    pub(super) async fn count_nodes(&self) -> Result<(), Error> {
        let count = self.client.pubsub_numsub(&self.channel);
        let counts: HashMap<String, usize> =
            self.others.redis.timed(RedisOperation::Nodes, count).await?;
        let nodes = counts.get(&self.channel).copied().unwrap_or(0);
        self.others.nodes.store(nodes, Ordering::Relaxed);
        Ok(())
    }

    /// Keeps logouts, and forgets those whose time is over. All go at the latest with the key, which
    /// lasts as long as the last of them.
    pub(super) async fn keep(
        &self,
        revocations: &[Revocation],
        lifetime: Duration,
    ) -> Result<(), Error> {
        let member = |revocation: &Revocation| {
            let text = serde_json::to_string(&revocation.logout);
            (revocation.until as f64, text.expect("a logout has nothing that JSON lacks"))
        };
        let members: Vec<_> = revocations.iter().map(member).collect();
        let (key, seconds) = (&self.revocations, i64::try_from(lifetime.as_secs() + 1));
        self.others
            .redis
            .timed(RedisOperation::Revoke, async {
                let _: () = self.client.zadd(key, None, None, false, false, members).await?;
                let _: () = self.client.expire(key, seconds.unwrap_or(i64::MAX), None).await?;
                self.client.zremrangebyscore(key, f64::NEG_INFINITY, now() as f64).await
            })
            .await
    }

    /// The logouts that are in force. From the end, so that none is passed over while others go at
    /// the beginning.
    pub(super) async fn revocations(&self) -> Result<Vec<Revocation>, Error> {
        let mut all = Vec::new();
        for offset in (0i64..).step_by(PAGE) {
            let page = self.client.zrevrangebyscore(
                &self.revocations,
                f64::INFINITY,
                now() as f64,
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
