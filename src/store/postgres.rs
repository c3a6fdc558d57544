//! Postgres: a pool for the packages, one for the audit trail, and one connection beside them that watches.
//!
//! A pool finds out late that its server is gone: it goes on connecting until it may no longer wait, and
//! statements on connections that nobody answers wait for TCP. So a watcher asks the server all the time.
//! While there is no answer, every statement is refused at once, those that wait included; but a change that
//! was sent waits for what came of it. When there is an answer again, the pools are replaced, since no
//! connection from before can be trusted.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgDatabaseError, PgPoolOptions, PgSeverity},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    OpenError,
    schema::{self, RUN, Run, Schema},
    shares::{AUDIT_CONNECTIONS, Share, Shares, most_of},
};
use crate::{
    config::{PostgresUrl, StoreConfig},
    metrics::DbErrorKind,
};

/// From one question of the watcher to the next.
const BEAT: Duration = Duration::from_millis(200);
/// Time for the answer: with [`BEAT`] less than the second in which requests are to be answered.
const PATIENCE: Duration = Duration::from_millis(650);
/// Time for another connection where the watcher's has ended.
const RECONNECT: Duration = Duration::from_millis(350);
/// The longest wait between attempts at the start.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Time for the answer to a change, beside that which the server may take for it: a server that was frozen, or
/// a network that was, may come back.
const LATEST: Duration = Duration::from_secs(30);
/// Time for the connections to be closed in order.
const CLOSING: Duration = Duration::from_secs(2);

pub(super) struct Postgres {
    shares: Arc<ArcSwap<Shares<sqlx::Postgres>>>,
    up: watch::Receiver<bool>,
    /// Time for a change, from its wait for a connection to the answer; none where a statement has no limit.
    longest: Option<Duration>,
    _watcher: AbortOnDropHandle<()>,
}

impl Postgres {
    /// Waits for the server, settles its schema, and begins to watch.
    pub(super) async fn open(
        url: &PostgresUrl,
        config: &StoreConfig,
    ) -> Result<(Self, Schema), OpenError> {
        let (options, first, schema) = prepare(url, config, config.auto_migrate).await?;
        let pooled = Pooled::new(&options, config);
        let shares = Arc::new(ArcSwap::from_pointee(pooled.shares()));
        let (told, up) = watch::channel(true);
        let watcher = Watcher {
            options,
            connect_timeout: config.connect_timeout,
            pooled,
            shares: Arc::clone(&shares),
            up: told,
        };
        let watching = AbortOnDropHandle::new(tokio::spawn(watcher.run(first)));
        let limit = config.statement_timeout;
        let longest = (!limit.is_zero()).then(|| config.connect_timeout + limit + LATEST);
        Ok((Self { shares, up, longest, _watcher: watching }, schema))
    }

    pub(super) fn shares(&self) -> Arc<Shares<sqlx::Postgres>> {
        self.shares.load_full()
    }

    pub(super) fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// Runs a statement until the server is down.
    pub(super) async fn while_up<T>(
        &self,
        statement: impl Future<Output = sqlx::Result<T>>,
    ) -> sqlx::Result<T> {
        let mut up = self.up.clone();
        tokio::select! {
            biased;
            Ok(_) = up.wait_for(|up| !up) => Err(down()),
            result = statement => result,
        }
    }

    /// Runs a change. Once it is `sent`, the server alone says what came of it, also where it is thought to be
    /// down meanwhile. A server that says nothing at all is given up late.
    pub(super) async fn to_its_end<T>(
        &self,
        sent: &AtomicBool,
        change: impl Future<Output = sqlx::Result<T>>,
    ) -> sqlx::Result<T> {
        let mut change = pin!(change);
        let mut up = self.up.clone();
        let answer = async {
            tokio::select! {
                biased;
                Ok(_) = up.wait_for(|up| !up) => {}
                result = &mut change => return result,
            }
            if sent.load(Ordering::Relaxed) { change.await } else { Err(down()) }
        };
        match self.longest {
            None => answer.await,
            Some(limit) => timeout(limit, answer).await.unwrap_or_else(|_| Err(late(limit))),
        }
    }

    pub(super) async fn close(&self) {
        if timeout(CLOSING, self.shares().close()).await.is_err() {
            tracing::warn!("connections to the database are cut off");
        }
    }
}

/// How the pools are made, and made again.
struct Pooled {
    connections: PgConnectOptions,
    pool: PgPoolOptions,
    pool_size: u32,
}

impl Pooled {
    fn new(options: &PgConnectOptions, config: &StoreConfig) -> Self {
        let limit = config.statement_timeout.as_millis();
        let connections = options.clone().options([("statement_timeout", limit)]);
        let pool = PgPoolOptions::new().acquire_timeout(config.connect_timeout);
        Self { connections, pool, pool_size: config.pool_size }
    }

    /// Shares are made with their pool: after an outage, an old connection may keep its place for long.
    fn shares(&self) -> Shares<sqlx::Postgres> {
        let packages = self.pool(self.pool_size);
        let audit = self.pool(AUDIT_CONNECTIONS);
        let share = |pool: &PgPool| Share::new(pool, most_of(pool.options().get_max_connections()));
        Shares {
            reads: share(&packages),
            changes: share(&packages),
            audit_reads: share(&audit),
            audit_changes: share(&audit),
            pools: vec![packages, audit],
        }
    }

    fn pool(&self, connections: u32) -> PgPool {
        let options = self.pool.clone().max_connections(connections);
        options.connect_lazy_with(self.connections.clone())
    }
}

