//! The database: SQLite or Postgres through sqlx, one file of queries a resource.
//!
//! One text of a statement runs on both where it can, with `$N` for parameters (see `statement!`). What is
//! unique is the database's word, never a check first.

mod actions;
mod authors;
mod error;
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
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::AssertSqlSafe;
use tokio::sync::oneshot;

pub use actions::{Action, StoredAction};
pub(crate) use actions::{ActionFilter, ActionKey, ActionPage, ActionPart, Place};
pub use authors::{Author, AuthorFilter, AuthorPage};
pub use error::OpenError;
pub(crate) use error::StoreError;
use error::classify;
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
    metrics::{DbMetrics, DbOperation, DbShare, Label as _},
    traces::{Query, Traces},
};

const LEAST_WANTED: usize = 4;

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
        store.measure().await;
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

    /// Whether the database answers, and takes changes.
    pub(crate) async fn is_healthy(&self) -> bool {
        match &self.database {
            Database::Sqlite(sqlite) => sqlite.is_healthy().await,
            Database::Postgres(postgres) => postgres.is_up(),
        }
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

    /// Sets the gauges of the database, of the pools, and of what is taken of them.
    pub(crate) async fn measure(&self) {
        self.metrics.up.set(self.is_healthy().await.into());
        match &self.database {
            Database::Sqlite(sqlite) => self.measure_shares(sqlite.shares()),
            Database::Postgres(postgres) => self.measure_shares(&postgres.shares()),
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
