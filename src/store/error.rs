//! Why the database cannot be opened, and why a statement failed.

use std::{io, path::PathBuf, time::Duration};

use sqlx::{
    error::{DatabaseError, ErrorKind},
    postgres::PgDatabaseError,
};

use super::{ConnectError, SchemaError, postgres, sqlite};
use crate::{config::DatabasePlace, files::Unwritable, metrics::DbErrorKind};

/// What to do where the error itself is all that is known.
const FIX: &str = "`switchboard doctor` with the same settings says what to change";

/// Why an operation on the database failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// A unique value is taken.
    #[error("a unique value is taken")]
    Conflict,
    /// The database cannot be reached or does not answer in time. Nothing was changed.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// The connection ended while the database was at a change: it may have been made.
    #[error("the database did not say whether it has made a change: {0}")]
    Unknown(#[source] sqlx::Error),
    /// No id is left for another row.
    #[error("the ids of the table are used up: {0}")]
    OutOfIds(#[source] sqlx::Error),
    /// Anything else: a bug.
    #[error("the database refused: {0}")]
    Other(#[source] sqlx::Error),
}

impl StoreError {
    /// The error of a statement on Postgres, where a change may have been `sent`.
    pub(super) fn of_change(self, sent: bool) -> Self {
        match self {
            Self::Unavailable(error) | Self::Other(error)
                if sent && postgres::has_ended(&error) =>
            {
                Self::Unknown(error)
            }
            other => other,
        }
    }

    /// Whether it is a value that the database does not take: again will not help.
    pub(crate) fn is_about_data(&self) -> bool {
        let Self::Other(sqlx::Error::Database(cause)) = self else {
            return matches!(self, Self::Conflict);
        };
        let code = cause.code().unwrap_or_default();
        match cause.try_downcast_ref::<PgDatabaseError>() {
            // data_exception, integrity_constraint_violation, program_limit_exceeded
            Some(_) => ["22", "23", "54"].iter().any(|class| code.starts_with(class)),
            // SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH
            None => code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 18..=20)),
        }
    }
}

/// Why the database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder of the file.
    #[error("cannot use the folder of the database: {0}")]
    Folder(#[from] io::Error),
    /// The file, or the database of a server.
    #[error("cannot open the database: {0}")]
    Database(#[from] sqlx::Error),
    /// There is no file, and it was not to be made.
    #[error("there is no database: {} does not exist; {fix}", file.display())]
    Absent {
        /// Where it would be.
        file: PathBuf,
        /// What to change.
        fix: &'static str,
    },
    /// A server that refuses, or each server of a list.
    #[error("cannot open the database: {0}")]
    Connect(ConnectError),
    /// The server.
    #[error("no answer from the database at {place} within {limit:?} (DB_START_TIMEOUT): {error}")]
    Unreachable {
        /// The URL, without its password.
        place: String,
        /// For all attempts together.
        limit: Duration,
        /// Of the last attempt.
        error: ConnectError,
    },
    /// A server that only takes reads, or each server of a list.
    #[error(
        "no server of {place} takes changes, asked for {limit:?} (DB_START_TIMEOUT): {error}; \
         set DATABASE_URL to the primary, or to all of its servers (HOST:PORT,HOST:PORT)"
    )]
    NoPrimary {
        /// The URL, without its password.
        place: String,
        /// For all attempts together.
        limit: Duration,
        /// Of the last attempt.
        error: ConnectError,
    },
    /// The schema, which was not to be touched.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The schema, as it was brought up to date.
    #[error("cannot migrate the database: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// The lock on the folder of SQLite's file.
    #[error(
        "cannot open the database: another process has had the lock on the folder {folder} for {limit:?} \
         (DB_START_TIMEOUT); `fuser -v {folder}` names it: wait for its migration, or end it", folder = folder.display()
    )]
    Held {
        /// Where the file is.
        folder: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The folder, the file or the server, with its place and with what to do.
    #[error("cannot use the database {place}: {error}; {fix}")]
    Place {
        /// The path, or the URL without its password.
        place: String,
        /// What SQLite, the server or the system says.
        error: String,
        /// What to do.
        fix: String,
    },
}

impl OpenError {
    /// The same with its place, where it does not name it.
    pub(super) fn at(self, place: &DatabasePlace) -> Self {
        let error = match self {
            Self::Folder(error) => error.to_string(),
            Self::Database(error) => error.to_string(),
            Self::Connect(error) => error.to_string(),
            Self::Migrate(error) => error.to_string(),
            other => return other,
        };
        let (place, unwritable) = match place {
            DatabasePlace::Sqlite(file) => (file.display().to_string(), sqlite::unwritable(file)),
            DatabasePlace::Postgres(url) => (url.to_string(), None),
        };
        match unwritable {
            Some(Unwritable { says, fix }) => Self::Place { place, error: says, fix },
            None => Self::Place { place, error, fix: FIX.into() },
        }
    }
}

impl From<ConnectError> for OpenError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Failed(error) => Self::Database(error),
            error => Self::Connect(error),
        }
    }
}

/// What an error means: to metrics, and to who asked.
pub(super) fn classify(error: sqlx::Error) -> (DbErrorKind, StoreError) {
    let kind = match &error {
        sqlx::Error::Database(cause) if cause.kind() == ErrorKind::UniqueViolation => {
            return (DbErrorKind::Integrity, StoreError::Conflict);
        }
        sqlx::Error::Database(cause) if is_out_of_ids(&**cause) => {
            return (DbErrorKind::Other, StoreError::OutOfIds(error));
        }
        sqlx::Error::Database(cause) => kind_of(&**cause),
        sqlx::Error::PoolTimedOut => DbErrorKind::Timeout,
        // Protocol: a proxy, say, that has no server to lead to.
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => DbErrorKind::Connection,
        _ => DbErrorKind::Other,
    };
    match kind {
        DbErrorKind::Timeout | DbErrorKind::Connection => (kind, StoreError::Unavailable(error)),
        _ => (kind, StoreError::Other(error)),
    }
}

/// Whether the database has no id left that fits: SQLite by a trigger, Postgres by its sequence.
fn is_out_of_ids(cause: &dyn DatabaseError) -> bool {
    let code = cause.code().unwrap_or_default();
    match cause.try_downcast_ref::<PgDatabaseError>() {
        // sequence_generator_limit_exceeded
        Some(_) => code == "2200H",
        None => sqlite::is_out_of_ids(&code, cause.message()),
    }
}

/// What a refusal of the database itself means, by its code.
fn kind_of(cause: &dyn DatabaseError) -> DbErrorKind {
    let code = cause.code().unwrap_or_default();
    if cause.try_downcast_ref::<PgDatabaseError>().is_some() {
        return postgres::kind_of(&code);
    }
    sqlite::kind_of(&code, cause.message())
}
