//! Logouts in the database. A logout is kept there before it is answered, and read before the first connection is
//! let in: neither a restart forgets it, nor the end of the node that answered it. Nodes also read there every few
//! seconds what others kept, which reaches them without Redis.

use std::{
    collections::HashSet,
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::Cluster;
use crate::{auth::Logout, store::StoreError};

/// Time for the database to keep a logout: its sender waits.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at what other nodes kept, and two tries to keep what the database did not.
const LOOK: Duration = Duration::from_secs(2);
/// A look goes back so far: what was kept may be seen late, by a transaction that took long.
const OVERLAP: i64 = 15;
/// Between two deletions of what is over.
const FORGET: Duration = Duration::from_secs(3600);
/// Logouts that are kept, or learnt, in one go.
const PAGE: usize = 1000;
/// Logouts that wait for the database, at most.
const BOUND: usize = 100_000;

/// The database did not take a logout. It is in force all the same, and the database gets it later.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("It is in force, but the database does not keep it yet: try again")]
pub(crate) struct NotKept;

impl Cluster {
    /// Learns what the database keeps.
    pub(crate) async fn recall(&self) -> Result<(), StoreError> {
        self.learn_kept(0).await.map(drop)
    }

    /// Has the database keep a logout.
    pub(super) async fn keep(&self, logout: &Logout) -> Result<(), NotKept> {
        // Before: whoever waits here may leave.
        if self.unkept().len() < BOUND {
            self.unkept().insert(logout.clone());
        }
        let kept = [(logout.clone(), self.validator.revocation_lifetime())];
        let error = match timeout(PATIENCE, self.store.keep_logouts(&kept)).await {
            Ok(Ok(())) => {
                self.unkept().remove(logout);
                return Ok(());
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {PATIENCE:?}"),
        };
        tracing::error!(error, "a logout is in force, but the database does not keep it yet");
        Err(NotKept)
    }

    /// Has the database keep what it did not before.
    pub(crate) async fn keep_late(&self) {
        let late: Vec<_> = self.unkept().iter().cloned().collect();
        if late.is_empty() {
            return;
        }
        let lifetime = self.validator.revocation_lifetime();
        let mut logouts = 0;
        for page in late.chunks(PAGE) {
            let kept: Vec<_> = page.iter().cloned().map(|logout| (logout, lifetime)).collect();
            let Ok(Ok(())) = timeout(PATIENCE, self.store.keep_logouts(&kept)).await else { break };
            let mut unkept = self.unkept();
            for logout in page {
                unkept.remove(logout);
            }
            logouts += page.len();
        }
        if logouts > 0 {
            tracing::info!(logouts, "the database keeps logouts that it did not before");
        }
    }

    /// Learns what was kept since a second of the database's clock; returns that of now.
    async fn learn_kept(&self, since: i64) -> Result<i64, StoreError> {
        let asked = Instant::now();
        let kept = self.store.kept_logouts(since).await?;
        self.clock.hear_first(kept.now, asked);
        let mut logouts = kept.logouts.into_iter().peekable();
        while logouts.peek().is_some() {
            self.learn(logouts.by_ref().take(PAGE));
            // Other tasks of this thread have their turn.
            yield_now().await;
        }
        Ok(i64::try_from(kept.now.as_secs()).unwrap_or(i64::MAX))
    }

    fn unkept(&self) -> MutexGuard<'_, HashSet<Logout>> {
        self.unkept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the database and this node in step until the server stops.
pub(crate) async fn keep_logouts(cluster: Arc<Cluster>, stop: CancellationToken) {
    let keep = async {
        let (mut since, mut forgotten) = (0, None::<Instant>);
        loop {
            sleep(LOOK).await;
            cluster.keep_late().await;
            if cluster.is_on() {
                match cluster.learn_kept(since).await {
                    Ok(now) => since = now - OVERLAP,
                    Err(error) => tracing::debug!(%error, "the database does not tell of logouts"),
                }
            }
            if forgotten.is_none_or(|last| last.elapsed() >= FORGET) {
                forgotten = Some(Instant::now());
                if let Err(error) = cluster.store.forget_logouts().await {
                    tracing::warn!(%error, "logouts that are over stay in the database for another hour");
                }
            }
        }
    };
    stop.run_until_cancelled(keep).await;
}
