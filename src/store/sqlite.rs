//! SQLite: one file. Writes go through a pool of one connection, since there is one writer and a queue
//! beats busy retries; reads of packages have a pool of their own, and so have those of the audit trail.
//!
//! The packages and the audit trail take turns on the writer: each has one place in its queue.

use std::{
    borrow::Cow,
    fs::{File, TryLockError},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use sqlx::{
    ConnectOptions, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::{
    sync::Mutex,
    time::{sleep, timeout},
};

use super::{
    OpenError, Progress,
    schema::{self, History, Runs, Schema, TABLES},
    shares::{AUDIT_CONNECTIONS, Share, Shares, most_of},
};
use crate::{
    config::{StoreConfig, database_files},
    files::{self, Unwritable},
    metrics::DbErrorKind,
};

/// Time to wait for a pool connection, and for another process's lock on the file.
const WAIT: Duration = Duration::from_secs(5);

/// A connection without work is closed after so long, and takes its cache along: by itself a pool keeps each
/// for ten minutes, with up to 2 MB.
const IDLE: Duration = Duration::from_secs(30);

/// After so long, a lock that another process has is asked for again.
const AGAIN: Duration = Duration::from_millis(50);

/// How long the answer to a probe is good for all others.
const HEALTH_LIFETIME: Duration = Duration::from_millis(250);

pub(super) struct Sqlite {
    shares: Shares<sqlx::Sqlite>,
    /// Readers of the audit trail, of which one is left to the probes.
    audit: SqlitePool,
    file: PathBuf,
    health: Mutex<Health>,
    /// The connection that writes was opened for reading alone: the next change opens another.
    reopen: Arc<AtomicBool>,
}

#[derive(Default)]
struct Health {
    /// When it was last asked whether the file can be read and written, and what came of it.
    known: Option<(Instant, bool)>,
    /// Why the file could not be written then.
    unwritable: Option<Unwritable>,
}

impl Sqlite {
    /// Opens the file; see [`prepare`].
    pub(super) async fn open(
        file: &Path,
        config: &StoreConfig,
    ) -> Result<(Self, Schema), OpenError> {
        let reopen = Arc::new(AtomicBool::new(false));
        let begun = Begin {
            migrate: config.auto_migrate,
            limit: config.start_timeout,
            writer: writer(Arc::clone(&reopen)),
            held: &|| {
                let folder = folder_of(file).display().to_string();
                let limit_s = config.start_timeout.as_secs_f64();
                tracing::warn!(
                    folder,
                    limit_s,
                    "waiting for another process that has locked the folder of the database"
                );
            },
        };
        let (write, schema) = prepare(file, begun).await?;
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
        let sqlite =
            Self { shares, audit, file: file.to_owned(), health: Mutex::default(), reopen };
        // What is wrong is logged at once, and not when somebody asks.
        sqlite.can_write(&mut *sqlite.health.lock().await).await;
        Ok((sqlite, schema))
    }

    pub(super) fn shares(&self) -> &Shares<sqlx::Sqlite> {
        &self.shares
    }

    /// Asked by anybody: the file is read by one of those that ask at the same time, for all of them.
    pub(super) async fn is_healthy(&self) -> bool {
        let mut health = self.health.lock().await;
        if let Some((at, healthy)) = health.known
            && at.elapsed() < HEALTH_LIFETIME
        {
            return healthy;
        }
        // A table has to be read: `SELECT 1` is answered without the file.
        let answer = sqlx::query("SELECT id FROM author LIMIT 1").execute(&self.audit);
        let read = matches!(timeout(Duration::from_secs(1), answer).await, Ok(Ok(_)));
        let healthy = read && self.can_write(&mut health).await;
        health.known = Some((Instant::now(), healthy));
        healthy
    }

    /// Whether this user may write the file. A change of that is logged.
    async fn can_write(&self, health: &mut Health) -> bool {
        let file = self.file.clone();
        // A disk may not answer.
        let looking = tokio::task::spawn_blocking(move || unwritable(&file));
        let Ok(Ok(unwritable)) = timeout(Duration::from_secs(1), looking).await else {
            return false;
        };
        if unwritable != health.unwritable {
            match &unwritable {
                Some(Unwritable { says, fix }) => {
                    tracing::error!(error = says, fix, "the database cannot be written");
                }
                None => {
                    self.reopen.store(true, Ordering::Relaxed);
                    tracing::info!("the database can be written again");
                }
            }
        }
        health.unwritable = unwritable;
        health.unwritable.is_none()
    }

    pub(super) async fn close(&self) {
        self.shares.close().await;
    }
}

/// Brings the schema of a file up to date, which is made if need be; returns how it was.
pub(super) async fn migrate(
    file: &Path,
    limit: Duration,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Schema, OpenError> {
    let held = || tell(Progress::Held);
    let begin = Begin { migrate: true, limit, writer: pool(1), held: &held };
    let (write, schema) = prepare(file, begin).await?;
    write.close().await;
    Ok(schema)
}

/// How a file is opened for writing.
struct Begin<'a> {
    /// Whether the schema may be brought up to date, and the file made.
    migrate: bool,
    /// Time to wait for another process that makes or migrates the file.
    limit: Duration,
    writer: SqlitePoolOptions,
    /// Called once if there is such a process.
    held: &'a (dyn Fn() + Send + Sync),
}

/// Opens the file for writing, and settles its schema; a file is made where it may also be migrated.
async fn prepare(file: &Path, begin: Begin<'_>) -> Result<(SqlitePool, Schema), OpenError> {
    let Begin { migrate, limit, writer, held } = begin;
    let histories = histories();
    if !migrate && !file.exists() {
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        let fix = "run `switchboard migrate`, which makes it, or set DATA_DIR or DATABASE_URL to where it is";
        return Err(OpenError::Absent { file, fix });
    }
    let _alone = match migrate {
        true => {
            files::make_folder(folder_of(file))?;
            let alone = lock(folder_of(file), limit, held).await?;
            files::make_file(file)?;
            Some(alone)
        }
        // Nothing is made.
        false => None,
    };
    let write = writer.connect_with(options(file)).await?;
    let mut connection = write.acquire().await?;
    let runs = migrations_run(&mut connection).await?;
    let schema = schema::settle(&mut *connection, &runs, &histories, migrate).await?;
    drop(connection);
    Ok((write, schema))
}

fn options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(named(file))
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(WAIT)
        .disable_statement_logging()
}

/// A path as the driver takes it, which wants UTF-8: SQLite itself takes any bytes, percent-encoded in a URI.
pub(super) fn named(file: &Path) -> Cow<'_, Path> {
    if file.to_str().is_some() {
        return Cow::Borrowed(file);
    }
    let bytes = percent_encode(file.as_os_str().as_bytes(), NON_ALPHANUMERIC);
    Cow::Owned(format!("file:{bytes}").into())
}

