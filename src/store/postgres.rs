//! Postgres: a pool for the packages, one for the audit trail, and one connection beside them that watches.
//!
//! A pool finds out late that its server is gone: it goes on connecting until it may no longer wait, and
//! statements on connections that nobody answers wait for TCP. So a watcher asks the server all the time whether
//! it takes changes. While it does not, every statement is refused at once, those that wait included; but a change
//! that was sent waits for what came of it. When a server takes changes again, the pools are replaced, since no
//! connection from before can be trusted. The same happens where the address leads to another server.

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
    Connection as _, Executor as _, PgConnection, PgPool,
    postgres::{PgDatabaseError, PgPoolOptions, PgSeverity},
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
    servers::{ConnectError, Primary, Servers, late, look},
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
/// From one look where the address leads to the next. Meanwhile, a server that the address has left is still used.
const RENEWAL: Duration = Duration::from_secs(5);
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
        let Prepared { servers, primary, schema, numbered } = prepare(url, config).await?;
        let pooled = Pooled::new(config);
        let shares = Arc::new(ArcSwap::from_pointee(pooled.shares(&primary)));
        let (told, up) = watch::channel(true);
        let is_numbered = Arc::new(AtomicBool::new(numbered));
        let (mut tasks, mut later) = (Vec::new(), None);
        if !numbered && config.auto_migrate {
            let (servers, patience) = (servers.clone(), config.connect_timeout);
            let numbered = Arc::clone(&is_numbered);
            let (tell, told) = oneshot::channel();
            later = Some(told);
            tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
                let done = numbering::in_background(servers, patience, numbered, unnumbered).await;
                // Nobody asks where no trail is kept.
                drop(tell.send(done));
            })));
        }
        let watcher = Watcher {
            servers,
            connect_timeout: config.connect_timeout,
            pooled,
            shares: Arc::clone(&shares),
            histories: histories(false),
            up: told,
        };
        tasks.push(AbortOnDropHandle::new(tokio::spawn(watcher.run(primary))));
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
    limit: u128,
    pool: PgPoolOptions,
    pool_size: u32,
    /// Set where a new connection led to a server that takes no changes.
    doubted: Arc<AtomicBool>,
}

impl Pooled {
    fn new(config: &StoreConfig) -> Self {
        Self {
            limit: config.statement_timeout.as_millis(),
            pool: PgPoolOptions::new().acquire_timeout(config.connect_timeout),
            pool_size: config.pool_size,
            doubted: Arc::default(),
        }
    }

    /// Shares are made with their pool: after an outage, an old connection may keep its place for long.
    fn shares(&self, primary: &Primary) -> Shares<sqlx::Postgres> {
        let packages = self.pool(primary, self.pool_size);
        let audit = self.pool(primary, AUDIT_CONNECTIONS);
        let share = |pool: &PgPool| Share::new(pool, most_of(pool.options().get_max_connections()));
        Shares {
            reads: share(&packages),
            changes: share(&packages),
            audit_reads: share(&audit),
            audit_changes: share(&audit),
            pools: vec![packages, audit],
        }
    }

    fn pool(&self, primary: &Primary, connections: u32) -> PgPool {
        let options = primary.options.clone().options([("statement_timeout", self.limit)]);
        let (place, doubted) = (Arc::new(options.clone()), Arc::clone(&self.doubted));
        let pool = self.pool.clone().max_connections(connections);
        // The address may have moved to a standby. The watcher is told, and refuses what waits for a connection.
        let pool = pool.after_connect(move |connection, _| {
            let (place, doubted) = (Arc::clone(&place), Arc::clone(&doubted));
            Box::pin(async move {
                let Err(error) = look(connection, &place).await else { return Ok(()) };
                doubted.store(true, Ordering::Relaxed);
                Err(sqlx::Error::Configuration(error.into()))
            })
        });
        pool.connect_lazy_with(options)
    }
}

/// Knows whether the server takes changes. Its connection is its own: a full pool is not a server that is down.
struct Watcher {
    servers: Servers,
    connect_timeout: Duration,
    pooled: Pooled,
    shares: Arc<ArcSwap<Shares<sqlx::Postgres>>>,
    /// What a server has to have: an empty one takes changes as well, and is not the one that is meant.
    histories: [History; 2],
    up: watch::Sender<bool>,
}

