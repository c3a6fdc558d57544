//! The database: SQLite through sqlx, one file of queries a resource.
//!
//! Writes go through a pool of one connection, since SQLite has one writer and a queue beats busy
//! retries; reads have a pool of their own. What is unique is the database's word, never a check first.

mod authors;
mod probe;

use std::{
    fs,
    future::Future,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sqlx::{
    SqlStr, SqlitePool,
    error::ErrorKind,
    migrate::{Migration, MigrationType, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

pub use authors::{Author, AuthorFilter, AuthorPage};
pub(crate) use probe::{Probe, ProbeError, probe};

use crate::{
    config::StoreConfig,
    metrics::{DbErrorKind, DbMetrics, DbOperation},
};

/// Time to wait for a pool connection, and for another process's lock on the file.
const WAIT: Duration = Duration::from_secs(5);

/// Why an operation on the database failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// A unique value is taken.
    #[error("a unique value is taken")]
    Conflict,
    /// The database cannot be reached or does not answer in time.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// Anything else: a bug.
    #[error("the database refused: {0}")]
    Other(#[source] sqlx::Error),
}

/// Why the database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder of the file.
    #[error("cannot use the folder of the database: {0}")]
    Folder(#[from] io::Error),
    /// The file.
    #[error("cannot open the database: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema.
    #[error("cannot migrate the database: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

/// An open, migrated database.
pub(crate) struct Store {
    read: SqlitePool,
    write: SqlitePool,
    metrics: DbMetrics,
}

impl Store {
    /// Opens the file, creates it if need be, and brings its schema up to date.
    pub(crate) async fn open(config: &StoreConfig, metrics: DbMetrics) -> Result<Self, OpenError> {
        let folder = config.sqlite_file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let alone = lock(folder.to_owned()).await?;
        let options = SqliteConnectOptions::new()
            .filename(&config.sqlite_file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(WAIT);
        let pool = |connections| {
            SqlitePoolOptions::new().max_connections(connections).acquire_timeout(WAIT)
        };
        let write = pool(1).connect_with(options.clone()).await?;
        migrator().run(&write).await?;
        drop(alone);
        let read = pool(config.pool_size).connect_with(options.read_only(true)).await?;
        metrics.connections_max.set(i64::from(config.pool_size) + 1);
        Ok(Self { read, write, metrics })
    }

    /// Whether the database answers.
    pub(crate) async fn is_healthy(&self) -> bool {
        // A table has to be read: `SELECT 1` is answered without the file.
        let answer = sqlx::query("SELECT id FROM author LIMIT 1").execute(&self.read);
        matches!(tokio::time::timeout(Duration::from_secs(1), answer).await, Ok(Ok(_)))
    }

    /// Sets the gauges of the pool.
    pub(crate) fn measure(&self) {
        let count = |n: u32| i64::from(n);
        let idle = self.read.num_idle() + self.write.num_idle();
        let idle = i64::try_from(idle).unwrap_or(i64::MAX);
        self.metrics.connections_idle.set(idle);
        let active = count(self.read.size()) + count(self.write.size()) - idle;
        self.metrics.connections_active.set(active.max(0));
    }

    /// Finishes what runs and closes the file.
    pub(crate) async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// Runs a statement, measures it, and says what its failure means.
    async fn run<T>(
        &self,
        operation: DbOperation,
        statement: impl Future<Output = sqlx::Result<T>>,
    ) -> Result<T, StoreError> {
        let started = Instant::now();
        let result = statement.await;
        self.metrics.query_duration.of(operation).observe(started.elapsed().as_secs_f64());
        result.map_err(|error| {
            let (kind, error) = classify(error);
            self.metrics.failed(operation, kind);
            error
        })
    }
}

fn classify(error: sqlx::Error) -> (DbErrorKind, StoreError) {
    match &error {
        sqlx::Error::Database(cause) if cause.kind() == ErrorKind::UniqueViolation => {
            (DbErrorKind::Integrity, StoreError::Conflict)
        }
        sqlx::Error::PoolTimedOut => (DbErrorKind::Timeout, StoreError::Unavailable(error)),
        sqlx::Error::Io(_) | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
            (DbErrorKind::Connection, StoreError::Unavailable(error))
        }
        // SQLITE_BUSY, SQLITE_LOCKED, SQLITE_IOERR, SQLITE_FULL and SQLITE_CANTOPEN with their variants.
        sqlx::Error::Database(cause)
            if cause
                .code()
                .and_then(|code| code.parse::<u32>().ok())
                .is_some_and(|code| [5, 6, 10, 13, 14].contains(&(code & 0xff))) =>
        {
            (DbErrorKind::Connection, StoreError::Unavailable(error))
        }
        _ => (DbErrorKind::Other, StoreError::Other(error)),
    }
}

/// Lets one process at a time make and migrate the file: sqlx takes no lock for that on SQLite, and of
/// two that started at once the second failed on a table that was there.
async fn lock(folder: PathBuf) -> io::Result<fs::File> {
    let locking = tokio::task::spawn_blocking(move || {
        let folder = fs::File::open(folder)?;
        folder.lock()?;
        Ok(folder)
    });
    locking.await.map_err(io::Error::other)?
}

fn migrator() -> Migrator {
    let migration = |version, description: &'static str, sql: &'static str| {
        Migration::new(
            version,
            description.into(),
            MigrationType::Simple,
            SqlStr::from_static(sql),
            false,
        )
    };
    Migrator::with_migrations(vec![migration(
        1,
        "author",
        include_str!("../../migrations/0001_author.sql"),
    )])
}
