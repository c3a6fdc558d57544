//! The index of open connections by id and by user, through which pushes go out.
//!
//! Handlers and REST push; the registry alone adds and removes. Delivery takes no turn of any actor:
//! a push is encoded once for each format and its bytes are shared by every outbox.

mod outbox;

use std::sync::Arc;

use dashmap::DashMap;
use prometheus::IntCounter;
use uuid::Uuid;

pub(crate) use outbox::{Batch, Command, Figures, Outbox, Ready};

use crate::{
    auth::Identity,
    protocol::{CloseReason, Push},
};

/// Every open connection of this node.
pub(crate) struct Hub {
    connections: DashMap<Uuid, Arc<Outbox>>,
    users: DashMap<Arc<str>, Vec<Arc<Outbox>>>,
    dropped: IntCounter,
}

impl Hub {
    /// An empty hub; `dropped` counts pushes that found a full lane.
    pub(crate) fn new(dropped: IntCounter) -> Self {
        Self { connections: DashMap::new(), users: DashMap::new(), dropped }
    }

    /// Lists a connection. The registry's alone to call.
    pub(crate) fn insert(&self, outbox: Arc<Outbox>) {
        self.users.entry(Arc::clone(&outbox.username)).or_default().push(Arc::clone(&outbox));
        self.connections.insert(outbox.id, outbox);
    }

    /// Takes a connection off. The registry's alone to call.
    pub(crate) fn remove(&self, outbox: &Outbox) {
        self.connections.remove(&outbox.id);
        if let Some(mut of_user) = self.users.get_mut(&outbox.username) {
            of_user.retain(|other| other.id != outbox.id);
        }
        self.users.remove_if(&outbox.username, |_, of_user| of_user.is_empty());
    }

    /// Takes every connection off, when the registry starts with an empty table.
    pub(crate) fn clear(&self) {
        self.connections.clear();
        self.users.clear();
    }

    /// Gives up the room that connections left behind.
    pub(crate) fn shrink(&self) {
        self.connections.shrink_to_fit();
        self.users.shrink_to_fit();
    }

    /// Pushes to every connection but `except`; returns to how many.
    pub(crate) fn push_to_all(&self, push: &Push, except: Option<Uuid>) -> usize {
        self.connections
            .iter()
            .filter(|entry| Some(*entry.key()) != except)
            .filter(|entry| self.deliver(entry.value(), push))
            .count()
    }

    /// Pushes to every connection of a user, by name; returns to how many.
    pub(crate) fn push_to_user(&self, username: &str, push: &Push) -> usize {
        self.users
            .get(username)
            .map_or(0, |of_user| of_user.iter().filter(|outbox| self.deliver(outbox, push)).count())
    }

    /// Ends a connection; false if there is none of this id.
    pub(crate) fn close(&self, id: Uuid, reason: CloseReason) -> bool {
        let found = self.connections.get(&id);
        found.is_some_and(|outbox| {
            outbox.command(Command::Close(reason));
            true
        })
    }

    /// Ends every connection of a user, by name, that was opened until then: milliseconds since 1970.
    pub(crate) fn close_user(&self, username: &str, until: u64, reason: CloseReason) {
        let of_user = self.users.get(username);
        let of_user = of_user.iter().flat_map(|of_user| of_user.iter());
        for outbox in of_user.filter(|outbox| outbox.since <= until) {
            outbox.command(Command::Close(reason));
        }
    }

    /// Ends every connection whose token in force is of such a user; returns how many. Looks at all of
    /// them: an index by session would weigh on each, and logouts are rare.
    pub(crate) fn close_of(&self, is: impl Fn(&Identity) -> bool, reason: CloseReason) -> usize {
        self.connections
            .iter()
            .filter(|outbox| is(&outbox.identity()))
            .map(|outbox| outbox.command(Command::Close(reason)))
            .count()
    }

    /// Every connection, or those of a user, by name.
    pub(crate) fn connections(&self, username: Option<&str>) -> Vec<Arc<Outbox>> {
        match username {
            None => self.connections.iter().map(|entry| Arc::clone(entry.value())).collect(),
            Some(name) => self.users.get(name).map(|of_user| of_user.clone()).unwrap_or_default(),
        }
    }

    /// Entries of its tables: connections and users.
    pub(crate) fn entries(&self) -> [usize; 2] {
        [self.connections.len(), self.users.len()]
    }

    /// Open connections.
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Requests taken and not answered yet, over all connections.
    pub(crate) fn in_flight(&self) -> usize {
        self.connections.iter().map(|entry| entry.in_flight()).sum()
    }

    fn deliver(&self, outbox: &Outbox, push: &Push) -> bool {
        let delivered = outbox.push(push).is_ok();
        if !delivered {
            self.dropped.inc();
        }
        delivered
    }
}
