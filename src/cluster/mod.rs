//! Many nodes as one server: what is pushed to clients, or ends their sessions, on whichever node they
//! are; and how many connections a user has on all of them.
//!
//! Handlers and REST call a [`Cluster`], which acts at once on this node's connections. Where there is a
//! Redis, it also puts an event into a bounded `queue`; the `link`, an actor, sends it to the others
//! and hands over theirs. A new connection takes one of the `leases`, which the link's `keeper` keeps in
//! the `ledger`. A node that is cut off from Redis serves its own clients as before.

mod clock;
mod commands;
mod details;
mod event;
mod keeper;
mod kept;
mod leases;
mod ledger;
mod link;
mod queue;
mod users;

use std::{
    borrow::Cow,
    cell::OnceCell,
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fred::error::Error;
use prometheus::IntCounter;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use tokio::task::yield_now;
use uuid::Uuid;

pub(crate) use kept::{NotKept, keep_logouts};
pub(crate) use leases::Lease;
pub(crate) use link::ClusterLink;
pub(crate) use users::{NamedBy, User};

use crate::{
    auth::{Identity, Logout, RefreshError, Validator},
    config::Config,
    hub::{Hub, Outbox, Recipients},
    limits::Limits,
    protocol::{CloseReason, Push},
    redis::Redis,
    store::Store,
};
use clock::Clock;
use details::describe;
use event::{Envelope, Event};
use leases::Leases;
use ledger::Ledger;
use queue::{Dropped, Item, Queue};

/// Why a connection is ended from outside.
const REVOKED: CloseReason = CloseReason::SessionRevoked;

/// Why a connection may not have been ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CloseError {
    /// Redis does not say whether there is one.
    #[error(transparent)]
    Away(#[from] Error),
    /// It is ended, and nodes that hear nothing may not learn it.
    #[error(transparent)]
    NotKept(#[from] NotKept),
}

/// Who gets a push.
pub(crate) enum Audience<'a> {
    /// Every connection whose user may see the changes of the package, but one perhaps.
    Viewers { except: Option<Uuid> },
    /// Every connection.
    All,
    /// Every connection of a user.
    User(&'a User),
}

/// The roles that are all needed to see the changes of a package, by id: of all packages that push changes.
pub(crate) type Viewers = HashMap<i32, &'static [&'static str]>;

/// The nodes, as this one sees them.
pub(crate) struct Cluster {
    /// This node, until it ends.
    node: Arc<str>,
    hub: Arc<Hub>,
    validator: Arc<Validator>,
    store: Arc<Store>,
    clock: Arc<Clock>,
    viewers: Viewers,
    broadcast_errors: IntCounter,
    /// Logouts that are in force and that the database does not keep yet.
    unkept: Mutex<HashSet<Logout>>,
    /// None: this node is alone.
    others: Option<Others>,
}

/// What a node's view of the others is made of.
pub(crate) struct ClusterParts {
    /// None: this node is alone.
    pub(crate) redis: Option<Arc<Redis>>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) store: Arc<Store>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) validator: Arc<Validator>,
    pub(crate) viewers: Viewers,
    pub(crate) broadcast_errors: IntCounter,
}

/// What the link works with, whichever actor it is.
struct Others {
    /// Connected: subscribed, and every logout of the others is known.
    redis: Arc<Redis>,
    /// Is told of failed authentications on other nodes.
    limits: Arc<Limits>,
    queue: Queue,
    leases: Arc<Leases>,
    /// The first attempt to connect is over.
    tried: AtomicBool,
    /// How many nodes there are, as Redis last said.
    nodes: AtomicUsize,
    /// Some logouts of this node may not be in Redis.
    unsynced: AtomicBool,
}

impl Cluster {
    /// A node of a cluster, or the only one there is.
    pub(crate) fn new(config: &Config, parts: ClusterParts) -> Self {
        let ClusterParts { redis, limits, store, hub, validator, viewers, broadcast_errors } =
            parts;
        let node = node_id(config.cluster.node.as_deref());
        let clock = Arc::new(Clock::new(redis.clone()));
        let leases = |redis| {
            let ledger = Ledger::new(redis, Arc::clone(&node), Arc::clone(&clock), &config.ws);
            Arc::new(Leases::new(ledger, config.cluster.fail_mode))
        };
        let others = redis.map(|redis| Others {
            leases: leases(Arc::clone(&redis)),
            redis,
            limits,
            queue: Queue::default(),
            tried: AtomicBool::new(false),
            nodes: AtomicUsize::new(1),
            unsynced: AtomicBool::new(false),
        });
        let unkept = Mutex::default();
        Self { node, hub, validator, store, clock, viewers, broadcast_errors, unkept, others }
    }

