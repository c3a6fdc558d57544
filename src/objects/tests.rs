use std::collections::BTreeMap;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};

use super::*;

#[derive(Debug, Deserialize)]
struct Point {
    #[serde(rename = "x")]
    _x: i32,
}

#[derive(Debug, Deserialize)]
enum Shape {
    #[serde(rename = "dot")]
    Dot(#[allow(dead_code)] Point),
    #[serde(rename = "line")]
    Line {
        #[serde(rename = "to")]
        _to: Option<Point>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(transparent)]
struct Wrapped(#[allow(dead_code)] Point);

fn refusal<T: DeserializeOwned + std::fmt::Debug>(text: &str) -> String {
    let error = read::<T>(text).unwrap_err();
    assert!(serde_json::from_str::<T>(text).is_ok(), "serde alone takes {text}");
    error.to_string()
}

#[test]
fn a_struct_is_read_from_an_object_only_however_deep_it_stands() {
    for refused in [
        refusal::<Point>("[1]"),
        refusal::<Option<Point>>("[1]"),
        refusal::<Vec<Point>>(r#"[{"x":1},[2]]"#),
        refusal::<(Point, i32)>("[[1],2]"),
        refusal::<BTreeMap<String, Point>>(r#"{"a":[1]}"#),
        refusal::<Box<[Option<Wrapped>]>>("[null,[1]]"),
        refusal::<Shape>(r#"{"dot":[1]}"#),
        refusal::<Shape>(r#"{"line":[{"x":1}]}"#),
        refusal::<Shape>(r#"{"line":{"to":[1]}}"#),
    ] {
        assert!(refused.starts_with("invalid type: sequence, expected an object"), "{refused}");
    }
}

#[test]
fn all_else_is_read_as_before() {
    assert!(read::<(i32, Vec<String>)>(r#"[1,["a"]]"#).is_ok());
    assert!(read::<Shape>(r#"{"line":{"to":{"x":1}}}"#).is_ok());
    assert_eq!(read::<Value>("[1,{}]").unwrap(), serde_json::json!([1, {}]));
    assert_eq!(read::<Box<RawValue>>("[1e999 ]").unwrap().get(), "[1e999 ]");
    assert!(read::<i32>("1 2").is_err());
    assert!(read_bytes::<Point>(b"{\"x\":1}").is_ok());
    assert!(read_bytes::<Point>(b"[1]").is_err());
}

#[test]
fn what_a_type_knows_is_what_it_reads() {
    let seen = known::<Vec<Shape>>(r#"[{"line":{"to":{"x":1,"y":2}}}]"#);
    assert!(seen.has_items());
    let shape = seen.at(0).unwrap();
    assert!(shape.has("line") && !shape.has("curve"));
    let line = shape.at(0).unwrap();
    assert!(line.has("to") && !line.has("x"));
    assert!(line.at(0).unwrap().has("x") && !line.at(0).unwrap().has("y"));

    assert!(known::<Value>(r#"{"a":[1]}"#).is_everything());
    assert!(known::<Box<RawValue>>("{}").is_everything());
    // Not reached: nothing is known of the second one.
    let failed = known::<(Point, Point)>(r#"[{"x":"a"},{"x":1}]"#);
    assert!(failed.at(0).unwrap().has("x"));
    assert!(failed.at(1).is_none());
    // An array where an object was meant has no member.
    assert!(!known::<Point>("[1]").has_items());
}
