//! Numbers the rows of a long audit trail on Postgres, while nodes read and write it.
//!
//! Migration 2 of the server makes an integer the key. On a long table it would hold its lock for minutes, so it is
//! prepared here first: rows get their number in batches, indexes are built beside writers, and what is left
//! to the migration takes milliseconds. Until then nodes of this release use the table as it was. All steps
//! may end at any moment; whoever comes next goes on where they ended.
//!
//! One process works at a time, under an advisory lock. Others try for it and never wait: a statement that waits has
//! a snapshot, and an index is only built when older snapshots are gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::IntGauge;
use sqlx::{Connection, Executor as _, PgConnection, migrate::MigrateError};
use tokio::time::sleep;

use super::{
    OpenError,
    postgres::{histories, migrations_run},
    schema::{self, Schema},
    servers::Servers,
};

/// Up to so many rows, the migration numbers them itself.
const FEW: i64 = 10_000;
/// Rows of a batch: some ten milliseconds.
const ROWS: i64 = 1_000;
/// The part of a batch's time that the database has for others after it.
const BREATH: u32 = 4;
/// Time for a lock that stops writers: they queue behind whoever waits for it.
pub(super) const LOCK_TIMEOUT: &str = "SET lock_timeout = '400ms'";
/// A role may have a limit that nodes override, and building an index would never end within.
const NO_LIMIT: &str = "SET statement_timeout = 0";
/// Between two tries of such a lock.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at what another process does.
const LOOK: Duration = Duration::from_millis(200);
/// Between two tries of the whole.
const RETRY: Duration = Duration::from_secs(5);
/// Between two lines in the log.
const REPORT: Duration = Duration::from_secs(10);
/// The key of the advisory lock.
const LOCK: i64 = 0x5357_424e_554d_4245;

const UNNUMBERED: &str = "SELECT count(*) FROM user_actions WHERE number IS NULL";

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub enum Progress {
    /// So many rows have no number yet.
    Left(i64),
    /// Indexes are built and checked.
    Indexes,
    /// Another process has locked the folder of the database: SQLite has not begun.
    Held,
    /// Others use the table, so that the last step has to wait: its lock would stop writers.
    Locked,
}

/// How far a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The integer is the key, or there is no table yet.
    Done,
    /// So few rows that the migration does it all at once.
    Short,
    /// It has to be prepared.
    Long,
    /// It is being prepared, or was when a process ended.
    Begun,
}

/// Looks how far the table is.
pub(super) async fn state(connection: &mut PgConnection) -> sqlx::Result<State> {
    let has = "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('user_actions') \
               AND attname = $1 AND NOT attisdropped";
    let mut has = async |column: &str| {
        let found: i64 = sqlx::query_scalar(has).bind(column).fetch_one(&mut *connection).await?;
        Ok::<_, sqlx::Error>(found > 0)
    };
    if !has("timestamp").await? || has("uid").await? {
        return Ok(State::Done);
    }
    if has("number").await? {
        return Ok(State::Begun);
    }
    let rows = "SELECT count(*) FROM (SELECT FROM user_actions LIMIT $1) AS first_rows";
    let rows: i64 = sqlx::query_scalar(rows).bind(FEW + 1).fetch_one(connection).await?;
    Ok(if rows > FEW { State::Long } else { State::Short })
}

/// How many rows have no number yet, where somebody has begun to number them.
pub(super) async fn left(connection: &mut PgConnection) -> sqlx::Result<Option<i64>> {
    match state(connection).await? {
        State::Begun => sqlx::query_scalar(UNNUMBERED).fetch_optional(connection).await,
        _ => Ok(None),
    }
}

