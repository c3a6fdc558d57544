//! The schema: which migrations a database has, and which this program needs.
//!
//! The server's tables and those of the authors have a history each: numbers and a table of their own. Earlier
//! both shared one. What it says was run is entered in the new ones, and its rows stay where they are, since an
//! older program looks there.
//!
//! Migrations only add, but for the integer key of the audit trail (see docs/database.md). So a database that a
//! newer program has migrated serves an older one as well, and nodes can be replaced one after the other.

use std::collections::HashMap;

use sqlx::{
    AssertSqlSafe, SqlStr,
    migrate::{Migrate, Migration, MigrationType, Migrator},
};

use super::OpenError;

/// The table that both histories shared.
const SHARED: &str = "_sqlx_migrations";
const SERVER: &str = "_switchboard_migrations";
const AUTHORS: &str = "_authors_migrations";

/// All tables of migrations that a database may have.
pub(super) const TABLES: [&str; 3] = [SHARED, SERVER, AUTHORS];

/// A row of a table of migrations: version, checksum, whether it ended.
pub(super) type Run = (i64, Vec<u8>, bool);

/// What each of [`TABLES`] says was run.
pub(super) type Runs = HashMap<&'static str, Vec<Run>>;

/// Text of a migration: its version, a description, what is run.
pub(super) type Text = (i64, &'static str, &'static str);

/// Asks a table for the migrations that were run, in their order.
pub(super) fn select_run(table: &'static str) -> AssertSqlSafe<String> {
    // The names are literals of this module.
    AssertSqlSafe(format!("SELECT version, checksum, success FROM {table} ORDER BY version"))
}

/// How a database was found: a part for each history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema(pub Vec<Part>);

/// How the tables of one history were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The name of the history.
    pub history: &'static str,
    /// The newest migration that was run; 0: none.
    pub has: i64,
    /// The newest migration of this program.
    pub needs: i64,
    /// Migrations of this program that were not run.
    pub pending: Vec<i64>,
}

impl Schema {
    /// The versions that were found, each with its history.
    pub fn has(&self) -> String {
        self.versions(|part| part.has)
    }

    /// The versions that this program needs, each with its history.
    pub fn needs(&self) -> String {
        self.versions(|part| part.needs)
    }

    /// Migrations of this program that were not run, each with its history.
    pub fn pending(&self) -> Vec<String> {
        let named = |part: &Part| {
            let name = |version: &i64| format!("{} {version}", part.history);
            part.pending.iter().map(name).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(named).collect()
    }

    /// Whether migrations of this program were not run.
    pub fn is_old(&self) -> bool {
        self.0.iter().any(|part| !part.pending.is_empty())
    }

    /// Whether an older program has made the database.
    pub fn is_of_older_program(&self) -> bool {
        self.0.iter().any(|part| part.has > 0 && !part.pending.is_empty())
    }

    /// Whether a newer program has migrated the database.
    pub fn is_newer(&self) -> bool {
        self.0.iter().any(|part| part.has > part.needs)
    }

    /// How it was found before this and a later part of the same migration.
    pub(super) fn then(mut self, later: Self) -> Self {
        for (part, later) in self.0.iter_mut().zip(later.0) {
            part.pending.extend(later.pending);
            part.pending.sort_unstable();
        }
        self
    }

    fn versions(&self, version: impl Fn(&Part) -> i64) -> String {
        let named = |part: &Part| format!("{} {}", part.history, version(part));
        self.0.iter().map(named).collect::<Vec<_>>().join(", ")
    }
}

/// Why a database has not the schema that a program needs.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// Migrations are to be run, and not by this program's start.
    #[error(
        "the database has the schema versions {has}, and this program needs {needs}: \
         run `switchboard migrate`"
    )]
    Old {
        /// The versions that were found.
        has: String,
        /// The versions that this program needs.
        needs: String,
    },
    /// A migration that is not what was run.
    #[error("the database's {history} migration {version} is not the one of this program")]
    Other {
        /// The name of its history.
        history: &'static str,
        /// Its version there.
        version: i64,
    },
    /// A migration that did not end.
    #[error("the database's {history} migration {version} was begun and not finished")]
    Unfinished {
        /// The name of its history.
        history: &'static str,
        /// Its version there.
        version: i64,
    },
}

impl From<&Schema> for SchemaError {
    fn from(old: &Schema) -> Self {
        Self::Old { has: old.has(), needs: old.needs() }
    }
}

