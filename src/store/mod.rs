//! The database: SQLite or Postgres through sqlx, one file of queries a resource.
//!
//! One text of a statement runs on both where it can, with `$N` for parameters (see `statement!`). What is
//! unique is the database's word, never a check first.

mod actions;
mod authors;
mod fold;
mod moment;
mod names;
mod numbering;
mod postgres;
mod probe;
mod revocations;
mod schema;
mod servers;
mod shares;
mod sqlite;
mod unreadable;

use std::{
    future::Future,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::{
    AssertSqlSafe,
    error::{DatabaseError, ErrorKind},
    postgres::PgDatabaseError,
};
use tokio::sync::oneshot;

pub use actions::{Action, StoredAction};
pub(crate) use actions::{ActionFilter, ActionKey, ActionPage, ActionPart, Place};
pub use authors::{Author, AuthorFilter, AuthorPage};
pub use moment::{Since, Until};
pub(crate) use names::keep_folded;
pub use numbering::Progress;
use postgres::Postgres;
pub(crate) use probe::{Probe, ProbeError, probe, servers_of};
pub use schema::{Part, Schema, SchemaError};
pub use servers::{Attempt, ConnectError};
use shares::Shares;
use sqlite::Sqlite;
use unreadable::Logged;

use crate::{
    config::{DatabasePlace, StoreConfig},
    files::Unwritable,
    metrics::{DbErrorKind, DbMetrics, DbOperation, DbShare, Label as _},
    traces::{Query, Traces},
};

const LEAST_WANTED: usize = 4;

/// What to do where the error itself is all that is known.
const FIX: &str = "`switchboard doctor` with the same settings says what to change";

/// Why an operation on the database failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// A unique value is taken.
    #[error("a unique value is taken")]
    Conflict,
    /// The database cannot be reached or does not answer in time. Nothing was changed.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// The connection ended while the database was at a change: it may have been made.
    #[error("the database did not say whether it has made a change: {0}")]
    Unknown(#[source] sqlx::Error),
    /// No id is left for another row.
    #[error("the ids of the table are used up: {0}")]
    OutOfIds(#[source] sqlx::Error),
    /// Anything else: a bug.
    #[error("the database refused: {0}")]
    Other(#[source] sqlx::Error),
}

impl StoreError {
    /// The error of a statement on Postgres, where a change may have been `sent`.
    fn of_change(self, sent: bool) -> Self {
        match self {
            Self::Unavailable(error) | Self::Other(error)
                if sent && postgres::has_ended(&error) =>
            {
                Self::Unknown(error)
            }
            other => other,
        }
    }

    /// Whether it is a value that the database does not take: again will not help.
    pub(crate) fn is_about_data(&self) -> bool {
        let Self::Other(sqlx::Error::Database(cause)) = self else {
            return matches!(self, Self::Conflict);
        };
        let code = cause.code().unwrap_or_default();
        match cause.try_downcast_ref::<PgDatabaseError>() {
            // data_exception, integrity_constraint_violation, program_limit_exceeded
            Some(_) => ["22", "23", "54"].iter().any(|class| code.starts_with(class)),
            // SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH
            None => code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 18..=20)),
        }
    }
}

/// Why the database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder of the file.
    #[error("cannot use the folder of the database: {0}")]
    Folder(#[from] io::Error),
    /// The file, or the database of a server.
    #[error("cannot open the database: {0}")]
    Database(#[from] sqlx::Error),
    /// There is no file, and it was not to be made.
    #[error("there is no database: {} does not exist; {fix}", file.display())]
    Absent {
        /// Where it would be.
        file: PathBuf,
        /// What to change.
        fix: &'static str,
    },
    /// A server that refuses, or each server of a list.
    #[error("cannot open the database: {0}")]
    Connect(ConnectError),
    /// The server.
    #[error("no answer from the database at {place} within {limit:?} (DB_START_TIMEOUT): {error}")]
    Unreachable {
        /// The URL, without its password.
        place: String,
        /// For all attempts together.
        limit: Duration,
        /// Of the last attempt.
        error: ConnectError,
    },
    /// A server that only takes reads, or each server of a list.
    #[error(
        "no server of {place} takes changes, asked for {limit:?} (DB_START_TIMEOUT): {error}; \
         set DATABASE_URL to the primary, or to all of its servers (HOST:PORT,HOST:PORT)"
    )]
    NoPrimary {
        /// The URL, without its password.
        place: String,
        /// For all attempts together.
        limit: Duration,
        /// Of the last attempt.
        error: ConnectError,
    },
    /// The schema, which was not to be touched.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The schema, as it was brought up to date.
    #[error("cannot migrate the database: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// The lock on the folder of SQLite's file.
    #[error(
        "cannot open the database: another process has had the lock on the folder {folder} for {limit:?} \
         (DB_START_TIMEOUT); `fuser -v {folder}` names it: wait for its migration, or end it", folder = folder.display()
    )]
    Held {
        /// Where the file is.
        folder: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The folder, the file or the server, with its place and with what to do.
    #[error("cannot use the database {place}: {error}; {fix}")]
    Place {
        /// The path, or the URL without its password.
        place: String,
        /// What SQLite, the server or the system says.
        error: String,
        /// What to do.
        fix: String,
    },
}