/// Brings the schema up to date, however long that takes; returns how it was.
pub(super) async fn migrate(
    servers: &Servers,
    patience: Duration,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Schema, OpenError> {
    let mut connection = servers.connect(patience).await?.connection;
    connection.execute(NO_LIMIT).await?;
    let mut found = None;
    // Held until the connection ends.
    while matches!(state(&mut connection).await?, State::Long | State::Begun) {
        let lock = "SELECT pg_try_advisory_lock($1)";
        if sqlx::query_scalar(lock).bind(LOCK).fetch_one(&mut connection).await? {
            // What nodes need that start meanwhile.
            found = Some(settle(servers, patience, false, tell).await?);
            prepare(&mut connection, tell).await?;
            break;
        }
        sleep(LOOK).await;
    }
    let last = settle(servers, patience, true, tell).await?;
    drop(connection.close().await);
    Ok(found.map_or(last.clone(), |found: Schema| found.and(last)))
}

/// Runs the migrations, or those but the one that makes the integer the key, as soon as nobody is in their way.
async fn settle(
    servers: &Servers,
    patience: Duration,
    numbered: bool,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Schema, OpenError> {
    loop {
        // Another connection each time: a migration that fails leaves the lock of sqlx taken.
        let mut connection = servers.connect(patience).await?.connection;
        connection.execute(NO_LIMIT).await?;
        if state(&mut connection).await? != State::Done {
            connection.execute(LOCK_TIMEOUT).await?;
        }
        let runs = migrations_run(&mut connection).await?;
        let settled = schema::settle(&mut connection, &runs, &histories(numbered), true).await;
        drop(connection.close().await);
        match settled {
            Err(error) if is_locked(&error) => {
                tell(Progress::Locked);
                sleep(PAUSE).await;
            }
            settled => return settled,
        }
    }
}

/// Does it for a server that serves meanwhile, until it is done; returns how the schema was.
pub(super) async fn in_background(
    servers: Servers,
    patience: Duration,
    numbered: Arc<AtomicBool>,
    left: IntGauge,
) -> Schema {
    let log = Log { left, last: std::sync::Mutex::new(None) };
    let started = Instant::now();
    let schema = loop {
        match migrate(&servers, patience, &|progress| log.tell(progress)).await {
            Ok(schema) => break schema,
            Err(error) => {
                tracing::warn!(%error, "the audit trail cannot be numbered; it is tried again");
                sleep(RETRY).await;
            }
        }
    };
    numbered.store(true, Ordering::Relaxed);
    log.left.set(0);
    tracing::info!(took_s = started.elapsed().as_secs(), "the audit trail is numbered");
    schema
}

/// Tells the operator, not too often.
struct Log {
    left: IntGauge,
    last: std::sync::Mutex<Option<Instant>>,
}

impl Log {
    fn tell(&self, progress: Progress) {
        let rows = if let Progress::Left(rows) = progress { rows } else { 0 };
        self.left.set(rows);
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < REPORT) {
            return;
        }
        *last = Some(Instant::now());
        match progress {
            Progress::Left(rows) => tracing::info!(rows, "the audit trail is being numbered"),
            // Of SQLite, whose migrations have no log.
            Progress::Held => {}
            Progress::Indexes => tracing::info!("the numbered audit trail gets its indexes"),
            Progress::Locked => tracing::warn!(
                "other sessions use the table user_actions; its last step waits for them"
            ),
        }
    }
}

/// Whether a migration gave up on a lock.
pub(super) fn is_locked(error: &OpenError) -> bool {
    let OpenError::Migrate(MigrateError::ExecuteMigration(error, _) | MigrateError::Execute(error)) =
        error
    else {
        return false;
    };
    is_lock_timeout(error)
}

fn is_lock_timeout(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|cause| cause.code());
    // lock_not_available
    code.is_some_and(|code| code == "55P03")
}

/// Does all that takes long.
async fn prepare(
    connection: &mut PgConnection,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> sqlx::Result<()> {
    begin(connection, tell).await?;
    number(connection, tell).await?;
    tell(Progress::Indexes);
    let check = "DO $$ BEGIN IF NOT EXISTS (
            SELECT FROM pg_constraint WHERE conrelid = 'user_actions'::regclass
                AND conname = 'user_actions_numbered'
        ) THEN ALTER TABLE user_actions ADD CONSTRAINT user_actions_numbered
            CHECK (number IS NOT NULL) NOT VALID; END IF; END $$";
    shortly(connection, check, tell).await?;
    connection
        .execute("ALTER TABLE user_actions VALIDATE CONSTRAINT user_actions_numbered")
        .await?;
    index(connection, "user_actions_number", "number").await?;
    index(connection, "user_actions_uid", "id").await
}

