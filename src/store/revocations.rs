//! Logouts, and what administrators ended, which a restart must not forget. All times are by the clock of the
//! database, which the nodes share.

use std::time::Duration;

use serde_json::json;

use super::{Store, StoreError, statement};
use crate::auth::Logout;

/// Logouts in one statement.
const PAGE: usize = 1000;
/// Logouts that are read at most: those that end last.
const MOST: i64 = 200_000;
/// Seconds for which a logout stays after its time: a clock that was set forward by mistake deletes nothing.
const MARGIN: i64 = 86_400;

/// What the database keeps.
pub(crate) struct KeptLogouts {
    /// Each with its time that is left.
    pub(crate) logouts: Vec<(Logout, Duration)>,
    /// The time since 1970, by the database.
    pub(crate) now: Duration,
}

/// The database's time in milliseconds, a logout, and the second of its end.
type Row = (i64, Option<String>, Option<i64>);

impl Store {
    /// Keeps logouts, each for a time. One that is kept for longer stays as it is.
    pub(crate) async fn keep_logouts(
        &self,
        logouts: &[(Logout, Duration)],
    ) -> Result<(), StoreError> {
        let sql = self.either(
            "INSERT INTO revocations (logout, ends, kept) \
             SELECT value ->> 'logout', unixepoch() + (value ->> 'left'), unixepoch() \
             FROM json_each($1) WHERE true ON CONFLICT (logout) DO UPDATE \
             SET ends = excluded.ends, kept = excluded.kept WHERE revocations.ends < excluded.ends \
             RETURNING 1",
            "INSERT INTO revocations (logout, ends, kept) \
             SELECT one.logout, clock.now + one.seconds, clock.now \
             FROM json_to_recordset($1::json) AS one (logout text, seconds bigint), \
             (SELECT extract(epoch FROM clock_timestamp())::bigint AS now) AS clock \
             ON CONFLICT (logout) DO UPDATE \
             SET ends = excluded.ends, kept = excluded.kept WHERE revocations.ends < excluded.ends \
             RETURNING 1",
        );
        for page in logouts.chunks(PAGE) {
            let row = |(logout, left): &(Logout, Duration)| {
                let logout = serde_json::to_string(logout).expect("a logout can be JSON");
                // Rounded up: no logout ends early.
                let seconds = left.as_secs() + 1;
                json!({ "logout": logout, "left": seconds, "seconds": seconds })
            };
            let rows = serde_json::Value::from_iter(page.iter().map(row)).to_string();
            let _kept: Vec<i32> =
                statement!(self, Changes, Insert, query_scalar(sql, &rows), fetch_all)?;
        }
        Ok(())
    }

    /// The logouts in force that were kept since a second; all of them since 0.
    pub(crate) async fn kept_logouts(&self, since: i64) -> Result<KeptLogouts, StoreError> {
        // With a row for the time, where there are no logouts.
        let sql = self.either(
            "SELECT clock.now, logout, ends \
             FROM (SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now) AS clock \
             LEFT JOIN revocations ON ends > clock.now / 1000 AND kept >= $1 \
             ORDER BY ends DESC LIMIT $2",
            "SELECT clock.now, logout, ends \
             FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now) AS clock \
             LEFT JOIN revocations ON ends > clock.now / 1000 AND kept >= $1 \
             ORDER BY ends DESC LIMIT $2",
        );
        let rows: Vec<Row> =
            statement!(self, Reads, Select, query_as(sql, since, MOST), fetch_all)?;
        let now = rows.first().map_or(0, |row| row.0);
        let mut logouts = Vec::new();
        for (_, logout, ends) in rows {
            let (Some(logout), Some(ends)) = (logout, ends) else { continue };
            match serde_json::from_str(&logout) {
                Ok(logout) => logouts.push((logout, seconds(ends - now / 1000))),
                // Of a newer program.
                Err(error) => tracing::debug!(%error, "a logout in the database is not understood"),
            }
        }
        let now = Duration::from_millis(u64::try_from(now).unwrap_or_default());
        Ok(KeptLogouts { logouts, now })
    }

    /// Deletes logouts whose time is over; returns how many.
    pub(crate) async fn forget_logouts(&self) -> Result<usize, StoreError> {
        let sql = self.either(
            "DELETE FROM revocations WHERE logout IN \
             (SELECT logout FROM revocations WHERE ends < unixepoch() - $1 LIMIT $2) RETURNING 1",
            "DELETE FROM revocations WHERE logout IN (SELECT logout FROM revocations \
             WHERE ends < extract(epoch FROM clock_timestamp())::bigint - $1 LIMIT $2) RETURNING 1",
        );
        let page = i64::try_from(PAGE).unwrap_or(i64::MAX);
        let mut all = 0;
        loop {
            let gone: Vec<i32> =
                statement!(self, Changes, Delete, query_scalar(sql, MARGIN, page), fetch_all)?;
            all += gone.len();
            if gone.len() < PAGE {
                return Ok(all);
            }
        }
    }
}

fn seconds(left: i64) -> Duration {
    Duration::from_secs(u64::try_from(left).unwrap_or_default())
}
