//! The protobuf codec: one binary frame a message, `data` as JSON text inside.

use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint, int32, message},
};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use super::{Incoming, Malformed, Meta, ReplyHead, Request, Status, scratch::with_scratch};

// A `Response` is read by tests alone: it is written field by field.
#[allow(missing_docs, unreachable_pub, dead_code)]
pub(super) mod wire {
    include!(concat!(env!("OUT_DIR"), "/switchboard.rs"));
}

pub(super) fn decode(bytes: &[u8]) -> Incoming {
    let mut request = wire::Request::default();
    // `merge` keeps the fields read before an error: they are echoed in the answer.
    let merged = request.merge(bytes);
    let pkg_id = request.pkg_id;
    let req_id = Uuid::try_parse(&request.req_id);
    let refused = |msg: String| {
        Incoming::Malformed(Malformed { pkg_id, req_id: req_id.clone().unwrap_or_default(), msg })
    };
    if let Err(error) = merged {
        return refused(format!("the message is not a protobuf Request: {error}"));
    }
    let Ok(req_id) = req_id else {
        return refused("req_id must be a UUID".into());
    };
    match object(request.data_json) {
        Ok(data) => Incoming::Request(Request { pkg_id, req_id, data }),
        Err(msg) => refused(msg),
    }
}

fn object(data_json: String) -> Result<Option<Box<RawValue>>, String> {
    if data_json.is_empty() {
        return Ok(None);
    }
    let raw = RawValue::from_string(data_json)
        .map_err(|error| format!("data_json is not valid JSON: {error}"))?;
    match raw.get().as_bytes().first() {
        Some(b'{') => Ok(Some(raw)),
        _ if raw.get() == "null" => Ok(None),
        _ => Err("data_json must be the JSON text of an object".into()),
    }
}

pub(super) fn encode<T: Serialize>(
    head: &ReplyHead,
    status: Status,
    data: &T,
    meta: Option<&Meta>,
) -> serde_json::Result<Message> {
    frame(head.pkg_id, head.req_id, status, data, meta)
}

pub(super) fn encode_push<T: Serialize>(pkg_id: i32, data: &T) -> serde_json::Result<Message> {
    frame(pkg_id, Uuid::nil(), Status::Ok, data, None)
}

/// Writes a `Response` field by field: a struct of prost would need a string for each.
fn frame<T: Serialize>(
    pkg_id: i32,
    req_id: Uuid,
    status: Status,
    data: &T,
    meta: Option<&Meta>,
) -> serde_json::Result<Message> {
    with_scratch(|out| {
        // The text comes first, since its length stands before it in the frame.
        serde_json::to_writer(&mut *out, data)?;
        let text = out.len();
        if pkg_id != 0 {
            int32::encode(1, &pkg_id, out);
        }
        let mut id = [0; uuid::fmt::Hyphenated::LENGTH];
        bytes(2, req_id.hyphenated().encode_lower(&mut id).as_bytes(), out);
        if status != Status::Ok {
            int32::encode(3, &(status as i32), out);
        }
        key(4, text, out);
        let head = out.len();
        if let Some(meta) = meta {
            message::encode(5, &metadata(meta), out);
        }
        let (text, head, meta) = (&out[..text], &out[text..head], &out[head..]);
        Ok(Message::Binary([head, text, meta].concat().into()))
    })
}

fn key(tag: u32, length: usize, out: &mut Vec<u8>) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

fn bytes(tag: u32, value: &[u8], out: &mut Vec<u8>) {
    key(tag, value.len(), out);
    out.extend_from_slice(value);
}

fn metadata(meta: &Meta) -> wire::Metadata {
    wire::Metadata {
        page: bounded(meta.page),
        per_page: bounded(meta.per_page),
        total: bounded(meta.total),
        pages: bounded(meta.pages),
        next_cursor: meta.next_cursor.clone().unwrap_or_default(),
        has_more: meta.has_more,
    }
}

/// The deployed schema has 32 bits; a larger count stands at its end.
fn bounded(value: i64) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
