//! What holds for every input, however strange.

use proptest::{collection::vec, option, prelude::*};

use super::*;

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..12).prop_map(String::from_iter)
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<i32>().prop_map(|n| Value::from(f64::from(n) / 4.0)),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![vec(inner.clone(), 0..4).prop_map(Value::from), object_of(inner)]
    })
}

fn object_of(member: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    vec((text(), member), 0..4).prop_map(|members| Value::Object(members.into_iter().collect()))
}

fn object() -> impl Strategy<Value = Value> {
    object_of(value())
}

fn id() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn meta() -> impl Strategy<Value = Meta> {
    let count = 0..=i64::from(i32::MAX);
    let cursor = option::of("[A-Za-z0-9_-]{1,20}");
    (count.clone(), count.clone(), count.clone(), count, cursor, any::<bool>()).prop_map(
        |(page, per_page, total, pages, next_cursor, has_more)| Meta {
            page,
            per_page,
            total,
            pages,
            next_cursor,
            has_more,
        },
    )
}

/// A member of a frame: right, any JSON, or absent.
fn member(right: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Option<Value>> {
    prop_oneof![3 => right.prop_map(Some), 1 => value().prop_map(Some), 1 => Just(None)]
}

/// A frame whose members are right, wrong or absent, each by itself.
fn frame() -> impl Strategy<Value = Value> {
    (
        member(any::<i32>().prop_map(Value::from)),
        member(id().prop_map(|id| Value::from(id.to_string()))),
        member(text().prop_map(Value::from)),
        member(object()),
        prop_oneof![8 => Just(None), 1 => value().prop_map(Some), 1 => Just(Some(json!("ping")))],
        option::of((text(), value())),
    )
        .prop_map(|(pkg_id, req_id, method, data, kind, other)| {
            let mut members = serde_json::Map::from_iter(other);
            for (name, value) in [
                ("pkg_id", pkg_id),
                ("req_id", req_id),
                ("method", method),
                ("data", data),
                ("type", kind),
            ] {
                members.extend(value.map(|value| (name.to_owned(), value)));
            }
            Value::Object(members)
        })
}

/// What the document says of a JSON frame, read from its tree.
fn ids(frame: &Value) -> (Option<i32>, Option<Uuid>) {
    let pkg_id = frame["pkg_id"].as_i64().and_then(|id| id.try_into().ok());
    (pkg_id, frame["req_id"].as_str().and_then(|id| id.parse().ok()))
}

fn is_request(frame: &Value) -> bool {
    let (pkg_id, req_id) = ids(frame);
    let (method, data) = (&frame["method"], &frame["data"]);
    pkg_id.is_some()
        && req_id.is_some()
        && (method.is_null() || method.is_string())
        && (data.is_null() || data.is_object())
}

proptest! {
    #[test]
    fn any_text_is_decoded_without_a_panic(text in any::<String>()) {
        let json = decode_text(Format::Json, &text);
        prop_assert!(!matches!(json, Incoming::WrongKind));
        let protobuf = decode_text(Format::Protobuf, &text);
        prop_assert!(matches!(protobuf, Incoming::WrongKind | Incoming::Control(_)));
    }

    #[test]
    fn any_bytes_are_decoded_without_a_panic(bytes in vec(any::<u8>(), 0..200)) {
        prop_assert!(matches!(decode_binary(Format::Json, &bytes), Incoming::WrongKind));
        let protobuf = decode_binary(Format::Protobuf, &bytes);
        prop_assert!(matches!(protobuf, Incoming::Malformed(_) | Incoming::Request(_)));
    }

    #[test]
    fn any_json_is_a_message_or_refused(value in value()) {
        let text = value.to_string();
        match decode_text(Format::Json, &text) {
            Incoming::Malformed(malformed) => prop_assert!(!malformed.msg.is_empty()),
            other => prop_assert!(value.is_object(), "{text}: {other:?}"),
        }
    }

    #[test]
    fn a_json_frame_is_what_its_members_say(frame in frame()) {
        let text = frame.to_string();
        let (pkg_id, req_id) = ids(&frame);
        match decode_text(Format::Json, &text) {
            Incoming::Control(_) => prop_assert!(frame["type"].is_string()),
            _ if frame["type"].is_string() => prop_assert!(false, "{text} is control"),
            Incoming::Request(request) => {
                prop_assert!(is_request(&frame));
                prop_assert_eq!((Some(request.pkg_id), Some(request.req_id)), (pkg_id, req_id));
                let data = request.data.map(|data| data.get().to_owned());
                let sent = frame.get("data").filter(|data| !data.is_null());
                prop_assert_eq!(data, sent.map(Value::to_string));
            }
            Incoming::Malformed(malformed) => {
                prop_assert!(!is_request(&frame), "{text}: {}", malformed.msg);
                let echoed = (malformed.pkg_id, malformed.req_id);
                prop_assert_eq!(echoed, (pkg_id.unwrap_or(0), req_id.unwrap_or_default()));
                for (name, wrong) in [("pkg_id", pkg_id.is_none()), ("req_id", req_id.is_none())] {
                    prop_assert_eq!(malformed.msg.contains(name), wrong, "{}", malformed.msg);
                }
            }
            Incoming::WrongKind => prop_assert!(false, "text is data in JSON"),
        }
    }

    #[test]
    fn a_control_frame_with_a_token_is_read_as_it_was_sent(
        refresh in any::<bool>(),
        token in member(text().prop_map(Value::from)),
        other in option::of((text(), value())),
    ) {
        let mut frame = serde_json::Map::from_iter(other);
        frame.insert("type".into(), Value::from(if refresh { "refresh" } else { "auth" }));
        frame.remove("token");
        frame.extend(token.clone().map(|token| ("token".to_owned(), token)));
        let text = Value::Object(frame).to_string();
        let token = token.and_then(|token| token.as_str().map(ToOwned::to_owned));
        let expected = match refresh {
            true => ClientControl::Refresh { token },
            false => ClientControl::Auth { token },
        };
        for format in FORMATS {
            match decode_text(format, &text) {
                Incoming::Control(control) => prop_assert_eq!(&control, &expected),
                other => prop_assert!(false, "{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_request_is_read_as_it_was_sent(
        pkg_id in any::<i32>(),
        req_id in id(),
        data in option::of(object()),
    ) {
        for format in FORMATS {
            let read = decoded(format, &request(format, pkg_id, req_id, data.as_ref()));
            prop_assert_eq!(read, (pkg_id, req_id, data.as_ref().map(Value::to_string)));
        }
    }

    #[test]
    fn a_request_cut_short_keeps_the_ids_that_arrived(
        pkg_id in any::<i32>(),
        req_id in id(),
        data in object(),
        cut in any::<prop::sample::Index>(),
    ) {
        let text = request(Format::Json, pkg_id, req_id, Some(&data)).into_text().unwrap();
        let end = cut.index(text.len());
        if text.is_char_boundary(end) {
            let read = decode_text(Format::Json, &text[..end]);
            prop_assert!(matches!(read, Incoming::Malformed(_)), "{:?}", read);
        }
        let bytes = request(Format::Protobuf, pkg_id, req_id, Some(&data)).into_data();
        let echoed = match decode_binary(Format::Protobuf, &bytes[..cut.index(bytes.len())]) {
            // Cut between two fields.
            Incoming::Request(request) => {
                prop_assert!(request.data.is_none());
                (request.pkg_id, request.req_id)
            }
            Incoming::Malformed(malformed) => (malformed.pkg_id, malformed.req_id),
            other => panic!("{other:?}"),
        };
        prop_assert!([0, pkg_id].contains(&echoed.0) && [Uuid::nil(), req_id].contains(&echoed.1));
    }

    #[test]
    fn a_success_is_read_as_it_was_sent(
        pkg_id in any::<i32>(),
        req_id in id(),
        data in value(),
        meta in option::of(meta()),
    ) {
        for format in FORMATS {
            let reply = ReplyHead { format, pkg_id, req_id }.ok(&data, meta.as_ref());
            let (data, meta) = (data.clone(), meta.clone());
            let expected = Seen { pkg_id, req_id, status: 0, data, meta };
            prop_assert_eq!(seen(format, &reply.frame), expected);
        }
    }

    #[test]
    fn a_failure_is_read_as_it_was_sent(
        pkg_id in any::<i32>(),
        req_id in id(),
        status in prop::sample::select(&Status::ALL[1..]),
        msg in text(),
        details in option::of(value()),
    ) {
        let error = ErrorBody { details: details.clone(), ..ErrorBody::new("conflict", msg.clone()) };
        let mut data = json!({ "code": "conflict", "msg": msg });
        if let Some(details) = details {
            data["details"] = details;
        }
        for format in FORMATS {
            let reply = ReplyHead { format, pkg_id, req_id }.error(status, &error);
            let (status, data) = (status as i32, data.clone());
            let expected = Seen { pkg_id, req_id, status, data, meta: None };
            prop_assert_eq!(seen(format, &reply.frame), expected);
        }
    }

    #[test]
    fn a_push_is_read_as_it_was_sent(pkg_id in any::<i32>(), data in value()) {
        let push = Push::new(pkg_id, &data).unwrap();
        for format in FORMATS {
            let data = data.clone();
            let expected = Seen { pkg_id, req_id: Uuid::nil(), status: 0, data, meta: None };
            prop_assert_eq!(seen(format, &push.frame(format)), expected);
        }
    }
}
