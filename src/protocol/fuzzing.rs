//! The codecs on any bytes: what one of them reads is what both write, and read again.

use prost::Message as _;
use serde_json::{Value, json};

use super::{protobuf::wire, *};

/// Bytes of the reason why a frame is refused: it tells what is wrong, and repeats nothing of the frame.
const LONGEST_REASON: usize = 256;

/// A text frame of a client.
pub(crate) fn json(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let incoming = decode_text(Format::Json, text);
    match (&incoming, decode_text(Format::Protobuf, text)) {
        (Incoming::Control(json), Incoming::Control(protobuf)) => assert_eq!(*json, protobuf),
        (Incoming::Control(_), _) | (_, Incoming::Control(_)) => {
            unreachable!("control frames are the same in both formats")
        }
        (_, other) => assert!(matches!(other, Incoming::WrongKind)),
    }
    as_its_tree_says(text, &incoming);
    answered(incoming);
}

/// A binary frame of a client.
pub(crate) fn protobuf(input: &[u8]) {
    assert!(matches!(decode_binary(Format::Json, input), Incoming::WrongKind));
    let incoming = decode_binary(Format::Protobuf, input);
    let sent = wire::Request::decode(input).ok();
    match (&incoming, sent) {
        (Incoming::Request(request), Some(sent)) => {
            assert_eq!(request.pkg_id, sent.pkg_id);
            assert_eq!(Ok(request.req_id), sent.req_id.parse());
            let data = request.data.as_ref().map_or("", |data| data.get());
            let sent = sent.data_json.trim_ascii();
            assert_eq!(data, if sent == "null" { "" } else { sent });
        }
        (Incoming::Malformed(_), _) => {}
        (other, sent) => unreachable!("{other:?} of {sent:?}"),
    }
    answered(incoming);
}

/// Compares with a tree of the whole text, where there is one: it has no numbers beyond `f64`, no lone
/// surrogates and no nesting of more than 127.
fn as_its_tree_says(text: &str, incoming: &Incoming) {
    let Ok(tree) = serde_json::from_str::<Value>(text) else { return };
    let is_control = tree.is_object() && tree["type"].is_string();
    assert_eq!(matches!(incoming, Incoming::Control(_)), is_control);
    let (method, data) = (&tree["method"], &tree["data"]);
    let pkg_id = tree["pkg_id"].as_i64().and_then(|id| i32::try_from(id).ok());
    let req_id = tree["req_id"].as_str().and_then(|id| id.parse::<Uuid>().ok());
    let is_request = tree.is_object()
        && pkg_id.is_some()
        && req_id.is_some()
        && (method.is_null() || method.is_string())
        && (data.is_null() || data.is_object());
    match incoming {
        Incoming::Request(request) => {
            assert!(is_request);
            assert_eq!((Some(request.pkg_id), Some(request.req_id)), (pkg_id, req_id));
            let read = request.data.as_ref().map(|data| data.get());
            let read = read.map(serde_json::from_str::<Value>);
            assert_eq!(read.transpose().expect("a part of what is JSON is JSON"), object(data));
        }
        Incoming::Malformed(malformed) if is_request => {
            assert!(malformed.msg.contains("twice"), "{}", malformed.msg);
        }
        Incoming::Malformed(malformed) => {
            let echoed = (malformed.pkg_id, malformed.req_id);
            let sent = (pkg_id.unwrap_or_default(), req_id.unwrap_or_default());
            assert!(!tree.is_object() || echoed == sent, "{echoed:?} is not {sent:?}");
        }
        Incoming::Control(_) | Incoming::WrongKind => {}
    }
}

fn object(data: &Value) -> Option<Value> {
    data.is_object().then(|| data.clone())
}