    /// This node's id, another one after each start.
    pub(crate) fn node(&self) -> &str {
        &self.node
    }

    /// Milliseconds since 1970, by the clock that the nodes share: when a connection was opened.
    pub(crate) fn now(&self) -> u64 {
        millis(self.clock.now())
    }

    /// Whether there may be others.
    pub(crate) fn is_on(&self) -> bool {
        self.others.is_some()
    }

    /// Whether the others can be reached; none where there are none.
    pub(crate) fn is_connected(&self) -> Option<bool> {
        self.others.as_ref().map(|others| others.redis.is_connected())
    }

    /// Nodes that can be reached, this one included.
    pub(crate) fn nodes(&self) -> usize {
        let others = self.others.as_ref().filter(|others| others.redis.is_connected());
        others.map_or(1, |others| others.nodes.load(Ordering::Relaxed).max(1))
    }

    /// Pushes on every node; returns how many connections this one has for it. The error is the serialiser's.
    pub(crate) fn push<T: Serialize>(
        &self,
        pkg_id: i32,
        data: &T,
        audience: &Audience<'_>,
    ) -> serde_json::Result<usize> {
        let push = Push::new(pkg_id, data).inspect_err(|_| self.broadcast_errors.inc())?;
        let roles = match audience {
            Audience::Viewers { .. } => self.viewers(pkg_id),
            Audience::All | Audience::User(_) => Some(Vec::new()),
        };
        let Some(roles) = roles else {
            tracing::error!(
                pkg_id,
                "a package without `seen_with` has a change: nobody is pushed it"
            );
            return Ok(0);
        };
        let push = push.seen_with(roles);
        let (here, recipients) = match audience {
            Audience::Viewers { except } => {
                (self.hub.len(), Some(Recipients::All { except: *except }))
            }
            Audience::All => (self.hub.len(), Some(Recipients::All { except: None })),
            Audience::User(User { subject: Some(user), .. }) => {
                (self.hub.connections(Some(user)).len(), Some(Recipients::User(Arc::clone(user))))
            }
            Audience::User(_) => (0, None),
        };
        if self.is_on() {
            let (user, subject) = match audience {
                // The connection that is left out is on this node.
                Audience::Viewers { .. } | Audience::All => (None, None),
                Audience::User(User { subject, name }) => (Some(name), subject.as_ref()),
            };
            let text = |text: &Arc<str>| text.to_string();
            let (user, subject) = (user.map(text), subject.map(text));
            let roles = Some(push.roles().to_vec());
            self.publish(Event::Push { pkg_id, user, subject, roles, data: to_raw_value(data)? });
        }
        if let Some(recipients) = recipients {
            self.hub.push(push, recipients);
        }
        Ok(here)
    }

    /// The roles that are all needed to see the changes of a package; none where it pushes no changes.
    fn viewers(&self, pkg_id: i32) -> Option<Vec<String>> {
        let roles = self.viewers.get(&pkg_id)?;
        Some(roles.iter().map(|role| (*role).to_owned()).collect())
    }

    /// A new connection's place among those of its user on all nodes; none where this node is alone. The
    /// error is why there is no place.
    pub(crate) async fn lease(&self, outbox: &Arc<Outbox>) -> Result<Option<Lease>, CloseReason> {
        match &self.others {
            None => Ok(None),
            Some(others) => others.leases.take(outbox).await.map(Some),
        }
    }

    /// Lets go of the places of this node's connections: their clients are about to be told to go to other
    /// nodes, where they need them while they are still here.
    pub(crate) async fn leave(&self) {
        if let Some(others) = &self.others {
            others.leases.give_all_back().await;
        }
    }

