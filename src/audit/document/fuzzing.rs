//! Request data in any text: the row's is JSON of a bounded size that a database takes, and a secret that was
//! planted in it is not in there.

use serde::Deserialize;

use super::*;

/// No text of a fuzzer has it by chance.
const SECRET: &str = "hush-hush-4711";
/// Each is a secret with any letters around it.
const NAMES: &[&str] = &["password", "TOKEN", "Secret", "api_key", "Authorization", "credential"];
/// Each is a secret whatever its name, with any blanks around it.
const VALUES: &[&str] = &[
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
    "4111 1111 1111 1111",
    "4111111111111111",
];

/// As a change's input may look.
#[derive(Debug, PartialEq, Deserialize)]
struct Input {
    id: i32,
    name: Option<String>,
    page: Option<Page>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Page {
    number: u32,
}

/// A line of what stands around a secret's name, then the data.
pub(crate) fn redaction(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let (around, data) = text.split_once('\n').unwrap_or(("", text));
    recorded(data);
    typed(data);
    let Ok(value) = serde_json::from_str::<Value>(data) else { return };
    let blanks = serde_json::to_string_pretty(&value).expect("a tree can be written");
    let shown = recorded(&value.to_string());
    if !shown.to_string().contains("_bytes\":") {
        assert_eq!(shown, recorded(&blanks), "blanks say nothing");
    }
    hides(around, value);
}

/// What a row has of request data.
fn recorded(text: &str) -> Value {
    stored(&Recorded::document(text))
}

fn stored(shown: &str) -> Value {
    assert!(shown.len() <= MAX_DATA, "{} bytes", shown.len());
    let shown = serde_json::from_str(shown).expect("a row's data is JSON");
    assert!(!has_nul(&shown), "Postgres takes no NUL");
    shown
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(members) => {
            members.iter().any(|(name, value)| name.contains('\0') || has_nul(value))
        }
        _ => false,
    }
}

/// What is read is what serde reads of objects; the id of what is changed is there, and nothing that the type
/// does not know.
fn typed(text: &str) {
    let shown = stored(&Recorded::input::<Input>(text));
    let read = objects::read::<Input>(text);
    let plain = serde_json::from_str::<Input>(text);
    let Ok(input) = read else {
        let tree = serde_json::from_str::<Value>(text).unwrap_or_default();
        let is_array = tree.is_array() || tree["page"].is_array();
        assert!(plain.is_err() || is_array, "{text} is an object, and refused");
        return;
    };
    assert_eq!(input, plain.expect("what is read of objects is read"));
    assert_eq!(shown["id"], json!(input.id), "{shown}");
    let Value::Object(members) = &shown else { unreachable!("an object is shown as {shown}") };
    for (name, value) in members {
        let is_known = ["id", "name", "page"].contains(&&**name);
        let is_hidden =
            value.as_str().is_some_and(|text| text.starts_with(UNKNOWN) || text == HIDDEN);
        assert!(is_known || is_hidden, "{name} is not of the type: {value}");
    }
}

/// Plants a secret in every object, and the whole in a text.
fn hides(around: &str, value: Value) {
    let all = value.to_string();
    if around.contains(SECRET) || all.contains(SECRET) {
        return;
    }
    let (before, after) = around.split_at(around.floor_char_boundary(around.len() / 2));
    let name = format!("{before}{}{after}", NAMES[around.len() % NAMES.len()]);
    let secret = match around.len() / NAMES.len() % 3 {
        0 => json!(SECRET),
        1 => json!([{ "a": SECRET }]),
        _ => json!({ SECRET: { "b": [SECRET] } }),
    };
    is_hidden(planted(value.clone(), &name, &secret), SECRET);
    let secret = VALUES[around.len() % VALUES.len()];
    if !all.contains(secret) {
        is_hidden(planted(value, "note", &json!(format!(" {secret}\t"))), secret);
    }
}

fn is_hidden(planted: Value, secret: &str) {
    let nested = json!([{ "text": planted.to_string() }]);
    for value in [planted, nested] {
        let shown = recorded(&value.to_string()).to_string();
        assert!(!shown.contains(secret), "a secret is shown: {shown}");
    }
}

fn planted(value: Value, name: &str, secret: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let members = members.into_iter().map(|(known, v)| (known, planted(v, name, secret)));
            let more = (name.to_owned(), secret.clone());
            Value::Object(members.chain([more]).collect())
        }
        Value::Array(items) => items.into_iter().map(|item| planted(item, name, secret)).collect(),
        value => value,
    }
}