/// Every request and every malformed frame has an answer, and means the same in the other format.
fn answered(incoming: Incoming) {
    match incoming {
        Incoming::Request(request) => {
            let Request { pkg_id, req_id, data } = &request;
            let data = data.as_deref();
            same(&request, &decode_text(Format::Json, &as_json(&request)));
            same(&request, &decode_binary(Format::Protobuf, &as_protobuf(&request)));
            let head = |format| ReplyHead { format, pkg_id: *pkg_id, req_id: *req_id };
            let meta = Meta {
                page: (*pkg_id).into(),
                per_page: i64::MAX,
                total: i64::MIN,
                pages: 0,
                next_cursor: data.map(|data| data.get().to_owned()),
                has_more: data.is_none(),
            };
            let text = data.map_or("null", RawValue::get);
            for meta in [None, Some(&meta)] {
                let reply = head(Format::Json).ok(&data, meta);
                seen_json(&reply, &request, text);
                let reply = head(Format::Protobuf).ok(&data, meta);
                seen_protobuf(&reply, &request, text);
            }
        }
        Incoming::Malformed(Malformed { pkg_id, req_id, msg }) => {
            assert!((1..=LONGEST_REASON).contains(&msg.len()), "{msg}");
            let body = ErrorBody::new("invalid_message", msg);
            let text = json!(body).to_string();
            let request = Request { pkg_id, req_id, data: None };
            let head = |format| ReplyHead { format, pkg_id, req_id };
            let status = Status::InvalidData;
            let reply = head(Format::Protobuf).error(status, &body);
            seen_protobuf(&reply, &request, &text);
            seen_json(&head(Format::Json).error(status, &body), &request, &text);
        }
        Incoming::Control(_) | Incoming::WrongKind => {}
    }
}

fn same(sent: &Request, read: &Incoming) {
    let Incoming::Request(read) = read else { unreachable!("{sent:?} is read as {read:?}") };
    assert_eq!((sent.pkg_id, sent.req_id), (read.pkg_id, read.req_id));
    assert_eq!(
        sent.data.as_ref().map(|data| data.get()),
        read.data.as_ref().map(|data| data.get())
    );
}

/// A request as a client of JSON writes it.
fn as_json(request: &Request) -> String {
    let Request { pkg_id, req_id, data } = request;
    let data = data.as_ref().map_or("null", |data| data.get());
    format!("{{\"data\":{data},\"pkg_id\":{pkg_id},\"req_id\":\"{req_id}\"}}")
}

/// A request as a client of protobuf writes it.
fn as_protobuf(request: &Request) -> Vec<u8> {
    let data_json = request.data.as_ref().map(|data| data.get().to_owned());
    let request = wire::Request {
        pkg_id: request.pkg_id,
        req_id: request.req_id.to_string(),
        method: String::new(),
        data_json: data_json.unwrap_or_default(),
    };
    request.encode_to_vec()
}

/// An answer in JSON says what was asked for, with `data` as it was given.
fn seen_json(reply: &Reply, request: &Request, data: &str) {
    #[derive(serde::Deserialize)]
    struct Answer<'a> {
        pkg_id: i32,
        req_id: Uuid,
        status_code: i32,
        #[serde(borrow)]
        data: &'a RawValue,
    }
    let text = reply.frame.to_text().expect("an answer in JSON is text");
    let answer: Answer<'_> = serde_json::from_str(text).expect("an answer is JSON");
    assert_eq!((answer.pkg_id, answer.req_id), (request.pkg_id, request.req_id));
    assert_eq!((answer.status_code, answer.data.get()), (reply.status as i32, data));
}

/// An answer in protobuf likewise.
fn seen_protobuf(reply: &Reply, request: &Request, data: &str) {
    let Message::Binary(bytes) = &reply.frame else {
        unreachable!("an answer in protobuf is binary")
    };
    let answer = wire::Response::decode(&**bytes).expect("an answer is a Response");
    assert_eq!(answer.encode_to_vec(), *bytes, "not as prost writes it");
    assert_eq!(answer.pkg_id, request.pkg_id);
    assert_eq!(answer.req_id, request.req_id.to_string());
    assert_eq!((answer.status_code, &*answer.data_json), (reply.status as i32, data));
}
