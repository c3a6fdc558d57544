//! What an erasure makes of a row: nothing in it names the person any more, and what was done stays.

use std::{collections::HashSet, sync::Arc};

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json, value::to_raw_value};
use uuid::Uuid;

use crate::store::Action;

/// Members of request data that say of whom a request is, wherever they stand.
const WHOM: &[&str] = &["user", "user_id", "username", "usernames", "subject", "subjects", "sub"];
/// Members of a person's own request data that stay, where they are numbers: what was changed, and how
/// often something happened.
const KEPT: &[&str] = &["id", "times"];

/// The member that names a session.
const SESSION: &str = "sid";

/// A person, and what stands for it afterwards.
#[derive(Debug, Clone)]
pub(super) struct Person {
    /// Its `sub`, also cut.
    pub(super) subjects: Vec<String>,
    /// Names by which it stands in rows that have no `user_id`.
    pub(super) usernames: Vec<String>,
    pub(super) pseudonym: Arc<str>,
    /// Its sessions, as its own rows name them: rows of logouts may have nothing else of it.
    pub(super) sessions: HashSet<String>,
}

/// How a row was about the person.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum About {
    /// The person did it, by `user_id`.
    Own,
    /// By a name that somebody gave.
    Named,
    /// Somebody did it to the person.
    Target,
}

impl Person {
    /// Takes the person out of a row; none where it is not in it.
    pub(super) fn blank(&mut self, action: &mut Action) -> Option<About> {
        let by_subject = action.user_id.as_deref().is_some_and(|id| self.is_subject(id));
        // The name of an operator is one of the operating system.
        let is_ours =
            action.action_type.starts_with("SERVER:") || action.action_type.starts_with("AUDIT:");
        let by_name = !is_ours
            && action.user_id.is_none()
            && action.username.as_deref().is_some_and(|name| self.is_name(name));
        if by_subject || by_name {
            if by_subject {
                self.sessions.extend(session(action));
            }
            self.blank_own(action);
            return Some(if by_subject { About::Own } else { About::Named });
        }
        self.blank_target(action).then_some(About::Target)
    }

    fn blank_own(&self, action: &mut Action) {
        action.user_id = action.user_id.as_ref().map(|_| Arc::clone(&self.pseudonym));
        action.username = action.username.as_ref().map(|_| Arc::clone(&self.pseudonym));
        (action.ip_address, action.user_agent, action.request_id) = (None, None, None);
        if let Some(data) = &action.request_data {
            let members: Map<String, Value> = serde_json::from_str(data.get()).unwrap_or_default();
            let mut kept: Map<_, _> = members
                .into_iter()
                .filter(|(name, value)| KEPT.contains(&&**name) && value.is_number())
                .collect();
            kept.insert("_erased".into(), json!(true));
            action.request_data = to_raw_value(&kept).ok();
        }
        // A connection's id leads to lines of the log that name its user.
        if action.resource.parse::<Uuid>().is_ok() {
            action.resource = Arc::clone(&self.pseudonym);
        }
        self.blank_resource(action);
        self.blank_message(action);
    }

    /// Rows of others keep whose they are.
    fn blank_target(&self, action: &mut Action) -> bool {
        let resource = self.blank_resource(action);
        let data = self.blank_data(action);
        // A message alone is no sign: it may have the name of something else.
        if resource || data {
            self.blank_message(action);
        }
        resource || data
    }

    fn blank_resource(&self, action: &mut Action) -> bool {
        if !action.resource.starts_with('/') {
            return false;
        }
        let mut found = false;
        let parts = action.resource.split('/').map(|part| {
            let is_person = self.is_in_path(part);
            found |= is_person;
            if is_person { &*self.pseudonym } else { part }
        });
        let blank = parts.collect::<Vec<_>>().join("/");
        if found {
            action.resource = blank.into();
        }
        found
    }

    fn is_in_path(&self, part: &str) -> bool {
        percent_decode_str(part).decode_utf8().is_ok_and(|part| self.is(&part))
    }

    fn blank_data(&self, action: &mut Action) -> bool {
        let Some(data) = &action.request_data else { return false };
        let Ok(mut value) = serde_json::from_str(data.get()) else { return false };
        let found = self.blank_value(&mut value, false);
        if found {
            action.request_data = to_raw_value(&value).ok();
        }
        found
    }

    fn blank_value(&self, value: &mut Value, says_whom: bool) -> bool {
        match value {
            Value::String(text) if says_whom && self.is(text) => {
                self.pseudonym.as_ref().clone_into(text);
                true
            }
            Value::Array(items) => items
                .iter_mut()
                .fold(false, |found, item| self.blank_value(item, says_whom) | found),
            Value::Object(members) => members.iter_mut().fold(false, |found, (name, value)| {
                let is_session = name == SESSION
                    && value.as_str().is_some_and(|sid| self.sessions.contains(sid));
                if is_session {
                    *value = json!(*self.pseudonym);
                }
                is_session || self.blank_value(value, WHOM.contains(&&**name)) | found
            }),
            _ => false,
        }
    }

    fn blank_message(&self, action: &mut Action) {
        let names_person = |text: &Arc<str>| {
            let mut names = self.subjects.iter().chain(&self.usernames);
            names.any(|name| has_word(text, name))
        };
        if action.error_message.as_ref().is_some_and(names_person) {
            action.error_message = None;
        }
    }

    fn is(&self, text: &str) -> bool {
        self.is_subject(text) || self.is_name(text)
    }

    fn is_subject(&self, text: &str) -> bool {
        self.subjects.iter().any(|subject| subject == text)
    }

    fn is_name(&self, text: &str) -> bool {
        self.usernames.iter().any(|name| name == text)
    }
}

/// The session that a row names.
fn session(action: &Action) -> Option<String> {
    let data: Value = serde_json::from_str(action.request_data.as_ref()?.get()).ok()?;
    Some(data.get(SESSION)?.as_str()?.to_owned())
}

/// Whether a name stands in a text by itself: `ann` is not in `channel`.
fn has_word(text: &str, name: &str) -> bool {
    let is_edge = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
    text.match_indices(name).any(|(at, found)| {
        is_edge(text[..at].chars().next_back()) && is_edge(text[at + found.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_as_a_word_and_in_no_other() {
        for (text, name, found) in [
            ("the user ann left", "ann", true),
            ("ann", "ann", true),
            ("(ann)", "ann", true),
            ("channel", "ann", false),
            ("anna, ann", "ann", true),
            ("joann", "ann", false),
            ("Zoë Z!", "Zoë Z", true),
            ("", "ann", false),
        ] {
            assert_eq!(has_word(text, name), found, "{text:?} {name:?}");
        }
    }
}
