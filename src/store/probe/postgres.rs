//! A look at a database of a Postgres server.

use std::{io, time::Duration};

use sqlx::{Connection, PgConnection};

use super::{Probe, ProbeError, RUN, Run, compare};
use crate::{
    config::PostgresUrl,
    store::postgres::{connect, migrator, options},
};

/// Connects, looks, and leaves all as it was.
pub(super) async fn probe(url: &PostgresUrl, limit: Duration) -> Result<Probe, ProbeError> {
    let options = options(url).map_err(ProbeError::Database)?;
    let mut connection = connect(&options, limit).await.map_err(|error| match error {
        sqlx::Error::Database(_) => ProbeError::Refused(error),
        sqlx::Error::Tls(_) => ProbeError::Untrusted(error),
        sqlx::Error::Io(ref cause) if cause.kind() == io::ErrorKind::InvalidData => {
            ProbeError::Untrusted(error)
        }
        error => ProbeError::Unreachable(error),
    })?;
    let looked = look(&mut connection).await;
    drop(connection.close().await);
    looked
}

async fn look(connection: &mut PgConnection) -> Result<Probe, ProbeError> {
    let state =
        "SELECT current_setting('server_encoding'), current_setting('transaction_read_only'),
        to_regclass('_sqlx_migrations') IS NOT NULL";
    let (encoding, read_only, migrated): (String, String, bool) =
        sqlx::query_as(state).fetch_one(&mut *connection).await.map_err(ProbeError::Database)?;
    if encoding != "UTF8" {
        return Err(ProbeError::Encoding(encoding));
    }
    if read_only == "on" {
        return Err(ProbeError::Standby);
    }
    let run: Vec<Run> = if migrated {
        sqlx::query_as(RUN).fetch_all(&mut *connection).await.map_err(ProbeError::Database)?
    } else {
        Vec::new()
    };
    let probe = compare(&run, &migrator())?;
    may_write(connection, &probe).await?;
    Ok(probe)
}

/// Whether the user may do what `serve` does; a statement that tried would change something.
async fn may_write(connection: &mut PgConnection, probe: &Probe) -> Result<(), ProbeError> {
    let Probe::Ready { applied, pending } = probe else { return Ok(()) };
    let create = "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)";
    let change =
        "SELECT coalesce(bool_and(has_table_privilege(to_regclass('author'), needed)), false)
        FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed";
    let mut needed = Vec::new();
    if *pending > 0 {
        needed.push((create, "the right to create tables, which migrations do"));
    }
    if *applied > 0 {
        needed.push((change, "the right to read and change the table author"));
    }
    for (asked, missing) in needed {
        let has: bool = sqlx::query_scalar(asked)
            .fetch_one(&mut *connection)
            .await
            .map_err(ProbeError::Database)?;
        if !has {
            return Err(ProbeError::Forbidden(missing));
        }
    }
    Ok(())
}
