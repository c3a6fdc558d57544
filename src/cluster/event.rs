//! What nodes tell each other, in JSON on one channel: `{"node":"<who>","events":[{"<kind>":…},…]}`.
//!
//! A node passes over a kind that it does not know, so that nodes of two versions can run side by side.

use std::{borrow::Cow, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use crate::auth::Logout;

/// Events in their order, each encoded by itself, and the node where they happened.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Envelope<'a, E> {
    /// Empty: nobody's own, every node carries them out.
    #[serde(borrow)]
    pub(super) node: Cow<'a, str>,
    pub(super) events: E,
}

/// Something that every node is to carry out on its own connections.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// A push to all, or to one user.
    Push {
        pkg_id: i32,
        /// With a `subject`: the user's name, which is all that older nodes know a user by; empty where it
        /// is not this user's alone. Without: a `sub` or a name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// The user's `sub`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        subject: Option<String>,
        /// All of these are needed to see it. Older nodes send none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        roles: Option<Vec<String>>,
        data: Box<RawValue>,
    },
    /// The end of connections whose places newer ones took. It is Redis that sends it.
    Replaced(Vec<Uuid>),
    /// Logouts, and what administrators end.
    LogOut(Vec<Revocation>),
    /// An administrator has the identity provider's keys fetched.
    RefreshKeys {},
}

impl Event {
    pub(super) fn encode(&self) -> Box<RawValue> {
        to_raw_value(self).expect("an event has nothing that JSON lacks")
    }
}

/// A logout and the end of its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Revocation {
    pub(super) logout: Logout,
    /// Seconds since 1970, by the clock that the nodes share. Older nodes go by their own.
    pub(super) until: u64,
}

impl Revocation {
    /// To the nearest second, so that it neither grows nor shrinks on its way from node to node.
    pub(super) fn lasting(logout: Logout, left: Duration, now: Duration) -> Self {
        Self { logout, until: now.as_secs() + (left + Duration::from_millis(500)).as_secs() }
    }

    /// The time that is left of it.
    pub(super) fn left(&self, now: Duration) -> Duration {
        Duration::from_secs(self.until.saturating_sub(now.as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_written_as_the_document_says() {
        let data = to_raw_value(&serde_json::json!({ "id": 1 })).unwrap();
        let log_out = |logout| Event::LogOut(vec![Revocation { logout, until: 9 }]);
        let push =
            |user: Option<&str>, subject: Option<&str>, roles: Option<&[&str]>| Event::Push {
                pkg_id: 3,
                user: user.map(Into::into),
                subject: subject.map(Into::into),
                roles: roles.map(|roles| roles.iter().map(|role| (*role).to_owned()).collect()),
                data: data.clone(),
            };
        for (event, text) in [
            (push(None, None, None), r#"{"push":{"pkg_id":3,"data":{"id":1}}}"#),
            (
                push(None, None, Some(&["get-authors"])),
                r#"{"push":{"pkg_id":3,"roles":["get-authors"],"data":{"id":1}}}"#,
            ),
            (
                push(Some("ann"), None, None),
                r#"{"push":{"pkg_id":3,"user":"ann","data":{"id":1}}}"#,
            ),
            (
                push(Some("ann"), Some("7a1f"), Some(&[])),
                r#"{"push":{"pkg_id":3,"user":"ann","subject":"7a1f","roles":[],"data":{"id":1}}}"#,
            ),
            (
                Event::Replaced(vec![Uuid::nil()]),
                r#"{"replaced":["00000000-0000-0000-0000-000000000000"]}"#,
            ),
            (Event::RefreshKeys {}, r#"{"refresh_keys":{}}"#),
            (
                log_out(Logout::Session("s1".into())),
                r#"{"log_out":[{"logout":{"session":"s1"},"until":9}]}"#,
            ),
            (
                log_out(Logout::Subject { subject: "ann".into(), at: 7 }),
                r#"{"log_out":[{"logout":{"subject":{"subject":"ann","at":7}},"until":9}]}"#,
            ),
            (
                log_out(Logout::Connection("c1".into())),
                r#"{"log_out":[{"logout":{"connection":"c1"},"until":9}]}"#,
            ),
            (
                log_out(Logout::User { name: "ann".into(), at: 7, subject: None }),
                r#"{"log_out":[{"logout":{"user":{"name":"ann","at":7}},"until":9}]}"#,
            ),
            (
                log_out(Logout::User { name: "ann".into(), at: 7, subject: Some("7a1f".into()) }),
                r#"{"log_out":[{"logout":{"user":{"name":"ann","at":7,"subject":"7a1f"}},"until":9}]}"#,
            ),
        ] {
            assert_eq!(event.encode().get(), text);
            let read: Event = serde_json::from_str(text).unwrap();
            assert_eq!(read.encode().get(), text);
        }
    }

    #[test]
    fn an_envelope_holds_events_of_kinds_that_nobody_knows() {
        let events = [Event::Replaced(vec![]).encode(), to_raw_value("?").unwrap()];
        let text = serde_json::to_string(&Envelope { node: "blue-1".into(), events }).unwrap();
        assert_eq!(text, r#"{"node":"blue-1","events":[{"replaced":[]},"?"]}"#);
        let read: Envelope<Vec<&RawValue>> = serde_json::from_str(&text).unwrap();
        assert_eq!(read.events.iter().map(|event| event.get().len()).sum::<usize>(), 18);
    }
}
