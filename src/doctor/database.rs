//! The database: whether it can be opened, migrated and written.

use super::Report;
use crate::{
    config::{DatabasePlace, StoreConfig},
    store::{ConnectError, Probe, ProbeError, Schema, probe, servers_of},
};

pub(super) async fn check(config: &StoreConfig, report: &mut Report) {
    let place = match &config.place {
        DatabasePlace::Sqlite(file) => file.display().to_string(),
        DatabasePlace::Postgres(url) => url.to_string(),
    };
    let migrates = config.auto_migrate;
    match probe(config).await {
        Ok(Probe::Absent) if migrates => {
            report.ok("database", format!("{place} will be made at the first start"));
        }
        Ok(Probe::Absent) => {
            let says = format!("{place} is not there, and DB_AUTO_MIGRATE is false");
            report.fault("database", says, "run `switchboard migrate`, which makes it");
        }
        Ok(Probe::Ready(schema, unnumbered)) => {
            if let Some(rows) = unnumbered {
                let says =
                    format!("the audit trail of {place} is being numbered: {rows} rows are left");
                report.ok("audit trail", says);
            }
            ready(&place, &schema, migrates, report);
            servers(config, report).await;
        }
        Err(ProbeError::Unwritable(found)) => {
            report.fault("database", format!("{place} cannot be used: {}", found.says), found.fix);
        }
        Err(error) => {
            report.fault("database", format!("{place} cannot be used: {error}"), fix(&error));
        }
    }
}

/// Says of each server of a list what it is good for.
async fn servers(config: &StoreConfig, report: &mut Report) {
    let DatabasePlace::Postgres(url) = &config.place else { return };
    if url.servers().len() < 2 {
        return;
    }
    for (place, error) in servers_of(url, config.connect_timeout).await.unwrap_or_default() {
        match error {
            None => report.ok("servers", format!("{place} takes changes")),
            Some(error @ ConnectError::ReadOnly { standby: true, .. }) => {
                report.ok("servers", error.to_string());
            }
            Some(error) => report.warning(
                "servers",
                format!("{place} would be of no help after a failover: {error}"),
                "start it, mend it, or take it out of the list in DATABASE_URL",
            ),
        }
    }
}

/// Says of a database that can be written whether its schema will do.
fn ready(place: &str, schema: &Schema, migrates: bool, report: &mut Report) {
    let (has, needs) = (schema.has(), schema.needs());
    let says = format!("{place} can be written, its schema versions are {has}");
    if schema.is_old() && !migrates {
        let says = format!("{says}; {needs} are needed, and DB_AUTO_MIGRATE is false");
        report.fault("database", says, "run `switchboard migrate`");
    } else if schema.is_old() {
        report.ok("database", format!("{says}, and will be {needs} at the next start"));
    } else if schema.is_newer() {
        let says = format!("{says}, newer than this program's {needs}");
        report.warning(
            "database",
            says,
            "none while nodes are replaced one after the other; \
             else start the newer Switchboard that migrated it",
        );
    } else {
        report.ok("database", format!("{says}, which are the newest"));
    }
}

/// What to change.
fn fix(error: &ProbeError) -> &'static str {
    match error {
        ProbeError::Folder(_) | ProbeError::ReadOnly | ProbeError::Unwritable(_) => {
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
        ProbeError::NoPrimary(_) => {
            "set DATABASE_URL to the primary server, or to all servers (HOST:PORT,HOST:PORT); \
             promote a standby if the primary is gone"
        }
        ProbeError::Forbidden(_) => {
            "make the user the owner of the database and its tables (ALTER … OWNER TO), \
             or set DATABASE_URL to the user that owns them"
        }
        ProbeError::Encoding(_) => {
            "make a database with createdb --encoding=UTF8 --template=template0, \
             and set DATABASE_URL to it"
        }
        ProbeError::Schema(_) | ProbeError::Database(_) => {
            "restore the database from a backup, or set DATABASE_URL to another one"
        }
    }
}
