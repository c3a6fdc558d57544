//! From `pkg_id` to the handler actor: is there one, may the caller, is there room.
//!
//! `connection/session` dispatches; the [`Responder`] that goes along with a job answers into the
//! connection's outbox, whatever becomes of the job.

mod handler_actor;
#[cfg(all(test, feature = "models"))]
mod models;
mod places;
mod responder;

use std::{mem, sync::Arc};

use arc_swap::ArcSwap;
use ractor::{Actor, ActorCell, ActorRef, SpawnErr};
use serde_json::json;
use uuid::Uuid;

use responder::Audited;
pub(crate) use responder::Responder;

use crate::{
    auth::Identity,
    config::HandlerConfig,
    handlers::{Caller, Context, Effect, Package},
    metrics::Metrics,
    protocol::{CloseReason, ErrorBody, Request, Status},
};
use handler_actor::{HandlerActor, Job, Jobs, Work};
use places::Places;

/// What a client is told to wait when a handler's queue is full, or that of the audit trail.
const OVERLOADED_RETRY_MS: u64 = 500;
/// Room for jobs that come with a second one: those of a client with 16 in flight, the default.
const MORE_JOBS: usize = 15;

/// The routing table. Read by every session, swapped when a handler actor is restarted.
pub(crate) struct Router {
    routes: ArcSwap<Vec<Arc<Route>>>,
    context: Arc<Context>,
    config: HandlerConfig,
    metrics: Arc<Metrics>,
}

/// The way to one package.
#[derive(Clone)]
struct Route {
    work: Arc<Work>,
    /// As many as the machine has for the server, so that a package is not bound to one core. A connection
    /// always uses the same one, so that its requests begin in their order.
    lanes: Vec<Lane>,
    /// What the audit trail calls it.
    action: Arc<str>,
    resource: Arc<str>,
}

/// One actor of a package.
#[derive(Clone)]
struct Lane {
    actor: ActorRef<Jobs>,
    /// Each job on its way has one until it begins.
    queued: Arc<()>,
}

impl Router {
    /// A router without routes.
    pub(crate) fn new(context: Arc<Context>, config: HandlerConfig, metrics: Arc<Metrics>) -> Self {
        Self { routes: ArcSwap::default(), context, config, metrics }
    }

    /// Starts an actor of a package under `supervisor`, in place of the one at `lane` if there is one, and
    /// routes to it from now on.
    pub(crate) async fn start(
        &self,
        package: &Package,
        lane: usize,
        supervisor: ActorCell,
    ) -> Result<ActorCell, SpawnErr> {
        let mut routes = Vec::clone(&self.routes.load());
        let found = routes.binary_search_by_key(&package.id, |route| route.work.package.id);
        let mut route = match found {
            Ok(found) => Route::clone(&routes.remove(found)),
            Err(_) => self.route(package.clone()),
        };
        let work = Arc::clone(&route.work);
        let (actor, _) = Actor::spawn_linked(None, HandlerActor(work), (), supervisor).await?;
        let cell = actor.get_cell();
        match route.lanes.get_mut(lane) {
            Some(lane) => lane.actor = actor,
            None => route.lanes.push(Lane { actor, queued: Arc::new(()) }),
        }
        let (Ok(place) | Err(place)) = found;
        routes.insert(place, Arc::new(route));
        self.routes.store(Arc::new(routes));
        Ok(cell)
    }

    fn route(&self, package: Package) -> Route {
        let (action, resource) = (format!("WS:{}", package.name).into(), package.name.into());
        // More would wait for connections to the database, where users do not take turns.
        let places = match package.uses_store {
            true => self
                .config
                .concurrency
                .min(self.context.store.places(package.effect == Effect::Change)),
            false => self.config.concurrency,
        };
        let work = Work {
            package,
            context: Arc::clone(&self.context),
            config: self.config.clone(),
            metrics: Arc::clone(&self.metrics),
            places: Places::new(places),
        };
        Route { work: Arc::new(work), lanes: Vec::new(), action, resource }
    }

    /// The packages that `new` may call and `old` may not, and the other way round, by id.
    pub(crate) fn compare(&self, old: &Identity, new: &Identity) -> (Vec<i32>, Vec<i32>) {
        let routes = self.routes.load();
        let only = |one: &Identity, other: &Identity| {
            let packages = routes.iter().map(|route| &route.work.package);
            let opened = packages.filter(|it| one.has(it.roles) && !other.has(it.roles));
            opened.map(|package| package.id).collect()
        };
        (only(new, old), only(old, new))
    }

