//! The actor that holds this node's connection to Redis: it sends what is queued, hands over what other
//! nodes send, and connects again when the connection is lost. While there is one, everybody on this node
//! sends commands over it (`redis`).

use std::{
    collections::HashSet,
    slice,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use fred::{
    error::{Error, ErrorKind},
    interfaces::EventInterface,
    types::{ClusterStateChange, Message},
};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SpawnErr};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::{sleep, timeout},
};

use super::{
    Cluster, Others,
    commands::{Commands, PAGE, SILENCE},
    event::{Event, Revocation},
    keeper::Keeper,
    queue::Batch,
};
use crate::{
    auth::Logout,
    redis::{Backoff, Connection, gone},
    task::{self, Task},
};

/// Between two signs of life.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Between two looks whether a Redis that was too slow answers again.
const RETRY: Duration = Duration::from_millis(100);
/// Time to connect before the first client is let in.
const FIRST: Duration = Duration::from_secs(2);
/// Time for what is queued when the server stops.
const LAST: Duration = Duration::from_secs(1);

/// Ties this node to the others.
pub(crate) struct ClusterLink(Arc<Cluster>);

impl ClusterLink {
    /// Starts one under `supervisor`.
    pub(crate) async fn start(
        cluster: Arc<Cluster>,
        supervisor: ActorCell,
    ) -> Result<ActorCell, SpawnErr> {
        let (actor, _) = Actor::spawn_linked(None, Self(cluster), (), supervisor).await?;
        Ok(actor.get_cell())
    }

    /// Waits for the first attempt to connect: a node that is replaced is not to let in, at its start,
    /// whom the others know to be logged out. A Redis that is down holds up nobody for long.
    pub(crate) async fn begin(cluster: &Cluster) {
        let Some(others) = &cluster.others else { return };
        let first = async {
            while !others.tried.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        drop(timeout(FIRST, first).await);
    }

    /// Waits until the others were sent what is queued, before the actor ends.
    pub(crate) async fn finish(cluster: &Cluster) {
        let Some(others) = &cluster.others else { return };
        let idle = || others.queue.is_idle() && others.leases.is_idle();
        let sent = async {
            while !idle() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(LAST, sent).await.is_err() || !idle() {
            tracing::warn!("other nodes miss the last events of this one");
        }
    }
}

impl Actor for ClusterLink {
    type Msg = ();
    type State = Task;
    type Arguments = ();

    async fn pre_start(&self, myself: ActorRef<()>, (): ()) -> Result<Task, ActorProcessingErr> {
        Ok(task::owned(&myself, keep_connected(Arc::clone(&self.0))))
    }
}

async fn keep_connected(cluster: Arc<Cluster>) {
    let Some(others) = &cluster.others else { return };
    let mut backoff = Backoff::new();
    let mut known = false;
    loop {
        let (was_connected, lost) = Box::pin(Session::live(&cluster, others)).await;
        others.tried.store(true, Ordering::Relaxed);
        if was_connected {
            backoff = Backoff::new();
        }
        if was_connected || !known {
            known = true;
            let without = match others.limits.serve_without_redis() {
                true => "this node serves its own clients",
                false => "this node refuses what has a limit, and is not ready after READY_AFTER",
            };
            tracing::warn!(error = %lost, "no connection to redis: {without}");
        }
        backoff.pause().await;
    }
}

/// What the driver sees of the masters of a Redis Cluster.
type Changes = Receiver<Vec<ClusterStateChange>>;

/// A connection, from its beginning to its end.
struct Session<'a> {
    cluster: &'a Cluster,
    others: &'a Others,
    commands: Commands<'a>,
    keeper: Keeper<'a>,
}

impl<'a> Session<'a> {
    /// Connects and lasts as long as the connection. False: there was none.
    async fn live(cluster: &'a Cluster, others: &'a Others) -> (bool, Error) {
        let (session, mut inbox, changes, connection) = match Self::open(cluster, others).await {
            Ok(open) => open,
            Err(error) => return (false, error),
        };
        let _shared = others.redis.share(session.commands.client.clone());
        others.tried.store(true, Ordering::Relaxed);
        let nodes = others.nodes.load(Ordering::Relaxed);
        tracing::info!(node = %cluster.node, nodes, "connected to redis");
        let lost = tokio::select! {
            // The sender first: what was answered is not given up.
            biased;
            error = session.send() => error,
            error = session.receive(&mut inbox) => error,
            error = session.watch() => error,
            error = session.keep() => error,
            error = rearranged(changes) => error,
            ended = connection => gone(ended),
        };
        cluster.note(others, &others.queue.give_up());
        (true, lost)
    }

