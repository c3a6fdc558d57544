//! The codecs against their promises: what a client writes is what is read, and the other way round.
//!
//! Here the two sides that the tests share: a client's frames, and a client's view of the server's.

mod close;
mod control;
mod malformed;
mod properties;
mod round_trips;

use prost::Message as _;
use serde_json::{Value, json};

use super::{protobuf::wire, *};

const FORMATS: [Format; 2] = [Format::Json, Format::Protobuf];

/// A request as a client writes it.
fn request(format: Format, pkg_id: i32, req_id: Uuid, data: Option<&Value>) -> Message {
    match format {
        Format::Json => {
            let mut frame = json!({ "pkg_id": pkg_id, "req_id": req_id });
            if let Some(data) = data {
                frame["data"] = data.clone();
            }
            Message::text(frame.to_string())
        }
        Format::Protobuf => Message::binary(
            wire::Request {
                pkg_id,
                req_id: req_id.to_string(),
                method: String::new(),
                data_json: data.map(Value::to_string).unwrap_or_default(),
            }
            .encode_to_vec(),
        ),
    }
}

/// Decodes a frame as the session does.
fn decode(format: Format, frame: &Message) -> Incoming {
    match frame {
        Message::Text(text) => decode_text(format, text),
        Message::Binary(bytes) => decode_binary(format, bytes),
        other => panic!("no data frame: {other:?}"),
    }
}

/// The request in a frame: `pkg_id`, `req_id` and the text of `data`.
fn decoded(format: Format, frame: &Message) -> (i32, Uuid, Option<String>) {
    match decode(format, frame) {
        Incoming::Request(Request { pkg_id, req_id, data }) => {
            (pkg_id, req_id, data.map(|data| data.get().to_owned()))
        }
        other => panic!("{frame:?} is a request, not {other:?}"),
    }
}

/// What a client learns from an answer or a push, whatever the format.
#[derive(Debug, PartialEq)]
struct Seen {
    pkg_id: i32,
    req_id: Uuid,
    /// 0 of a push, where JSON has none.
    status: i32,
    data: Value,
    meta: Option<Meta>,
}

fn seen(format: Format, frame: &Message) -> Seen {
    match (format, frame) {
        (Format::Json, Message::Text(text)) => seen_json(text),
        (Format::Protobuf, Message::Binary(bytes)) => seen_protobuf(bytes),
        (_, other) => panic!("a frame of the other format's kind: {other:?}"),
    }
}

fn seen_json(text: &str) -> Seen {
    let frame: Value = serde_json::from_str(text).unwrap();
    let members: Vec<_> = frame.as_object().unwrap().keys().map(String::as_str).collect();
    let push = ["data", "pkg_id", "req_id"];
    let answer = ["data", "meta", "pkg_id", "req_id", "status_code"];
    assert!(members == push || members == answer, "{text}");
    let number = |value: &Value| value.as_i64().unwrap();
    let meta = frame.get("meta").filter(|meta| !meta.is_null()).map(|meta| Meta {
        page: number(&meta["page"]),
        per_page: number(&meta["per_page"]),
        total: number(&meta["total"]),
        pages: number(&meta["pages"]),
        next_cursor: match &meta["next_cursor"] {
            Value::Null => None,
            cursor => Some(cursor.as_str().unwrap().to_owned()),
        },
        has_more: meta["has_more"].as_bool().unwrap(),
    });
    Seen {
        pkg_id: i32::try_from(number(&frame["pkg_id"])).unwrap(),
        req_id: frame["req_id"].as_str().unwrap().parse().unwrap(),
        status: frame.get("status_code").map_or(0, |code| i32::try_from(number(code)).unwrap()),
        data: frame["data"].clone(),
        meta,
    }
}

fn seen_protobuf(bytes: &[u8]) -> Seen {
    let frame = wire::Response::decode(bytes).unwrap();
    assert_eq!(frame.encode_to_vec(), bytes, "not as prost writes it");
    Seen {
        pkg_id: frame.pkg_id,
        req_id: frame.req_id.parse().unwrap(),
        status: frame.status_code,
        data: serde_json::from_str(&frame.data_json).unwrap(),
        meta: frame.meta.map(|meta| Meta {
            page: meta.page.into(),
            per_page: meta.per_page.into(),
            total: meta.total.into(),
            pages: meta.pages.into(),
            next_cursor: Some(meta.next_cursor).filter(|cursor| !cursor.is_empty()),
            has_more: meta.has_more,
        }),
    }
}