impl OpenError {
    /// The same with its place, where it does not name it.
    fn at(self, place: &DatabasePlace) -> Self {
        let error = match self {
            Self::Folder(error) => error.to_string(),
            Self::Database(error) => error.to_string(),
            Self::Connect(error) => error.to_string(),
            Self::Migrate(error) => error.to_string(),
            other => return other,
        };
        let (place, unwritable) = match place {
            DatabasePlace::Sqlite(file) => (file.display().to_string(), sqlite::unwritable(file)),
            DatabasePlace::Postgres(url) => (url.to_string(), None),
        };
        match unwritable {
            Some(Unwritable { says, fix }) => Self::Place { place, error: says, fix },
            None => Self::Place { place, error, fix: FIX.into() },
        }
    }
}

impl From<ConnectError> for OpenError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Failed(error) => Self::Database(error),
            error => Self::Connect(error),
        }
    }
}

/// Brings the schema of a database up to date, whatever `DB_AUTO_MIGRATE` is; returns how it was.
///
/// A long audit trail takes minutes; `tell` hears how far it is.
pub async fn migrate(
    config: &StoreConfig,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Schema, OpenError> {
    let migrated = match &config.place {
        DatabasePlace::Sqlite(file) => sqlite::migrate(file, config.start_timeout, tell).await,
        DatabasePlace::Postgres(url) => postgres::migrate(url, config, tell).await,
    };
    migrated.map_err(|error| error.at(&config.place))
}

/// An open database with the schema that this program needs.
pub(crate) struct Store {
    database: Database,
    metrics: DbMetrics,
    slow_query: Duration,
    traces: Option<Arc<Traces>>,
    unreadable: Logged,
    found: Schema,
}

enum Database {
    Sqlite(Sqlite),
    Postgres(Postgres),
}

/// Runs a statement on whichever database is open, measured: the share that it takes a connection of, what
/// it is, its text and its parameters, and how its rows are fetched. The pools have types of their own, so
/// the statement is made for each.
macro_rules! statement {
    ($store:expr, $share:ident, $operation:ident, $make:ident($sql:expr $(, $parameter:expr)*), $fetch:ident) => {{
        let operation = $crate::metrics::DbOperation::$operation;
        let share = $crate::metrics::DbShare::$share;
        let sql = sqlx::SqlSafeStr::into_sql_str($sql);
        match &$store.database {
            $crate::store::Database::Sqlite(sqlite) => {
                let statement = async {
                    let mut taken = sqlite.shares().of(share).take().await?;
                    sqlx::$make(sql.clone())$(.bind($parameter))*.$fetch(&mut *taken).await
                };
                $store.run(operation, sql.as_str(), statement).await
            }
            $crate::store::Database::Postgres(postgres) => {
                let shares = postgres.shares();
                let sent = std::sync::atomic::AtomicBool::new(false);
                let statement = async {
                    let mut taken = shares.of(share).take().await?;
                    sent.store(true, std::sync::atomic::Ordering::Relaxed);
                    sqlx::$make(sql.clone())$(.bind($parameter))*.$fetch(&mut *taken).await
                };
                match share {
                    $crate::metrics::DbShare::Changes => {
                        let change = postgres.to_its_end(&sent, statement);
                        let made = $store.run(operation, sql.as_str(), change).await;
                        made.map_err(|error| error.of_change(sent.into_inner()))
                    }
                    _ => $store.run(operation, sql.as_str(), postgres.while_up(statement)).await,
                }
            }
        }
    }};
}
use statement;

/// A statement with those conditions that are set, and no others. So each finds its index: a condition
/// such as `$1 IS NULL OR id = $1` has to be planned as if it might hold for every row.
fn with_conditions(head: &str, conditions: &[(bool, &str)], tail: &str) -> AssertSqlSafe<String> {
    let mut sql = head.to_owned();
    for (i, (_, condition)) in conditions.iter().filter(|(is_set, _)| *is_set).enumerate() {
        sql += if i == 0 { " WHERE " } else { " AND " };
        sql += condition;
    }
    // All parts are literals of this module.
    AssertSqlSafe(sql + tail)
}

impl Store {
    /// Opens the database; brings its schema up to date, or refuses an old one.
    pub(crate) async fn open(
        config: &StoreConfig,
        metrics: DbMetrics,
        traces: Option<Arc<Traces>>,
    ) -> Result<Self, OpenError> {
        let opened = match &config.place {
            DatabasePlace::Sqlite(file) => Sqlite::open(file, config)
                .await
                .map(|(sqlite, schema)| (Database::Sqlite(sqlite), schema)),
            DatabasePlace::Postgres(url) => {
                Postgres::open(url, config, metrics.unnumbered_rows.clone())
                    .await
                    .map(|(postgres, schema)| (Database::Postgres(postgres), schema))
            }
        };
        let (database, schema) = opened.map_err(|error| error.at(&config.place))?;
        if schema.is_newer() {
            let (has, needs) = (schema.has(), schema.needs());
            tracing::warn!(has, needs, "the schema is that of a newer program");
        }
        let store = Self {
            database,
            metrics,
            slow_query: config.slow_query,
            traces,
            unreadable: Logged::default(),
            found: schema,
        };
        store.metrics.up.set(1);
        store.measure();
        Ok(store)
    }

    /// Opens a database that is there, with the schema that this program needs. Makes and migrates nothing.
    pub(crate) async fn open_existing(
        config: &StoreConfig,
        metrics: DbMetrics,
    ) -> Result<Self, OpenError> {
        if let DatabasePlace::Sqlite(file) = &config.place
            && !file.exists()
        {
            // In another folder than the server's, a relative path is another one.
            let file = std::path::absolute(file).unwrap_or_else(|_| file.clone());
            let fix = "set DATA_DIR or DATABASE_URL to where the server has it";
            return Err(OpenError::Absent { file, fix });
        }
        let as_it_is = StoreConfig { auto_migrate: false, ..config.clone() };
        Self::open(&as_it_is, metrics, None).await
    }

    /// How the schema was found, before it was brought up to date.
    pub(crate) fn found(&self) -> &Schema {
        &self.found
    }

    /// Told how the schema was when migrations that run in the background are done. None: there are none, or
    /// somebody asked before.
    pub(crate) fn migrated_later(&self) -> Option<oneshot::Receiver<Schema>> {
        match &self.database {
            Database::Sqlite(_) => None,
            Database::Postgres(postgres) => postgres.migrated_later(),
        }
    }

    /// Whether the database answers; a server of Postgres also says whether it takes changes.
    pub(crate) async fn is_healthy(&self) -> bool {
        let is_healthy = match &self.database {
            Database::Sqlite(sqlite) => sqlite.is_healthy().await,
            Database::Postgres(postgres) => postgres.is_up(),
        };
        self.metrics.up.set(is_healthy.into());
        is_healthy
    }

    /// How many statements of a kind may be wanted at once: those that run, or a few more where that is one, so
    /// that the next is there when it ends.
    pub(crate) fn places(&self, changes: bool) -> usize {
        let share = if changes { DbShare::Changes } else { DbShare::Reads };
        let [_, most] = match &self.database {
            Database::Sqlite(sqlite) => sqlite.shares().of(share).places(),
            Database::Postgres(postgres) => postgres.shares().of(share).places(),
        };
        most.max(LEAST_WANTED)
    }

    /// Sets the gauges of the pools, and of what is taken of them.
    pub(crate) fn measure(&self) {
        match &self.database {
            Database::Sqlite(sqlite) => self.measure_shares(sqlite.shares()),
            Database::Postgres(postgres) => {
                self.metrics.up.set(postgres.is_up().into());
                self.measure_shares(&postgres.shares());
            }
        }
    }

    fn measure_shares<DB: sqlx::Database>(&self, shares: &Shares<DB>) {
        let count = |amount: usize| i64::try_from(amount).unwrap_or(i64::MAX);
        let [open, idle, max] = shares.connections();
        self.metrics.connections_max.set(count(max));
        self.metrics.connections_idle.set(count(idle));
        self.metrics.connections_active.set(count(open.saturating_sub(idle)));
        for share in DbShare::ALL {
            let [taken, most] = shares.of(*share).places();
            self.metrics.set_share(*share, count(taken), count(most));
        }
    }

    /// Finishes what runs and closes the connections.
    pub(crate) async fn close(&self) {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.close().await,
            Database::Postgres(postgres) => postgres.close().await,
        }
    }

    /// What is not the same on both: texts of a statement.
    fn either<T>(&self, sqlite: T, postgres: T) -> T {
        match &self.database {
            Database::Sqlite(_) => sqlite,
            Database::Postgres(_) => postgres,
        }
    }

    /// Runs a statement, measures it, and says what its failure means.
    async fn run<T>(
        &self,
        operation: DbOperation,
        sql: &str,
        statement: impl Future<Output = sqlx::Result<T>>,
    ) -> Result<T, StoreError> {
        let running = Running { store: self, operation, sql, started: Instant::now() };
        let result = statement.await.map_err(classify);
        let took = running.started.elapsed();
        drop(running);
        if let Some(traces) = &self.traces {
            traces.query(&Query {
                system: self.either("sqlite", "postgresql"),
                operation: operation.label(),
                text: sql,
                took,
                error: result.as_ref().err().map(|(kind, _)| kind.label()),
            });
        }
        result.map_err(|(kind, error)| {
            self.metrics.failed(operation, kind);
            error
        })
    }
}

