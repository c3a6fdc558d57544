//! The registry actor: admits connections, supervises them, and cleans up after them.
//!
//! One actor, so that no two checks of a limit can pass each other. Its table is the truth behind
//! `ws_connections_active`; it alone writes the hub. It never waits for a socket.

use std::{collections::HashMap, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use ractor::{
    Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, MessagingErr, SpawnErr,
    SupervisionEvent,
};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, oneshot},
    task::{self, JoinSet},
    time::sleep,
};

use crate::{
    audit::{Event, session_data},
    cluster::Lease,
    config::ConnectionPolicy,
    connection::{Admission, Connection, Shared},
    hub::{Command, Hub, Outbox},
    machine,
    metrics::{AuditOutcome, ConnectionOutcome, LimitType},
    protocol::CloseReason,
};

/// What the registry is told.
pub(crate) enum RegistryMessage {
    /// Let a connection in. A refused one comes back with the reason.
    Admit {
        admission: Box<Admission>,
        /// The connection's place under `WS_MAX_CONNECTIONS`.
        place: OwnedSemaphorePermit,
        refused: oneshot::Sender<(Box<Admission>, CloseReason)>,
    },
    /// Drain every connection. Sent once, after `draining` of [`Shared`] is cancelled.
    Drain {
        /// Clients are told to come back after a random part of this.
        spread: Duration,
        /// How long requests are still taken.
        grace: Duration,
        /// There are other nodes: a client keeps its connection until it has had the time for a new one
        /// there, and misses no push in between.
        overlap: bool,
    },
    /// Look whether there is memory to give back.
    Rest,
}

/// Between two looks.
const REST: Duration = Duration::from_secs(5);
/// Connections that must have ended, and be most of those there were, before memory is given back.
const MANY: usize = 100;
/// When it is given back once more: what a crowd asked the database for lies in the caches of connections to
/// it, which are closed within a minute without work.
const AFTER_CROWD: Duration = Duration::from_secs(70);

/// The way to the registry of the moment: a restart swaps the actor behind it.
#[derive(Default)]
pub(crate) struct RegistryAddress(ArcSwapOption<ActorRef<RegistryMessage>>);

impl RegistryAddress {
    /// Tells the registry something; between its end and its restart the message comes back.
    pub(crate) fn tell(&self, message: RegistryMessage) -> Result<(), RegistryMessage> {
        match &*self.0.load() {
            None => Err(message),
            Some(actor) => match actor.cast(message) {
                Err(MessagingErr::SendErr(message)) => Err(message),
                _ => Ok(()),
            },
        }
    }

    /// Starts a registry with an empty table under `supervisor`.
    pub(crate) async fn start(
        &self,
        hub: Arc<Hub>,
        shared: Arc<Shared>,
        supervisor: ActorCell,
    ) -> Result<ActorCell, SpawnErr> {
        let registry = Registry { hub, shared };
        let (actor, _) = Actor::spawn_linked(None, registry, (), supervisor).await?;
        let cell = actor.get_cell();
        self.0.store(Some(Arc::new(actor)));
        Ok(cell)
    }
}

struct Registry {
    hub: Arc<Hub>,
    shared: Arc<Shared>,
}

struct Entry {
    actor: ActorRef<Command>,
    outbox: Arc<Outbox>,
    /// Given back when the entry goes.
    _place: OwnedSemaphorePermit,
    lease: Option<Lease>,
}

#[derive(Default)]
struct Table {
    /// Started with the first connection.
    supervisor: Option<ActorCell>,
    connections: HashMap<ActorId, Entry>,
    /// The most connections since memory was last given back.
    peak: usize,
}

impl Actor for Registry {
    type Msg = RegistryMessage;
    type State = Table;
    type Arguments = ();

