//! Deletes the rows that are too old, a few at a time: others want to write too. A run that deleted
//! something leaves a row.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use serde_json::json;
use tokio::time::{interval, sleep};

use super::{Audit, Event, own::Deed};
use crate::{
    metrics::AuditOutcome,
    store::{Store, StoreError},
};

/// How often it is looked for such rows, the first time at the start.
const EVERY: Duration = Duration::from_secs(3600);
/// Rows of one statement.
const FEW: usize = 500;
/// After a statement.
const BREATH: Duration = Duration::from_millis(50);

/// Keeps the trail no longer than `keep`.
pub(super) async fn run(audit: Arc<Audit>, store: Arc<Store>, node: Arc<str>, keep: Duration) {
    let mut hour = interval(EVERY);
    loop {
        hour.tick().await;
        let Ok(before) = Timestamp::now().checked_sub(keep) else { continue };
        let mut run = Run { audit: &audit, node: &node, before, rows: 0 };
        // It comes to it in an hour.
        if let Err(error) = run.delete(&store).await {
            tracing::warn!(%error, "old audit rows cannot be deleted");
        }
    }
}

/// One run. Its end, also by a fault or a stop in the middle, leaves the row.
struct Run<'a> {
    audit: &'a Audit,
    node: &'a str,
    before: Timestamp,
    rows: usize,
}

impl Run<'_> {
    async fn delete(&mut self, store: &Store) -> Result<(), StoreError> {
        loop {
            let rows = store.delete_actions(self.before, FEW as i64).await?;
            self.rows += rows;
            if rows < FEW {
                return Ok(());
            }
            sleep(BREATH).await;
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        if self.rows == 0 {
            return;
        }
        tracing::info!(rows = self.rows, "audit rows were too old and are deleted");
        let data = json!({ "rows": self.rows, "before": format!("{:.6}", self.before) });
        let event = Event::of_node(self.node, Deed::Retention, AuditOutcome::Success, &data);
        self.audit.record(event);
    }
}
