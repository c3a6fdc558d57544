//! Sums up what anybody can cause at will, so that a flood of it is a few rows.
//!
//! [`Audit::record`](super::Audit::record) offers every event here first. What fails without a valid token
//! is summed up by address and kind. A user's denials have a row each up to a limit, and are summed up by
//! user and kind beyond it. The `writer` makes rows of the sums when the interval ends.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::json;
use tokio::{sync::Notify, time::sleep_until};

use super::{Cause, Event, Recorded};
use crate::{
    config::{AuditConfig, network_of},
    metrics::AuditOutcome,
};

/// Rows of unknown callers in an interval; the rest shares one more.
const UNKNOWN_ROWS: usize = 50;
/// Rows of summed-up denials of users in an interval; the rest shares one more.
const USER_ROWS: usize = 500;
/// Rows of one caller in an interval: a single address must not take the rows of all others.
const ROWS_OF_ONE: usize = 10;
/// Users whose denials are counted in an interval.
const USERS: usize = 10_000;
/// Distinct names that a row shows, and bytes of each.
const NAMES: usize = 10;
pub(crate) const NAME_BYTES: usize = 128;

/// The sums of the interval that runs.
pub(super) struct Summary {
    interval: Duration,
    /// Denials of a user, and breaches of an address, that have a row each in an interval; none: all have.
    denials: Option<u32>,
    table: Mutex<Table>,
    /// Told of the first event of an interval.
    begun: Notify,
}

#[derive(Default)]
struct Table {
    /// When the interval began: with its first event.
    begun: Option<Instant>,
    /// Rows that users have had, and networks.
    rows: HashMap<Caller, u32>,
    of_unknown: Sums,
    of_users: Sums,
    /// The server stops: nobody takes sums any more.
    closed: bool,
}

/// Whose events a row sums up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Of one network without a valid token.
    Network,
    /// Of one user.
    User,
    /// Of users of one network.
    UsersOfNetwork,
    /// Of unknown callers for whom there was no row left.
    OtherNetworks,
    /// Of users for whom there was no row left.
    OtherUsers,
}

impl Scope {
    /// Nobody known is behind it.
    pub(super) fn is_unknown(self) -> bool {
        matches!(self, Self::Network | Self::OtherNetworks)
    }

    /// It has no caller of its own.
    pub(super) fn is_other(self) -> bool {
        matches!(self, Self::OtherNetworks | Self::OtherUsers)
    }
}

/// Events that share a row.
pub(super) struct Sum {
    pub(super) scope: Scope,
    /// The first of them, which stands for all.
    event: Event,
    times: u64,
    first: Timestamp,
    last: Timestamp,
    names: Vec<Box<str>>,
}

#[derive(Default)]
struct Sums {
    by_kind: HashMap<Key, Sum>,
    other: Option<Sum>,
}

/// Nothing in it but the address is a caller's choice, or each request could have a kind of its own.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    caller: Caller,
    action: Arc<str>,
    route: Arc<str>,
    status: i32,
}

#[derive(PartialEq, Eq, Hash, Clone)]
enum Caller {
    /// Nobody known.
    Network(IpAddr),
    User(Arc<str>),
    UsersOfNetwork(IpAddr),
}

impl Summary {
    pub(super) fn new(config: &AuditConfig) -> Self {
        Self {
            interval: config.summary_interval,
            denials: config.denials_per_user,
            table: Mutex::default(),
            begun: Notify::new(),
        }
    }

    /// Counts an event that shares a row; gives back one that is a row of its own.
    pub(super) fn take(&self, event: Event) -> Option<Event> {
        let network = network_of(event.remote.address);
        let caller = match &event.user {
            Some(user) if event.is_denial() => Caller::User(Arc::clone(&user.subject)),
            None if event.outcome != AuditOutcome::Success => Caller::Network(network),
            _ => return Some(event),
        };
        let mut table = self.table();
        if table.closed {
            return Some(event);
        }
        self.begin(&mut table);
        if let Caller::Network(_) = caller {
            table.of_unknown.add(caller, event, UNKNOWN_ROWS);
            return None;
        }
        let of_network = (event.cause == Cause::Breach).then_some(Caller::UsersOfNetwork(network));
        for caller in [caller].into_iter().chain(of_network) {
            match self.rows_left(&mut table, &caller) {
                Left::Row => continue,
                Left::Sum => table.of_users.add(caller, event, USER_ROWS),
                Left::Nothing => table.of_users.add_other(Scope::OtherUsers, event),
            }
            return None;
        }
        Some(event)
    }

    /// Counts an event that would be a row of its own, for which the queue has no room; gives it back where
    /// nobody would make a row of it any more.
    pub(super) fn absorb(&self, event: Event) -> Option<Event> {
        let mut table = self.table();
        if table.closed {
            return Some(event);
        }
        self.begin(&mut table);
        match &event.user {
            Some(user) => {
                let caller = Caller::User(Arc::clone(&user.subject));
                table.of_users.add(caller, event, USER_ROWS);
            }
            None => {
                let caller = Caller::Network(network_of(event.remote.address));
                table.of_unknown.add(caller, event, UNKNOWN_ROWS);
            }
        }
        None
    }