/// Migrations that are numbered on their own, and the table that says which of them were run.
pub(super) struct History {
    name: &'static str,
    table: &'static str,
    /// The number of the first migration in [`SHARED`].
    shared_as: i64,
    migrator: Migrator,
}

impl History {
    /// The tables that the server itself needs.
    pub(super) fn server(migrations: &[Text]) -> Self {
        Self::new("server", SERVER, 2, migrations)
    }

    /// The tables of the authors.
    pub(super) fn authors(migrations: &[Text]) -> Self {
        Self::new("authors", AUTHORS, 1, migrations)
    }

    fn new(name: &'static str, table: &'static str, shared_as: i64, migrations: &[Text]) -> Self {
        let mut migrator = migrator(migrations);
        migrator.dangerous_set_table_name(table);
        Self { name, table, shared_as, migrator }
    }

    /// Compares the migrations that were run with those of this program.
    fn compare(&self, runs: &Runs) -> Result<Part, SchemaError> {
        let run = match runs.get(self.table) {
            Some(own) if !own.is_empty() => own.clone(),
            _ => Vec::from_iter(self.first_when_shared(runs)),
        };
        let history = self.name;
        for (version, checksum, finished) in &run {
            let version = *version;
            let known = self.migrator.iter().find(|known| known.version == version);
            match known {
                _ if !finished => return Err(SchemaError::Unfinished { history, version }),
                Some(known) if *known.checksum != **checksum => {
                    return Err(SchemaError::Other { history, version });
                }
                _ => {}
            }
        }
        let was_run = |version: i64| run.iter().any(|run| run.0 == version);
        let versions = || self.migrator.iter().map(|migration| migration.version);
        Ok(Part {
            history,
            has: run.iter().map(|run| run.0).max().unwrap_or(0),
            needs: versions().max().unwrap_or(0),
            pending: versions().filter(|version| !was_run(*version)).collect(),
        })
    }

    /// The first migration, if [`SHARED`] says that it was run. With another checksum it is not this one: the
    /// table has sqlx's usual name, and any program may have made it.
    fn first_when_shared(&self, runs: &Runs) -> Option<Run> {
        let first = self.migrator.iter().next()?;
        let is_first = |run: &&Run| run.0 == self.shared_as && run.1 == *first.checksum;
        let (_, checksum, finished) = runs.get(SHARED)?.iter().find(is_first)?;
        Some((first.version, checksum.clone(), *finished))
    }

    /// Runs what is left to do, under the lock; returns what that was.
    async fn run<C: Migrate>(&self, connection: &mut C, found: Part) -> Result<Part, OpenError> {
        connection.ensure_migrations_table(self.table).await?;
        let run = connection.list_applied_migrations(self.table).await?;
        let pending = found.pending.into_iter();
        let pending = pending.filter(|version| run.iter().all(|run| run.version != *version));
        let found = Part { pending: pending.collect(), ..found };
        if run.is_empty() && found.has > 0 {
            for migration in self.migrator.iter().take(1) {
                connection.skip(self.table, migration).await?;
            }
        }
        self.migrator.run_direct(None, connection, false).await?;
        Ok(found)
    }
}

/// Compares the migrations that were run with those of this program.
pub(super) fn compare(runs: &Runs, histories: &[History]) -> Result<Schema, SchemaError> {
    let parts: Result<Vec<_>, _> = histories.iter().map(|history| history.compare(runs)).collect();
    Ok(Schema(parts?))
}

/// Brings a schema up to date, or refuses an old one where that is not to be done; returns how it was.
pub(super) async fn settle<C: Migrate>(
    connection: &mut C,
    runs: &Runs,
    histories: &[History],
    migrate: bool,
) -> Result<Schema, OpenError> {
    let found = compare(runs, histories)?;
    if !found.is_old() {
        return Ok(found);
    }
    if !migrate {
        return Err(SchemaError::from(&found).into());
    }
    // Another process may be at it: what is left to do is known under the lock, which is counted, so
    // that `run_direct` can take it once more.
    connection.lock().await?;
    let mut parts = Vec::new();
    for (history, found) in histories.iter().zip(found.0) {
        parts.push(history.run(connection, found).await?);
    }
    connection.unlock().await?;
    Ok(Schema(parts))
}

fn migrator(migrations: &[Text]) -> Migrator {
    let migration = |(version, description, sql): &Text| {
        let sql = SqlStr::from_static(sql);
        Migration::new(*version, (*description).into(), MigrationType::Simple, sql, false)
    };
    let mut migrator = Migrator::with_migrations(migrations.iter().map(migration).collect());
    // Those of a newer program.
    migrator.set_ignore_missing(true);
    migrator
}
