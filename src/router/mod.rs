//! From `pkg_id` to the handler actor: is there one, may the caller, is there room.
//!
//! `connection/session` dispatches; the [`Responder`] that goes along with a job answers into the
//! connection's outbox, whatever becomes of the job.

mod handler_actor;
mod responder;

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;
use ractor::{ActorCell, ActorRef, SpawnErr};
use serde_json::json;

use responder::Audited;
pub(crate) use responder::Responder;

use crate::{
    audit::taken_along,
    auth::Identity,
    config::HandlerConfig,
    handlers::{Caller, Context, Effect, Package},
    metrics::Metrics,
    protocol::{ErrorBody, Request, Status},
};
use handler_actor::{HandlerActor, Job, Jobs, Work};

/// What a client is told to wait when a handler's queue is full.
const OVERLOADED_RETRY_MS: u64 = 500;

/// The routing table. Read by every session, swapped when a handler actor is restarted.
pub(crate) struct Router {
    routes: ArcSwap<Vec<Arc<Route>>>,
    context: Arc<Context>,
    config: HandlerConfig,
    metrics: Arc<Metrics>,
}

/// The way to one package.
struct Route {
    package: Package,
    actor: ActorRef<Work>,
    /// What the audit trail calls it.
    action: Arc<str>,
    resource: Arc<str>,
    /// Jobs cast and not yet begun. Of this incarnation of the actor: a restart starts anew.
    queued: Arc<AtomicUsize>,
}

impl Router {
    /// A router without routes.
    pub(crate) fn new(context: Arc<Context>, config: HandlerConfig, metrics: Arc<Metrics>) -> Self {
        Self { routes: ArcSwap::default(), context, config, metrics }
    }

    /// Starts the handler actor of a package under `supervisor` and routes to it from now on.
    pub(crate) async fn start(
        &self,
        package: Package,
        supervisor: ActorCell,
    ) -> Result<ActorCell, SpawnErr> {
        let queued = Arc::new(AtomicUsize::new(0));
        let actor = HandlerActor {
            package: package.clone(),
            context: Arc::clone(&self.context),
            config: self.config.clone(),
            metrics: Arc::clone(&self.metrics),
            queued: Arc::clone(&queued),
        };
        let (actor, _) = ractor::Actor::spawn_linked(None, actor, (), supervisor).await?;
        let cell = actor.get_cell();
        let mut routes = Vec::clone(&self.routes.load());
        routes.retain(|route| route.package.id != package.id);
        let (action, resource) = (format!("WS:{}", package.name).into(), package.name.into());
        routes.push(Arc::new(Route { package, actor, action, resource, queued }));
        routes.sort_by_key(|route| route.package.id);
        self.routes.store(Arc::new(routes));
        Ok(cell)
    }

    /// The packages that `new` may call and `old` may not, and the other way round, by id.
    pub(crate) fn compare(&self, old: &Identity, new: &Identity) -> (Vec<i32>, Vec<i32>) {
        let routes = self.routes.load();
        let only = |one: &Identity, other: &Identity| {
            let packages = routes.iter().map(|route| &route.package);
            let opened = packages.filter(|it| one.has(it.roles) && !other.has(it.roles));
            opened.map(|package| package.id).collect()
        };
        (only(new, old), only(old, new))
    }

    /// Sends a request on its way, with those that arrived with it. The responder answers if it
    /// cannot go.
    pub(crate) fn dispatch(
        &self,
        request: Request,
        caller: &Arc<Caller>,
        mut responder: Responder,
        departure: &mut Departure,
    ) {
        let routes = self.routes.load();
        let Ok(found) = routes.binary_search_by_key(&request.pkg_id, |route| route.package.id)
        else {
            let msg = format!("No handler found for pkg_id {}", request.pkg_id);
            return responder.refuse(Status::Error, ErrorBody::new("unknown_pkg", msg));
        };
        let route = &routes[found];
        let allowed = caller.identity.has(route.package.roles);
        if self.is_audited(&route.package, allowed) {
            responder.record(Audited {
                audit: Arc::clone(&self.context.audit),
                caller: Arc::clone(caller),
                action: Arc::clone(&route.action),
                resource: Arc::clone(&route.resource),
                data: request.data.as_deref().map(|data| taken_along(data.get())),
            });
        }
        if !allowed {
            let msg = format!("No permission for pkg_id {}", request.pkg_id);
            let error = ErrorBody::new("permission_denied", msg)
                .with(json!({ "required_roles": route.package.roles }));
            return responder.refuse(Status::PermissionDenied, error);
        }
        if route.queued.fetch_add(1, Ordering::Relaxed) >= self.config.queue {
            route.queued.fetch_sub(1, Ordering::Relaxed);
            let error = ErrorBody::new("overloaded", "Too many requests wait for this handler")
                .with(json!({ "retry_after_ms": OVERLOADED_RETRY_MS }));
            return responder.refuse(Status::Error, error);
        }
        departure.join(route, Job { data: request.data, caller: Arc::clone(caller), responder });
    }

    /// Whether a request for a package belongs into the audit trail.
    fn is_audited(&self, package: &Package, allowed: bool) -> bool {
        match package.effect {
            _ if !allowed => self.context.audit.is_on(),
            Effect::Change => self.context.audit.is_on(),
            Effect::Read => self.context.audit.has_reads(),
            Effect::Nothing => false,
        }
    }
}

/// Requests of one connection that go to one handler with one message. Departs when it is dropped, or
/// when a request for another handler comes.
#[derive(Default)]
pub(crate) struct Departure {
    route: Option<Arc<Route>>,
    jobs: Jobs,
}

impl Departure {
    fn join(&mut self, route: &Arc<Route>, job: Job) {
        if !self.route.as_ref().is_some_and(|open| Arc::ptr_eq(open, route)) {
            self.depart();
            self.route = Some(Arc::clone(route));
        }
        self.jobs.push(job);
    }

    fn depart(&mut self) {
        if let Some(route) = self.route.take() {
            // A dead actor returns the jobs, and dropping their responders answers them.
            drop(route.actor.cast(Work::Run(mem::take(&mut self.jobs))));
        }
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.depart();
    }
}