    /// Some connections of all nodes, or of a user by `sub`, the newest first, and how many there are.
    pub(crate) async fn connections(
        &self,
        subject: Option<&str>,
        skip: i64,
        items: i64,
    ) -> Result<(Vec<Box<RawValue>>, i64), Error> {
        if let Some(others) = &self.others {
            let (page, total) = others.leases.ledger.page(subject, skip, items).await?;
            return Ok((page.into_iter().flat_map(RawValue::from_string).collect(), total));
        }
        let mut all = self.hub.connections(subject);
        all.sort_unstable_by_key(|outbox| (Reverse(outbox.since), outbox.id));
        let page = all.iter().skip(size(skip)).take(size(items));
        let page = page.map(|outbox| describe(outbox, &self.node)).collect();
        Ok((page, i64::try_from(all.len()).unwrap_or(i64::MAX)))
    }

    /// How many connections all nodes have, or a user by `sub`; as far as Redis knows at once.
    pub(crate) async fn count(&self, subject: Option<&str>) -> Option<usize> {
        self.others.as_ref()?.leases.ledger.count(subject).await.ok()
    }

    /// Ends a connection, on whichever node it is; false if none of this id is here or listed.
    pub(crate) async fn close(&self, id: Uuid) -> Result<bool, CloseError> {
        if self.hub.close(id, REVOKED) {
            return Ok(true);
        }
        let Some(others) = &self.others else { return Ok(false) };
        let listed = others.leases.ledger.has(id).await?;
        // In any case: those of a node that drains, or is away, may not be listed.
        self.disconnect(Logout::Connection(id.to_string().into())).await?;
        // Once more: it may have been let in here meanwhile.
        Ok(self.hub.close(id, REVOKED) || listed)
    }

    /// Ends every connection of a user.
    pub(crate) async fn close_user(&self, User { subject, name }: User) -> Result<(), NotKept> {
        if let Some(subject) = &subject {
            self.hub.close_user(subject, u64::MAX, REVOKED);
        }
        let at = millis(self.clock.ask_or_guess().await);
        let kept = self.disconnect(Logout::User { name, at, subject: subject.clone() }).await;
        // Once more: some may have been let in here meanwhile.
        if let Some(subject) = subject {
            self.hub.close_user(&subject, at, REVOKED);
        }
        kept
    }

    /// Refuses what a logout ends, then closes it: a socket that is opened in between finds the refusal.
    /// Returns the user, if a connection here tells who it is, and whether the database keeps it.
    pub(crate) async fn log_out(&self, logout: &Logout) -> (Option<Identity>, Result<(), NotKept>) {
        self.validator.revoke(logout);
        let user = OnceCell::new();
        let is_meant = |identity: &Identity| {
            let ends = logout.ends(identity);
            if ends {
                user.get_or_init(|| identity.clone());
            }
            ends
        };
        let connections = self.hub.close_of(is_meant, REVOKED);
        tracing::info!(connections, "a logout closes its connections");
        self.tell(logout.clone());
        (user.into_inner(), self.keep(logout).await)
    }

    /// Ends connections of other nodes, which learn it like a logout: when they are back if they are away.
    async fn disconnect(&self, logout: Logout) -> Result<(), NotKept> {
        if !self.is_on() {
            return Ok(());
        }
        self.validator.revoke(&logout);
        self.tell(logout.clone());
        self.keep(&logout).await
    }

    fn tell(&self, logout: Logout) {
        let lifetime = self.validator.revocation_lifetime();
        self.queue(|| Item::LogOut((logout, lifetime)));
    }

    /// Has all nodes fetch the identity provider's keys; returns the names of those that this one got.
    pub(crate) async fn refresh_keys(&self) -> Result<Vec<String>, RefreshError> {
        if self.is_on() {
            self.publish(Event::RefreshKeys {});
        }
        self.validator.refresh_keys().await
    }

    fn publish(&self, event: Event) {
        self.queue(|| Item::Event(event.encode()));
    }

    /// Events as they travel.
    fn envelope(&self, events: &[Box<RawValue>]) -> String {
        let envelope = Envelope { node: Cow::Borrowed(&*self.node), events };
        serde_json::to_string(&envelope).expect("what is JSON can be written as JSON")
    }

    fn queue(&self, item: impl FnOnce() -> Item) {
        if let Some(others) = &self.others {
            self.note(others, &others.queue.push(item()));
        }
    }

