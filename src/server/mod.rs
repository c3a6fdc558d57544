//! The server as a function of its configuration, its sockets and the future that ends it.
//!
//! [`run`] opens the parts from the bottom up, starts the root actor, accepts until `shutdown`, and
//! drains: not ready → time for a balancer to notice → new upgrades refused → every connection told and
//! closed with 1001 → listeners closed → changes that outlived their clients ended → parts closed.

mod accept;
mod root;
mod stream;
mod upgrade;

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use ractor::Actor;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::Semaphore,
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    audit::{Audit, AuditWriter},
    auth::{DevIssuer, Logins, Provider, Validator},
    cluster::{Cluster, ClusterLink, ClusterParts, keep_logouts},
    config::{AuthConfig, Config, ServerConfig},
    connection::Shared,
    files,
    handlers::{self, Context, Package, PackageError},
    http::{self, Api, Forwarding, Held},
    hub::Hub,
    limits::{Limits, Pool},
    machine,
    metrics::{Dependency, Metrics},
    redis::Redis,
    registry::{RegistryAddress, RegistryMessage},
    router::Router,
    store::{OpenError, Store, keep_folded},
    traces::{Traces, TracesError},
};
use accept::Entrance;
use root::Root;
use stream::Patience;
use upgrade::Web;

#[cfg(any(test, fuzzing))]
pub(crate) use upgrade::fuzzing;

/// Time for sockets to close after the last answer, on top of `DRAIN_TIMEOUT`.
const CLOSING: Duration = Duration::from_secs(6);

/// Connections that wait to be accepted, as far as `net.core.somaxconn` goes. With the library's 128, most
/// of a crowd that reconnects at once had to try again a second or two later.
const BACKLOG: u32 = 4096;

/// Bound sockets. Port 0 in the configuration binds a free one.
pub struct Listeners {
    /// WebSocket and REST.
    pub clients: TcpListener,
    /// `/metrics`, `/health*`, `/admin/*`, if they have a socket of their own.
    pub ops: Option<TcpListener>,
}

impl Listeners {
    /// Binds the addresses of the configuration.
    pub async fn bind(config: &ServerConfig) -> io::Result<Self> {
        let bind = |setting, address| {
            listen(address).map_err(|error| {
                let says = format!(
                    "{setting}={address}: {error}; set {setting} to a free address of this machine, \
                     or end the program that has it"
                );
                io::Error::new(error.kind(), says)
            })
        };
        let ops = config.ops_addr.map(|address| bind("OPS_ADDR", address)).transpose()?;
        Ok(Self { clients: bind("LISTEN_ADDR", config.listen_addr)?, ops })
    }