/// The pool of the one connection that writes.
fn writer(reopen: Arc<AtomicBool>) -> SqlitePoolOptions {
    pool(1).before_acquire(move |_, _| {
        let keep = !(reopen.load(Ordering::Relaxed) && reopen.swap(false, Ordering::Relaxed));
        Box::pin(async move { Ok(keep) })
    })
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
///
/// Asks again and again: a thread that waits in the kernel would keep a process from its end.
async fn lock(
    folder: &Path,
    limit: Duration,
    held: &(dyn Fn() + Send + Sync),
) -> Result<File, OpenError> {
    let alone = File::open(folder)?;
    let mut began = None;
    loop {
        match alone.try_lock() {
            Ok(()) => return Ok(alone),
            Err(TryLockError::Error(error)) => return Err(error.into()),
            Err(TryLockError::WouldBlock) => {}
        }
        let began = began.get_or_insert_with(|| {
            held();
            Instant::now()
        });
        if began.elapsed() >= limit {
            return Err(OpenError::Held { folder: folder.to_owned(), limit });
        }
        sleep(AGAIN).await;
    }
}

fn folder_of(file: &Path) -> &Path {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Why this user cannot write a database, where its file is there. Changes nothing.
pub(super) fn unwritable(file: &Path) -> Option<Unwritable> {
    files::unwritable(folder_of(file), &database_files(file))
}

/// Whether a trigger of the authors' migrations refused an id.
pub(super) fn is_out_of_ids(code: &str, message: &str) -> bool {
    // SQLITE_CONSTRAINT_TRIGGER
    code == "1811" && message == "no id of 32 bits is left for an author"
}

pub(super) fn kind_of(code: &str, message: &str) -> DbErrorKind {
    // SQLITE_BUSY, SQLITE_LOCKED, SQLITE_READONLY, SQLITE_IOERR, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_CANTOPEN and
    // SQLITE_NOTADB with their variants.
    match code.parse::<u32>().map(|code| code & 0xff) {
        Ok(5 | 6 | 8 | 10 | 11 | 13 | 14 | 26) => DbErrorKind::Connection,
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
        for code in ["5", "6", "8", "10", "11", "13", "14", "26", "266", "1038"] {
            assert_eq!(kind_of(code, ""), DbErrorKind::Connection, "{code}");
        }
        assert_eq!(kind_of("1", "no such table: author"), DbErrorKind::Connection);
        for (code, message) in [("1", "no such column: nam"), ("19", ""), ("", "")] {
            assert_eq!(kind_of(code, message), DbErrorKind::Other, "{code} {message}");
        }
    }
}
