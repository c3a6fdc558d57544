//! What a node asks of Redis, each within [`COMMAND`] and measured: the channel, and the sorted set of
//! logouts, whose scores are the ends of their times.

use std::{
    collections::HashMap,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use fred::{
    clients::SubscriberClient,
    error::{Error, ErrorKind},
    interfaces::{ClientLike, KeysInterface, PubsubInterface, SortedSetsInterface},
    types::{Builder, RespVersion, config::Config},
};
use tokio::{task::JoinError, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Redis,
    event::{Revocation, now},
};
use crate::metrics::{CallOutcome, RedisOperation};

/// Time for a command.
const COMMAND: Duration = Duration::from_millis(100);
/// Time to connect, and for each step of it.
const CONNECT: Duration = Duration::from_secs(1);
/// Time to find the server and all these steps.
const OPENING: Duration = Duration::from_secs(2);
/// Messages that wait to be handed over; more are lost.
const INBOX: usize = 4096;
/// Logouts in one command.
pub(super) const PAGE: usize = 1000;

/// The driver's task, which is done when the connection is lost, and takes it along when it is dropped.
pub(super) type Connection = AbortOnDropHandle<Result<(), Error>>;

/// Why the driver's task ended.
pub(super) fn gone(ended: Result<Result<(), Error>, JoinError>) -> Error {
    match ended {
        Ok(Err(error)) => error,
        _ => Error::new(ErrorKind::Canceled, "the driver gave up"),
    }
}

/// The commands of one connection.
pub(super) struct Commands<'a> {
    pub(super) client: SubscriberClient,
    redis: &'a Redis,
    channel: String,
    revocations: String,
}

impl<'a> Commands<'a> {
    /// Not connected yet.
    pub(super) fn new(redis: &'a Redis) -> Result<Self, Error> {
        let mut config = Config::from_url(redis.url.expose())?;
        // Commands and messages share the connection.
        config.version = RespVersion::RESP3;
        let client = Builder::from_config(config)
            .with_connection_config(|connection| {
                connection.connection_timeout = CONNECT;
                connection.internal_command_timeout = CONNECT;
                connection.max_command_attempts = 1;
            })
            .with_performance_config(|performance| {
                performance.default_command_timeout = COMMAND;
                performance.broadcast_channel_capacity = INBOX;
            })
            .build_subscriber_client()?;
        let key = |name| format!("{}:{name}", redis.prefix);
        Ok(Self { client, redis, channel: key("events"), revocations: key("revocations") })
    }

    /// Connects.
    pub(super) async fn connect(&self) -> Result<Connection, Error> {
        let connect = async {
            let mut connection = AbortOnDropHandle::new(self.client.connect());
            tokio::select! {
                connected = timeout(OPENING, self.client.wait_for_connect()) => match connected {
                    Ok(connected) => connected?,
                    Err(_) => return Err(Error::new(ErrorKind::Timeout, "no answer")),
                },
                ended = &mut connection => return Err(gone(ended)),
            }
            Ok(connection)
        };
        self.timed(RedisOperation::Connect, connect).await
    }

    /// Takes part in the channel.
    pub(super) async fn subscribe(&self) -> Result<(), Error> {
        self.timed(RedisOperation::Subscribe, self.client.subscribe(&self.channel)).await
    }

    /// Sends to every node, this one included.
    pub(super) async fn publish(&self, text: &str) -> Result<(), Error> {
        let publish = self.client.publish(&self.channel, text);
        let nodes = self.timed(RedisOperation::Publish, publish).await?;
        self.redis.nodes.store(nodes, Ordering::Relaxed);
        Ok(())
    }

    /// Asks how many nodes there are, which is a sign of life too.
    pub(super) async fn count_nodes(&self) -> Result<(), Error> {
        let count = self.client.pubsub_numsub(&self.channel);
        let counts: HashMap<String, usize> = self.timed(RedisOperation::Nodes, count).await?;
        let nodes = counts.get(&self.channel).copied().unwrap_or(0);
        self.redis.nodes.store(nodes, Ordering::Relaxed);
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
        self.timed(RedisOperation::Revoke, async {
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
            let page: Vec<(String, f64)> = self.timed(RedisOperation::Revocations, page).await?;
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

    async fn timed<T>(
        &self,
        operation: RedisOperation,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let result = call.await;
        let outcome = if result.is_ok() { CallOutcome::Success } else { CallOutcome::Error };
        self.redis.metrics.done(operation, outcome, started.elapsed().as_secs_f64());
        result
    }
}
