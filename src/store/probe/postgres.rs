//! A look at a database of a Postgres server.

use std::{io, time::Duration};

use sqlx::{Connection, PgConnection};

use super::{Probe, ProbeError};
use crate::{
    config::{PostgresUrl, StoreConfig},
    store::{
        ConnectError, numbering,
        postgres::{histories, migrations_run},
        schema::{Schema, compare},
        servers::Servers,
    },
};

/// Connects, looks, and leaves all as it was.
pub(super) async fn probe(url: &PostgresUrl, config: &StoreConfig) -> Result<Probe, ProbeError> {
    let servers = Servers::of(url).map_err(ProbeError::Database)?;
    let mut connection = servers.connect(config.connect_timeout).await.map_err(refused)?.connection;
    let looked = look(&mut connection, config.auto_migrate).await;
    drop(connection.close().await);
    let (schema, unnumbered) = looked?;
    Ok(Probe::Ready(schema, unnumbered))
}

fn refused(error: ConnectError) -> ProbeError {
    match error {
        ConnectError::ReadOnly { .. } | ConnectError::All(_) => ProbeError::NoPrimary(error),
        ConnectError::Failed(sqlx::Error::Database(_)) => ProbeError::Refused(error),
        ConnectError::Failed(sqlx::Error::Tls(_)) => ProbeError::Untrusted(error),
        ConnectError::Failed(sqlx::Error::Io(ref cause))
            if cause.kind() == io::ErrorKind::InvalidData =>
        {
            ProbeError::Untrusted(error)
        }
        error => ProbeError::Unreachable(error),
    }
}

/// Each server of a list, and why it cannot be used, if so.
pub(crate) async fn servers_of(
    url: &PostgresUrl,
    limit: Duration,
) -> sqlx::Result<Vec<(String, Option<ConnectError>)>> {
    Ok(Servers::of(url)?.examine(limit).await)
}

async fn look(
    connection: &mut PgConnection,
    migrates: bool,
) -> Result<(Schema, Option<i64>), ProbeError> {
    let encoding: String = sqlx::query_scalar("SELECT current_setting('server_encoding')")
        .fetch_one(&mut *connection)
        .await
        .map_err(ProbeError::Database)?;
    if encoding != "UTF8" {
        return Err(ProbeError::Encoding(encoding));
    }
    let runs = migrations_run(connection).await.map_err(ProbeError::Database)?;
    let schema = compare(&runs, &histories(true))?;
    may_write(connection, &schema, migrates).await?;
    let unnumbered = numbering::left(connection).await.map_err(ProbeError::Database)?;
    Ok((schema, unnumbered))
}

/// Whether the user may do what `serve` does; a statement that tried would change something.
async fn may_write(
    connection: &mut PgConnection,
    schema: &Schema,
    migrates: bool,
) -> Result<(), ProbeError> {
    let create = "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)";
    // Nothing is said of a table that is not there yet.
    let change = "SELECT coalesce(bool_and(has_table_privilege(to_regclass(name), needed)), false)
        FROM unnest(ARRAY['author', 'user_actions', 'revocations']) AS name,
             unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed";
    let mut needed = Vec::new();
    if migrates && schema.is_old() {
        needed.push((create, "the right to create tables, which migrations do"));
    }
    if schema.0.iter().any(|part| part.has > 0) {
        needed.push((
            change,
            "the right to read and change the tables author, user_actions and revocations",
        ));
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
