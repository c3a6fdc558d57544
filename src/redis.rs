//! The Redis that nodes share: one connection, which the link of `cluster` opens and keeps, and which
//! everybody else sends commands over.
//!
//! Nobody waits longer than [`COMMAND`] for an answer, and nobody at all while there is no connection or
//! the circuit breaker is open: callers then do without.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use fred::{
    clients::SubscriberClient,
    error::{Error, ErrorKind},
    interfaces::{ClientLike, LuaInterface},
    types::{
        Builder, FromValue, RespVersion,
        config::{Config, ReconnectPolicy},
        scripts::Script,
    },
};
use tokio::{
    task::JoinError,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    breaker::Breaker,
    config::ClusterConfig,
    metrics::{CallOutcome, Dependency, Metrics, RedisMetrics, RedisOperation},
};

/// Time for a command, or a script.
pub(crate) const COMMAND: Duration = Duration::from_millis(100);
/// Time to connect, and for each step of it.
const CONNECT: Duration = Duration::from_secs(1);
/// Time to find the server and all these steps.
const OPENING: Duration = Duration::from_secs(2);
/// Milliseconds between two attempts at something: at first and at last, with some chance on top.
const BACKOFF: (u32, u32) = (50, 1000);
/// Messages that wait to be handed over; more are lost.
const INBOX: usize = 4096;
/// How long the circuit breaker stays open, at first and at most.
const BREAKER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));

/// The driver's task, which is done when the connection is lost, and takes it along when it is dropped.
pub(crate) type Connection = AbortOnDropHandle<Result<(), Error>>;

/// The pauses between attempts at what fails: each is twice as long as the one before.
pub(crate) struct Backoff(ReconnectPolicy);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(ReconnectPolicy::new_exponential(0, BACKOFF.0, BACKOFF.1, 2))
    }

    pub(crate) async fn pause(&mut self) {
        let delay = self.0.next_delay().unwrap_or(BACKOFF.1.into());
        sleep(Duration::from_millis(delay)).await;
    }
}

/// Redis as this node sees it.
pub(crate) struct Redis {
    config: Config,
    prefix: String,
    metrics: RedisMetrics,
    breaker: Breaker,
    /// The client while there is a connection.
    client: ArcSwapOption<SubscriberClient>,
    outage: Outage,
}

/// Since when limits cannot be asked, which takes a script that writes. Nothing else ends an outage: a Redis that
/// takes no writes answers all that only reads.
struct Outage {
    begun: Instant,
    /// Milliseconds from `begun` to the first failure after the last success; [`NONE`](Self::NONE), or
    /// [`ALWAYS`](Self::ALWAYS).
    since: AtomicU64,
}

impl Outage {
    const NONE: u64 = u64::MAX;
    /// There was no connection yet.
    const ALWAYS: u64 = u64::MAX - 1;

    fn new() -> Self {
        Self { begun: Instant::now(), since: AtomicU64::new(Self::ALWAYS) }
    }

    fn failed(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(Self::ALWAYS);
        // Else an outage lasts already.
        let _ = self.since.compare_exchange(Self::NONE, now, Relaxed, Relaxed);
    }

    fn ended(&self) {
        // Asked first: what is only read is shared by all threads.
        if self.since.load(Relaxed) != Self::NONE {
            self.since.store(Self::NONE, Relaxed);
        }
    }

    fn lasts(&self) -> Option<Duration> {
        match self.since.load(Relaxed) {
            Self::NONE => None,
            Self::ALWAYS => Some(Duration::MAX),
            since => Some(self.begun.elapsed().saturating_sub(Duration::from_millis(since))),
        }
    }
}

impl Redis {
    /// Not connected yet; none without `REDIS_URL`.
    pub(crate) fn new(config: &ClusterConfig, metrics: &Metrics) -> Option<Self> {
        let url = config.redis.as_ref()?;
        let mut driver =
            Config::from_url(url.expose()).expect("the configuration takes no other URLs");
        // Commands and messages share the connection.
        driver.version = RespVersion::RESP3;
        Some(Self {
            config: driver,
            prefix: config.prefix.clone(),
            metrics: metrics.redis.clone(),
            breaker: Breaker::new("redis", BREAKER, metrics.breakers.of(Dependency::Redis)),
            client: ArcSwapOption::empty(),
            outage: Outage::new(),
        })
    }