impl Watcher {
    async fn run(self, mut primary: Primary) {
        let mut renewed = Instant::now();
        loop {
            sleep(BEAT).await;
            let doubted = self.pooled.doubted.swap(false, Ordering::Relaxed);
            let found = if doubted || renewed.elapsed() >= RENEWAL {
                renewed = Instant::now();
                self.look_anew(&mut primary).await
            } else {
                self.look(&mut primary).await
            };
            match found {
                Ok(None) => {}
                Ok(Some(found)) => {
                    if !found.is_same_as(&primary) {
                        tracing::warn!(
                            server = found.place(),
                            "the database is another server now"
                        );
                        self.replace_pools(&found);
                    }
                    primary = found;
                }
                Err(error) => primary = self.until_back(&error).await,
            }
        }
    }

    /// Asks the server; returns another connection where this one has ended.
    async fn look(&self, primary: &mut Primary) -> Result<Option<Primary>, ConnectError> {
        match timeout(PATIENCE, primary.look()).await {
            Ok(Ok(())) => return Ok(None),
            Ok(Err(_)) => {}
            Err(_) => return Err(late(PATIENCE).into()),
        }
        // This connection alone may have ended, or another server may have been promoted.
        match Primary::connect_to(&primary.options, RECONNECT, &self.histories).await {
            Ok(found) => Ok(Some(found)),
            Err(_) => self.servers.connect_to(RECONNECT, &self.histories).await.map(Some),
        }
    }

    /// Asks the server, and beside it whoever has its address now: that may be another server, while the old one
    /// still answers on the connection. The other servers of a list are not asked: one that comes back, and was
    /// not told that it is no primary any more, would be taken for one.
    async fn look_anew(&self, primary: &mut Primary) -> Result<Option<Primary>, ConnectError> {
        let options = primary.options.clone();
        let anew = Primary::connect_to(&options, PATIENCE, &self.histories);
        match tokio::join!(self.look(primary), anew) {
            (_, Ok(found)) => Ok(Some(found)),
            // Changes on the old server may be lost.
            (_, Err(error @ (ConnectError::ReadOnly { .. } | ConnectError::Schema { .. }))) => {
                Err(error)
            }
            (asked, Err(_)) => asked,
        }
    }

    async fn until_back(&self, error: &ConnectError) -> Primary {
        let mut said = error.to_string();
        tracing::error!(
            error = said,
            "the database is down; requests are refused until it takes changes"
        );
        self.up.send_replace(false);
        let primary = loop {
            sleep(BEAT).await;
            let found = self.servers.connect_to(self.connect_timeout, &self.histories).await;
            let error = match found {
                Ok(primary) => break primary,
                Err(error) => error.to_string(),
            };
            if error != said {
                tracing::error!(error, "the database is still down");
                said = error;
            }
        };
        self.replace_pools(&primary);
        self.up.send_replace(true);
        tracing::info!(server = primary.place(), "the database takes changes again");
        primary
    }

    /// Statements on the old connections come to their end.
    fn replace_pools(&self, primary: &Primary) {
        let before = self.shares.swap(Arc::new(self.pooled.shares(primary)));
        drop(tokio::spawn(async move { timeout(CLOSING, before.close()).await }));
    }
}

/// A server with a schema that this program can work with.
struct Prepared {
    servers: Servers,
    primary: Primary,
    schema: Schema,
    /// Whether the audit trail has its integer key.
    numbered: bool,
}

/// Waits for the server, and settles its schema. What would take long is left for later: until then, the audit
/// trail is used as the previous release made it.
async fn prepare(url: &PostgresUrl, config: &StoreConfig) -> Result<Prepared, OpenError> {
    let servers = Servers::of(url)?;
    let mut primary = servers.until_reached(url, config).await?;
    let state = numbering::state(&mut primary.connection).await?;
    let mut numbered = match state {
        State::Done | State::Short => true,
        // One that was not to be changed is refused.
        State::Long => !config.auto_migrate,
        State::Begun => false,
    };
    if state == State::Short {
        primary.connection.execute(LOCK_TIMEOUT).await?;
    }
    let mut settled = settle(&mut primary.connection, config, numbered).await;
    if settled.as_ref().is_err_and(numbering::is_locked) {
        // Others use the table. This connection has sqlx's lock.
        primary = servers.connect(config.connect_timeout).await?;
        numbered = false;
        settled = settle(&mut primary.connection, config, numbered).await;
    }
    primary.connection.execute("RESET lock_timeout").await?;
    Ok(Prepared { servers, primary, schema: settled?, numbered })
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
    let servers = Servers::of(url)?;
    servers.until_reached(url, config).await?.connection.close().await?;
    numbering::migrate(&servers, config.connect_timeout, tell).await
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

fn down() -> sqlx::Error {
    sqlx::Error::Io(io::Error::new(
        io::ErrorKind::NotConnected,
        "the server is down, or takes no changes",
    ))
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
