//! Reading a request's `data` or body, with the path to what does not fit.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

use super::HandlerError;
use crate::{objects, protocol::ErrorBody};

/// What a column has to be equal to.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Exact(pub(crate) String);

impl TryFrom<String> for Exact {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        // Postgres cannot hold it, so no row has it.
        if text.contains('\0') { Err("a text without NUL is allowed") } else { Ok(Self(text)) }
    }
}

/// Reads JSON text; structs from objects alone. The path to a fault is looked for only when there is one: it costs a second pass.
pub(crate) fn read<T: DeserializeOwned>(text: &str) -> Result<T, HandlerError> {
    objects::read(text).map_err(|first| {
        let again = &mut serde_json::Deserializer::from_str(text);
        match serde_path_to_error::deserialize::<_, T>(objects::only(again)) {
            Err(error) => HandlerError::InvalidData {
                path: match error.path().to_string() {
                    path if path == "." => String::new(),
                    path => path,
                },
                msg: plain(error.inner()),
            },
            // Only what follows the value can be wrong then.
            Ok(_) => HandlerError::InvalidData { path: String::new(), msg: plain(&first) },
        }
    })
}

/// The message without its position, which means nothing to the sender of one value.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) if error.is_data() => text[..end].to_owned(),
        _ => text,
    }
}

/// The answer to input that does not fit.
pub(crate) fn invalid_data(path: &str, msg: &str) -> ErrorBody {
    ErrorBody::new("invalid_data", "The data does not fit")
        .with(json!({ "errors": [{ "path": path, "msg": msg }] }))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[serde(rename = "inner")]
        _inner: Inner,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[serde(rename = "id")]
        _id: i32,
    }

    #[test]
    fn a_fault_is_named_by_its_path() {
        for (text, path, msg) in [
            (r#"{"inner":{"id":"x"}}"#, "inner.id", r#"invalid type: string "x", expected i32"#),
            (r#"{"inner":{"id":1},"b":2}"#, "b", "unknown field `b`, expected `inner`"),
            ("{}", "", "missing field `inner`"),
            (r#"[{"id":1}]"#, "", "invalid type: sequence, expected an object"),
            (r#"{"inner":[1]}"#, "inner", "invalid type: sequence, expected an object"),
        ] {
            match read::<Outer>(text) {
                Err(HandlerError::InvalidData { path: p, msg: m }) => {
                    assert_eq!((p.as_str(), m.as_str()), (path, msg));
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn malformed_text_is_invalid_data() {
        for text in ["", "{", "[1", r#"{"inner":{"id":1}} x"#] {
            assert!(matches!(read::<Outer>(text), Err(HandlerError::InvalidData { .. })), "{text}");
        }
    }
}
