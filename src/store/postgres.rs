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
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use prometheus::IntGauge;
use sqlx::{
    ConnectOptions, Connection, Executor as _, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgDatabaseError, PgPoolOptions, PgSeverity},
};
use tokio::{
    sync::{oneshot, watch},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    OpenError, Progress,
    numbering::{self, LOCK_TIMEOUT, State},
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
    /// Whether the audit trail has its integer key.
    numbered: Arc<AtomicBool>,
    /// How the schema was, once what takes long is done in the background.
    later: Mutex<Option<oneshot::Receiver<Schema>>>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Postgres {
    /// Waits for the server, settles its schema, and begins to watch. A long audit trail is numbered in the
    /// background; `unnumbered` shows how many rows are left.
    pub(super) async fn open(
        url: &PostgresUrl,
        config: &StoreConfig,
        unnumbered: IntGauge,
    ) -> Result<(Self, Schema), OpenError> {
        let Prepared { options, connection, schema, numbered } = prepare(url, config).await?;
        let pooled = Pooled::new(&options, config);
        let shares = Arc::new(ArcSwap::from_pointee(pooled.shares()));
        let (told, up) = watch::channel(true);
        let is_numbered = Arc::new(AtomicBool::new(numbered));
        let (mut tasks, mut later) = (Vec::new(), None);
        if !numbered && config.auto_migrate {
            let (options, patience) = (options.clone(), config.connect_timeout);
            let numbered = Arc::clone(&is_numbered);
            let (tell, told) = oneshot::channel();
            later = Some(told);
            tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
                let done = numbering::in_background(options, patience, numbered, unnumbered).await;
                // Nobody asks where no trail is kept.
                drop(tell.send(done));
            })));
        }
        let watcher = Watcher {
            options,
            connect_timeout: config.connect_timeout,
            pooled,
            shares: Arc::clone(&shares),
            up: told,
        };
        tasks.push(AbortOnDropHandle::new(tokio::spawn(watcher.run(connection))));
        let limit = config.statement_timeout;
        let longest = (!limit.is_zero()).then(|| config.connect_timeout + limit + LATEST);
        Ok((
            Self {
                shares,
                up,
                longest,
                numbered: is_numbered,
                later: Mutex::new(later),
                _tasks: tasks,
            },
            schema,
        ))
    }

    /// Told how the schema was when migrations in the background are done. None: there are none.
    pub(super) fn migrated_later(&self) -> Option<oneshot::Receiver<Schema>> {
        self.later.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the audit trail has its integer key, as far as this node knows.
    pub(super) fn is_numbered(&self) -> bool {
        self.numbered.load(Ordering::Relaxed)
    }

    /// Whether a statement failed because the audit trail has got its integer key without this node's knowledge.
    pub(super) async fn is_numbered_since(&self, error: &sqlx::Error) -> bool {
        let code = error.as_database_error().and_then(|cause| cause.code());
        // Columns and types that do not fit.
        if self.is_numbered() || !code.is_some_and(|code| code.starts_with("42")) {
            return false;
        }
        let shares = self.shares();
        let look = self
            .while_up(async { numbering::state(&mut *shares.audit_changes.take().await?).await });
        let is_done = matches!(look.await, Ok(State::Done));
        if is_done {
            self.numbered.store(true, Ordering::Relaxed);
        }
        is_done
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

/// A server with a schema that this program can work with.
struct Prepared {
    options: PgConnectOptions,
    connection: PgConnection,
    schema: Schema,
    /// Whether the audit trail has its integer key.
    numbered: bool,
}

/// Waits for the server, and settles its schema. What would take long is left for later: until then, the audit
/// trail is used as the previous release made it.
async fn prepare(url: &PostgresUrl, config: &StoreConfig) -> Result<Prepared, OpenError> {
    let options = options(url)?;
    let mut connection = until_reached(&options, url, config).await?;
    let state = numbering::state(&mut connection).await?;
    let mut numbered = match state {
        State::Done | State::Short => true,
        // One that was not to be changed is refused.
        State::Long => !config.auto_migrate,
        State::Begun => false,
    };
    if state == State::Short {
        connection.execute(LOCK_TIMEOUT).await?;
    }
    let mut settled = settle(&mut connection, config, numbered).await;
    if settled.as_ref().is_err_and(numbering::is_locked) {
        // Others use the table. This connection has sqlx's lock.
        connection = connect(&options, config.connect_timeout).await?;
        numbered = false;
        settled = settle(&mut connection, config, numbered).await;
    }
    connection.execute("RESET lock_timeout").await?;
    Ok(Prepared { options, connection, schema: settled?, numbered })
}

async fn settle(
    connection: &mut PgConnection,
    config: &StoreConfig,
    numbered: bool,
) -> Result<Schema, OpenError> {
    let runs = migrations_run(connection).await?;
    schema::settle(connection, &runs, &histories(numbered), config.auto_migrate).await
}

/// Brings the schema up to date, however long that takes; returns how it was.
pub(super) async fn migrate(
    url: &PostgresUrl,
    config: &StoreConfig,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Schema, OpenError> {
    let options = options(url)?;
    until_reached(&options, url, config).await?.close().await?;
    numbering::migrate(&options, config.connect_timeout, tell).await
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

/// The migrations of this program, or without that which gives the audit trail its integer key.
pub(super) fn histories(numbered: bool) -> [History; 2] {
    let mut server = vec![
        (1, "user actions", include_str!("../../migrations/server/postgres/0001_user_actions.sql")),
        (2, "integer key", include_str!("../../migrations/server/postgres/0002_integer_key.sql")),
        (3, "revocations", include_str!("../../migrations/server/postgres/0003_revocations.sql")),
    ];
    if !numbered {
        server.retain(|(version, ..)| *version != 2);
    }
    let authors = include_str!("../../migrations/authors/postgres/0001_author.sql");
    let search = include_str!("../../migrations/authors/postgres/0002_name_search.sql");
    [
        History::server(&server),
        History::authors(&[(1, "author", authors), (2, "name search", search)]),
    ]
}