    /// Connects, subscribes, and only then asks for logouts: one that comes in between is heard of.
    async fn open(
        cluster: &'a Cluster,
        others: &'a Others,
    ) -> Result<(Self, Receiver<Message>, Changes, Connection), Error> {
        let (client, connection) = others.redis.connect().await?;
        let (inbox, changes) = (client.message_rx(), client.cluster_change_rx());
        let keeper = Keeper::new(&others.leases, client.clone());
        let session = Self { cluster, others, commands: Commands::new(others, client), keeper };
        session.commands.subscribe().await?;
        session.ask_for_the_time().await?;
        session.sync().await?;
        session.keeper.compare().await?;
        session.commands.count_nodes().await?;
        Ok((session, inbox, changes, connection))
    }

    /// Asks for a sign of life now and then; returns when there was none for long.
    async fn watch(&self) -> Error {
        let mut last = Instant::now();
        loop {
            sleep(HEARTBEAT).await;
            match self.commands.sign_of_life().await {
                Ok(()) => {
                    last = Instant::now();
                    // Without an answer, the time since the last one does.
                    drop(self.ask_for_the_time().await);
                }
                Err(error) if last.elapsed() >= SILENCE => return error,
                Err(_) => {}
            }
        }
    }

    async fn ask_for_the_time(&self) -> Result<(), Error> {
        self.cluster.clock.ask(Some(&self.commands.client)).await.map(drop)
    }

    /// Keeps leases. A Redis that has lost them may have lost logouts too.
    async fn keep(&self) -> Error {
        loop {
            self.keeper.keep().await;
            if let Err(error) = self.sync().await {
                return error;
            }
        }
    }

    /// Hands over what other nodes send, in the order of each.
    async fn receive(&self, inbox: &mut Receiver<Message>) -> Error {
        loop {
            match inbox.recv().await {
                Ok(message) => {
                    let text = message.value.as_bytes().unwrap_or_default();
                    if *message.channel == *self.commands.failures {
                        self.cluster.block(&self.others.limits, text);
                    } else {
                        self.cluster.receive(text).await;
                    }
                }
                Err(RecvError::Lagged(lost)) => {
                    self.cluster.broadcast_errors.inc_by(lost);
                    tracing::warn!(lost, "events of other nodes came too fast");
                    // There may have been logouts among them, and connections that were replaced.
                    self.others.leases.compare();
                    if let Err(error) = self.sync().await {
                        return error;
                    }
                }
                Err(RecvError::Closed) => return Error::new_canceled(),
            }
        }
    }

    /// Sends what is queued, one batch after the other, for their order.
    async fn send(&self) -> Error {
        loop {
            if self.others.unsynced.swap(false, Ordering::Relaxed)
                && let Err(error) = self.sync().await
            {
                return error;
            }
            let (batch, dropped) = self.others.queue.next().await;
            self.cluster.note(self.others, &dropped);
            let Some(batch) = batch else { continue };
            let sent = match &batch {
                Batch::Events(events) => {
                    self.commands.publish(&self.cluster.envelope(events)).await
                }
                Batch::LogOut(logout) => self.tell(slice::from_ref(logout)).await,
            };
            // Also what has arrived: an end of the connection after this gives up nothing.
            let given_up = self.others.queue.give_up();
            if let Err(error) = sent {
                tracing::debug!(%error, "events were not sent");
                self.cluster.note(self.others, &given_up);
                // The others stay in the queue until there is an answer.
                while self.commands.count_nodes().await.is_err() {
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// Makes this node and Redis know the same logouts: each tells the other what it lacks. A Redis
    /// that was started anew lacks all of them.
    async fn sync(&self) -> Result<(), Error> {
        let now = self.cluster.clock.now();
        let kept = self.commands.revocations(now).await?;
        let left = |kept: &Revocation| (kept.logout.clone(), kept.left(now));
        self.cluster.learn(kept.iter().map(left));
        let kept: HashSet<_> = kept.into_iter().map(|revocation| revocation.logout).collect();
        let known = self.cluster.validator.revoked().into_iter();
        let missing: Vec<_> = known.filter(|(logout, _)| !kept.contains(logout)).collect();
        for page in missing.chunks(PAGE) {
            self.tell(page).await?;
        }
        Ok(())
    }

    /// Keeps logouts in Redis, which tells the nodes that are there.
    async fn tell(&self, logouts: &[(Logout, Duration)]) -> Result<(), Error> {
        let now = self.cluster.clock.now();
        let lasting =
            |(logout, left): &(Logout, Duration)| Revocation::lasting(logout.clone(), *left, now);
        let event = Event::LogOut(logouts.iter().map(lasting).collect()).encode();
        self.commands.keep(logouts, self.cluster.envelope(&[event])).await
    }
}

/// Waits until a Redis Cluster is without one of its masters. The driver goes on with the others, and does not
/// say whether it had subscribed at that one.
async fn rearranged(mut changes: Changes) -> Error {
    let is_less = |change: &ClusterStateChange| matches!(change, ClusterStateChange::Remove(_));
    loop {
        match changes.recv().await {
            Ok(changes) if !changes.iter().any(is_less) => {}
            _ => return Error::new(ErrorKind::Cluster, "a master of the cluster is gone"),
        }
    }
}
