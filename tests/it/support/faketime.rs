//! A wall clock of a process's own, which a test sets while the process runs: libfaketime. Its monotonic clock
//! goes on as it is, as when an operator sets the clock, and when a suspended machine wakes up.

use std::{fs, path::PathBuf};

use tempfile::TempDir;

use super::programs::program;

/// The clock of one process or several.
pub(crate) struct WallClock {
    folder: TempDir,
    library: PathBuf,
}

impl WallClock {
    /// So many seconds ahead of the machine's clock.
    pub(crate) fn ahead(seconds: i64) -> Self {
        let missing =
            "the tests need libfaketime: install it (Debian and Ubuntu: apt-get install faketime)";
        program(&["faketime"], "faketime", missing);
        let found = fs::read_dir("/usr/lib").unwrap().flatten();
        let mut found = found.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
        let library = found.find(|library| library.exists()).expect(missing);
        let clock = Self { folder: TempDir::new().unwrap(), library };
        clock.set(seconds);
        clock
    }

    /// Sets it so many seconds ahead of the machine's clock.
    pub(crate) fn set(&self, seconds: i64) {
        let (new, file) = (self.folder.path().join("new"), self.file());
        fs::write(&new, format!("{seconds:+}")).unwrap();
        fs::rename(new, file).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("offset")
    }

    /// What a process needs in its environment.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("DONT_FAKE_MONOTONIC", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
        ]
    }
}
