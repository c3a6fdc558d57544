//! From an event to a row: secrets go, sizes are bounded, and nothing stays that a database refuses.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use serde_json::{
    Value, json,
    value::{RawValue, to_raw_value},
};

use super::{Entry, summary::Scope};
use crate::{config::network_of, metrics::Label, store::Action};

/// Bytes of request data in a row.
const MAX_DATA: usize = 4096;
/// Characters of any other text in a row.
const MAX_TEXT: usize = 1024;
/// Bytes of a text in a column with an index: Postgres refuses a row of 2,704 bytes in one.
const MAX_INDEXED: usize = 512;
const HIDDEN: &str = "***";

/// In a member's name without its separators, anywhere.
const SECRETS: &[&str] = &[
    "password",
    "passwd",
    "passphrase",
    "passcode",
    "token",
    "secret",
    "authorization",
    "credential",
    "apikey",
    "privatekey",
    "socialsecurity",
    "pincode",
    "card",
];
/// With a `card` in them, and no secrets.
const PLAIN: &[&str] =
    &["discard", "postcard", "wildcard", "scorecard", "cardinal", "cardio", "cardiac"];
/// As a whole word of a member's name, or at one of its ends.
const SECRET_WORDS: &[&str] = &["cvv", "cvc", "ssn", "pwd", "pin", "jwt"];
/// Long enough to be no part of a word by chance.
const SECRET_ENDS: &[&str] = &["cvv", "cvc", "ssn", "pwd"];

/// The row of an entry.
pub(super) fn row(entry: &Entry) -> Action {
    let event = &entry.event;
    let user = event.user.as_deref();
    let claimed = || event.claimed.as_deref().map(|name| cut(name).into());
    let correlation = || indexed(&event.remote.correlation);
    // Of a row that sums up many callers nothing is one caller's.
    let of_one = !entry.scope.is_some_and(Scope::is_other);
    let request_id = event.req_id.map_or_else(correlation, |id| id.to_string().into());
    Action {
        id: entry.id,
        timestamp: format!("{:.6}", entry.at).into(),
        user_id: user.map(|user| indexed(&user.subject)),
        username: user.map(|user| indexed(&user.username)).or_else(claimed),
        user_roles: user.map(|user| roles(&user.roles)).unwrap_or_default(),
        action_type: indexed(&event.action),
        resource: indexed(&event.resource),
        outcome: event.outcome.label().into(),
        ip_address: of_one.then(|| address(entry).into()),
        user_agent: event.remote.user_agent.as_deref().filter(|_| of_one).map(text),
        request_id: of_one.then_some(request_id),
        request_data: event.data.as_deref().map(data),
        response_status: of_one.then_some(event.status),
        error_message: event.error.as_deref().map(text),
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

/// What stands for data that is too large: its size.
pub(super) fn omitted(bytes: usize) -> String {
    json!({ "_omitted_bytes": bytes }).to_string()
}

/// Request data as a row has it.
fn data(raw: &str) -> Box<RawValue> {
    let shown = match serde_json::from_str(raw) {
        Ok(value) => written(&redacted(value)),
        // Such as a number that no type holds: what is not understood may hold anything.
        Err(_) => written(&json!({ "_unreadable_bytes": raw.len() })),
    };
    if shown.get().len() <= MAX_DATA {
        return shown;
    }
    written(&json!({ "_omitted_bytes": raw.len() }))
}

fn written(value: &Value) -> Box<RawValue> {
    to_raw_value(value).expect("a JSON value is written as JSON")
}

fn redacted(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let member = |(name, value): (String, Value)| {
                let value = if is_secret(&name) { HIDDEN.into() } else { redacted(value) };
                (storable(name), value)
            };
            Value::Object(members.into_iter().map(member).collect())
        }
        Value::Array(items) => items.into_iter().map(redacted).collect(),
        // JSON within JSON.
        Value::String(text) if text.trim_start().starts_with(['{', '[']) => {
            let shown = serde_json::from_str(&text).map(|value| redacted(value).to_string());
            shown.unwrap_or_else(|_| storable(text)).into()
        }
        Value::String(text) => storable(text).into(),
        value => value,
    }
}