    /// Sends a request on its way, with those that arrived with it. The responder answers if it
    /// cannot go. The error ends the connection.
    pub(crate) fn dispatch(
        &self,
        request: Request,
        caller: &Arc<Caller>,
        mut responder: Responder,
        departure: &mut Departure,
    ) -> Result<(), CloseReason> {
        let routes = self.routes.load();
        let Ok(found) = routes.binary_search_by_key(&request.pkg_id, |route| route.work.package.id)
        else {
            let msg = format!("No handler found for pkg_id {}", request.pkg_id);
            responder.refuse(Status::Error, ErrorBody::new("unknown_pkg", msg));
            return Ok(());
        };
        let route = &routes[found];
        let package = &route.work.package;
        let allowed = caller.identity.has(package.roles);
        if self.is_audited(package, allowed) {
            responder.record(Audited {
                audit: Arc::clone(&self.context.audit),
                caller: Arc::clone(caller),
                action: Arc::clone(&route.action),
                resource: Arc::clone(&route.resource),
                data: request.data.as_deref().map(|data| (package.recorded)(data.get())),
                reserved: None,
            });
        }
        if !allowed {
            let msg = format!("No permission for pkg_id {}", request.pkg_id);
            let error = ErrorBody::new("permission_denied", msg)
                .with(json!({ "required_roles": package.roles }));
            responder.refuse(Status::PermissionDenied, error);
            return Ok(());
        }
        // The session's timer may not know it yet: the wall clock may have stepped.
        if package.effect == Effect::Change && caller.identity.expires_in().is_zero() {
            let error =
                ErrorBody::new("token_expired", "The token is expired: nothing was changed");
            responder.refuse(Status::Error, error);
            return Err(CloseReason::SessionExpired);
        }
        let lane = route.lane_of(caller.connection);
        let queued = Arc::clone(&route.lanes[lane].queued);
        if route.is_full(lane, self.config.queue) {
            let error = overloaded("Too many requests wait for this handler");
            responder.refuse(Status::Error, error);
            return Ok(());
        }
        let caller = Arc::clone(caller);
        departure.join(route, lane, Job { data: request.data, caller, responder, queued });
        Ok(())
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

fn overloaded(msg: &'static str) -> ErrorBody {
    ErrorBody::new("overloaded", msg).with(json!({ "retry_after_ms": OVERLOADED_RETRY_MS }))
}

impl Route {
    /// The actor that a connection uses.
    fn lane_of(&self, connection: Option<Uuid>) -> usize {
        // The last bytes are random. By multiplication: this is done for every message.
        let id = connection.unwrap_or_default().as_u64_pair().1 & u64::from(u32::MAX);
        ((id * self.lanes.len() as u64) >> 32) as usize
    }

    /// Whether more than `limit` jobs are on their way, with one to `lane` that has just been counted.
    fn is_full(&self, lane: usize, limit: usize) -> bool {
        let on_way = |lane: &Lane| Arc::strong_count(&lane.queued) - 1;
        // The other lanes are counted only where this one has some jobs, since their counts lie in the caches of
        // other cores. So an eighth more than the limit may be on their way.
        on_way(&self.lanes[lane]) > limit / self.lanes.len() / 8
            && self.lanes.iter().map(on_way).sum::<usize>() > limit
    }
}

/// Requests of one connection that go to one handler with one message. Departs when it is dropped, or
/// when a request for another handler comes.
#[derive(Default)]
pub(crate) struct Departure {
    route: Option<(Arc<Route>, usize)>,
    jobs: Jobs,
}

impl Departure {
    fn join(&mut self, route: &Arc<Route>, lane: usize, job: Job) {
        if !self.route.as_ref().is_some_and(|(open, _)| Arc::ptr_eq(open, route)) {
            self.depart();
            self.route = Some((Arc::clone(route), lane));
        }
        if self.jobs.len() == 1 {
            // A second one is seldom the last: they grow once.
            self.jobs.reserve(MORE_JOBS);
        }
        self.jobs.push(job);
    }

    fn depart(&mut self) {
        if let Some((route, lane)) = self.route.take() {
            // A dead actor returns the jobs, and dropping their responders answers them.
            drop(route.lanes[lane].actor.cast(mem::take(&mut self.jobs)));
        }
    }
}

impl Drop for Departure {
    #[inline]
    fn drop(&mut self) {
        if self.route.is_some() {
            self.depart();
        }
    }
}
