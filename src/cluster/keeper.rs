//! Keeps Redis in step with this node's leases, over one connection to it: gives back those of connections
//! that have ended, renews the node's life, reports figures, takes off what dead nodes left behind, and
//! compares all of it where the two may differ.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fred::{clients::SubscriberClient, error::Error};
use tokio::time::timeout;

use super::{
    leases::Leases,
    ledger::{Dead, Entered, Life},
};
use crate::{hub::Outbox, redis::Backoff};

/// Connections in one script: a few milliseconds of Redis.
const PAGE: usize = 100;
/// Between two signs of life, with what is new about connections.
const RENEWAL: Duration = Duration::from_secs(3);
/// A comparison is followed by a pause so many times as long, up to a renewal: each connection that is let in
/// without a lease asks for one, and of thousands it is work.
const PAUSES: u32 = 10;

pub(super) struct Keeper<'a> {
    leases: &'a Leases,
    life: Life<'a>,
}

/// When something may be done again.
struct Next {
    renewal: Instant,
    comparison: Instant,
    /// This life was over.
    is_lost: bool,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(leases: &'a Leases, client: SubscriberClient) -> Self {
        Self { leases, life: Life::new(&leases.ledger, client) }
    }

    /// Goes on until Redis turns out to have lost the node's life, and has all of its leases again.
    pub(super) async fn keep(&self) {
        let (renewal, comparison) = (Instant::now() + RENEWAL, Instant::now());
        let mut next = Next { renewal, comparison, is_lost: false };
        let mut backoff = Backoff::new();
        loop {
            let pausing = self.leases.is_unsynced() && next.comparison < next.renewal;
            let due = if pausing { next.comparison } else { next.renewal };
            let due = due.saturating_duration_since(Instant::now());
            drop(timeout(due, self.leases.changed.notified()).await);
            match self.step(&mut next).await {
                Ok(()) if next.is_lost => break,
                Ok(()) => backoff = Backoff::new(),
                Err(error) => {
                    tracing::debug!(%error, "redis was not told of connections");
                    // It may have heard it, or not.
                    self.leases.compare();
                    backoff.pause().await;
                }
            }
        }
    }

    async fn step(&self, next: &mut Next) -> Result<(), Error> {
        let begun = Instant::now();
        if begun >= next.comparison && self.leases.is_to_compare() {
            next.is_lost |= self.life.renew().await?.is_none();
            self.compare().await?;
            next.comparison = Instant::now() + (PAUSES * begun.elapsed()).min(RENEWAL);
        }
        loop {
            let ended = self.leases.next_ended(PAGE);
            if ended.is_empty() {
                break;
            }
            self.life.release(&ended).await?;
            self.leases.given_back(ended.len());
        }
        if Instant::now() >= next.renewal {
            match self.life.renew().await? {
                Some(dead) => self.bury(&dead).await?,
                None => self.leases.compare(),
            }
            for page in self.leases.news().chunks(PAGE) {
                self.life.report(page).await?;
            }
            next.renewal = Instant::now() + RENEWAL;
        }
        Ok(())
    }

    /// Makes Redis know the connections that this node has, and no others of it. A Redis that was started
    /// anew lacks all of them.
    pub(super) async fn compare(&self) -> Result<(), Error> {
        self.life.begin().await?;
        let admitted: Vec<Arc<Outbox>> = self.leases.admitted();
        for page in admitted.chunks(PAGE) {
            if self.life.enter(page).await? == Entered::Unknown {
                self.leases.compare();
            }
        }
        let listed = self.life.listed(None).await?.into_iter();
        let gone: Vec<_> = listed.filter(|id| !self.leases.has(id)).collect();
        for page in gone.chunks(PAGE) {
            self.life.release_listed(None, page).await?;
        }
        Ok(())
    }

    /// Takes off what dead nodes left behind.
    async fn bury(&self, dead: &[Dead]) -> Result<(), Error> {
        for dead in dead {
            let listed = self.life.listed(Some(dead)).await?;
            if !listed.is_empty() {
                let (node, connections) = (dead.node(), listed.len());
                tracing::warn!(node, connections, "a node is gone, and its connections");
            }
            let mut is_dead = true;
            for page in listed.chunks(PAGE) {
                is_dead = is_dead && self.life.release_listed(Some(dead), page).await?;
            }
            if listed.is_empty() {
                self.life.release_listed(Some(dead), &[]).await?;
            }
        }
        Ok(())
    }
}
