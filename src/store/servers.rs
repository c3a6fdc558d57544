//! The servers of a Postgres URL, and which of them takes changes.
//!
//! Every connection begins here: at the start, of the watcher, of migrations and of `doctor`. Names are resolved
//! for each connection, so an address that moves to another server is followed. A server that only takes reads
//! (a standby, a demoted primary) is no better than one that is down.

use std::{
    io,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use sqlx::{ConnectOptions as _, PgConnection, postgres::PgConnectOptions};
use tokio::time::{sleep, timeout};

use super::{
    OpenError,
    postgres::migrations_run,
    schema::{self, History},
};
use crate::config::{PostgresUrl, StoreConfig};

/// Time that a server has to answer before the next one of the URL is asked too.
const HEAD_START: Duration = Duration::from_millis(100);
/// The shortest time for an attempt at the start.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest wait between attempts at the start.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A transaction is read only on a standby, and where a setting of the server, database or user says so.
const LOOK: &str = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', \
                    pg_postmaster_start_time()::text";

/// Why there is no connection to a server that takes changes.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A server cannot be reached, or refuses.
    #[error(transparent)]
    Failed(#[from] sqlx::Error),
    /// A server that answers, and refuses every change.
    #[error("{place} only takes reads: {}", reason(.standby))]
    ReadOnly {
        /// Its host and port.
        place: String,
        /// Whether it follows another server.
        standby: bool,
    },
    /// A server with other tables than this program's: an empty one, say.
    #[error("{place}: {error}")]
    Schema {
        /// Its host and port.
        place: String,
        /// What is wrong with them.
        error: Box<OpenError>,
    },
    /// Each server of the list failed.
    #[error("{}", listed(.0))]
    All(Vec<Attempt>),
}

/// A server of a list, and why it cannot be used.
#[derive(Debug)]
pub struct Attempt {
    place: String,
    error: ConnectError,
}

fn reason(standby: &bool) -> &'static str {
    match standby {
        true => "it is a standby",
        false => "it is set to be read only (default_transaction_read_only)",
    }
}

fn listed(attempts: &[Attempt]) -> String {
    let one = |Attempt { place, error }: &Attempt| match error {
        ConnectError::ReadOnly { .. } | ConnectError::Schema { .. } => error.to_string(),
        error => format!("{place}: {error}"),
    };
    attempts.iter().map(one).collect::<Vec<_>>().join("; ")
}

impl ConnectError {
    /// Whether every server answers, and none takes changes.
    pub(super) fn is_read_only(&self) -> bool {
        match self {
            Self::Failed(_) | Self::Schema { .. } => false,
            Self::ReadOnly { .. } => true,
            Self::All(attempts) => attempts.iter().all(|attempt| attempt.error.is_read_only()),
        }
    }

    /// Whether no server answered in time.
    fn is_late(&self) -> bool {
        match self {
            Self::Failed(sqlx::Error::Io(cause)) => cause.kind() == io::ErrorKind::TimedOut,
            Self::All(attempts) => attempts.iter().all(|attempt| attempt.error.is_late()),
            _ => false,
        }
    }

    /// Whether a server is not there yet, starts, has no connection left, or may be promoted.
    fn passes(&self) -> bool {
        match self {
            // Data that is no TLS, or a certificate that is not trusted.
            Self::Failed(sqlx::Error::Io(cause)) => cause.kind() != io::ErrorKind::InvalidData,
            Self::Failed(sqlx::Error::Database(cause)) => {
                cause.code().is_some_and(|code| matches!(&*code, "57P01" | "57P03" | "53300"))
            }
            Self::Failed(_) => false,
            Self::ReadOnly { .. } | Self::Schema { .. } => true,
            Self::All(attempts) => attempts.iter().any(|attempt| attempt.error.passes()),
        }
    }
}

/// The servers of a URL, in its order.
#[derive(Debug, Clone)]
pub(super) struct Servers(Vec<PgConnectOptions>);

