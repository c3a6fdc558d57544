//! The root of the supervision tree: starts the registry, the handler actors, the writer of the audit
//! trail and the link to the other nodes, and starts them again.
//!
//! Actors that keep ending are a fault that restarts do not mend: past the budget the root ends too,
//! and with it the server.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use tokio::runtime::Handle;

use crate::{
    audit::AuditWriter,
    cluster::ClusterLink,
    connection::Shared,
    handlers::{Context, Package},
    metrics,
    registry::RegistryAddress,
    router::Router,
};

/// Restarts allowed within [`RESTART_WINDOW`], over all children.
const MAX_RESTARTS: usize = 10;
const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// Knows how to start every child.
pub(super) struct Root {
    pub(super) router: Arc<Router>,
    pub(super) registry: Arc<RegistryAddress>,
    pub(super) context: Arc<Context>,
    pub(super) shared: Arc<Shared>,
    pub(super) packages: Vec<Package>,
}

#[derive(Clone)]
enum Child {
    Registry,
    Audit,
    Cluster,
    /// An actor of a package, by its number.
    Handler(Package, usize),
}

#[derive(Default)]
pub(super) struct Children {
    running: HashMap<ActorId, Child>,
    restarts: VecDeque<Instant>,
}

impl Actor for Root {
    type Msg = ();
    type State = Children;
    type Arguments = ();

    async fn pre_start(
        &self,
        myself: ActorRef<()>,
        (): (),
    ) -> Result<Children, ActorProcessingErr> {
        let mut children = Children::default();
        let workers = Handle::current().metrics().num_workers();
        let handlers = self
            .packages
            .iter()
            .flat_map(|package| (0..workers).map(|worker| Child::Handler(package.clone(), worker)));
        let audit = self.context.audit.is_on().then_some(Child::Audit);
        let cluster = self.context.cluster.is_on().then_some(Child::Cluster);
        for child in audit.into_iter().chain(cluster).chain(handlers).chain([Child::Registry]) {
            self.start(child, &myself, &mut children).await?;
        }
        Ok(children)
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<()>,
        event: SupervisionEvent,
        children: &mut Children,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, cause) = match event {
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell, reason.unwrap_or_default())
            }
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            _ => return Ok(()),
        };
        let Some(child) = children.running.remove(&cell.get_id()) else { return Ok(()) };
        let (label, name) = match &child {
            Child::Registry => (metrics::Actor::Registry, "registry"),
            Child::Audit => (metrics::Actor::Audit, "audit writer"),
            Child::Cluster => (metrics::Actor::Cluster, "cluster link"),
            Child::Handler(package, _) => (metrics::Actor::Handler, package.name),
        };
        self.shared.metrics.actor_restarts.inc(label);
        tracing::error!(actor = name, cause, "an actor ended and is started again");
        children.spend_restart()?;
        self.start(child, &myself, children).await?;
        Ok(())
    }
}

impl Root {
    async fn start(
        &self,
        child: Child,
        myself: &ActorRef<()>,
        children: &mut Children,
    ) -> Result<(), SpawnErr> {
        let supervisor: ActorCell = myself.get_cell();
        let started = match &child {
            Child::Handler(package, worker) => {
                self.router.start(package, *worker, supervisor).await?
            }
            Child::Registry => {
                let (hub, shared) = (Arc::clone(&self.context.hub), Arc::clone(&self.shared));
                self.registry.start(hub, shared, supervisor).await?
            }
            Child::Audit => {
                let Context { audit, store, cluster, .. } = &*self.context;
                let node = cluster.node().into();
                AuditWriter::start(Arc::clone(audit), Arc::clone(store), node, supervisor).await?
            }
            Child::Cluster => {
                ClusterLink::start(Arc::clone(&self.context.cluster), supervisor).await?
            }
        };
        children.running.insert(started.get_id(), child);
        Ok(())
    }
}

impl Children {
    fn spend_restart(&mut self) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        self.restarts.retain(|at| now - *at < RESTART_WINDOW);
        self.restarts.push_back(now);
        if self.restarts.len() > MAX_RESTARTS {
            return Err(format!("{MAX_RESTARTS} restarts within a minute did not help").into());
        }
        Ok(())
    }
}
