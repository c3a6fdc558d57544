//! A look at the database for `switchboard doctor`: would [`Store::open`](super::Store::open) succeed?
//! It makes nothing and migrates nothing.

mod postgres;
mod sqlite;

use std::{io, time::Duration};

pub(crate) use postgres::servers_of;

use super::{ConnectError, Schema, SchemaError};
use crate::{
    config::{DatabasePlace, StoreConfig},
    files::Unwritable,
};

/// Time to wait for another process's lock on the file.
const WAIT: Duration = Duration::from_secs(2);

/// A database that can be opened.
#[derive(Debug)]
pub(crate) enum Probe {
    /// There is no file yet; it can be made.
    Absent,
    /// It can be written. While its audit trail is being numbered, with the rows that are left.
    Ready(Schema, Option<i64>),
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
    /// The same, where the system says why.
    #[error("{}", .0.says)]
    Unwritable(Unwritable),
    /// Another process writes.
    #[error("another process has held its lock for {} seconds", WAIT.as_secs())]
    Busy,
    /// No server answers there.
    #[error("no server answers: {0}")]
    Unreachable(ConnectError),
    /// TLS fails, most often for a certificate that is not trusted.
    #[error("TLS fails: {0}")]
    Untrusted(ConnectError),
    /// The server does not let this user in, or has no such database.
    #[error("the server refuses: {0}")]
    Refused(ConnectError),
    /// A standby, a server that is set to be read only, or a list without a primary.
    #[error("no server takes changes: {0}")]
    NoPrimary(ConnectError),
    /// Rights of the user that are missing.
    #[error("its user lacks {0}")]
    Forbidden(&'static str),
    /// An encoding in which not every name can be stored.
    #[error("its encoding is {0}, not UTF8")]
    Encoding(String),
    /// A schema that is not one of this program.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// Anything else.
    #[error("{0}")]
    Database(sqlx::Error),
}

/// Looks at the database, or where it will be.
pub(crate) async fn probe(config: &StoreConfig) -> Result<Probe, ProbeError> {
    match &config.place {
        DatabasePlace::Sqlite(file) => sqlite::probe(file).await,
        DatabasePlace::Postgres(url) => postgres::probe(url, config).await,
    }
}
