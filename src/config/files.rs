//! The files that a configuration names and this server makes.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use super::{Config, DatabasePlace};

impl Config {
    /// `DATA_DIR`.
    pub(crate) fn folder(&self) -> &Path {
        self.audit.spool.parent().unwrap_or(Path::new("."))
    }

    /// The files of the database, the development key, and the spool with what is in it: there or not.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut files = match &self.store.place {
            DatabasePlace::Sqlite(file) => database_files(file).to_vec(),
            DatabasePlace::Postgres(_) => Vec::new(),
        };
        if self.auth.provider.is_none() {
            files.push(self.auth.dev_key_file.clone());
        }
        files.push(self.audit.spool.clone());
        let spooled = fs::read_dir(&self.audit.spool).into_iter().flatten().flatten();
        files.extend(spooled.map(|entry| entry.path()));
        files
    }
}

/// A database of SQLite and the files that SQLite makes beside it.
pub(crate) fn database_files(file: &Path) -> [PathBuf; 4] {
    ["", "-wal", "-shm", "-journal"].map(|ending| {
        let mut name = OsString::from(file);
        name.push(ending);
        name.into()
    })
}
