//! The audit trail: what it holds, and how long a row may wait.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Reader,
    value::{Bytes, DiskBytes},
};

/// The shortest `AUDIT_BATCH_TIMEOUT` and `AUDIT_SUMMARY_INTERVAL`: a disk has to keep up with them.
const SHORTEST: Duration = Duration::from_millis(100);

/// The smallest `AUDIT_QUEUE_BYTES`: the largest row has to find room in a part of it.
const SMALLEST_QUEUE: usize = 256 * 1024;

/// A hundred years: no database has rows from before its calendar.
const MOST_DAYS: u32 = 36_500;

/// The audit trail.
#[derive(Debug, Clone)]
pub struct AuditConfig {
    /// `AUDIT_ENABLED`.
    pub enabled: bool,
    /// `AUDIT_READS`.
    pub reads: bool,
    /// `AUDIT_LOGINS`: logins and refreshes over WebSocket.
    pub logins: bool,
    /// `AUDIT_QUEUE`, in rows.
    pub queue: usize,
    /// `AUDIT_QUEUE_BYTES`.
    pub queue_bytes: usize,
    /// `AUDIT_BATCH_SIZE`, in rows.
    pub batch_size: usize,
    /// `AUDIT_BATCH_TIMEOUT`.
    pub batch_timeout: Duration,
    /// The spool's folder, in `DATA_DIR`.
    pub spool: PathBuf,
    /// `AUDIT_SPOOL_LIMIT`, in bytes.
    pub spool_limit: u64,
    /// `AUDIT_SUMMARY_INTERVAL`.
    pub summary_interval: Duration,
    /// `AUDIT_DENIALS_PER_USER`, in an interval; none: no limit.
    pub denials_per_user: Option<u32>,
    /// `AUDIT_LOG_RETENTION_DAYS`; none: rows stay.
    pub retention: Option<Duration>,
}

impl Reader<'_> {
    pub(super) fn audit(&mut self, data_dir: &Path) -> AuditConfig {
        let days: u32 = self.get("AUDIT_LOG_RETENTION_DAYS");
        let denials: u32 = self.get("AUDIT_DENIALS_PER_USER");
        let config = AuditConfig {
            enabled: self.get("AUDIT_ENABLED"),
            reads: self.get("AUDIT_READS"),
            logins: self.get("AUDIT_LOGINS"),
            queue: self.count("AUDIT_QUEUE"),
            queue_bytes: self.get::<Bytes>("AUDIT_QUEUE_BYTES").0,
            batch_size: self.count("AUDIT_BATCH_SIZE"),
            batch_timeout: self.get("AUDIT_BATCH_TIMEOUT"),
            spool: data_dir.join("audit"),
            spool_limit: self.get::<DiskBytes>("AUDIT_SPOOL_LIMIT").0,
            summary_interval: self.get("AUDIT_SUMMARY_INTERVAL"),
            denials_per_user: (denials > 0).then_some(denials),
            retention: (days > 0).then(|| Duration::from_secs(u64::from(days) * 86_400)),
        };
        for (name, time) in [
            ("AUDIT_BATCH_TIMEOUT", config.batch_timeout),
            ("AUDIT_SUMMARY_INTERVAL", config.summary_interval),
        ] {
            if time < SHORTEST {
                self.faults.push(format!(
                    "{name}: {time:?} is not allowed; allowed: at least {SHORTEST:?}"
                ));
            }
        }
        if config.queue_bytes < SMALLEST_QUEUE {
            self.faults.push(format!(
                "AUDIT_QUEUE_BYTES: {} is not allowed; allowed: 256KiB to 1GiB",
                config.queue_bytes
            ));
        }
        if days > MOST_DAYS {
            self.faults.push(format!(
                "AUDIT_LOG_RETENTION_DAYS: {days} is not allowed; allowed: 0 to {MOST_DAYS}"
            ));
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn a_queue_that_is_smaller_than_its_largest_row_is_a_fault() {
        let read = |size: &str| {
            Config::read(|name| (name == "AUDIT_QUEUE_BYTES").then(|| size.to_owned()))
        };
        let fault = read("255KiB").unwrap_err().to_string();
        assert!(fault.contains("AUDIT_QUEUE_BYTES: 261120 is not allowed"), "{fault}");
        assert!(fault.contains("256KiB to 1GiB"), "{fault}");
        assert_eq!(read("256KiB").unwrap().audit.queue_bytes, 256 * 1024);
        assert_eq!(Config::read(|_| None).unwrap().audit.queue_bytes, 32 << 20);
    }
}