/// Knows whether the server answers. Its connection is its own: a full pool is not a server that is down.
struct Watcher {
    options: PgConnectOptions,
    connect_timeout: Duration,
    pooled: Pooled,
    shares: Arc<ArcSwap<Shares<sqlx::Postgres>>>,
    up: watch::Sender<bool>,
}

impl Watcher {
    async fn run(self, mut connection: PgConnection) {
        loop {
            sleep(BEAT).await;
            let again = match timeout(PATIENCE, connection.ping()).await {
                Ok(Ok(())) => continue,
                // This connection alone may have ended.
                Ok(Err(_)) => connect(&self.options, RECONNECT).await,
                Err(_) => Err(late(PATIENCE)),
            };
            connection = match again {
                Ok(connection) => connection,
                Err(error) => self.until_back(error).await,
            };
        }
    }

    async fn until_back(&self, error: sqlx::Error) -> PgConnection {
        tracing::error!(%error, "the database is down; requests are refused until it answers");
        self.up.send_replace(false);
        let connection = loop {
            sleep(BEAT).await;
            if let Ok(connection) = connect(&self.options, self.connect_timeout).await {
                break connection;
            }
        };
        let before = self.shares.swap(Arc::new(self.pooled.shares()));
        drop(tokio::spawn(async move { timeout(CLOSING, before.close()).await }));
        self.up.send_replace(true);
        tracing::info!("the database answers again");
        connection
    }
}

/// Waits for the server, and settles its schema.
pub(super) async fn prepare(
    url: &PostgresUrl,
    config: &StoreConfig,
    migrate: bool,
) -> Result<(PgConnectOptions, PgConnection, Schema), OpenError> {
    let options = options(url)?;
    let mut connection = until_reached(&options, url, config).await?;
    let run = migrations_run(&mut connection).await?;
    let schema = schema::settle(&mut connection, &run, &migrator(), migrate).await?;
    Ok((options, connection, schema))
}

/// The migrations that were run; none in a database without their table.
pub(super) async fn migrations_run(connection: &mut PgConnection) -> sqlx::Result<Vec<Run>> {
    let table = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";
    let is_there: bool = sqlx::query_scalar(table).fetch_one(&mut *connection).await?;
    if is_there { sqlx::query_as(RUN).fetch_all(connection).await } else { Ok(Vec::new()) }
}

/// The connections that a URL means; the password may come from `PGPASSWORD` or a `.pgpass` file.
pub(super) fn options(url: &PostgresUrl) -> sqlx::Result<PgConnectOptions> {
    let options: PgConnectOptions = url.expose().parse()?;
    // Migrations say of tables that they are there; that is not worth a line.
    Ok(options.options([("client_min_messages", "warning")]).disable_statement_logging())
}

/// Connects, or fails when the time is over.
pub(super) async fn connect(
    options: &PgConnectOptions,
    limit: Duration,
) -> sqlx::Result<PgConnection> {
    timeout(limit, options.connect()).await.unwrap_or_else(|_| Err(late(limit)))
}

fn down() -> sqlx::Error {
    sqlx::Error::Io(io::Error::new(io::ErrorKind::NotConnected, "the server is down"))
}

fn late(limit: Duration) -> sqlx::Error {
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}")))
}

/// Connects as soon as the server does: it is often started at the same time.
async fn until_reached(
    options: &PgConnectOptions,
    url: &PostgresUrl,
    config: &StoreConfig,
) -> Result<PgConnection, OpenError> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        let error = match connect(options, config.connect_timeout).await {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        // A wrong password does not become right, nor a certificate that nobody vouches for.
        if !passes(&error) {
            return Err(error.into());
        }
        let limit = config.start_timeout;
        let left = limit.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(OpenError::Unreachable { place: url.to_string(), limit, error });
        }
        pause = pause.min(left);
        tracing::warn!(%error, retry_ms = pause.as_millis(), "no answer from the database yet");
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether an error is one of a server that is not there yet, starts, or has no connection left.
fn passes(error: &sqlx::Error) -> bool {
    match error {
        // Data that is no TLS, or a certificate that is not trusted.
        sqlx::Error::Io(cause) => cause.kind() != io::ErrorKind::InvalidData,
        sqlx::Error::Database(cause) => {
            cause.code().is_some_and(|code| matches!(&*code, "57P01" | "57P03" | "53300"))
        }
        _ => false,
    }
}

/// Whether a connection ended with this error, so that nobody knows what came of a statement on it.
pub(super) fn has_ended(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(cause) => {
            let cause = cause.try_downcast_ref::<PgDatabaseError>();
            let severity = cause.map(PgDatabaseError::severity);
            matches!(severity, Some(PgSeverity::Fatal | PgSeverity::Panic))
        }
        _ => false,
    }
}

pub(super) fn kind_of(code: &str) -> DbErrorKind {
    match code {
        // query_canceled (statement_timeout), lock_not_available
        "57014" | "55P03" => DbErrorKind::Timeout,
        // read_only_sql_transaction (a standby after a failover), invalid_catalog_name
        "25006" | "3D000" => DbErrorKind::Connection,
        code => match code.get(..2) {
            // connections, authorization, resources, the operator, the system
            Some("08" | "28" | "53" | "57" | "58") => DbErrorKind::Connection,
            Some("23") => DbErrorKind::Integrity,
            _ => DbErrorKind::Other,
        },
    }
}

pub(super) fn migrator() -> Migrator {
    schema::migrator(&[
        (1, "author", include_str!("../../migrations/postgres/0001_author.sql")),
        (2, "user actions", include_str!("../../migrations/postgres/0002_user_actions.sql")),
    ])
}