    /// Where clients and operators connect, as texts.
    fn addresses(&self) -> (Option<String>, Option<String>) {
        let shown = |listener: &TcpListener| Some(listener.local_addr().ok()?.to_string());
        (shown(&self.clients), self.ops.as_ref().and_then(shown))
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart finds the address free, whatever of the old connections the kernel still holds.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The table of packages.
    #[error(transparent)]
    Packages(#[from] PackageError),
    /// The database.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The spool of the audit trail.
    #[error("cannot use the spool of the audit trail: {0}")]
    Audit(#[source] io::Error),
    /// The logouts that the database keeps.
    #[error("cannot read the logouts in the table revocations: {0}")]
    Logouts(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The key of the development issuer.
    #[error("cannot use the development key: {0}")]
    DevKey(#[from] io::Error),
    /// A public key.
    #[error("cannot use the development key: {0}")]
    Key(#[from] jsonwebtoken::errors::Error),
    /// The client of the identity provider.
    #[error("cannot make an HTTP client: {0}")]
    Provider(#[from] reqwest::Error),
    /// The exporter of traces.
    #[error("cannot export traces: {0}")]
    Traces(#[from] TracesError),
    /// The supervision tree did not come up.
    #[error("cannot start the actors: {0}")]
    Actors(#[from] ractor::SpawnErr),
    /// The supervision tree gave up.
    #[error("the actors keep failing")]
    Supervision,
}

/// Serves until `shutdown` is done, then drains and returns.
pub async fn run(
    config: Config,
    packages: Vec<Package>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let mut shutdown = pin!(shutdown);
    // A database that does not answer is waited for, and a stop does not wait for that.
    let server = tokio::select! {
        server = Server::open(config, packages) => server?,
        () = &mut shutdown => {
            tracing::info!("stopped before the start was done");
            return Ok(());
        }
    };
    let started = Instant::now();
    let Context { audit, store, cluster, .. } = &*server.context;
    audit.started(store, cluster.node()).await;
    let (root, mut root_ended) = Actor::spawn(None, server.root(), ()).await?;
    ClusterLink::begin(&server.context.cluster).await;
    let (address, ops_address) = listeners.addresses();
    let accepting = server.accept(listeners);
    tracing::info!(node = server.context.cluster.node(), "ready");
    tracing::info!(
        address,
        ops_address,
        development_tokens = server.provider.is_none(),
        "listening"
    );

    let supervision = tokio::select! {
        () = &mut shutdown => Ok(()),
        _ = &mut root_ended => Err(ServeError::Supervision),
    };
    let until = server.drain().await;
    accepting.stop().await;
    server.finish_changes(until).await;
    ClusterLink::finish(&server.context.cluster).await;
    cluster.keep_late().await;
    if supervision.is_ok() {
        root.stop(None);
        drop(root_ended.await);
    }
    audit.stopped(cluster.node(), supervision.is_ok(), started.elapsed());
    AuditWriter::finish(&server.context.audit, &server.context.store).await;
    server.context.store.close().await;
    if let Some(traces) = &server.shared.traces {
        traces.finish().await;
    }
    tracing::info!("stopped");
    supervision
}

/// The parts of a running server.
struct Server {
    config: Config,
    packages: Vec<Package>,
    context: Arc<Context>,
    shared: Arc<Shared>,
    registry: Arc<RegistryAddress>,
    validator: Arc<Validator>,
    provider: Option<Arc<Provider>>,
    bounds: Bounds,
    /// Cancelled when the server is to stop: it is not ready any more.
    leaving: CancellationToken,
}

impl Server {
    async fn open(config: Config, packages: Vec<Package>) -> Result<Self, ServeError> {
        handlers::check(&packages)?;
        let names: Vec<_> = packages.iter().map(|package| (package.id, package.name)).collect();
        let metrics = Arc::new(Metrics::new(&names, config.environment.as_str()));
        let traces = config.traces.as_ref();
        let traces = traces.map(|traces| Traces::open(traces, config.environment)).transpose()?;
        let traces = traces.map(Arc::new);
        let (validator, provider) = validator(&config.auth, &metrics, traces.clone()).await?;
        let validator = Arc::new(validator);
        let store = Store::open(&config.store, metrics.db.clone(), traces.clone()).await?;
        let store = Arc::new(store);
        let (settings, series) = (config.audit.clone(), metrics.audit.clone());
        // It reads what an earlier process left.
        let audit = spawn_blocking(move || Audit::open(&settings, series)).await;
        let audit = audit.map_err(io::Error::other).flatten().map_err(|error| {
            let (folder, user) = (config.audit.spool.display(), machine::user());
            let fix = format!("let {user} write the folder and its files, or set DATA_DIR");
            ServeError::Audit(io::Error::new(error.kind(), format!("{folder}: {error}; {fix}")))
        })?;
        let audit = Arc::new(audit);
        close_to_others(&config).await;
        let hub = Arc::new(Hub::new(metrics.ws.dropped_slow_consumer.clone()));
        let redis = Redis::new(&config.cluster, &metrics).map(Arc::new);
        let limits = Arc::new(Limits::new(&config, redis.clone()));
        let viewers = packages.iter().filter_map(|package| Some((package.id, package.viewers?)));
        let parts = ClusterParts {
            redis,
            limits: Arc::clone(&limits),
            store: Arc::clone(&store),
            hub: Arc::clone(&hub),
            validator: Arc::clone(&validator),
            viewers: viewers.collect(),
            broadcast_errors: metrics.ws.broadcast_errors.clone(),
        };
        let cluster = Cluster::new(&config, parts);
        cluster.recall().await.map_err(|error| ServeError::Logouts(error.into()))?;
        let context = Arc::new(Context {
            store,
            audit: Arc::clone(&audit),
            changes: TaskTracker::new(),
            hub,
            cluster: Arc::new(cluster),
            broadcast_changes: config.handlers.broadcast_changes,
            max_rows: config.handlers.max_rows,
        });
        let router =
            Router::new(Arc::clone(&context), config.handlers.clone(), Arc::clone(&metrics));
        let shared = Arc::new(Shared {
            config: config.ws.clone(),
            draining: CancellationToken::new(),
            drain_timeout: config.server.drain_timeout,
            router: Arc::new(router),
            validator: Arc::clone(&validator),
            limits: Arc::clone(&limits),
            audit,
            metrics,
            traces,
            tasks: TaskTracker::new(),
        });
        Ok(Self {
            bounds: Bounds::new(&config),
            validator,
            provider,
            registry: Arc::default(),
            leaving: CancellationToken::new(),
            config,
            packages,
            context,
            shared,
        })
    }

    fn root(&self) -> Root {
        Root {
            router: Arc::clone(&self.shared.router),
            registry: Arc::clone(&self.registry),
            context: Arc::clone(&self.context),
            shared: Arc::clone(&self.shared),
            packages: self.packages.clone(),
        }
    }

    fn accept(&self, listeners: Listeners) -> Accepting {
        let client_id = &self.config.auth.client_id;
        let metrics = &self.shared.metrics.auth;
        let provider = self.provider.clone();
        let api = Arc::new(Api {
            context: Arc::clone(&self.context),
            validator: Arc::clone(&self.validator),
            logins: provider.map(|provider| Logins::new(provider, client_id, metrics)),
            limits: Arc::clone(&self.shared.limits),
            metrics: Arc::clone(&self.shared.metrics),
            traces: self.shared.traces.clone(),
            config: self.config.http.clone(),
            held: self.bounds.held.clone(),
            forwarding: Forwarding::default(),
            leaving: self.leaving.clone(),
        });
        let web = Arc::new(Web {
            shared: Arc::clone(&self.shared),
            cluster: Arc::clone(&self.context.cluster),
            registry: Arc::clone(&self.registry),
            http: self.config.http.clone(),
            places: Arc::clone(&self.bounds.places),
            pending: Arc::clone(&self.bounds.held.pending),
            farewells: Arc::clone(&self.bounds.held.farewells),
        });
        let web = axum::routing::any(upgrade::web).with_state(web);
        let (clients, ops) = http::routes(&api, web, listeners.ops.is_some());
        let (stop, requests) = (CancellationToken::new(), TaskTracker::new());
        let config = Arc::new(self.config.http.clone());
        let patience = Patience {
            keep_alive: config.keep_alive,
            write: self.config.ws.write_timeout,
            request: config.request_timeout,
        };
        let loop_on = |listener, routes, pool: &Arc<Pool>| {
            if let Err(error) = accept::watch_peers(&listener, patience.write) {
                tracing::warn!(%error, "peers that are gone are noticed late");
            }
            let (config, pool) = (Arc::clone(&config), Arc::clone(pool));
            let metrics = self.shared.metrics.http.clone();
            let entrance = Entrance { listener, routes, config, patience, pool, metrics };
            tokio::spawn(accept::accept(entrance, stop.clone(), requests.clone()))
        };
        let held = &self.bounds.held;
        let mut loops = vec![loop_on(listeners.clients, clients, &held.connections)];
        loops.extend(listeners.ops.map(|listener| loop_on(listener, ops, &held.ops_connections)));
        loops.push(tokio::spawn(forget_idle(Arc::clone(&self.shared.limits), stop.clone())));
        let cluster = Arc::clone(&self.context.cluster);
        loops.push(tokio::spawn(keep_logouts(cluster, stop.clone())));
        loops.push(tokio::spawn(keep_folded(Arc::clone(&self.context.store), stop.clone())));
        Accepting { stop, requests, loops }
    }

    /// Ends every WebSocket: those in their handshake at once, the others when they are quiet. First a
    /// balancer is given the time to notice: whom it sends here until then is still let in.
    /// Returns until when a stop waits for changes that were begun.
    async fn drain(&self) -> Instant {
        let ServerConfig { drain_delay, drain_spread: spread, drain_grace: grace, .. } =
            self.config.server;
        tracing::info!(connections = self.context.hub.len(), "draining");
        self.leaving.cancel();
        sleep(drain_delay).await;
        self.shared.draining.cancel();
        self.context.cluster.leave().await;
        let overlap = self.context.cluster.is_on();
        // Without a registry there is nobody to tell: connections end with theirs, and the next one admits none.
        drop(self.registry.tell(RegistryMessage::Drain { spread, grace, overlap }));
        self.shared.tasks.close();
        let drain_timeout = self.config.server.drain_timeout;
        let (until, limit) = (Instant::now() + drain_timeout, drain_timeout + CLOSING);
        if timeout(limit, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!(connections = self.shared.tasks.len(), "connections are cut off");
        }
        until
    }

    /// Waits for changes that outlive their requests or their connections.
    async fn finish_changes(&self, until: Instant) {
        let changes = &self.context.changes;
        changes.close();
        if timeout_at(until.into(), changes.wait()).await.is_err() {
            tracing::warn!(changes = changes.len(), "changes are cut off");
        }
    }
}

/// What clients may hold at once.
struct Bounds {
    /// Of authenticated WebSockets.
    places: Arc<Semaphore>,
    held: Held,
}

impl Bounds {
    fn new(config: &Config) -> Self {
        let (ws, http) = (&config.ws, &config.http);
        let connections = || Pool::new(http.max_connections, http.max_connections_per_address);
        let pending = || Pool::new(ws.max_pending, ws.max_pending_per_address);
        Self {
            places: Arc::new(Semaphore::new(ws.max_connections)),
            held: Held {
                connections: connections(),
                ops_connections: connections(),
                pending: pending(),
                farewells: pending(),
                bodies: Pool::new(http.max_body_memory, http.max_body_memory / 4),
            },
        }
    }
}

/// Takes the rights of other users from the files of this server. What cannot be changed is told once.
async fn close_to_others(config: &Config) {
    let (folder, files) = (config.folder().to_owned(), config.files());
    let left = spawn_blocking(move || files::tighten(&folder, &files)).await.unwrap_or_default();
    if left.is_empty() {
        return;
    }
    let left: Vec<_> = left.iter().map(|path| path.display().to_string()).collect();
    let files = left.join(" ");
    let fix =
        format!("as their owner, run `chmod go= {files}`, or give DATA_DIR a folder of its own");
    tracing::warn!(files, fix, "other users can use files of this server");
}

/// With an identity provider there is no development issuer, and no key of it.
async fn validator(
    config: &AuthConfig,
    metrics: &Metrics,
    traces: Option<Arc<Traces>>,
) -> Result<(Validator, Option<Arc<Provider>>), ServeError> {
    let auth = metrics.auth.clone();
    let Some(provider) = &config.provider else {
        let (file, client) = (config.dev_key_file.clone(), config.client_id.clone());
        let issuer = spawn_blocking(move || DevIssuer::open(&file, &client)).await;
        let issuer = issuer.map_err(io::Error::other).flatten()?;
        return Ok((Validator::trusting(&issuer, config, auth)?, None));
    };
    let breaker = metrics.breakers.of(Dependency::Keycloak);
    let duration = auth.provider_duration.clone();
    let max_age = config.keys_max_age.as_secs();
    auth.keys_max_age.set(i64::try_from(max_age).unwrap_or(i64::MAX));
    let provider = Arc::new(Provider::new(provider, config.timeout, breaker, duration, traces)?);
    Ok((Validator::of(&provider, config, auth), Some(provider)))
}

/// The accept loops and the HTTP requests they started.
struct Accepting {
    stop: CancellationToken,
    requests: TaskTracker,
    loops: Vec<JoinHandle<()>>,
}

impl Accepting {
    /// Closes the listeners and lets open requests finish.
    async fn stop(self) {
        self.stop.cancel();
        for accepting in self.loops {
            drop(accepting.await);
        }
        self.requests.close();
        if timeout(CLOSING, self.requests.wait()).await.is_err() {
            tracing::warn!(requests = self.requests.len(), "HTTP requests are cut off");
        }
    }
}

/// Drops the limits of users that have not come back.
async fn forget_idle(limits: Arc<Limits>, stop: CancellationToken) {
    let mut minute = tokio::time::interval(Duration::from_secs(60));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = minute.tick() => limits.forget_idle(),
        }
    }
}

#[cfg(test)]
mod tests;
