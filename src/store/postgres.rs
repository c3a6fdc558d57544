//! Postgres: a pool for the packages, one for the audit trail, and one connection beside them that watches.
//!
//! A pool finds out late that its server is gone: it goes on connecting until it may no longer wait, and
//! statements on connections that nobody answers wait for TCP. So a watcher asks the server all the time.
//! While there is no answer, every statement is refused at once, those that wait included; when there is
//! one again, the pools are replaced, since no connection from before can be trusted.

use std::{
    future::Future,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    OpenError,
    schema::{self, History, Runs, Schema, TABLES},
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
/// Time for the connections to be closed in order.
const CLOSING: Duration = Duration::from_secs(2);

pub(super) struct Postgres {
    shares: Arc<ArcSwap<Shares<sqlx::Postgres>>>,
    up: watch::Receiver<bool>,
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
        Ok((Self { shares, up, _watcher: watching }, schema))
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
            Ok(_) = up.wait_for(|up| !up) => Err(sqlx::Error::Io(io::Error::new(
                io::ErrorKind::NotConnected,
                "the server is down",
            ))),
            result = statement => result,
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
    let runs = migrations_run(&mut connection).await?;
    let schema = schema::settle(&mut connection, &runs, &histories(), migrate).await?;
    Ok((options, connection, schema))
}

/// The migrations that were run; none of a table that is not there.
pub(super) async fn migrations_run(connection: &mut PgConnection) -> sqlx::Result<Runs> {
    let mut runs = Runs::new();
    for table in TABLES {
        let found = "SELECT to_regclass($1) IS NOT NULL";
        let is_there: bool =
            sqlx::query_scalar(found).bind(table).fetch_one(&mut *connection).await?;
        if is_there {
            let run = sqlx::query_as(schema::select_run(table));
            runs.insert(table, run.fetch_all(&mut *connection).await?);
        }
    }
    Ok(runs)
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

/// The migrations of this program.
pub(super) fn histories() -> [History; 2] {
    let server = include_str!("../../migrations/server/postgres/0001_user_actions.sql");
    let authors = include_str!("../../migrations/authors/postgres/0001_author.sql");
    let search = include_str!("../../migrations/authors/postgres/0002_name_search.sql");
    [
        History::server(&[(1, "user actions", server)]),
        History::authors(&[(1, "author", authors), (2, "name search", search)]),
    ]
}