/// A statement, which is measured when it ends: also where nobody waits any longer, since the time is over
/// or the client has left.
struct Running<'a> {
    store: &'a Store,
    operation: DbOperation,
    sql: &'a str,
    started: Instant,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Self { store, operation, sql, started } = *self;
        let took = started.elapsed();
        store.metrics.query_duration.of(operation).observe(took.as_secs_f64());
        let duration_ms = took.as_secs_f64() * 1000.0;
        // The text has `$N` where the parameters are.
        if !store.slow_query.is_zero() && took > store.slow_query {
            store.metrics.slow_queries.inc(operation);
            tracing::warn!(duration_ms, statement = sql, "slow query");
        } else {
            tracing::debug!(duration_ms, statement = sql, "query");
        }
    }
}

fn classify(error: sqlx::Error) -> (DbErrorKind, StoreError) {
    let kind = match &error {
        sqlx::Error::Database(cause) if cause.kind() == ErrorKind::UniqueViolation => {
            return (DbErrorKind::Integrity, StoreError::Conflict);
        }
        sqlx::Error::Database(cause) if is_out_of_ids(&**cause) => {
            return (DbErrorKind::Other, StoreError::OutOfIds(error));
        }
        sqlx::Error::Database(cause) => kind_of(&**cause),
        sqlx::Error::PoolTimedOut => DbErrorKind::Timeout,
        // Protocol: a proxy, say, that has no server to lead to.
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => DbErrorKind::Connection,
        _ => DbErrorKind::Other,
    };
    match kind {
        DbErrorKind::Timeout | DbErrorKind::Connection => (kind, StoreError::Unavailable(error)),
        _ => (kind, StoreError::Other(error)),
    }
}

/// Whether the database has no id left that fits: SQLite by a trigger, Postgres by its sequence.
fn is_out_of_ids(cause: &dyn DatabaseError) -> bool {
    let code = cause.code().unwrap_or_default();
    match cause.try_downcast_ref::<PgDatabaseError>() {
        // sequence_generator_limit_exceeded
        Some(_) => code == "2200H",
        None => sqlite::is_out_of_ids(&code, cause.message()),
    }
}

/// What a refusal of the database itself means, by its code.
fn kind_of(cause: &dyn DatabaseError) -> DbErrorKind {
    let code = cause.code().unwrap_or_default();
    if cause.try_downcast_ref::<PgDatabaseError>().is_some() {
        return postgres::kind_of(&code);
    }
    sqlite::kind_of(&code, cause.message())
}
