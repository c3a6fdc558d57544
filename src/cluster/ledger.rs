//! What Redis knows of connections: the leases of users, whose count is the limit, and what administrators
//! are shown. Scripts change it, each in one atomic step; all keys are in one slot of a Redis Cluster.
//!
//! Each connection of a node to Redis is a life of it, which lasts a little longer than the connection:
//! what comes late over one that was given up does not count, and what a dead node leaves behind the others
//! take off. `leases` asks for new connections, `keeper` does the rest.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fred::{
    clients::SubscriberClient,
    error::Error,
    interfaces::{HashesInterface, SetsInterface, SortedSetsInterface},
    types::{FromValue, scripts::Script},
};
use uuid::Uuid;

use super::{
    clock::Clock,
    details::{Owner, describe},
};
use crate::{
    config::{ConnectionPolicy, WsConfig},
    hub::Outbox,
    metrics::RedisOperation,
    redis::Redis,
};

/// How long a node lives without a sign of life.
const LIFETIME: Duration = Duration::from_secs(18);
/// Connections in one script: a few milliseconds of Redis.
const PAGE: i64 = 100;

/// What Redis says to connections that are entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entered {
    /// They count.
    Counted,
    /// The user has enough.
    Refused,
    /// This life is over: Redis has lost everything, or thinks the node dead.
    Unknown,
}

/// The last life of a node that is dead.
pub(super) struct Dead(String);

impl Dead {
    /// The node's id, without the number of its life.
    pub(super) fn node(&self) -> &str {
        self.0.rsplit_once(':').map_or(&*self.0, |(node, _)| node)
    }
}

pub(super) struct Ledger {
    redis: Arc<Redis>,
    node: Arc<str>,
    clock: Arc<Clock>,
    lives: AtomicU64,
    limit: u32,
    policy: ConnectionPolicy,
    scripts: Scripts,
}

struct Scripts {
    enter: Script,
    release: Script,
    renew: Script,
    report: Script,
    page: Script,
}

impl Ledger {
    pub(super) fn new(
        redis: Arc<Redis>,
        node: Arc<str>,
        clock: Arc<Clock>,
        config: &WsConfig,
    ) -> Self {
        let scripts = Scripts {
            enter: Script::from_lua(include_str!("scripts/enter.lua")),
            release: Script::from_lua(include_str!("scripts/release.lua")),
            renew: Script::from_lua(include_str!("scripts/renew.lua")),
            report: Script::from_lua(include_str!("scripts/report.lua")),
            page: Script::from_lua(include_str!("scripts/page.lua")),
        };
        let (limit, policy) = (config.max_connections_per_user, config.connection_policy);
        Self { redis, node, clock, lives: AtomicU64::new(0), limit, policy, scripts }
    }

    /// Whether users may have so many connections only.
    pub(super) fn is_limited(&self) -> bool {
        self.limit > 0
    }

    pub(super) fn is_connected(&self) -> bool {
        self.redis.is_connected()
    }

    /// Takes a lease for a new connection, if its user has not enough.
    pub(super) async fn take(&self, outbox: &Arc<Outbox>) -> Result<Entered, Error> {
        let policy = match self.policy {
            _ if self.limit == 0 => "keep",
            policy => policy.as_str(),
        };
        let (keys, arguments) = self.entry(std::slice::from_ref(outbox), policy);
        let script = &self.scripts.enter;
        self.redis.run(RedisOperation::Lease, script, keys, arguments).await.map(entered)
    }

    /// Some connections, of all users or of one by `sub`, the newest first, as JSON; and how many there are.
    pub(super) async fn page(
        &self,
        subject: Option<&str>,
        skip: i64,
        items: i64,
    ) -> Result<(Vec<String>, i64), Error> {
        self.page_of(self.index(subject), skip, items).await
    }

    async fn page_of(
        &self,
        index: String,
        skip: i64,
        items: i64,
    ) -> Result<(Vec<String>, i64), Error> {
        let keys = vec![index, self.key("details")];
        let (operation, script) = (RedisOperation::Connections, &self.scripts.page);
        let arguments = vec![skip.to_string(), items.to_string()];
        let page: Vec<String> = self.redis.run(operation, script, keys, arguments).await?;
        let mut page = page.into_iter();
        let total = page.next().and_then(|total| total.parse().ok()).unwrap_or(0);
        Ok((page.collect(), total))
    }

