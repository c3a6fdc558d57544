//! The schema: which migrations a database has, and which this program needs.
//!
//! Migrations only add. So a database that a newer program has migrated serves an older one as well, and
//! nodes can be replaced one after the other.

use sqlx::{
    SqlStr,
    migrate::{Migrate, Migration, MigrationType, Migrator},
};

use super::OpenError;

const TABLE: &str = "_sqlx_migrations";

/// A row of the table of migrations: version, checksum, whether it ended.
pub(super) type Run = (i64, Vec<u8>, bool);

/// The migrations that were run, in their order.
pub(super) const RUN: &str =
    "SELECT version, checksum, success FROM _sqlx_migrations ORDER BY version";

/// How a database was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    /// The newest migration that was run; 0: none.
    pub has: i64,
    /// The newest migration of this program.
    pub needs: i64,
    /// Migrations of this program that were not run.
    pub pending: Vec<i64>,
}

impl Schema {
    /// Whether a newer program has migrated the database.
    pub fn is_newer(&self) -> bool {
        self.has > self.needs
    }
}

/// Why a database has not the schema that a program needs.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// Migrations are to be run, and not by this program's start.
    #[error(
        "the database has schema version {has}, and this program needs version {needs}: \
         run `switchboard migrate`"
    )]
    Old {
        /// The newest migration that was run; 0: none.
        has: i64,
        /// The newest migration of this program.
        needs: i64,
    },
    /// A migration that is not what was run.
    #[error("the database's migration {0} is not the one of this program")]
    Other(i64),
    /// A migration that did not end.
    #[error("the database's migration {0} was begun and not finished")]
    Unfinished(i64),
}

/// Compares the migrations that were run with those of this program.
pub(super) fn compare(run: &[Run], migrator: &Migrator) -> Result<Schema, SchemaError> {
    for (version, checksum, finished) in run {
        let known = migrator.iter().find(|known| known.version == *version);
        match known {
            _ if !finished => return Err(SchemaError::Unfinished(*version)),
            Some(known) if *known.checksum != **checksum => {
                return Err(SchemaError::Other(*version));
            }
            _ => {}
        }
    }
    let was_run = |version: i64| run.iter().any(|run| run.0 == version);
    let versions = || migrator.iter().map(|migration| migration.version);
    Ok(Schema {
        has: run.iter().map(|run| run.0).max().unwrap_or(0),
        needs: versions().max().unwrap_or(0),
        pending: versions().filter(|version| !was_run(*version)).collect(),
    })
}

/// Brings a schema up to date, or refuses an old one where that is not to be done; returns how it was.
pub(super) async fn settle<C: Migrate>(
    connection: &mut C,
    run: &[Run],
    migrator: &Migrator,
    migrate: bool,
) -> Result<Schema, OpenError> {
    let Schema { has, needs, pending } = compare(run, migrator)?;
    if pending.is_empty() {
        return Ok(Schema { has, needs, pending });
    }
    if !migrate {
        return Err(SchemaError::Old { has, needs }.into());
    }
    // Another process may be at it: what is left to do is known under the lock, which is counted, so
    // that `run_direct` can take it once more.
    connection.lock().await?;
    connection.ensure_migrations_table(TABLE).await?;
    let run = connection.list_applied_migrations(TABLE).await?;
    let pending =
        pending.into_iter().filter(|version| run.iter().all(|run| run.version != *version));
    let schema = Schema { has, needs, pending: pending.collect() };
    migrator.run_direct(None, connection, false).await?;
    connection.unlock().await?;
    Ok(schema)
}

/// The migrations of a database, in their order.
pub(super) fn migrator(migrations: &[(i64, &'static str, &'static str)]) -> Migrator {
    let migration = |(version, description, sql): &(i64, &'static str, &'static str)| {
        let sql = SqlStr::from_static(sql);
        Migration::new(*version, (*description).into(), MigrationType::Simple, sql, false)
    };
    let mut migrator = Migrator::with_migrations(migrations.iter().map(migration).collect());
    // Those of a newer program.
    migrator.set_ignore_missing(true);
    migrator
}
