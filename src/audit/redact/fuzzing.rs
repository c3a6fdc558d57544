//! Request data in any text: the row's is JSON of a bounded size that a database takes, and a secret that was
//! planted in it is not in there.

use super::*;

/// No text of a fuzzer has it by chance.
const SECRET: &str = "hush-hush-4711";
/// Each is a secret with any letters around it.
const NAMES: &[&str] = &["password", "TOKEN", "Secret", "api_key", "Authorization", "credential"];

/// A line of what stands around a secret's name, then the data.
pub(crate) fn redaction(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let (around, data) = text.split_once('\n').unwrap_or(("", text));
    let shown = recorded(data);
    if let Ok(value) = serde_json::from_str::<Value>(data) {
        let blanks = serde_json::to_string_pretty(&value).expect("a tree can be written");
        if !shown.to_string().contains("_omitted_bytes") {
            assert_eq!(recorded(&value.to_string()), recorded(&blanks), "blanks say nothing");
        }
        hides(around, value);
    }
}

/// What a row has of request data.
fn recorded(text: &str) -> Value {
    let shown = data(text);
    assert!(shown.get().len() <= MAX_DATA, "{} bytes", shown.get().len());
    let shown = serde_json::from_str(shown.get()).expect("a row's data is JSON");
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

/// Plants a secret in every object, and the whole in a text.
fn hides(around: &str, value: Value) {
    if around.contains(SECRET) || value.to_string().contains(SECRET) {
        return;
    }
    let (before, after) = around.split_at(around.floor_char_boundary(around.len() / 2));
    let name = format!("{before}{}{after}", NAMES[around.len() % NAMES.len()]);
    let secret = match around.len() / NAMES.len() % 3 {
        0 => json!(SECRET),
        1 => json!([{ "a": SECRET }]),
        _ => json!({ SECRET: { "b": [SECRET] } }),
    };
    let planted = planted(value, &name, &secret);
    let nested = json!([{ "text": planted.to_string() }]);
    for value in [planted, nested] {
        let shown = recorded(&value.to_string()).to_string();
        assert!(!shown.contains(SECRET), "{name:?} shows its secret: {shown}");
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
