//! The database: whether it can be opened, migrated and written.

use super::Report;
use crate::{
    config::{DatabasePlace, StoreConfig},
    store::{Probe, ProbeError, probe},
};

pub(super) async fn check(config: &StoreConfig, report: &mut Report) {
    let place = match &config.place {
        DatabasePlace::Sqlite(file) => file.display().to_string(),
        DatabasePlace::Postgres(url) => url.to_string(),
    };
    match probe(config).await {
        Ok(Probe::Absent) => {
            report.ok("database", format!("{place} will be made at the first start"));
        }
        Ok(Probe::Ready { applied, pending: 0 }) => {
            let says = format!("{place} can be written, all {applied} migrations are run");
            report.ok("database", says);
        }
        Ok(Probe::Ready { applied, pending }) => {
            let says = format!(
                "{place} can be written, {applied} migrations are run, \
                 {pending} will be at the next start"
            );
            report.ok("database", says);
        }
        Err(error) => {
            report.fault("database", format!("{place} cannot be used: {error}"), fix(&error));
        }
    }
}

/// What to change.
fn fix(error: &ProbeError) -> &'static str {
    match error {
        ProbeError::Folder(_) | ProbeError::ReadOnly => {
            "let the user that serves write the folder and the file (chown, or the volume's owner), \
             or set DATA_DIR or DATABASE_URL to a place that it can write"
        }
        ProbeError::Busy => "end the program that holds it: a backup, or a shell of SQLite",
        ProbeError::Unreachable(_) => {
            "start Postgres, let it listen there (listen_addresses, port, firewall), \
             or set DATABASE_URL to where it is"
        }
        ProbeError::Untrusted(_) => {
            "name the file of the authority that signed the server's certificate: \
             sslrootcert=PATH in DATABASE_URL, or set sslmode in it to what the server offers"
        }
        ProbeError::Refused(_) => {
            "make the user and the database (createuser, createdb), let the user in (pg_hba.conf), \
             or set DATABASE_URL to a user, password and database that are there"
        }
        ProbeError::Standby => "set DATABASE_URL to the primary server",
        ProbeError::Forbidden(_) => {
            "make the user the owner of the database and its tables (ALTER … OWNER TO), \
             or set DATABASE_URL to the user that owns them"
        }
        ProbeError::Encoding(_) => {
            "make a database with createdb --encoding=UTF8 --template=template0, \
             and set DATABASE_URL to it"
        }
        ProbeError::Newer(_) => {
            "start the newer Switchboard that migrated it, or set DATABASE_URL to another database"
        }
        ProbeError::Other(_) | ProbeError::Unfinished(_) | ProbeError::Database(_) => {
            "restore the database from a backup, or set DATABASE_URL to another one"
        }
    }
}