    /// A key or channel of this cluster.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}:{name}", self.prefix)
    }

    /// Whether there is a connection.
    pub(crate) fn is_connected(&self) -> bool {
        self.client.load().is_some()
    }

    /// Whether an answer is to be expected: there is a connection, and the circuit breaker is closed.
    pub(crate) fn answers(&self) -> bool {
        // By the gauge, which costs each message less than the client.
        self.metrics.connected.get() == 1 && self.breaker.is_closed()
    }

    /// For how long limits cannot be asked; none: they can. It is without end before the first connection.
    pub(crate) fn outage(&self) -> Option<Duration> {
        self.outage.lasts()
    }

    /// Opens a connection; nobody else uses it before it is [shared](Self::share).
    pub(crate) async fn connect(&self) -> Result<(SubscriberClient, Connection), Error> {
        let client = self.client()?;
        let connect = async {
            let mut connection = AbortOnDropHandle::new(client.connect());
            tokio::select! {
                connected = timeout(OPENING, client.wait_for_connect()) => match connected {
                    Ok(connected) => connected?,
                    Err(_) => return Err(Error::new(ErrorKind::Timeout, "no answer")),
                },
                ended = &mut connection => return Err(gone(ended)),
            }
            Ok(connection)
        };
        let connection = self.timed(RedisOperation::Connect, connect).await?;
        Ok((client, connection))
    }

    /// The driver is kept from trying again by itself: a command that was sent twice would be a push
    /// that arrives twice.
    fn client(&self) -> Result<SubscriberClient, Error> {
        Builder::from_config(self.config.clone())
            .with_connection_config(|connection| {
                connection.connection_timeout = CONNECT;
                connection.internal_command_timeout = CONNECT;
                connection.max_command_attempts = 1;
                connection.tcp.nodelay = Some(true);
            })
            .with_performance_config(|performance| {
                performance.default_command_timeout = COMMAND;
                performance.broadcast_channel_capacity = INBOX;
            })
            .build_subscriber_client()
    }

    /// Lets everybody use a connection for as long as the guard is held.
    pub(crate) fn share(&self, client: SubscriberClient) -> Shared<'_> {
        self.client.store(Some(Arc::new(client)));
        self.metrics.connected.set(1);
        // Else the first limit that can be asked again ends the outage.
        if self.breaker.is_closed() {
            self.outage.ended();
        }
        Shared(self)
    }

    /// A command on a connection that may not be shared yet: measured, and told to the breaker.
    pub(crate) async fn timed<T>(
        &self,
        operation: RedisOperation,
        command: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        // It goes out in any case. Asking is what lets an open breaker close again.
        self.breaker.permits();
        let started = Instant::now();
        let result = command.await;
        let outcome = match result {
            Ok(_) => {
                self.breaker.succeeded();
                CallOutcome::Success
            }
            Err(_) => {
                self.breaker.failed();
                CallOutcome::Error
            }
        };
        self.metrics.done(operation, outcome, started.elapsed().as_secs_f64());
        result
    }

    /// A command on the connection that is shared.
    pub(crate) async fn command<T, F: Future<Output = Result<T, Error>>>(
        &self,
        operation: RedisOperation,
        command: impl FnOnce(Arc<SubscriberClient>) -> F,
    ) -> Result<T, Error> {
        self.timed(operation, command(self.shared()?)).await
    }

    /// Runs a script, which is one atomic step, on the connection that is shared. Its first key decides
    /// where it runs in a Redis Cluster; all of its keys have to be there.
    pub(crate) async fn run<T: FromValue>(
        &self,
        operation: RedisOperation,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<String>,
    ) -> Result<T, Error> {
        self.run_on(&*self.shared()?, operation, script, keys, arguments).await
    }

    fn shared(&self) -> Result<Arc<SubscriberClient>, Error> {
        let client = self.client.load_full();
        let client = client.ok_or_else(|| Error::new(ErrorKind::IO, "no connection"))?;
        if !self.breaker.permits() {
            return Err(Error::new(ErrorKind::IO, "its circuit breaker is open"));
        }
        Ok(client)
    }

    /// The same as [`Self::run`], on a connection that may not be shared yet.
    pub(crate) async fn run_on<T: FromValue>(
        &self,
        client: &SubscriberClient,
        operation: RedisOperation,
        script: &Script,
        keys: Vec<String>,
        arguments: Vec<String>,
    ) -> Result<T, Error> {
        // Boxed: the driver's futures take up 14 KiB each.
        let run = Box::pin(async {
            match client.evalsha(script.sha1().clone(), keys.clone(), arguments.clone()).await {
                // A Redis that was started anew, or has never seen it.
                Err(error) if error.details().starts_with("NOSCRIPT") => {
                    let text = script.lua().expect("it was made from its text");
                    client.eval(text.clone(), keys, arguments).await
                }
                result => result,
            }
        });
        let late = |_| Err(Error::new(ErrorKind::Timeout, "no answer"));
        let run = async { timeout(COMMAND, run).await.unwrap_or_else(late) };
        let result = self.timed(operation, run).await;
        match result {
            // Else it is a connection that may be given up before it is shared.
            Ok(_) if self.is_connected() && operation.writes() => self.outage.ended(),
            Ok(_) => {}
            Err(_) => self.outage.failed(),
        }
        result
    }
}

/// A connection that everybody may use.
pub(crate) struct Shared<'a>(&'a Redis);

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.0.outage.failed();
        self.0.client.store(None);
        self.0.metrics.connected.set(0);
    }
}

/// Why the driver's task ended.
pub(crate) fn gone(ended: Result<Result<(), Error>, JoinError>) -> Error {
    match ended {
        Ok(Err(error)) => error,
        _ => Error::new(ErrorKind::Canceled, "the driver gave up"),
    }
}