    async fn pre_start(
        &self,
        myself: ActorRef<RegistryMessage>,
        (): (),
    ) -> Result<Table, ActorProcessingErr> {
        // A predecessor's connections end with it; nothing of them may stay listed.
        self.hub.clear();
        self.shared.metrics.ws.connections_active.set(0);
        // Ends with the actor.
        myself.send_interval(REST, || RegistryMessage::Rest);
        Ok(Table::default())
    }

    async fn handle(
        &self,
        myself: ActorRef<RegistryMessage>,
        message: RegistryMessage,
        table: &mut Table,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RegistryMessage::Admit { admission, place, refused } => {
                match self.refusal(&admission) {
                    Some(reason) => drop(refused.send((admission, reason))),
                    None => self.admit(admission, place, myself.get_cell(), table).await?,
                }
            }
            RegistryMessage::Drain { spread, grace, overlap } => {
                for entry in table.connections.values_mut() {
                    // Of one that came after all others were given back.
                    drop(entry.lease.take());
                    let reconnect_after = spread.mul_f64(fastrand::f64());
                    let stay = if overlap { reconnect_after + grace } else { grace };
                    drop(entry.actor.cast(Command::Drain { reconnect_after, stay }));
                }
            }
            RegistryMessage::Rest => self.rest(table),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<RegistryMessage>,
        event: SupervisionEvent,
        table: &mut Table,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(cell, ..) => self.ended(cell.get_id(), table),
            SupervisionEvent::ActorFailed(cell, error) => {
                tracing::error!(%error, "a connection actor failed");
                self.ended(cell.get_id(), table)
            }
            _ => Ok(()),
        }
    }
}

/// Holds the connections for the registry and hands on how they end. ractor's table of an actor's
/// children never gets smaller: the one of a crowd goes with the supervisor that it was under.
struct Supervisor;

impl Actor for Supervisor {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<()>,
        event: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        if !matches!(event, SupervisionEvent::ActorStarted(_)) {
            myself.notify_supervisor(event);
        }
        Ok(())
    }
}

impl Registry {
    fn refusal(&self, admission: &Admission) -> Option<CloseReason> {
        // Not asked of the table: a registry that was started again during a drain has an empty one.
        if self.shared.draining.is_cancelled() {
            return Some(CloseReason::GoingAway);
        }
        let limit = self.shared.config.max_connections_per_user as usize;
        if limit == 0 {
            return None;
        }
        let open = self.hub.connections(Some(&admission.identity.subject));
        let counted = admission.lease.as_ref().is_some_and(Lease::is_counted);
        if counted || open.len() < limit {
            return None;
        }
        if self.shared.config.connection_policy == ConnectionPolicy::KickOldest {
            // Those that were told before are ending already: as many as may be open are left.
            for oldest in &open[..=open.len() - limit] {
                oldest.command(Command::Close(CloseReason::Replaced));
            }
            return None;
        }
        self.shared.metrics.ws.connections.inc(ConnectionOutcome::RejectedLimit);
        self.shared.metrics.rate_limit_hits.inc(LimitType::Connection);
        Some(CloseReason::ConnectionLimit)
    }

