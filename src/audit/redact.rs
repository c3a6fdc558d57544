//! From an event to a row: sizes are bounded, and nothing stays that a database refuses. Request data is
//! ready for it already.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use super::{
    Cause, Entry,
    document::{Recorded, storable},
    secrets::without_secrets,
    summary::Scope,
};
use crate::{config::network_of, metrics::Label, store::Action};

/// Characters of any other text in a row.
const MAX_TEXT: usize = 1024;
/// Bytes of a text in a column with an index: Postgres refuses a row of 2,704 bytes in one.
const MAX_INDEXED: usize = 512;

/// The row of an entry.
pub(super) fn row(entry: &Entry) -> Action {
    let event = &entry.event;
    let user = event.user.as_deref();
    let claimed = || event.claimed.as_deref().map(|name| cut(&without_secrets(name)).into());
    let correlation = || indexed(&event.remote.correlation);
    // Of a row that sums up many callers nothing is one caller's, and a server's own has no caller.
    let of_one = !entry.scope.is_some_and(Scope::is_other) && event.cause != Cause::Server;
    let request_id = event.req_id.map_or_else(correlation, |id| id.to_string().into());
    Action {
        uid: entry.id,
        timestamp: format!("{:.6}", entry.at).into(),
        user_id: user.map(|user| indexed(&user.subject)),
        username: user.map(|user| indexed(&user.username)).or_else(claimed),
        user_roles: user.map(|user| roles(&user.roles)).unwrap_or_default(),
        action_type: indexed(&event.action),
        resource: indexed(&event.resource),
        outcome: event.outcome.label().into(),
        ip_address: of_one.then(|| address(entry).into()),
        user_agent: event.remote.user_agent.as_deref().filter(|_| of_one).map(plain),
        request_id: of_one.then_some(request_id),
        request_data: event.data.as_ref().map(Recorded::json),
        response_status: of_one.then_some(event.status),
        error_message: event.error.as_deref().map(|told| text(&without_secrets(told))),
        duration_ms: event.took.map(|took| took.as_micros() as f64 / 1000.0),
    }
}

/// The client's address, or the network of all that were summed up.
fn address(entry: &Entry) -> String {
    let address = entry.event.remote.address;
    match (entry.scope, network_of(address)) {
        (Some(Scope::Network | Scope::UsersOfNetwork), network @ IpAddr::V6(_)) => {
            format!("{network}/64")
        }
        _ => address.to_string(),
    }
}

fn roles(roles: &Arc<[Box<str>]>) -> Arc<[Box<str>]> {
    if roles.iter().all(|role| fits(role)) {
        return Arc::clone(roles);
    }
    roles.iter().map(|role| (*text(role)).into()).collect()
}

/// A text that many rows have, for a column with an index.
fn indexed(shared: &Arc<str>) -> Arc<str> {
    match cut(shared) {
        Cow::Borrowed(whole) if whole.len() == shared.len() => Arc::clone(shared),
        cut => cut.into(),
    }
}

/// As much of a text as an index holds, which ends with a whole character.
pub(crate) fn cut(text: &str) -> Cow<'_, str> {
    let cut = &text[..text.floor_char_boundary(MAX_INDEXED)];
    if !cut.contains('\0') {
        return cut.into();
    }
    let mut text = storable(cut.into()).into_owned();
    text.truncate(text.floor_char_boundary(MAX_INDEXED));
    text.into()
}

fn fits(text: &str) -> bool {
    text.len() <= MAX_TEXT && !text.contains('\0')
}

/// A text that a client chose, and that is not looked through elsewhere.
fn plain(given: &str) -> Arc<str> {
    text(&without_secrets(given))
}

fn text(text: &str) -> Arc<str> {
    if fits(text) {
        return text.into();
    }
    storable(text.chars().take(MAX_TEXT).collect::<String>().into()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_bounded() {
        assert_eq!(*text(&"ü".repeat(MAX_TEXT + 1)), "ü".repeat(MAX_TEXT));
    }
}