impl Servers {
    /// The servers that a URL means; the password may come from `PGPASSWORD` or a `.pgpass` file.
    pub(super) fn of(url: &PostgresUrl) -> sqlx::Result<Self> {
        let options = |server: &str| {
            let mut options: PgConnectOptions = server.parse()?;
            // The driver would look up the brackets of `[::1]` too.
            if let Some(host) = options.get_host().strip_prefix('[') {
                let host = host.trim_end_matches(']').to_owned();
                options = options.host(&host);
            }
            // Migrations say of tables that they are there; that is not worth a line.
            let quiet = options.options([("client_min_messages", "warning")]);
            Ok(quiet.disable_statement_logging())
        };
        url.servers().map(options).collect::<sqlx::Result<_>>().map(Self)
    }

    /// Connects to the first server that takes changes, or fails when the time is over. A server that does not
    /// answer holds up the next one for [`HEAD_START`] only.
    pub(super) async fn connect(&self, limit: Duration) -> Result<Primary, ConnectError> {
        self.connect_to(limit, &[]).await
    }

    /// The same with the first server that has these histories too.
    pub(super) async fn connect_to(
        &self,
        limit: Duration,
        histories: &[History],
    ) -> Result<Primary, ConnectError> {
        let mut attempts = FuturesUnordered::new();
        let mut wait = Duration::ZERO;
        for (i, options) in self.0.iter().enumerate() {
            attempts.push(async move {
                sleep(wait).await;
                (i, Primary::connect_to(options, limit.saturating_sub(wait), histories).await)
            });
            wait += HEAD_START;
        }
        let mut failed = Vec::new();
        while let Some((i, attempt)) = attempts.next().await {
            match attempt {
                Ok(primary) => return Ok(primary),
                Err(error) => failed.push((i, error)),
            }
        }
        failed.sort_by_key(|(i, _)| *i);
        Err(self.all(failed))
    }

    /// One error of all servers.
    fn all(&self, mut failed: Vec<(usize, ConnectError)>) -> ConnectError {
        if let [_] = self.0[..]
            && let Some((_, error)) = failed.pop()
        {
            return error;
        }
        let attempt = |(i, error): (usize, ConnectError)| {
            let place = self.0.get(i).map(place).unwrap_or_default();
            Attempt { place, error }
        };
        ConnectError::All(failed.into_iter().map(attempt).collect())
    }

    /// Connects as soon as a server takes changes: servers are often started, or promoted, at the same time.
    pub(super) async fn until_reached(
        &self,
        url: &PostgresUrl,
        config: &StoreConfig,
    ) -> Result<Primary, OpenError> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(100);
        let mut before = None;
        loop {
            let left = config.start_timeout.saturating_sub(started.elapsed()).max(SHORTEST);
            let error = match self.connect(config.connect_timeout.min(left)).await {
                Ok(primary) => return Ok(primary),
                Err(error) => error,
            };
            // The last attempt has little time, and may say less than the one before.
            let error = before.take().filter(|_| error.is_late()).unwrap_or(error);
            // A wrong password does not become right, nor a certificate that nobody vouches for.
            if !error.passes() {
                return Err(error.into());
            }
            let limit = config.start_timeout;
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                let place = url.to_string();
                return Err(match error.is_read_only() {
                    false => OpenError::Unreachable { place, limit, error },
                    true => OpenError::NoPrimary { place, limit, error },
                });
            }
            pause = pause.min(left);
            let retry_ms = pause.as_millis();
            match error.is_read_only() {
                false => tracing::warn!(%error, retry_ms, "no answer from the database yet"),
                true => tracing::warn!(%error, retry_ms, "the database takes no changes yet"),
            }
            before = Some(error);
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Each server of a list, and why it cannot be used, if so.
    pub(super) async fn examine(&self, limit: Duration) -> Vec<(String, Option<ConnectError>)> {
        let mut seen = Vec::new();
        for options in &self.0 {
            let error = Primary::connect(options, limit).await.err();
            seen.push((place(options), error));
        }
        seen
    }
}

/// A connection to a server that takes changes.
pub(super) struct Primary {
    pub(super) connection: PgConnection,
    /// For more connections to this server.
    pub(super) options: PgConnectOptions,
    /// When its process started, to the microsecond, which tells it from other servers.
    started: String,
}

impl Primary {
    async fn connect(options: &PgConnectOptions, limit: Duration) -> Result<Self, ConnectError> {
        Self::connect_to(options, limit, &[]).await
    }

