//! The protobuf codec: one binary frame a message, `data` as JSON text inside.

use bytes::Bytes;
use prost::Message as _;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use super::{Incoming, Malformed, Meta, ReplyHead, Request, Status};

#[allow(missing_docs, unreachable_pub)]
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
    Ok(frame(&wire::Response {
        pkg_id: head.pkg_id,
        req_id: head.req_id.to_string(),
        status_code: status as i32,
        data_json: serde_json::to_string(data)?,
        meta: meta.map(|meta| wire::Metadata {
            page: int32(meta.page),
            per_page: int32(meta.per_page),
            total: int32(meta.total),
            pages: int32(meta.pages),
            next_cursor: meta.next_cursor.clone().unwrap_or_default(),
            has_more: meta.has_more,
        }),
    }))
}

pub(super) fn encode_push<T: Serialize>(pkg_id: i32, data: &T) -> serde_json::Result<Message> {
    Ok(frame(&wire::Response {
        pkg_id,
        req_id: Uuid::nil().to_string(),
        status_code: Status::Ok as i32,
        data_json: serde_json::to_string(data)?,
        meta: None,
    }))
}

/// The deployed schema has 32 bits; a larger count stands at its end.
fn int32(value: i64) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

fn frame(response: &wire::Response) -> Message {
    Message::Binary(Bytes::from(response.encode_to_vec()))
}
