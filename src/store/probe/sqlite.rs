//! A look at a file of SQLite.

use std::path::Path;

use sqlx::{ConnectOptions, Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use super::{Probe, ProbeError, WAIT};
use crate::{
    machine,
    store::{
        schema::{Runs, compare},
        sqlite::{histories, migrations_run, named, unwritable},
    },
};

fn failed(error: sqlx::Error) -> ProbeError {
    let code = error.as_database_error().and_then(|cause| cause.code());
    match code.and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff) {
        Some(5 | 6) => ProbeError::Busy, // SQLITE_BUSY, SQLITE_LOCKED
        Some(8) => ProbeError::ReadOnly, // SQLITE_READONLY
        _ => ProbeError::Database(error),
    }
}

/// Looks at the file, or where it will be.
pub(super) async fn probe(file: &Path) -> Result<Probe, ProbeError> {
    if !file.exists() {
        machine::can_make(file)?;
        return Ok(Probe::Absent);
    }
    // The folder too: journals are made beside the file.
    if let Some(unwritable) = unwritable(file) {
        return Err(ProbeError::Unwritable(unwritable));
    }
    // No journal mode: setting it would change the file.
    let options = SqliteConnectOptions::new().filename(named(file)).busy_timeout(WAIT);
    let mut connection = options.connect().await.map_err(failed)?;
    let runs = look(&mut connection).await;
    // The last one to close takes the journals away that the first one made.
    drop(connection.close().await);
    Ok(Probe::Ready(compare(&runs.map_err(failed)?, &histories())?, None))
}

async fn look(connection: &mut SqliteConnection) -> sqlx::Result<Runs> {
    let runs = migrations_run(connection).await?;
    // Takes the lock of a writer. In a file that cannot be written this succeeds: only a change tells.
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
    let changed =
        sqlx::query("CREATE TABLE switchboard_probe (id)").execute(&mut *connection).await;
    // Nothing reaches the disk.
    sqlx::query("ROLLBACK").execute(connection).await?;
    changed?;
    Ok(runs)
}