    /// How many connections there are, of all users or of one by `sub`.
    pub(super) async fn count(&self, subject: Option<&str>) -> Result<usize, Error> {
        let index = self.index(subject);
        let count = |client: Arc<SubscriberClient>| async move { client.zcard(index).await };
        self.redis.command(RedisOperation::Connections, count).await
    }

    /// Whether a user, by `sub`, has a connection.
    pub(super) async fn has_user(&self, subject: &str) -> Result<bool, Error> {
        Ok(self.count(Some(subject)).await? > 0)
    }

    /// The name that a user's newest connection was opened by.
    pub(super) async fn name_of(&self, subject: &str) -> Result<Option<Arc<str>>, Error> {
        let (newest, _) = self.page(Some(subject), 0, 1).await?;
        Ok(newest.first().map(|details| Owner::read(details).user.into()))
    }

    /// Adds the users with connections that were opened by a name, each by `sub`, until there are more than
    /// `most`.
    pub(super) async fn add_named(
        &self,
        name: &str,
        users: &mut BTreeSet<Arc<str>>,
        most: usize,
    ) -> Result<(), Error> {
        for skip in (0..).step_by(PAGE as usize) {
            let (page, total) = self.page_of(self.name(name), skip, PAGE).await?;
            for details in page {
                users.insert(Owner::read(&details).subject.into());
            }
            if skip + PAGE >= total || users.len() > most {
                break;
            }
        }
        Ok(())
    }

    /// Whether any node has a connection of this id.
    pub(super) async fn has(&self, id: Uuid) -> Result<bool, Error> {
        let (key, id) = (self.key("details"), id.to_string());
        let has = |client: Arc<SubscriberClient>| async move { client.hexists(key, id).await };
        self.redis.command(RedisOperation::Connections, has).await
    }

    /// The keys and arguments that enter connections.
    fn entry(&self, outboxes: &[Arc<Outbox>], policy: &str) -> (Vec<String>, Vec<String>) {
        let (channel, limit) = (self.redis.key("events"), self.limit.to_string());
        let mut keys = self.keys(&self.node);
        let mut arguments = vec![self.life(), limit, policy.to_owned(), channel];
        for outbox in outboxes {
            keys.extend([self.lease(outbox.subject()), self.name(outbox.username())]);
            let age = self.clock.since(outbox.since).as_millis().to_string();
            arguments.extend([outbox.id.to_string(), age, self.describe(outbox)]);
        }
        (keys, arguments)
    }

    fn describe(&self, outbox: &Outbox) -> String {
        describe(outbox, &self.node).get().to_owned()
    }

    fn life(&self) -> String {
        format!("{}:{}", self.node, self.lives.load(Ordering::Relaxed))
    }

    fn key(&self, name: &str) -> String {
        // What is in braces decides the slot.
        self.redis.key(&format!("{{connections}}:{name}"))
    }

    fn of_node(&self, node: &str) -> String {
        self.key(&format!("node:{node}"))
    }

    fn lease(&self, subject: &str) -> String {
        self.key(&format!("user:{subject}"))
    }

    fn name(&self, username: &str) -> String {
        self.key(&format!("name:{username}"))
    }

    fn index(&self, subject: Option<&str>) -> String {
        subject.map_or_else(|| self.key("all"), |subject| self.lease(subject))
    }

    fn keys(&self, node: &str) -> Vec<String> {
        vec![self.key("nodes"), self.key("all"), self.key("details"), self.of_node(node)]
    }
}

fn entered(answer: i64) -> Entered {
    match answer {
        1 => Entered::Counted,
        0 => Entered::Refused,
        _ => Entered::Unknown,
    }
}

/// A life of this node: what its link writes, over the connection that the life goes with.
pub(super) struct Life<'a> {
    ledger: &'a Ledger,
    client: SubscriberClient,
}

impl<'a> Life<'a> {
    pub(super) fn new(ledger: &'a Ledger, client: SubscriberClient) -> Self {
        ledger.lives.fetch_add(1, Ordering::Relaxed);
        Self { ledger, client }
    }

    /// Begins; whatever this node was before is over.
    pub(super) async fn begin(&self) -> Result<(), Error> {
        let lives = format!("{}:", self.ledger.node);
        self.renew_as(lives).await.map(drop)
    }

