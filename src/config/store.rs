//! The database: where it is, and how long it may take.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{PostgresUrl, Reader, value::Secret};

/// The database.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// `DATABASE_URL`.
    pub place: DatabasePlace,
    /// `DB_POOL_SIZE`.
    pub pool_size: u32,
    /// `DB_CONNECT_TIMEOUT`, of Postgres.
    pub connect_timeout: Duration,
    /// `DB_START_TIMEOUT`: for the server of Postgres, or the lock on the folder of SQLite.
    pub start_timeout: Duration,
    /// `DB_STATEMENT_TIMEOUT`, of Postgres; 0: no limit.
    pub statement_timeout: Duration,
    /// `DB_SLOW_QUERY_MS`; 0: no query is slow.
    pub slow_query: Duration,
    /// `DB_AUTO_MIGRATE`.
    pub auto_migrate: bool,
}

/// Where the database is.
#[derive(Debug, Clone)]
pub enum DatabasePlace {
    /// A file of SQLite.
    Sqlite(PathBuf),
    /// A server, or several that replicate each other.
    Postgres(PostgresUrl),
}

const ALLOWED: &str = "sqlite://PATH without parameters, or postgres://USER:PASSWORD@HOST:PORT/NAME (or HOST:PORT,HOST:PORT) with libpq's parameters such as sslmode=require";

impl Reader<'_> {
    pub(super) fn store(&mut self, data_dir: &Path) -> StoreConfig {
        let millis: u32 = self.get("DB_SLOW_QUERY_MS");
        StoreConfig {
            place: self
                .place()
                .unwrap_or_else(|| DatabasePlace::Sqlite(data_dir.join("switchboard.db"))),
            pool_size: u32::try_from(self.count("DB_POOL_SIZE")).unwrap_or(u32::MAX),
            connect_timeout: self.get("DB_CONNECT_TIMEOUT"),
            start_timeout: self.get("DB_START_TIMEOUT"),
            statement_timeout: self.get("DB_STATEMENT_TIMEOUT"),
            slow_query: Duration::from_millis(millis.into()),
            auto_migrate: self.get("DB_AUTO_MIGRATE"),
        }
    }

    fn place(&mut self) -> Option<DatabasePlace> {
        let url: Option<Secret> = self.get("DATABASE_URL");
        let url = url?;
        match read(&url) {
            Ok(place) => Some(place),
            Err(reason) => {
                self.faults.push(format!("DATABASE_URL: {reason}; allowed: {ALLOWED}"));
                None
            }
        }
    }
}

fn read(url: &Secret) -> Result<DatabasePlace, String> {
    let text = url.expose();
    if let Some(path) = text.strip_prefix("sqlite://").or_else(|| text.strip_prefix("sqlite:")) {
        // Parameters would become part of the name, and each pool would have a memory of its own.
        let is_file = !path.is_empty() && path != ":memory:" && !path.contains('?');
        let refused = || "this URL of scheme \"sqlite\" is not allowed".to_owned();
        return is_file.then(|| DatabasePlace::Sqlite(path.into())).ok_or_else(refused);
    }
    PostgresUrl::read(url).map(DatabasePlace::Postgres)
}

#[cfg(test)]
mod tests {
    use super::DatabasePlace;
    use crate::config::Config;

    fn place(url: &str) -> Result<DatabasePlace, String> {
        Config::read(|name| (name == "DATABASE_URL").then(|| url.to_owned()))
            .map(|config| config.store.place)
            .map_err(|faults| faults.to_string())
    }

    #[test]
    fn the_scheme_of_the_url_chooses_the_database() {
        for (url, postgres) in [
            ("sqlite:///var/lib/switchboard.db", false),
            ("sqlite:relative.db", false),
            ("postgres://ann:hush-hush@db.example:5433/x?sslmode=verify-full", true),
            ("postgresql://db.example/x", true),
            ("postgres:///x?host=/run/postgresql&user=ann&options=-c%20search_path%3Dx", true),
        ] {
            let place = place(url).unwrap();
            assert_eq!(matches!(place, DatabasePlace::Postgres(_)), postgres, "{url}");
            assert!(!format!("{place:?}").contains("hush-hush"));
        }
    }

    #[test]
    fn what_the_driver_would_not_understand_is_a_fault_that_tells_no_password() {
        for url in [
            "sqlite://",
            "sqlite://:memory:",
            "sqlite://x.db?mode=ro",
            "mysql://ann:hush-hush@db.example/x",
            "ann:hush-hush@db.example",
            "postgres://ann:hush-hush@db.example/x?sslmode=maybe",
            "postgres://db.example/x?sslpassword=hush-hush",
            "postgres://ann:hush-hush@db.example:port/x",
        ] {
            let fault = place(url).unwrap_err();
            assert!(fault.contains("DATABASE_URL") && !fault.contains("hush-hush"), "{fault}");
        }
    }
}
