//! The index of open connections by id and by user, through which pushes go out.
//!
//! Handlers and REST push; the registry alone adds and removes. Delivery takes no turn of any actor:
//! a push is encoded once for each format and its bytes are shared by every outbox.

mod fanout;
#[cfg(all(test, feature = "models"))]
pub(crate) mod models;
mod outbox;

use std::sync::Arc;

use dashmap::DashMap;
use prometheus::IntCounter;
use smallvec::SmallVec;
use uuid::Uuid;

pub(crate) use fanout::Recipients;
pub(crate) use outbox::{Batch, Command, Figures, Outbox, Ready};

use fanout::Fanout;

use crate::{
    auth::Identity,
    protocol::{CloseReason, Push},
};

/// Every open connection of this node.
pub(crate) struct Hub {
    connections: DashMap<Uuid, Arc<Outbox>>,
    /// The connections of each user, by `sub`.
    users: DashMap<Arc<str>, Vec<Arc<Outbox>>>,
    /// The users of each name, by `sub`. Without those whose name is their `sub`.
    names: DashMap<Arc<str>, SmallVec<[Arc<str>; 1]>>,
    fanout: Fanout,
    dropped: IntCounter,
}

impl Hub {
    /// An empty hub; `dropped` counts pushes that found a full lane.
    pub(crate) fn new(dropped: IntCounter) -> Self {
        Self {
            connections: DashMap::new(),
            users: DashMap::new(),
            names: DashMap::new(),
            fanout: Fanout::default(),
            dropped,
        }
    }

    /// Lists a connection. The registry's alone to call.
    pub(crate) fn insert(&self, outbox: Arc<Outbox>) {
        let mut of_user = self.users.entry(Arc::clone(outbox.subject())).or_default();
        let is_named = of_user.iter().any(|other| other.username() == outbox.username());
        of_user.push(Arc::clone(&outbox));
        drop(of_user);
        if !is_named && outbox.username() != outbox.subject() {
            let mut named = self.names.entry(Arc::clone(outbox.username())).or_default();
            named.push(Arc::clone(outbox.subject()));
        }
        self.connections.insert(outbox.id, outbox);
    }

    /// Takes a connection off. The registry's alone to call.
    pub(crate) fn remove(&self, outbox: &Outbox) {
        self.connections.remove(&outbox.id);
        let mut is_named = false;
        if let Some(mut of_user) = self.users.get_mut(outbox.subject()) {
            of_user.retain(|other| other.id != outbox.id);
            is_named = of_user.iter().any(|other| other.username() == outbox.username());
        }
        self.users.remove_if(outbox.subject(), |_, of_user| of_user.is_empty());
        if is_named {
            return;
        }
        if let Some(mut named) = self.names.get_mut(outbox.username()) {
            named.retain(|subject| subject != outbox.subject());
        }
        self.names.remove_if(outbox.username(), |_, named| named.is_empty());
    }

    /// Takes every connection off, when the registry starts with an empty table.
    pub(crate) fn clear(&self) {
        self.connections.clear();
        self.users.clear();
        self.names.clear();
    }

    /// Gives up the room that connections left behind.
    pub(crate) fn shrink(&self) {
        self.connections.shrink_to_fit();
        self.users.shrink_to_fit();
        self.names.shrink_to_fit();
    }

    /// Ends a connection; false if there is none of this id.
    pub(crate) fn close(&self, id: Uuid, reason: CloseReason) -> bool {
        let found = self.connections.get(&id);
        found.is_some_and(|outbox| {
            outbox.command(Command::Close(reason));
            true
        })
    }

    /// Ends every connection of a user, by `sub`, that was opened until then: milliseconds since 1970.
    pub(crate) fn close_user(&self, subject: &str, until: u64, reason: CloseReason) {
        let of_user = self.users.get(subject);
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

    /// Every connection, or those of a user, by `sub`.
    pub(crate) fn connections(&self, subject: Option<&str>) -> Vec<Arc<Outbox>> {
        match subject {
            None => self.connections.iter().map(|entry| Arc::clone(entry.value())).collect(),
            Some(user) => self.users.get(user).map(|of_user| of_user.clone()).unwrap_or_default(),
        }
    }

    /// The users with connections here whose `sub` or name this is, each by `sub`.
    pub(crate) fn users(&self, sub_or_name: &str) -> Vec<Arc<str>> {
        let mut users = self.named(sub_or_name);
        if let Some(user) = self.users.get(sub_or_name)
            && !users.contains(user.key())
        {
            users.push(Arc::clone(user.key()));
        }
        users
    }

    /// The users with connections here that were opened by this name, each by `sub`.
    pub(crate) fn named(&self, name: &str) -> Vec<Arc<str>> {
        let mut named = self.names.get(name).map(|named| named.to_vec()).unwrap_or_default();
        // Whose name is the `sub`.
        if let Some(of_user) = self.users.get(name)
            && of_user.iter().any(|outbox| **outbox.username() == *name)
        {
            named.push(Arc::clone(of_user.key()));
        }
        named
    }

    /// The name that a user's newest connection here was opened by.
    pub(crate) fn name_of(&self, subject: &str) -> Option<Arc<str>> {
        let of_user = self.users.get(subject)?;
        of_user.last().map(|outbox| Arc::clone(outbox.username()))
    }

    /// Entries of its tables: connections, users and names.
    pub(crate) fn entries(&self) -> [usize; 3] {
        [self.connections.len(), self.users.len(), self.names.len()]
    }

    /// Open connections.
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Requests taken and not answered yet, over all connections.
    pub(crate) fn in_flight(&self) -> usize {
        self.connections.iter().map(|entry| entry.in_flight()).sum()
    }

    fn deliver(&self, outbox: &Outbox, push: &Push) {
        if outbox.push(push).is_err() {
            self.dropped.inc();
        }
    }
}