    /// Goes on, and says who is dead. None: this life is over.
    pub(super) async fn renew(&self) -> Result<Option<Vec<Dead>>, Error> {
        let over = self.renew_as(String::new()).await?;
        Ok((!over.is_empty()).then(|| over.into_iter().skip(1).map(Dead).collect()))
    }

    async fn renew_as(&self, begins: String) -> Result<Vec<String>, Error> {
        let arguments = vec![self.ledger.life(), LIFETIME.as_micros().to_string(), begins];
        let keys = vec![self.ledger.key("nodes")];
        self.run(RedisOperation::Renew, &self.ledger.scripts.renew, keys, arguments).await
    }

    /// Enters connections that are open. Users may have too many after that, but where the oldest go.
    pub(super) async fn enter(&self, outboxes: &[Arc<Outbox>]) -> Result<Entered, Error> {
        let policy = match self.ledger.policy {
            ConnectionPolicy::KickOldest if self.ledger.limit > 0 => "kick_oldest",
            _ => "keep",
        };
        let (keys, arguments) = self.ledger.entry(outboxes, policy);
        let script = &self.ledger.scripts.enter;
        self.run(RedisOperation::Lease, script, keys, arguments).await.map(entered)
    }

    /// Shows what is new about connections.
    pub(super) async fn report(&self, outboxes: &[Arc<Outbox>]) -> Result<(), Error> {
        let pair = |outbox: &Arc<Outbox>| [outbox.id.to_string(), self.ledger.describe(outbox)];
        let arguments = outboxes.iter().flat_map(pair).collect();
        let keys = vec![self.ledger.key("details")];
        self.run(RedisOperation::Report, &self.ledger.scripts.report, keys, arguments).await
    }

    /// Takes off connections that have ended.
    pub(super) async fn release(&self, ended: &[Arc<Outbox>]) -> Result<(), Error> {
        let connection = |outbox: &Arc<Outbox>| {
            let (user, subject) = (outbox.username().to_string(), outbox.identity());
            (outbox.id.to_string(), Owner { user, subject: subject.subject.to_string() })
        };
        let ended = ended.iter().map(connection);
        self.take_off(&self.ledger.node, String::new(), ended).await.map(drop)
    }

    /// The connections that stand there, of this node or of one that is dead.
    pub(super) async fn listed(&self, dead: Option<&Dead>) -> Result<Vec<String>, Error> {
        let node = dead.map_or(&*self.ledger.node, Dead::node);
        let listed = self.client.smembers(self.ledger.of_node(node));
        self.ledger.redis.timed(RedisOperation::Connections, listed).await
    }

    /// Takes off connections by their ids. False: the node that seemed dead lives.
    pub(super) async fn release_listed(
        &self,
        dead: Option<&Dead>,
        ids: &[String],
    ) -> Result<bool, Error> {
        let mut owners: Vec<Option<String>> = Vec::new();
        if !ids.is_empty() {
            let details = self.client.hmget(self.ledger.key("details"), ids.to_vec());
            owners = self.ledger.redis.timed(RedisOperation::Connections, details).await?;
        }
        let owner = |text: Option<String>| text.map(|text| Owner::read(&text)).unwrap_or_default();
        let connections = ids.iter().cloned().zip(owners.into_iter().map(owner));
        let node = dead.map_or(&*self.ledger.node, Dead::node);
        let life = dead.map(|dead| dead.0.clone()).unwrap_or_default();
        self.take_off(node, life, connections).await
    }

    async fn take_off(
        &self,
        node: &str,
        life: String,
        connections: impl Iterator<Item = (String, Owner)>,
    ) -> Result<bool, Error> {
        let mut keys = self.ledger.keys(node);
        let mut arguments = vec![life];
        for (id, owner) in connections {
            keys.extend([self.ledger.lease(&owner.subject), self.ledger.name(&owner.user)]);
            arguments.push(id);
        }
        let script = &self.ledger.scripts.release;
        let answer: i64 = self.run(RedisOperation::Release, script, keys, arguments).await?;
        Ok(answer == 1)
    }

    async fn run<T: FromValue>(
        &self,
        operation: RedisOperation,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<String>,
    ) -> Result<T, Error> {
        self.ledger.redis.run_on(&self.client, operation, script, keys, arguments).await
    }
}