fn is_secret(name: &str) -> bool {
    let mut letters: String =
        name.chars().filter(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect();
    // Here and below, what copies is left to the few names that call for it.
    if SECRET_WORDS.iter().any(|word| letters.contains(word))
        && words(name).iter().any(|word| SECRET_WORDS.contains(&word.as_str()))
    {
        return true;
    }
    if letters.contains("card") {
        for plain in PLAIN {
            letters = letters.replace(plain, "");
        }
    }
    SECRETS.iter().any(|secret| letters.contains(secret))
        || SECRET_ENDS.iter().any(|end| letters.starts_with(end) || letters.ends_with(end))
}

/// The words of `card_number`, `cardNumber` or `CARD-NUMBER`, in lower case.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for c in name.chars() {
        let begins = !c.is_alphabetic() || (c.is_uppercase() && before.is_lowercase());
        if begins {
            words.push(String::new());
        }
        if c.is_alphabetic()
            && let Some(word) = words.last_mut()
        {
            word.extend(c.to_lowercase());
        }
        before = c;
    }
    words
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
fn cut(text: &str) -> Cow<'_, str> {
    let cut = &text[..text.floor_char_boundary(MAX_INDEXED)];
    if !cut.contains('\0') {
        return cut.into();
    }
    let mut text = storable(cut.to_owned());
    text.truncate(text.floor_char_boundary(MAX_INDEXED));
    text.into()
}

fn fits(text: &str) -> bool {
    text.len() <= MAX_TEXT && !text.contains('\0')
}

fn text(text: &str) -> Arc<str> {
    if fits(text) {
        return text.into();
    }
    storable(text.chars().take(MAX_TEXT).collect()).into()
}

/// Postgres holds no NUL.
fn storable(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(raw: &str) -> String {
        data(raw).get().to_owned()
    }

    #[test]
    fn secrets_go_at_any_depth_and_in_any_case() {
        for name in [
            "password",
            "Password",
            "PASSWORD",
            "user_password",
            "newPassword",
            "passwd",
            "token",
            "access_token",
            "refreshToken",
            "X-Auth-Token",
            "secret",
            "clientSecret",
            "authorization",
            "Authorization",
            "card",
            "card_number",
            "cardNumber",
            "creditCard",
            "credit-card",
            "cvv",
            "CVC",
            "ssn",
            "SSN",
            "social_security_number",
            "socialSecurity",
            "pin",
            "api_key",
            "card1",
            "CARDINFO",
            "ssn2",
            "SSNumber",
            "userSSN",
            "PINCode",
        ] {
            for (raw, expected) in [
                (json!({ name: "hush" }), json!({ name: "***" })),
                (json!({ name: { "deep": ["hush"] } }), json!({ name: "***" })),
                (json!({ name: 4711 }), json!({ name: "***" })),
                (json!([{ "a": [{ name: "hush" }] }]), json!([{ "a": [{ name: "***" }] }])),
            ] {
                assert_eq!(shown(&raw.to_string()), expected.to_string(), "{name}");
            }
        }
    }

    #[test]
    fn names_that_only_sound_like_secrets_stay() {
        for name in
            ["name", "business_name", "discard", "postcard", "cardinality", "spin", "passing"]
        {
            let raw = json!({ name: "plain" }).to_string();
            assert_eq!(shown(&raw), raw);
        }
    }

    #[test]
    fn json_in_a_text_is_looked_through_too() {
        let raw = json!({ "a": " {\"password\":\"hush\",\"b\":1}", "c": "[not json" }).to_string();
        let expected = json!({ "a": "{\"b\":1,\"password\":\"***\"}", "c": "[not json" });
        assert_eq!(serde_json::from_str::<Value>(&shown(&raw)).unwrap(), expected);
    }

    #[test]
    fn what_a_database_or_a_reader_could_stumble_over_is_replaced() {
        assert_eq!(shown(r#"{"a\u0000":"b\u0000c"}"#), "{\"a\u{fffd}\":\"b\u{fffd}c\"}");
        for unreadable in ["{\"a\":NaN}", "{\"a\":1e999}", r#"{"a":"\ud800"}"#, "{"] {
            assert_eq!(
                shown(unreadable),
                format!("{{\"_unreadable_bytes\":{}}}", unreadable.len())
            );
        }
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert_eq!(shown(&deep), r#"{"_unreadable_bytes":400}"#);
    }

    #[test]
    fn data_is_bounded() {
        let fits = json!({ "a": "x".repeat(MAX_DATA - 8) }).to_string();
        assert_eq!(shown(&fits), fits);
        let long = json!({ "a": "x".repeat(MAX_DATA) }).to_string();
        assert_eq!(shown(&long), omitted(long.len()));
        assert_eq!(*text(&"ü".repeat(MAX_TEXT + 1)), "ü".repeat(MAX_TEXT));
    }
}
