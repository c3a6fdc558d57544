//! Logins that ended before their tokens did, and connections that administrators ended. The validator
//! asks here after its cache, and whoever puts an identity in force asks once more when it is listed: a
//! logout may have come in between.

use std::{
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{Identity, clock::Moment, memory::Memory};

/// Logouts remembered at most, of each kind: some 15 MB.
const BOUND: usize = 100_000;
/// Bytes of a `sid`, `sub`, `jti` or name that is remembered.
pub(crate) const MAX_NAME: usize = 255;

/// The kinds of logouts.
const SESSION: usize = 0;
const SUBJECT: usize = 1;
const CONNECTION: usize = 2;
const USER: usize = 3;
/// By `sub`.
const KNOWN_USER: usize = 4;

/// What a logout ends. Nodes tell each other in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Logout {
    /// One login session, by `sid`.
    Session(Arc<str>),
    /// Every login of a user before that moment, by `sub`.
    Subject {
        subject: Arc<str>,
        /// Seconds since 1970, by the issuer's clock, as in the `iat` of its tokens.
        at: u64,
    },
    /// One connection, by id, and no token.
    Connection(Arc<str>),
    /// Every connection of a user that was opened before, and no token.
    User {
        /// With a `subject`: the user's name, which is all that older nodes know a user by; empty where it
        /// is not this user's alone. Without: a `sub` or name that is not known where it was asked for.
        name: Arc<str>,
        /// Milliseconds since 1970, by the clock that the nodes share.
        at: u64,
        /// The user's `sub`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        subject: Option<Arc<str>>,
    },
}

/// What is remembered of a logout beside its kind and a name.
struct Said {
    /// The moment until which it ends what has that name.
    at: u64,
    /// A user's name, where the user is known by `sub`.
    name: Option<Arc<str>>,
}

impl Logout {
    /// What is remembered of it: its kind, a name, and the moment until which it ends what has that name.
    fn parts(&self) -> (usize, &Arc<str>, u64) {
        match self {
            Self::Session(sid) => (SESSION, sid, 0),
            Self::Subject { subject, at } => (SUBJECT, subject, *at),
            Self::Connection(id) => (CONNECTION, id, 0),
            Self::User { subject: Some(subject), at, .. } => (KNOWN_USER, subject, *at),
            Self::User { name, at, subject: None } => (USER, name, *at),
        }
    }

    fn of(kind: usize, name: &Arc<str>, said: &Said) -> Self {
        let (known, at) = (Arc::clone(name), said.at);
        match kind {
            SESSION => Self::Session(known),
            SUBJECT => Self::Subject { subject: known, at },
            CONNECTION => Self::Connection(known),
            USER => Self::User { name: known, at, subject: None },
            _ => {
                Self::User { name: said.name.clone().unwrap_or_default(), at, subject: Some(known) }
            }
        }
    }

    /// The name of a user who is known by `sub`.
    fn user_name(&self) -> Option<&Arc<str>> {
        match self {
            Self::User { name, subject: Some(_), .. } => Some(name),
            _ => None,
        }
    }

    /// What is remembered of it.
    pub(crate) fn name(&self) -> &str {
        self.parts().1
    }

    /// Whether the bearer of a token is logged out by this. A token of the same second is: it may have
    /// been issued before.
    pub(crate) fn ends(&self, identity: &Identity) -> bool {
        match self {
            Self::Session(sid) => identity.session.as_ref() == Some(sid),
            Self::Subject { subject, at } => {
                identity.subject == *subject && identity.issued_at <= *at
            }
            Self::Connection(_) | Self::User { .. } => false,
        }
    }
}

/// The logouts that this node knows of, each for as long as the node that heard of it said.
pub(super) struct Revocations {
    lifetime: Duration,
    /// It was said that tokens live longer.
    warned: AtomicBool,
    /// It was said that there are too many.
    forgot: AtomicBool,
    /// By kind and name, each with its moment.
    kinds: [RwLock<Memory<Said>>; 5],
}

impl Revocations {
    /// Remembers a logout of this node for `lifetime`.
    pub(super) fn new(lifetime: Duration) -> Self {
        Self {
            lifetime,
            warned: AtomicBool::new(false),
            forgot: AtomicBool::new(false),
            kinds: [(); 5].map(|()| RwLock::new(Memory::new(BOUND))),
        }
    }

