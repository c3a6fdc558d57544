//! Logins and refreshes over WebSocket: a row for each session and each fresh token, not for each socket.
//!
//! A node remembers which sessions it recorded, so a further socket costs one look-up. The id of the row
//! is made of the `sid`: where several nodes record one session, or one node does again after a
//! restart, the database passes over the row that it has. Tokens without a `sid` have a row for each node.

use std::{
    collections::{HashSet, VecDeque},
    hash::BuildHasher,
    sync::{Arc, Mutex, PoisonError},
};

use foldhash::{fast, quality::RandomState};
use serde_json::json;
use uuid::Uuid;

use super::{Audit, Cause, Event, Recorded, room::Part};
use crate::{
    auth::{Identity, Remote},
    metrics::AuditOutcome,
    protocol::CloseReason,
};

/// Sessions and tokens that a node remembers, 16 bytes and a little each. The oldest are forgotten first.
const BOUND: usize = 100_000;
/// Of the ids of these rows.
const NAMESPACE: Uuid = Uuid::from_u128(0x5f0c_93a1_7c0e_4b5d_9d3b_61a8_2e47_f0c6);

/// What makes a row once.
#[derive(Hash)]
enum Name<'a> {
    Session(&'a str),
    /// A token has no name of its own here: its user, `iat` and `exp` are told apart.
    Token(u64, u64),
    Refresh(u64, u64),
}

impl<'a> Name<'a> {
    fn of_login(identity: &'a Identity) -> Self {
        match &identity.session {
            Some(sid) => Self::Session(sid),
            None => Self::Token(identity.issued_at, identity.expires_at),
        }
    }

    fn of_refresh(identity: &Identity) -> Self {
        Self::Refresh(identity.issued_at, identity.expires_at)
    }

    /// The id of its row: the same on every node, and made of nothing that could be guessed, since it
    /// outlives an erasure. Without a `sid` it is one of this node.
    fn id(&self, identity: &Identity) -> Uuid {
        let Some(sid) = &identity.session else { return Uuid::now_v7() };
        let refresh = match self {
            Self::Refresh(from, to) => Some((from, to)),
            Self::Session(_) | Self::Token(..) => None,
        };
        let text = json!([identity.issuer, identity.subject, sid, refresh]).to_string();
        Uuid::new_v5(&NAMESPACE, text.as_bytes())
    }
}

/// What was recorded.
pub(super) struct Sessions {
    bound: usize,
    /// With a key of this process: nobody can choose names that collide.
    hasher: RandomState,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    known: HashSet<u64, fast::RandomState>,
    order: VecDeque<u64>,
}

impl Sessions {
    pub(super) fn new() -> Self {
        Self { bound: BOUND, hasher: RandomState::default(), seen: Mutex::default() }
    }

    fn hash(&self, identity: &Identity, name: &Name<'_>) -> u64 {
        self.hasher.hash_one((&identity.issuer, &identity.subject, name))
    }

    fn forget(&self, identity: &Identity, name: &Name<'_>) {
        let hash = self.hash(identity, name);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        // The newest, most likely.
        if let Some(place) = seen.order.iter().rposition(|known| *known == hash) {
            seen.order.remove(place);
            seen.known.remove(&hash);
        }
    }

    /// Remembers a name; false: it was known.
    fn is_new(&self, identity: &Identity, name: &Name<'_>) -> bool {
        let hash = self.hash(identity, name);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.known.insert(hash) {
            return false;
        }
        seen.order.push_back(hash);
        if seen.order.len() > self.bound
            && let Some(oldest) = seen.order.pop_front()
        {
            seen.known.remove(&oldest);
        }
        true
    }
}

/// The session of a user as request data, where the issuer names it.
pub(crate) fn session_data(identity: &Identity) -> Option<Recorded> {
    let data = |sid| Recorded::own(json!({ "sid": sid }));
    identity.session.as_ref().map(data)
}

impl Audit {
    /// Records a login over WebSocket, once for each session.
    pub(crate) fn logged_in(
        &self,
        identity: &Arc<Identity>,
        remote: &Arc<Remote>,
        connection: Uuid,
    ) {
        let name = Name::of_login(identity);
        self.record_once(&name, "AUTH", "/web".into(), identity, remote, connection);
    }

