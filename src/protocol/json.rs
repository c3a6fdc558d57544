//! The JSON codec: one text frame a message.

use std::{collections::HashMap, mem};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use uuid::Uuid;

use super::{
    ClientControl, Incoming, Malformed, Meta, ReplyHead, Request, Status,
    scratch::{KEPT, with_scratch},
    text_frame,
};

/// Every member that a frame may have, in one pass; unknown ones are skipped.
#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    pkg_id: Option<i32>,
    req_id: Option<Uuid>,
    #[serde(borrow)]
    method: Option<&'a RawValue>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

pub(super) fn decode(text: &str) -> Incoming {
    // A struct of serde also reads from an array, which is no message here.
    if !text.trim_start().starts_with('{') {
        return malformed(text);
    }
    let Ok(members) = serde_json::from_str::<Members<'_>>(text) else {
        return malformed(text);
    };
    if members.kind.is_some_and(is_string) {
        return Incoming::Control(ClientControl::parse(text));
    }
    match (members.pkg_id, members.req_id) {
        (Some(pkg_id), Some(req_id))
            if members.method.is_none_or(is_string) && members.data.is_none_or(is_object) =>
        {
            Incoming::Request(Request { pkg_id, req_id, data: members.data.map(ToOwned::to_owned) })
        }
        _ => malformed(text),
    }
}

fn is_string(raw: &RawValue) -> bool {
    raw.get().starts_with('"')
}

fn is_object(raw: &RawValue) -> bool {
    raw.get().starts_with('{')
}

/// Reads a refused frame once more, slowly, for its ids and for the reason.
fn malformed(text: &str) -> Incoming {
    let refused = |msg: String| Malformed { pkg_id: 0, req_id: Uuid::nil(), msg };
    // Members stay text: one that nests too deep or is too large a number does not hide the ids.
    let read = serde_json::from_str::<&RawValue>(text).and_then(|raw| match is_object(raw) {
        true => serde_json::from_str::<HashMap<String, &RawValue>>(raw.get()).map(Some),
        false => Ok(None),
    });
    let members = match read {
        Ok(Some(members)) => members,
        Ok(None) => return Incoming::Malformed(refused("a message must be a JSON object".into())),
        Err(error) => {
            return Incoming::Malformed(refused(format!("the message is not valid JSON: {error}")));
        }
    };
    let member = |name: &str| members.get(name).copied();
    if member("type").is_some_and(is_string) {
        return Incoming::Control(ClientControl::parse(text));
    }
    let pkg_id = member("pkg_id").and_then(|raw| serde_json::from_str::<i32>(raw.get()).ok());
    let req_id = member("req_id").and_then(|raw| serde_json::from_str::<Uuid>(raw.get()).ok());
    let fits = |name: &str, is: fn(&RawValue) -> bool| {
        member(name).is_none_or(|raw| raw.get() == "null" || is(raw))
    };
    let mut reasons = Vec::new();
    if pkg_id.is_none() {
        reasons.push("pkg_id must be an integer of 32 bits");
    }
    if req_id.is_none() {
        reasons.push("req_id must be a UUID");
    }
    if !fits("method", is_string) {
        reasons.push("method must be a string, null or absent");
    }
    if !fits("data", is_object) {
        reasons.push("data must be an object, null or absent");
    }
    if reasons.is_empty() {
        reasons.push("a member stands twice in the message");
    }
    Incoming::Malformed(Malformed {
        pkg_id: pkg_id.unwrap_or(0),
        req_id: req_id.unwrap_or(Uuid::nil()),
        msg: reasons.join("; "),
    })
}

/// Written member by member: ids and numbers need no escaping, and this runs for every message.
pub(super) fn encode<T: Serialize>(
    head: &ReplyHead,
    status: Status,
    data: &T,
    meta: Option<&Meta>,
) -> serde_json::Result<Message> {
    with_scratch(|out| {
        out.extend_from_slice(b"{\"pkg_id\":");
        serde_json::to_writer(&mut *out, &head.pkg_id)?;
        out.extend_from_slice(b",\"req_id\":\"");
        let mut req_id = [0; uuid::fmt::Hyphenated::LENGTH];
        out.extend_from_slice(head.req_id.hyphenated().encode_lower(&mut req_id).as_bytes());
        out.extend_from_slice(b"\",\"status_code\":");
        out.push(b'0' + status as u8);
        out.extend_from_slice(b",\"meta\":");
        match meta {
            Some(meta) => serde_json::to_writer(&mut *out, meta)?,
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"data\":");
        serde_json::to_writer(&mut *out, data)?;
        out.push(b'}');
        Ok(text(out))
    })
}

/// A frame of what serde_json wrote.
#[expect(unsafe_code, reason = "to look at each byte again is a hundredth of a message's cost")]
fn text(out: &mut Vec<u8>) -> Message {
    if out.len() > KEPT {
        out.shrink_to_fit();
        // SAFETY: as below.
        return text_frame(unsafe { String::from_utf8_unchecked(mem::take(out)) });
    }
    // SAFETY: all of it is ASCII from above, or was written by serde_json, which writes UTF-8 alone;
    // `serde_json::to_string` relies on that too.
    Message::Text(Utf8Bytes::from(unsafe { str::from_utf8_unchecked(out) }))
}

#[derive(Serialize)]
struct PushBody<'a, T> {
    pkg_id: i32,
    req_id: Uuid,
    data: &'a T,
}

pub(super) fn encode_push<T: Serialize>(pkg_id: i32, data: &T) -> serde_json::Result<Message> {
    serde_json::to_string(&PushBody { pkg_id, req_id: Uuid::nil(), data }).map(text_frame)
}