    /// Connects to a server that takes changes and has these histories.
    pub(super) async fn connect_to(
        options: &PgConnectOptions,
        limit: Duration,
        histories: &[History],
    ) -> Result<Self, ConnectError> {
        let connecting = async {
            let mut connection = options.connect().await.map_err(named)?;
            let started = look(&mut connection, options).await?;
            if let Err(error) = check(&mut connection, histories).await {
                return Err(ConnectError::Schema { place: place(options), error: Box::new(error) });
            }
            Ok(Self { connection, options: options.clone(), started })
        };
        timeout(limit, connecting).await.unwrap_or_else(|_| Err(late(limit).into()))
    }

    /// Asks whether it still takes changes.
    pub(super) async fn look(&mut self) -> Result<(), ConnectError> {
        look(&mut self.connection, &self.options).await.map(drop)
    }

    /// Whether both lead to one server, which has not been started anew between.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        self.started == other.started
    }

    /// Its host and port.
    pub(super) fn place(&self) -> String {
        place(&self.options)
    }
}

/// Asks a server whether it takes changes, and when its process started.
pub(super) async fn look(
    connection: &mut PgConnection,
    options: &PgConnectOptions,
) -> Result<String, ConnectError> {
    let (standby, read_only, started): (bool, bool, String) =
        sqlx::query_as(LOOK).fetch_one(connection).await?;
    match standby || read_only {
        true => Err(ConnectError::ReadOnly { place: place(options), standby }),
        false => Ok(started),
    }
}

/// Whether a server has all of these histories.
async fn check(connection: &mut PgConnection, histories: &[History]) -> Result<(), OpenError> {
    if histories.is_empty() {
        return Ok(());
    }
    let runs = migrations_run(connection).await?;
    schema::settle(connection, &runs, histories, false).await.map(drop)
}

/// Host and port, or the folder of the socket.
fn place(options: &PgConnectOptions) -> String {
    let folder = options.get_socket().map(|folder| folder.display().to_string());
    let host = folder.unwrap_or_else(|| match options.get_host() {
        host if host.contains(':') => format!("[{host}]"),
        host => host.to_owned(),
    });
    format!("{host}:{}", options.get_port())
}

/// The driver reads an answer where a connection ends before there is one: a proxy has no server to lead to.
fn named(error: sqlx::Error) -> sqlx::Error {
    match error {
        sqlx::Error::Protocol(text) if text.ends_with("SSLRequest: 0x00") => {
            let closed = "the connection was closed before there was an answer";
            sqlx::Error::Io(io::Error::new(io::ErrorKind::UnexpectedEof, closed))
        }
        error => error,
    }
}

pub(super) fn late(limit: Duration) -> sqlx::Error {
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, DatabasePlace};

    fn servers(url: &str) -> Servers {
        let config = Config::read(|name| (name == "DATABASE_URL").then(|| url.to_owned()));
        match config.unwrap().store.place {
            DatabasePlace::Postgres(url) => Servers::of(&url).unwrap(),
            place @ DatabasePlace::Sqlite(_) => panic!("{place:?}"),
        }
    }

    #[test]
    fn an_address_of_ipv6_loses_its_brackets_for_the_driver() {
        let Servers(servers) = servers("postgres://[::1]:5433,db:1/x");
        assert_eq!(servers[0].get_host(), "::1");
        assert_eq!([place(&servers[0]), place(&servers[1])], ["[::1]:5433", "db:1"]);
    }

    #[test]
    fn a_list_waits_while_one_of_its_servers_may_come() {
        let servers = servers("postgres://a,b/x");
        let refused = || sqlx::Error::Io(io::ErrorKind::ConnectionRefused.into());
        let standby =
            |place: &str| ConnectError::ReadOnly { place: place.to_owned(), standby: true };
        let wrong = || sqlx::Error::Protocol("no TLS".to_owned());
        for (first, second, passes, is_read_only) in [
            (standby("a:5432"), standby("b:5432"), true, true),
            (refused().into(), standby("b:5432"), true, false),
            (wrong().into(), refused().into(), true, false),
            (wrong().into(), wrong().into(), false, false),
        ] {
            let error = servers.all(vec![(0, first), (1, second)]);
            assert_eq!((error.passes(), error.is_read_only()), (passes, is_read_only), "{error}");
            let said = error.to_string();
            assert!(said.matches("a:5432").count() == 1 && said.matches("b:5432").count() == 1);
        }
    }
}