    /// Counts what was dropped. A logout is not lost: this node still knows it, and tells Redis later.
    fn note(&self, others: &Others, dropped: &Dropped) {
        self.broadcast_errors.inc_by(dropped.events);
        if dropped.logouts > 0 {
            others.unsynced.store(true, Ordering::Relaxed);
        }
    }

    /// Carries out what another node tells of. Sessions get their turn after each event: what waited
    /// for long comes at once, and would fill the lane of a client that is quick enough.
    async fn receive(&self, message: &[u8]) {
        match serde_json::from_slice::<Envelope<Vec<&RawValue>>>(message) {
            Ok(Envelope { node, .. }) if *node == *self.node => {}
            Ok(Envelope { events, .. }) => {
                for event in events {
                    match serde_json::from_str(event.get()) {
                        Ok(event) => self.carry_out(event),
                        Err(error) => self.not_understood(&error),
                    }
                    yield_now().await;
                }
            }
            Err(error) => self.not_understood(&error),
        }
    }

    /// Refuses an address that failed too often on all nodes together.
    fn block(&self, limits: &Limits, message: &[u8]) {
        match serde_json::from_slice(message) {
            Ok(blocked) => limits.failures.block(&blocked),
            Err(error) => self.not_understood(&error),
        }
    }

    fn not_understood(&self, error: &serde_json::Error) {
        self.broadcast_errors.inc();
        tracing::warn!(%error, "another node's event is not understood");
    }

    fn carry_out(&self, event: Event) {
        match event {
            Event::Push { pkg_id, user, subject, roles, data } => {
                // Text that was JSON before is JSON now.
                let Ok(push) = Push::new(pkg_id, &data) else { return };
                // An older node does not say who may see it. A change is for whom this node's packages name.
                let roles = roles.or_else(|| self.viewers(pkg_id)).unwrap_or_default();
                let push = push.seen_with(roles);
                self.deliver(push, user.as_deref(), subject);
            }
            Event::Replaced(ids) => {
                if let Some(others) = &self.others {
                    others.leases.replace(&ids);
                }
            }
            Event::LogOut(revocations) => {
                let now = self.clock.now();
                let left = revocations.iter().map(|one| (one.logout.clone(), one.left(now)));
                self.learn(left);
            }
            Event::RefreshKeys {} => self.validator.ask_for_keys(),
        }
    }

    /// Pushes to all, or to one user.
    fn deliver(&self, push: Push, user: Option<&str>, subject: Option<String>) {
        let recipients = match (subject, user) {
            (Some(subject), _) => Some(Recipients::User(subject.into())),
            (None, None) => Some(Recipients::All { except: None }),
            (None, Some(text)) => self.only_user_here(text).map(Recipients::User),
        };
        if let Some(recipients) = recipients
            && !self.hub.offer(push, recipients)
        {
            self.broadcast_errors.inc();
        }
    }

    /// Takes over logouts, and looks once through the connections for all of them.
    fn learn(&self, revocations: impl IntoIterator<Item = (Logout, Duration)>) {
        let mut logouts = 0;
        for (logout, left) in revocations {
            let is_new = self.validator.learn(&logout, left);
            match &logout {
                _ if !is_new => {}
                Logout::Connection(id) => {
                    drop(Uuid::try_parse(id).map(|id| self.hub.close(id, REVOKED)));
                }
                Logout::User { at, subject: Some(subject), .. } => {
                    self.hub.close_user(subject, *at, REVOKED);
                }
                Logout::User { name, at, subject: None } => {
                    if let Some(subject) = self.only_user_here(name) {
                        self.hub.close_user(&subject, *at, REVOKED);
                    }
                }
                Logout::Session(_) | Logout::Subject { .. } => logouts += 1,
            }
        }
        if logouts > 0 {
            let connections = self.hub.close_of(|user| self.validator.is_revoked(user), REVOKED);
            tracing::info!(
                logouts,
                connections,
                "logouts that were kept, or that other nodes told, close their connections"
            );
        }
    }
}

/// A node that is started again is another one: it has none of the connections that the first had.
fn node_id(name: Option<&str>) -> Arc<str> {
    let random = Uuid::new_v4();
    match name {
        None => random.to_string().into(),
        Some(name) => format!("{name}-{:08x}", random.as_fields().0).into(),
    }
}

fn millis(since_1970: Duration) -> u64 {
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

fn size(number: i64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