/// From here on, rows that are added have a number. Those that are there follow, so numbers of rows from the time
/// in between are mixed.
async fn begin(
    connection: &mut PgConnection,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> sqlx::Result<()> {
    // Nodes may write as a user that may only change rows: see docs/database.md.
    let sql = "DO $$ BEGIN IF to_regclass('user_actions_numbers') IS NULL AND EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = 'user_actions'::regclass AND attname = 'number' AND NOT attisdropped
        ) THEN RAISE EXCEPTION
            'user_actions has a column \"number\" of your own: rename it, and migrate again';
        END IF; END $$;
        ALTER TABLE user_actions ADD COLUMN IF NOT EXISTS number BIGINT;
        CREATE SEQUENCE IF NOT EXISTS user_actions_numbers;
        GRANT USAGE ON SEQUENCE user_actions_numbers TO PUBLIC;
        ALTER TABLE user_actions ALTER COLUMN number SET DEFAULT nextval('user_actions_numbers')";
    shortly(connection, sql, tell).await
}

/// Numbers all rows, the oldest first.
async fn number(
    connection: &mut PgConnection,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> sqlx::Result<()> {
    loop {
        let mut left: i64 = sqlx::query_scalar(UNNUMBERED).fetch_one(&mut *connection).await?;
        tell(Progress::Left(left));
        if left == 0 {
            return Ok(());
        }
        // Rows that others have locked, to delete them most likely, are passed over and met the next time.
        let mut last = ("-infinity".to_owned(), uuid::Uuid::nil().to_string());
        let before = left;
        loop {
            let started = Instant::now();
            let Some((rows, timestamp, id)) = batch(connection, &last).await? else { break };
            last = (timestamp, id);
            left -= rows;
            tell(Progress::Left(left.max(0)));
            sleep(started.elapsed() / BREATH).await;
        }
        if left == before {
            // Others hold all that is left.
            tell(Progress::Locked);
            sleep(PAUSE).await;
        }
    }
}

/// Numbers the rows after `last`; returns how many, and the last of them.
async fn batch(
    connection: &mut PgConnection,
    last: &(String, String),
) -> sqlx::Result<Option<(i64, String, String)>> {
    let mut transaction = connection.begin().await?;
    // It reads by the indexes, whatever the planner believes of a table that changes under it.
    for plan in ["seqscan", "bitmapscan", "hashjoin", "mergejoin"] {
        let off = format!("SET LOCAL enable_{plan} = off");
        transaction.execute(sqlx::AssertSqlSafe(off)).await?;
    }
    let sql = "WITH part AS MATERIALIZED (
            SELECT id, timestamp FROM user_actions
            WHERE number IS NULL AND (timestamp, id) > ($1::timestamptz, $2::uuid)
            ORDER BY timestamp, id LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED
        ), numbered AS (
            UPDATE user_actions SET number = part.number
            FROM (SELECT id, nextval('user_actions_numbers') AS number FROM part) AS part
            WHERE user_actions.id = part.id
        )
        SELECT (SELECT count(*) FROM part), timestamp::text, id::text FROM part
        ORDER BY part.timestamp DESC, part.id DESC LIMIT 1";
    let done = sqlx::query_as(sql).bind(&last.0).bind(&last.1).bind(ROWS);
    let done = done.fetch_optional(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(done)
}

/// Builds a unique index without stopping writers.
async fn index(connection: &mut PgConnection, name: &str, column: &str) -> sqlx::Result<()> {
    let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)";
    let valid: Option<bool> =
        sqlx::query_scalar(valid).bind(name).fetch_optional(&mut *connection).await?;
    if valid == Some(false) {
        // It was left half built.
        let drop = format!("DROP INDEX CONCURRENTLY {name}");
        connection.execute(sqlx::AssertSqlSafe(drop)).await?;
    }
    if valid != Some(true) {
        let create = format!("CREATE UNIQUE INDEX CONCURRENTLY {name} ON user_actions ({column})");
        connection.execute(sqlx::AssertSqlSafe(create)).await?;
    }
    Ok(())
}

/// Runs statements that stop writers for as long as they run, as soon as nobody is in their way.
async fn shortly(
    connection: &mut PgConnection,
    sql: &'static str,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> sqlx::Result<()> {
    loop {
        let mut transaction = connection.begin().await?;
        transaction.execute("SET LOCAL lock_timeout = '400ms'").await?;
        let run: Result<_, sqlx::Error> = sqlx::raw_sql(sql).execute(&mut *transaction).await;
        match run {
            Ok(_) => return transaction.commit().await,
            Err(error) if is_lock_timeout(&error) => {
                transaction.rollback().await?;
                tell(Progress::Locked);
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}