    /// Records that a connection has a fresh token, once for each token.
    pub(crate) fn refreshed(
        &self,
        identity: &Arc<Identity>,
        remote: &Arc<Remote>,
        connection: Uuid,
    ) {
        let name = Name::of_refresh(identity);
        let resource = connection.to_string();
        self.record_once(&name, "REFRESH", resource, identity, remote, connection);
    }

    fn record_once(
        &self,
        name: &Name<'_>,
        action: &str,
        resource: String,
        identity: &Arc<Identity>,
        remote: &Arc<Remote>,
        connection: Uuid,
    ) {
        let is_kept = self.is_on() && self.config.logins;
        if !is_kept || !self.sessions.is_new(identity, name) {
            return;
        }
        let data = json!({ "connection": connection, "sid": identity.session });
        let (outcome, reason) = (AuditOutcome::Success, CloseReason::Normal);
        let event = Event {
            user: Some(Arc::clone(identity)),
            data: Some(Recorded::own(data)),
            status: 0,
            error: None,
            cause: Cause::Other,
            ..Event::of_connection(action, resource, outcome, remote, reason)
        };
        self.metrics.actions.inc(outcome);
        let room = self.space.take(event.bytes(), Part::Known);
        if room.is_none() {
            // It has no row of its own: the session's next socket makes one.
            self.sessions.forget(identity, name);
        }
        self.enter(name.id(identity), event, None, room);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(subject: &str, session: Option<&str>, issued_at: u64) -> Identity {
        Identity {
            subject: subject.into(),
            issuer: "issuer".into(),
            session: session.map(Arc::from),
            username: "ann".into(),
            roles: [].into(),
            issued_at,
            expires_at: issued_at + 300,
        }
    }

    #[test]
    fn a_session_is_new_once_however_many_tokens_it_has_and_a_token_without_one_once_too() {
        let sessions = Sessions::new();
        let is_new = |of: &Identity| sessions.is_new(of, &Name::of_login(of));
        for (of, new) in [
            (identity("ann", Some("s1"), 1), true),
            (identity("ann", Some("s1"), 2), false),
            (identity("ann", Some("s2"), 2), true),
            (identity("bob", Some("s1"), 1), true),
            (identity("ann", None, 1), true),
            (identity("ann", None, 1), false),
            (identity("ann", None, 2), true),
        ] {
            assert_eq!(is_new(&of), new, "{of:?}");
        }
        let ann = identity("ann", None, 1);
        assert!(sessions.is_new(&ann, &Name::of_refresh(&ann)));
    }

    #[test]
    fn the_memory_of_sessions_has_a_bound_and_the_oldest_goes_first() {
        let sessions = Sessions { bound: 2, ..Sessions::new() };
        let is_new = |sid: &str| {
            let of = identity("ann", Some(sid), 1);
            sessions.is_new(&of, &Name::of_login(&of))
        };
        assert!(is_new("a") && is_new("b") && !is_new("a") && is_new("c"));
        assert!(!is_new("b") && is_new("a"));
        let seen = sessions.seen.lock().unwrap();
        assert_eq!((seen.known.len(), seen.order.len()), (2, 2));
    }

    #[test]
    fn every_node_gives_the_row_of_a_session_the_same_id_and_that_of_a_nameless_one_another() {
        let ids: HashSet<_> = [
            identity("ann", Some("s1"), 1),
            identity("ann", Some("s1"), 2),
            identity("ann", Some("s2"), 1),
            identity("bob", Some("s1"), 1),
            identity("ann", None, 1),
            identity("ann", None, 1),
        ]
        .iter()
        .map(|of| Name::of_login(of).id(of))
        .collect();
        assert_eq!(ids.len(), 5);
        let (old, fresh) = (identity("ann", Some("s1"), 1), identity("ann", Some("s1"), 2));
        assert_ne!(Name::of_refresh(&old).id(&old), Name::of_refresh(&fresh).id(&fresh));
    }
}
