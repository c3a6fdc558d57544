//! The database: whether it can be opened, migrated and written.

use super::Report;
use crate::{
    config::StoreConfig,
    store::{Probe, ProbeError, probe},
};

pub(super) async fn check(config: &StoreConfig, report: &mut Report) {
    let file = config.sqlite_file.display();
    let error = match probe(config).await {
        Ok(Probe::Absent) => {
            return report.ok("database", format!("{file} will be made at the first start"));
        }
        Ok(Probe::Ready { applied, pending: 0 }) => {
            let says = format!("{file} can be written, all {applied} migrations are run");
            return report.ok("database", says);
        }
        Ok(Probe::Ready { applied, pending }) => {
            let says = format!(
                "{file} can be written, {applied} migrations are run, \
                 {pending} will be at the next start"
            );
            return report.ok("database", says);
        }
        Err(error) => error,
    };
    let fix = match &error {
        ProbeError::Folder(_) | ProbeError::ReadOnly => {
            "let the user that serves write the folder and the file (chown, or the volume's owner), \
             or set DATA_DIR or DATABASE_URL to a place that it can write"
        }
        ProbeError::Busy => "end the program that holds it: a backup, or a shell of SQLite",
        ProbeError::Newer(_) => {
            "start the newer Switchboard that migrated it, or set DATABASE_URL to another file"
        }
        ProbeError::Other(_) | ProbeError::Unfinished(_) => {
            "restore the database from a backup, or set DATABASE_URL to another file"
        }
        ProbeError::Database(_) => {
            "restore the file from a backup, or set DATABASE_URL to a file of SQLite"
        }
    };
    report.fault("database", format!("{file} cannot be used: {error}"), fix);
}