    async fn admit(
        &self,
        mut admission: Box<Admission>,
        place: OwnedSemaphorePermit,
        myself: ActorCell,
        table: &mut Table,
    ) -> Result<(), ActorProcessingErr> {
        let outbox = Arc::clone(&admission.outbox);
        tracing::info!(
            connection_id = %outbox.id, request_id = &*outbox.remote.correlation, user_id = &**outbox.subject(),
            session_id = admission.identity.session.as_deref(), "connection opened"
        );
        // Listed before it can answer: who has seen `auth_ok` gets every push from then on.
        self.hub.insert(Arc::clone(&outbox));
        // A logout that came after its token was checked did not find it listed, nor did an administrator
        // who saw it in Redis.
        let (validator, identity) = (&self.shared.validator, &admission.identity);
        if validator.is_revoked(identity)
            || validator.has_ended(outbox.id, identity, outbox.since, |name| {
                *self.hub.users(name) == [Arc::clone(outbox.subject())]
            })
        {
            outbox.command(Command::Close(CloseReason::SessionRevoked));
        }
        let supervisor = match &table.supervisor {
            Some(supervisor) => supervisor.clone(),
            None => {
                let (actor, _) = Actor::spawn_linked(None, Supervisor, (), myself).await?;
                table.supervisor.insert(actor.get_cell()).clone()
            }
        };
        let lease = admission.lease.take();
        let connection = Connection { shared: Arc::clone(&self.shared) };
        let (actor, _) = Actor::spawn_linked(None, connection, admission, supervisor).await?;
        let id = actor.get_id();
        table.connections.insert(id, Entry { actor, outbox, _place: place, lease });
        table.peak = table.peak.max(table.connections.len());
        self.shared.metrics.ws.connections.inc(ConnectionOutcome::Accepted);
        self.measure(table);
        Ok(())
    }

    /// The only place where a connection is taken off, whatever ended it.
    fn ended(&self, id: ActorId, table: &mut Table) -> Result<(), ActorProcessingErr> {
        let Some(entry) = table.connections.remove(&id) else {
            let lost = table.supervisor.as_ref().is_some_and(|actor| actor.get_id() == id);
            return if lost { Err("the connections lost their supervisor".into()) } else { Ok(()) };
        };
        self.hub.remove(&entry.outbox);
        self.measure(table);
        let reason = entry.outbox.ended().unwrap_or_else(|| {
            // The session's task broke before it could say why.
            self.shared.metrics.errors.panicked("connection");
            CloseReason::InternalError
        });
        self.shared.metrics.ws.disconnected(reason);
        if reason.is_expulsion() {
            let address = entry.outbox.remote.address;
            self.shared.limits.count_expulsion(entry.outbox.subject(), address);
        }
        if reason.is_forced() {
            let (outcome, remote) = (AuditOutcome::Success, &entry.outbox.remote);
            let id = entry.outbox.id.to_string();
            self.shared.audit.record(Event {
                data: session_data(&entry.outbox.identity()),
                user: Some(entry.outbox.identity()),
                ..Event::of_connection("DISCONNECT", id, outcome, remote, reason)
            });
        }
        tracing::info!(
            connection_id = %entry.outbox.id, request_id = &*entry.outbox.remote.correlation,
            user_id = &**entry.outbox.subject(), session_id = entry.outbox.identity().session.as_deref(),
            code = reason.code(),
            "connection closed"
        );
        Ok(())
    }

    /// Gives memory back once most connections of the last peak are gone.
    fn rest(&self, table: &mut Table) {
        let open = table.connections.len();
        if table.peak - open < MANY || open > table.peak / 2 {
            return;
        }
        // The last of a crowd are few: their end counts too.
        table.peak = if open == 0 { 0 } else { open.max(MANY) };
        if let Some(supervisor) = table.supervisor.take_if(|_| open == 0) {
            supervisor.stop(None);
        }
        table.connections.shrink_to(2 * open);
        self.hub.shrink();
        tokio::spawn(async {
            give_memory_back().await;
            sleep(AFTER_CROWD).await;
            give_memory_back().await;
        });
    }

    fn measure(&self, table: &Table) {
        let open = i64::try_from(table.connections.len()).unwrap_or(i64::MAX);
        self.shared.metrics.ws.connections_active.set(open);
    }
}

/// Gives memory back, with what the workers keep at hand. Each has its own cache; busy ones do not get to
/// theirs.
async fn give_memory_back() {
    let mut workers = JoinSet::new();
    for _ in 0..Handle::current().metrics().num_workers() {
        workers.spawn(async { machine::cached_memory() });
    }
    let cached = workers.join_all().await;
    // Once for all of them: it takes the locks of the whole heap.
    drop(task::spawn_blocking(|| machine::give_memory_back(cached)).await);
}
