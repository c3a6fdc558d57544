//! Deletes the rows that are too old, a few at a time: others want to write too.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::{interval, sleep};

use crate::store::{Store, StoreError};

/// How often it is looked for such rows, the first time at the start.
const EVERY: Duration = Duration::from_secs(3600);
/// Rows of one statement.
const FEW: usize = 500;
/// After a statement.
const BREATH: Duration = Duration::from_millis(50);

/// Keeps the trail no longer than `keep`.
pub(super) async fn run(store: Arc<Store>, keep: Duration) {
    let mut hour = interval(EVERY);
    loop {
        hour.tick().await;
        match delete(&store, keep).await {
            Ok(0) => {}
            Ok(rows) => tracing::info!(rows, "audit rows were too old and are deleted"),
            // It comes to it in an hour.
            Err(error) => tracing::warn!(%error, "old audit rows cannot be deleted"),
        }
    }
}

async fn delete(store: &Store, keep: Duration) -> Result<usize, StoreError> {
    let Ok(before) = Timestamp::now().checked_sub(keep) else { return Ok(0) };
    let mut deleted = 0;
    loop {
        let rows = store.delete_actions(before, FEW as i64).await?;
        deleted += rows;
        if rows < FEW {
            return Ok(deleted);
        }
        sleep(BREATH).await;
    }
}