    /// How long a logout is remembered.
    pub(super) fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Every logout that is remembered, and for how long it still will be.
    pub(super) fn all(&self) -> Vec<(Logout, Duration)> {
        let now = Moment::now();
        let mut all = Vec::new();
        for kind in 0..self.kinds.len() {
            let known = self.known(kind);
            let known = known.all(now);
            all.extend(known.map(|(name, said, left)| (Logout::of(kind, name, said), left)));
        }
        all
    }

    /// Whether all that the logout ends is refused already.
    pub(super) fn know(&self, logout: &Logout) -> bool {
        let (kind, name, at) = logout.parts();
        self.known(kind).get(name, Moment::now()).is_some_and(|known| at <= known.at)
    }

    /// Refuses what the logout ends, for so long, or for as long as was said before.
    pub(super) fn add(&self, logout: &Logout, left: Duration) {
        let now = Moment::now();
        let (kind, name, at) = logout.parts();
        let mut known = self.kinds[kind].write().unwrap_or_else(PoisonError::into_inner);
        // Logouts may arrive in another order than they were made in.
        let mut last = Said { at, name: logout.user_name().cloned() };
        if let Some(newer) = known.get(name, now).filter(|known| known.at > at) {
            last = Said { at: newer.at, name: newer.name.clone() };
        }
        if !known.insert(Arc::clone(name), last, left, now)
            && !self.forgot.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(bound = BOUND, "too many logouts: those that end first are forgotten");
        }
    }

    fn known(&self, kind: usize) -> RwLockReadGuard<'_, Memory<Said>> {
        self.kinds[kind].read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an administrator ended a connection of a user that was opened at a moment. Where only a name
    /// or a `sub` is known, `is_meant` says whether it is this user's alone.
    pub(super) fn have_ended(
        &self,
        id: &str,
        user: &Identity,
        since: u64,
        is_meant: impl Fn(&str) -> bool,
    ) -> bool {
        let now = Moment::now();
        let ended =
            |kind, name: &str| self.known(kind).get(name, now).is_some_and(|said| since <= said.at);
        self.known(CONNECTION).get(id, now).is_some()
            || ended(KNOWN_USER, &user.subject)
            || [&user.subject, &user.username]
                .iter()
                .any(|name| ended(USER, name) && is_meant(name))
    }

    /// Looks at how long a token lives that a logout could end: says once if that is too long.
    pub(super) fn expect(&self, identity: &Identity) {
        if identity.session.is_some()
            && identity.expires_in() > self.lifetime
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                expires_in = identity.expires_in().as_secs(),
                "tokens live longer than REVOCATION_LIFETIME: after a logout they are good again"
            );
        }
    }

    /// Whether the bearer of a token was logged out.
    pub(super) fn cover(&self, identity: &Identity) -> bool {
        let now = Moment::now();
        let session = identity.session.as_deref();
        session.is_some_and(|sid| self.known(SESSION).get(sid, now).is_some())
            || self
                .known(SUBJECT)
                .get(&identity.subject, now)
                .is_some_and(|said| identity.issued_at <= said.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn identity(subject: &str, session: Option<&str>, issued_at: u64) -> Identity {
        Identity {
            subject: subject.into(),
            issuer: "issuer".into(),
            session: session.map(Arc::from),
            username: "ann".into(),
            roles: [].into(),
            issued_at,
            expires_at: u64::MAX,
        }
    }

    #[test]
    fn a_logout_ends_its_session_or_what_its_subject_had_before() {
        let session = Logout::Session("s1".into());
        let subject = Logout::Subject { subject: "ann".into(), at: 100 };
        for (of, by_session, by_subject) in [
            (identity("ann", Some("s1"), 99), true, true),
            (identity("ann", Some("s2"), 100), false, true),
            (identity("ann", None, 0), false, true),
            (identity("ann", Some("s1"), 101), true, false),
            (identity("bob", Some("s1"), 99), true, false),
            (identity("bob", None, 99), false, false),
        ] {
            for (logout, ends) in [(&session, by_session), (&subject, by_subject)] {
                let revocations = Revocations::new(MINUTE);
                assert!(!revocations.cover(&of));
                revocations.add(logout, MINUTE);
                assert_eq!((logout.ends(&of), revocations.cover(&of)), (ends, ends), "{of:?}");
            }
        }
    }

    #[test]
    fn an_older_logout_does_not_take_back_a_newer_one() {
        let revocations = Revocations::new(MINUTE);
        for at in [100, 50] {
            revocations.add(&Logout::Subject { subject: "ann".into(), at }, MINUTE);
        }
        assert!(revocations.cover(&identity("ann", None, 100)));
        assert!(!revocations.cover(&identity("ann", None, 101)));
    }

    #[test]
    fn a_logout_is_forgotten_after_its_lifetime() {
        let revocations = Revocations::new(MINUTE);
        revocations.add(&Logout::Session("s1".into()), Duration::ZERO);
        assert!(!revocations.cover(&identity("ann", Some("s1"), 0)));
    }

    #[test]
    fn a_node_with_a_short_lifetime_keeps_what_another_one_keeps_for_longer() {
        let revocations = Revocations::new(Duration::from_secs(1));
        let session = Logout::Session("s1".into());
        revocations.add(&session, MINUTE);
        revocations.add(&session, revocations.lifetime());
        let all = revocations.all();
        assert!(all[0].1 > MINUTE / 2, "{all:?}");
    }

    #[test]
    fn logouts_that_are_told_to_another_node_are_refused_there_and_no_longer_than_here() {
        let (here, there) = (Revocations::new(MINUTE), Revocations::new(2 * MINUTE));
        let logouts = [
            Logout::Session("s1".into()),
            Logout::Subject { subject: "ann".into(), at: 7 },
            Logout::Connection("c1".into()),
            Logout::User { name: "bob".into(), at: 9, subject: None },
            Logout::User { name: "bob".into(), at: 9, subject: Some("b0b".into()) },
        ];
        for logout in &logouts {
            here.add(logout, MINUTE);
        }
        for (logout, left) in here.all() {
            assert!(!there.know(&logout));
            there.add(&serde_json::from_value(serde_json::json!(logout)).unwrap(), left);
        }
        assert!(there.cover(&identity("bob", Some("s1"), 9)));
        assert!(there.cover(&identity("ann", None, 7)) && !there.cover(&identity("ann", None, 8)));
        assert!(there.all().iter().all(|(_, left)| *left <= MINUTE));
        assert!(logouts.iter().all(|logout| there.know(logout)));
        assert!(!there.know(&Logout::Subject { subject: "ann".into(), at: 8 }));
        there.add(&Logout::Session("s2".into()), Duration::ZERO);
        assert!(!there.cover(&identity("bob", Some("s2"), 9)));
    }

    #[test]
    fn an_administrator_ends_what_a_user_had_before_by_sub_and_by_a_name_that_is_this_users_alone()
    {
        let by_sub = |at| Logout::User { name: "".into(), at, subject: Some("7a1f".into()) };
        let by_name = |name: &str| Logout::User { name: name.into(), at: 9, subject: None };
        for (logout, since, is_meant, ended) in [
            (by_sub(9), 9, false, true),
            (by_sub(9), 10, true, false),
            (by_name("ann"), 9, true, true),
            (by_name("ann"), 10, true, false),
            (by_name("ann"), 9, false, false),
            (by_name("7a1f"), 9, true, true),
            (by_name("bob"), 9, true, false),
            // One that stands in nobody's way but the user's of this `sub`.
            (
                Logout::User { name: "ann".into(), at: 9, subject: Some("b0b".into()) },
                9,
                true,
                false,
            ),
        ] {
            let revocations = Revocations::new(MINUTE);
            revocations.add(&logout, MINUTE);
            let user = identity("7a1f", None, 0);
            assert_eq!(
                revocations.have_ended("c1", &user, since, |_| is_meant),
                ended,
                "{logout:?}"
            );
        }
        // The later moment stands, with the name that was told with it.
        let revocations = Revocations::new(MINUTE);
        let named =
            |name: &str, at| Logout::User { name: name.into(), at, subject: Some("7a1f".into()) };
        for logout in [named("ann", 9), named("", 5)] {
            revocations.add(&logout, MINUTE);
        }
        let all: Vec<_> = revocations.all().into_iter().map(|(logout, _)| logout).collect();
        assert_eq!(all, [named("ann", 9)]);
    }
}
