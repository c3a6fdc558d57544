//! SQLite: one file. Writes go through a pool of one connection, since there is one writer and a queue
//! beats busy retries; reads of packages have a pool of their own, and so have those of the audit trail.
//!
//! The packages and the audit trail take turns on the writer: each has one place in its queue.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sqlx::{
    ConnectOptions, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::Mutex;

use super::{
    OpenError,
    schema::{self, History, Runs, Schema, SchemaError, TABLES},
    shares::{AUDIT_CONNECTIONS, Share, Shares, most_of},
};
use crate::{config::StoreConfig, metrics::DbErrorKind};

/// Time to wait for a pool connection, and for another process's lock on the file.
const WAIT: Duration = Duration::from_secs(5);

/// A connection without work is closed after so long, and takes its cache along: by itself a pool keeps each
/// for ten minutes, with up to 2 MB.
const IDLE: Duration = Duration::from_secs(30);

/// How long the answer to a probe is good for all others.
const HEALTH_LIFETIME: Duration = Duration::from_millis(250);

pub(super) struct Sqlite {
    shares: Shares<sqlx::Sqlite>,
    /// Readers of the audit trail, of which one is left to the probes.
    audit: SqlitePool,
    /// When it was last asked whether the file can be read, and what came of it.
    health: Mutex<Option<(Instant, bool)>>,
}

impl Sqlite {
    /// Opens the file; see [`prepare`].
    pub(super) async fn open(
        file: &Path,
        config: &StoreConfig,
    ) -> Result<(Self, Schema), OpenError> {
        let (write, schema) = prepare(file, config.auto_migrate).await?;
        let readers = config.pool_size;
        let read = pool(readers).connect_with(options(file).read_only(true)).await?;
        let audit = pool(AUDIT_CONNECTIONS).connect_lazy_with(options(file).read_only(true));
        let shares = Shares {
            // All: nothing else takes of this pool.
            reads: Share::new(&read, readers),
            changes: Share::new(&write, 1),
            audit_reads: Share::new(&audit, most_of(AUDIT_CONNECTIONS)),
            audit_changes: Share::new(&write, 1),
            pools: vec![read, audit.clone(), write],
        };
        Ok((Self { shares, audit, health: Mutex::default() }, schema))
    }

    pub(super) fn shares(&self) -> &Shares<sqlx::Sqlite> {
        &self.shares
    }

    /// Asked by anybody: the file is read by one of those that ask at the same time, for all of them.
    pub(super) async fn is_healthy(&self) -> bool {
        let mut known = self.health.lock().await;
        if let Some((at, healthy)) = *known
            && at.elapsed() < HEALTH_LIFETIME
        {
            return healthy;
        }
        // A table has to be read: `SELECT 1` is answered without the file.
        let answer = sqlx::query("SELECT id FROM author LIMIT 1").execute(&self.audit);
        let healthy =
            matches!(tokio::time::timeout(Duration::from_secs(1), answer).await, Ok(Ok(_)));
        *known = Some((Instant::now(), healthy));
        healthy
    }

    pub(super) async fn close(&self) {
        self.shares.close().await;
    }
}

/// Opens the file for writing, and settles its schema; a file is made where it may also be migrated.
pub(super) async fn prepare(file: &Path, migrate: bool) -> Result<(SqlitePool, Schema), OpenError> {
    let histories = histories();
    if !migrate && !file.exists() {
        return Err(SchemaError::from(&schema::compare(&Runs::new(), &histories)?).into());
    }
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let _alone = lock(folder.to_owned()).await?;
    let write = pool(1).connect_with(options(file).create_if_missing(true)).await?;
    let mut connection = write.acquire().await?;
    let runs = migrations_run(&mut connection).await?;
    let schema = schema::settle(&mut *connection, &runs, &histories, migrate).await?;
    drop(connection);
    Ok((write, schema))
}

fn options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(WAIT)
        .disable_statement_logging()
}

fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new().max_connections(connections).acquire_timeout(WAIT).idle_timeout(IDLE)
}

/// The migrations that were run; none of a table that is not there.
pub(super) async fn migrations_run(connection: &mut SqliteConnection) -> sqlx::Result<Runs> {
    let mut runs = Runs::new();
    for table in TABLES {
        let tables = "SELECT count(*) FROM sqlite_master WHERE name = $1";
        let tables: i64 =
            sqlx::query_scalar(tables).bind(table).fetch_one(&mut *connection).await?;
        if tables > 0 {
            let run = sqlx::query_as(schema::select_run(table));
            runs.insert(table, run.fetch_all(&mut *connection).await?);
        }
    }
    Ok(runs)
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

/// Whether a trigger of the authors' migrations refused an id.
pub(super) fn is_out_of_ids(code: &str, message: &str) -> bool {
    // SQLITE_CONSTRAINT_TRIGGER
    code == "1811" && message == "no id of 32 bits is left for an author"
}

pub(super) fn kind_of(code: &str, message: &str) -> DbErrorKind {
    // SQLITE_BUSY, SQLITE_LOCKED, SQLITE_IOERR, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_CANTOPEN and
    // SQLITE_NOTADB with their variants.
    match code.parse::<u32>().map(|code| code & 0xff) {
        Ok(5 | 6 | 10 | 11 | 13 | 14 | 26) => DbErrorKind::Connection,
        // The tables were there at the start: the file was emptied or replaced.
        Ok(1) if message.starts_with("no such table") => DbErrorKind::Connection,
        _ => DbErrorKind::Other,
    }
}

/// The migrations of this program.
pub(super) fn histories() -> [History; 2] {
    let server = [
        (1, "user actions", include_str!("../../migrations/server/sqlite/0001_user_actions.sql")),
        (2, "integer key", include_str!("../../migrations/server/sqlite/0002_integer_key.sql")),
        (3, "revocations", include_str!("../../migrations/server/sqlite/0003_revocations.sql")),
    ];
    let authors = include_str!("../../migrations/authors/sqlite/0001_author.sql");
    let search = include_str!("../../migrations/authors/sqlite/0002_name_search.sql");
    [
        History::server(&server),
        History::authors(&[(1, "author", authors), (2, "name search", search)]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_gone_broken_or_emptied_is_an_outage_and_bad_sql_is_a_bug() {
        for code in ["5", "6", "10", "11", "13", "14", "26", "266", "1038"] {
            assert_eq!(kind_of(code, ""), DbErrorKind::Connection, "{code}");
        }
        assert_eq!(kind_of("1", "no such table: author"), DbErrorKind::Connection);
        for (code, message) in [("1", "no such column: nam"), ("19", ""), ("", "")] {
            assert_eq!(kind_of(code, message), DbErrorKind::Other, "{code} {message}");
        }
    }
}
