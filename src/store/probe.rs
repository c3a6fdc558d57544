//! A look at the database for `switchboard doctor`: would [`Store::open`](super::Store::open) succeed?
//! It makes nothing and migrates nothing.

use std::{io, time::Duration};

use sqlx::{ConnectOptions, Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use super::migrator;
use crate::{config::StoreConfig, machine};

/// Time to wait for another process's lock on the file.
const WAIT: Duration = Duration::from_secs(2);

/// A database that can be opened.
#[derive(Debug)]
pub(crate) enum Probe {
    /// There is no file yet; it can be made.
    Absent,
    /// It can be written.
    Ready {
        /// Migrations that were run.
        applied: usize,
        /// Migrations that the next start runs.
        pending: usize,
    },
}

/// Why a database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The folder of the file, or what stands in its place.
    #[error("{0}")]
    Folder(#[from] io::Error),
    /// Its owner or mode is not as needed.
    #[error("the file cannot be written")]
    ReadOnly,
    /// Another process writes.
    #[error("another process has held its lock for {} seconds", WAIT.as_secs())]
    Busy,
    /// A migration that this program does not have.
    #[error("its migration {0} is not known")]
    Newer(i64),
    /// A migration that is not what was run.
    #[error("its migration {0} is not the one of this program")]
    Other(i64),
    /// A migration that did not end.
    #[error("its migration {0} was begun and not finished")]
    Unfinished(i64),
    /// Anything else.
    #[error("{0}")]
    Database(sqlx::Error),
}

impl From<sqlx::Error> for ProbeError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|cause| cause.code());
        match code.and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff) {
            Some(5 | 6) => Self::Busy, // SQLITE_BUSY, SQLITE_LOCKED
            Some(8) => Self::ReadOnly, // SQLITE_READONLY
            _ => Self::Database(error),
        }
    }
}

/// Looks at the file, or where it will be.
pub(crate) async fn probe(config: &StoreConfig) -> Result<Probe, ProbeError> {
    let file = &config.sqlite_file;
    // Journals are made beside the file: a file of its own rights is not enough.
    machine::can_make(file)?;
    if !file.exists() {
        return Ok(Probe::Absent);
    }
    // No journal mode: setting it would change the file.
    let options = SqliteConnectOptions::new().filename(file).busy_timeout(WAIT);
    let mut connection = options.connect().await?;
    let result = look(&mut connection).await;
    // The last one to close takes the journals away that the first one made.
    drop(connection.close().await);
    result
}

async fn look(connection: &mut SqliteConnection) -> Result<Probe, ProbeError> {
    let tables = "SELECT count(*) FROM sqlite_master WHERE name = '_sqlx_migrations'";
    let migrated: i64 = sqlx::query_scalar(tables).fetch_one(&mut *connection).await?;
    let run: Vec<(i64, Vec<u8>, bool)> = match migrated {
        0 => Vec::new(),
        _ => {
            let all = "SELECT version, checksum, success FROM _sqlx_migrations ORDER BY version";
            sqlx::query_as(all).fetch_all(&mut *connection).await?
        }
    };
    let migrator = migrator();
    for (version, checksum, finished) in &run {
        let known = migrator.iter().find(|known| known.version == *version);
        match known {
            _ if !finished => return Err(ProbeError::Unfinished(*version)),
            None => return Err(ProbeError::Newer(*version)),
            Some(known) if *known.checksum != **checksum => {
                return Err(ProbeError::Other(*version));
            }
            Some(_) => {}
        }
    }
    // Takes the lock of a writer, and writes nothing.
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
    sqlx::query("ROLLBACK").execute(connection).await?;
    Ok(Probe::Ready { applied: run.len(), pending: migrator.iter().count() - run.len() })
}
