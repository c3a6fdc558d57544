//! Shares of the connections. Statements that are slow, or wait for a lock, take no more than the share of
//! their kind; all other kinds go on.

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use sqlx::{Database, Pool, pool::PoolConnection};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::metrics::DbShare;

/// Connections of the audit trail and of probes, beside `DB_POOL_SIZE`.
pub(super) const AUDIT_CONNECTIONS: u32 = 3;

/// Three quarters of a pool, and never all of it where it has two connections or more.
pub(super) fn most_of(connections: u32) -> u32 {
    connections.saturating_sub((connections / 4).max(1)).max(1)
}

/// The pools of a database, and who may take how much of them.
pub(super) struct Shares<DB: Database> {
    /// In the order in which they are closed.
    pub(super) pools: Vec<Pool<DB>>,
    pub(super) reads: Share<DB>,
    pub(super) changes: Share<DB>,
    pub(super) audit_reads: Share<DB>,
    pub(super) audit_changes: Share<DB>,
}

impl<DB: Database> Shares<DB> {
    pub(super) fn of(&self, share: DbShare) -> &Share<DB> {
        match share {
            DbShare::Reads => &self.reads,
            DbShare::Changes => &self.changes,
            DbShare::AuditReads => &self.audit_reads,
            DbShare::AuditChanges => &self.audit_changes,
        }
    }

    /// Open connections, idle ones, and how many there may be.
    pub(super) fn connections(&self) -> [usize; 3] {
        self.pools.iter().fold([0; 3], |[open, idle, max], pool| {
            let most = pool.options().get_max_connections() as usize;
            [open + pool.size() as usize, idle + pool.num_idle(), max.saturating_add(most)]
        })
    }

    pub(super) async fn close(&self) {
        for pool in &self.pools {
            pool.close().await;
        }
    }
}

/// What one kind of statement may take of a pool.
pub(super) struct Share<DB: Database> {
    pool: Pool<DB>,
    places: Arc<Semaphore>,
    most: u32,
}

impl<DB: Database> Share<DB> {
    pub(super) fn new(pool: &Pool<DB>, most: u32) -> Self {
        Self { pool: pool.clone(), places: Arc::new(Semaphore::new(most as usize)), most }
    }

    /// Takes a connection. A place in the share and a connection together are waited for as long as the
    /// pool allows for a connection.
    pub(super) async fn take(&self) -> sqlx::Result<Taken<DB>> {
        let patience: Duration = self.pool.options().get_acquire_timeout();
        // What connects is large, and seldom needed: a handler's future shall not hold it.
        let taking = Box::pin(async {
            let place = Arc::clone(&self.places).acquire_owned().await;
            let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
            Ok(Taken { connection: self.pool.acquire().await?, place: Some(place) })
        });
        timeout(patience, taking).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    /// Places that are taken, and how many there are.
    pub(super) fn places(&self) -> [usize; 2] {
        let most = self.most as usize;
        [most - self.places.available_permits(), most]
    }
}

/// A connection, and the place that it takes.
pub(super) struct Taken<DB: Database> {
    connection: PoolConnection<DB>,
    place: Option<OwnedSemaphorePermit>,
}

impl<DB: Database> Deref for Taken<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        &self.connection
    }
}

impl<DB: Database> DerefMut for Taken<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.connection
    }
}

/// The place is kept until the connection is back. A statement that nobody waits for any longer still runs
/// in the database, and its connection is no one else's until it ends.
impl<DB: Database> Drop for Taken<DB> {
    fn drop(&mut self) {
        let place = self.place.take();
        let returned = self.connection.return_to_pool();
        drop(tokio::spawn(async move {
            returned.await;
            drop(place);
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::most_of;

    #[test]
    fn a_share_is_three_quarters_and_leaves_a_connection_where_there_are_two() {
        for (connections, most) in [(1, 1), (2, 1), (3, 2), (4, 3), (7, 6), (8, 6), (20, 15)] {
            assert_eq!(most_of(connections), most, "{connections}");
        }
    }
}