    /// Begins an interval with its first event.
    fn begin(&self, table: &mut Table) {
        if table.begun.is_none() {
            table.begun = Some(Instant::now());
            self.begun.notify_one();
        }
    }

    /// Takes a denial from the budget of a caller.
    fn rows_left(&self, table: &mut Table, caller: &Caller) -> Left {
        let Some(limit) = self.denials else { return Left::Row };
        if let Some(rows) = table.rows.get_mut(caller) {
            *rows += u32::from(*rows < limit);
            return if *rows < limit { Left::Row } else { Left::Sum };
        }
        if table.rows.len() >= USERS {
            return Left::Nothing;
        }
        table.rows.insert(caller.clone(), 0);
        Left::Row
    }

    /// Waits until an interval ends.
    pub(super) async fn ended(&self) {
        loop {
            let begun = self.table().begun;
            match begun {
                None => self.begun.notified().await,
                Some(begun) => return sleep_until((begun + self.interval).into()).await,
            }
        }
    }

    /// Takes the sums out. The next event begins a new interval.
    pub(super) fn end(&self) -> Vec<Sum> {
        let mut table = self.table();
        let ended = std::mem::take(&mut *table);
        table.closed = ended.closed;
        drop(table);
        let mut sums = Vec::new();
        for Sums { by_kind, other } in [ended.of_users, ended.of_unknown] {
            sums.extend(by_kind.into_values().chain(other));
        }
        sums.sort_by_key(|sum| sum.first);
        sums
    }

    /// Users and sums that are in memory.
    pub(super) fn entries(&self) -> usize {
        let table = self.table();
        let sums = [&table.of_users, &table.of_unknown];
        let sums = sums.map(|sums| sums.by_kind.len() + usize::from(sums.other.is_some()));
        table.rows.len() + sums.iter().sum::<usize>()
    }

    /// Has every event be a row of its own from now on.
    pub(super) fn close(&self) {
        self.table().closed = true;
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a denial may still have in an interval.
enum Left {
    /// A row of its own.
    Row,
    /// A part of a row.
    Sum,
    /// A part of the row of others: more users are denied than are told apart.
    Nothing,
}

impl Sums {
    fn add(&mut self, caller: Caller, event: Event, at_most: usize) {
        let (action, route) = (Arc::clone(&event.action), Arc::clone(&event.route));
        let key = Key { caller, action, route, status: event.status };
        if let Some(sum) = self.by_kind.get_mut(&key) {
            return sum.add(&event);
        }
        let of_caller = || self.by_kind.keys().filter(|known| known.caller == key.caller).count();
        let (scope, other) = match key.caller {
            Caller::Network(_) => (Scope::Network, Scope::OtherNetworks),
            Caller::User(_) => (Scope::User, Scope::OtherUsers),
            Caller::UsersOfNetwork(_) => (Scope::UsersOfNetwork, Scope::OtherUsers),
        };
        if self.by_kind.len() >= at_most || of_caller() >= ROWS_OF_ONE {
            return self.add_other(other, event);
        }
        self.by_kind.insert(key, Sum::new(scope, event));
    }

    fn add_other(&mut self, scope: Scope, event: Event) {
        match &mut self.other {
            Some(sum) => sum.add(&event),
            None => self.other = Some(Sum::new(scope, event)),
        }
    }
}

impl Sum {
    fn new(scope: Scope, event: Event) -> Self {
        let now = Timestamp::now();
        let names = event.name().map(shown).into_iter().collect();
        Self { scope, event, times: 1, first: now, last: now, names }
    }

    fn add(&mut self, event: &Event) {
        self.times += 1;
        self.last = Timestamp::now();
        let Some(name) = event.name() else { return };
        if self.names.len() < NAMES {
            let name = shown(name);
            if !self.names.contains(&name) {
                self.names.push(name);
            }
        }
    }

    /// The event that a row is made of: the first one, without what it has not in common with the others.
    pub(super) fn into_event(self) -> Event {
        let mut data = json!({
            "times": self.times,
            "first": format!("{:.6}", self.first),
            "last": format!("{:.6}", self.last),
        });
        let mut event = self.event;
        if self.names.len() > 1 || self.scope.is_other() && !self.names.is_empty() {
            data["usernames"] = json!(self.names);
            (event.user, event.claimed) = (None, None);
        }
        event.resource = Arc::clone(&event.route);
        event.data = Some(Recorded::document(&data.to_string()));
        event.took = None;
        if self.scope.is_other() {
            let whose = if self.scope.is_unknown() { "unknown callers" } else { "users" };
            (event.action, event.resource) = ("other".into(), whose.into());
            (event.user, event.error) = (None, None);
        }
        event
    }
}

/// A name that somebody gave: so many bytes of it, none of which JSON writes as six.
fn shown(name: &str) -> Box<str> {
    let name: String = name
        .chars()
        .take(NAME_BYTES)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    name[..name.floor_char_boundary(NAME_BYTES)].into()
}

#[cfg(test)]
mod tests;
