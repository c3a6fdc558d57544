//! One table for both codecs: they carry the same information.

use super::*;

const PKG_IDS: [i32; 5] = [1, 0, -1, i32::MAX, i32::MIN];

fn payloads() -> Vec<Value> {
    vec![
        json!({}),
        json!({ "name": "Ann" }),
        json!({ "name": "Łukasz 你好 🦀 \u{0} \u{7f} \" \\ / \u{2028}" }),
        json!({ "🦀": { "a": [1, [2, [3, { "b": null }]]], "c": { "d": {} } } }),
        json!({ "n": [0, -1, 2.5, 9_007_199_254_740_993_i64, u64::MAX, i64::MIN], "t": true }),
        json!({ "data": { "pkg_id": 9, "type": "ping" }, "type": "auth" }),
    ]
}

fn metas() -> Vec<Option<Meta>> {
    let page =
        Meta { page: 2, per_page: 20, total: 41, pages: 3, next_cursor: None, has_more: true };
    let walk =
        Meta { page: 1, total: 0, pages: 0, next_cursor: Some("MTI".into()), ..page.clone() };
    let last = Meta { next_cursor: None, has_more: false, ..walk.clone() };
    let full = i64::from(i32::MAX);
    let largest = Meta { page: full, per_page: 100, total: full, pages: full, ..walk.clone() };
    vec![None, Some(page), Some(walk), Some(last), Some(largest)]
}

fn errors() -> Vec<ErrorBody> {
    vec![
        ErrorBody::internal(),
        ErrorBody::new("not_found", "No author is called \"🦀\""),
        ErrorBody::new("rate_limit_exceeded", "Too many messages")
            .with(json!({ "retry_after_ms": 1 })),
        ErrorBody::new("invalid_data", "The data does not fit")
            .with(json!({ "errors": [{ "path": "filters.id", "msg": "expected i32" }] })),
    ]
}

#[test]
fn requests_reach_the_server_in_both_formats() {
    for format in FORMATS {
        for pkg_id in PKG_IDS {
            for data in payloads() {
                let req_id = Uuid::new_v4();
                let read = decoded(format, &request(format, pkg_id, req_id, Some(&data)));
                assert_eq!(read, (pkg_id, req_id, Some(data.to_string())), "{format:?}");
            }
        }
    }
}

#[test]
fn absent_data_and_null_data_are_the_same() {
    for format in FORMATS {
        for data in [None, Some(&Value::Null)] {
            let read = decoded(format, &request(format, 1, Uuid::max(), data));
            assert_eq!(read, (1, Uuid::max(), None), "{format:?} {data:?}");
        }
    }
}

#[test]
fn members_that_may_be_absent_may_also_be_null_and_unknown_ones_are_skipped() {
    let id = "550e8400-e29b-41d4-a716-446655440000";
    for (rest, data) in [
        (r#""method":null,"data":null"#, None),
        (r#""method":"","data":{}"#, Some("{}")),
        (r#""method":"get","data": { "a" : 1 } "#, Some(r#"{ "a" : 1 }"#)),
        (r#""type":null,"data":{}"#, Some("{}")),
        (r#""type":7,"data":{}"#, Some("{}")),
        (r#""newer":{"deep":[{}]},"data":{}"#, Some("{}")),
    ] {
        let text = format!(r#" {{"pkg_id":1,"req_id":"{id}",{rest}}} "#);
        let read = decoded(Format::Json, &Message::text(text));
        assert_eq!(read, (1, id.parse().unwrap(), data.map(str::to_owned)), "{rest}");
    }
}

#[test]
fn a_protobuf_request_without_pkg_id_is_one_for_package_0() {
    let id = Uuid::new_v4();
    let frame = wire::Request { req_id: id.to_string(), ..Default::default() };
    let read = decoded(Format::Protobuf, &Message::binary(frame.encode_to_vec()));
    assert_eq!(read, (0, id, None));
}

#[test]
fn protobuf_field_numbers_are_those_of_deployed_clients() {
    let id = "550e8400-e29b-41d4-a716-446655440000";
    // Field and wire type by hand: 1 varint, 2 to 4 of given length.
    let mut bytes = vec![0x08, 100, 0x12, 36];
    bytes.extend(id.as_bytes());
    bytes.extend(b"\x1a\x01m\x22\x07{\"a\":1}");
    let read = decoded(Format::Protobuf, &Message::binary(bytes));
    assert_eq!(read, (100, id.parse().unwrap(), Some(r#"{"a":1}"#.into())));

    let head = ReplyHead { format: Format::Protobuf, pkg_id: 2, req_id: id.parse().unwrap() };
    let meta = Meta {
        page: 1,
        per_page: 2,
        total: 3,
        pages: 4,
        next_cursor: Some("c".into()),
        has_more: true,
    };
    let mut expected = vec![0x08, 2, 0x12, 36];
    expected.extend(id.as_bytes());
    expected.extend(b"\x22\x02{}\x2a\x0d\x08\x01\x10\x02\x18\x03\x20\x04\x2a\x01c\x30\x01");
    let frame = head.ok(&json!({}), Some(&meta)).frame;
    assert_eq!(frame, Message::binary(expected));
}

#[test]
fn answers_reach_the_client_in_both_formats() {
    for format in FORMATS {
        for pkg_id in PKG_IDS {
            let head = ReplyHead { format, pkg_id, req_id: Uuid::new_v4() };
            for data in payloads().into_iter().chain([json!(null), json!([]), json!([{ "id": 1 }])])
            {
                for meta in metas() {
                    let reply = head.ok(&data, meta.as_ref());
                    assert_eq!(reply.status, Status::Ok);
                    let expected =
                        Seen { pkg_id, req_id: head.req_id, status: 0, data: data.clone(), meta };
                    assert_eq!(seen(format, &reply.frame), expected);
                }
            }
        }
    }
}

#[test]
fn errors_reach_the_client_in_both_formats() {
    for format in FORMATS {
        let head = ReplyHead { format, pkg_id: 3, req_id: Uuid::new_v4() };
        for (number, status) in (0..).zip(Status::ALL) {
            for error in errors() {
                let reply = head.error(status, &error);
                assert_eq!(reply.status, status);
                let mut data = json!({ "code": error.code, "msg": error.msg });
                if let Some(details) = error.details {
                    data["details"] = details;
                }
                let expected =
                    Seen { pkg_id: 3, req_id: head.req_id, status: number, data, meta: None };
                assert_eq!(seen(format, &reply.frame), expected);
            }
        }
    }
}

#[test]
fn pushes_reach_the_client_in_both_formats() {
    for pkg_id in PKG_IDS {
        for data in payloads() {
            let push = Push::new(pkg_id, &data).unwrap();
            for format in FORMATS {
                let expected =
                    Seen { pkg_id, req_id: Uuid::nil(), status: 0, data: data.clone(), meta: None };
                assert_eq!(seen(format, &push.frame(format)), expected);
            }
        }
    }
}

#[test]
fn counts_beyond_32_bits_stand_at_the_end_of_the_range_in_protobuf() {
    let meta = Meta {
        page: 1,
        per_page: 1,
        total: i64::from(i32::MAX) + 1,
        pages: i64::MAX,
        next_cursor: None,
        has_more: true,
    };
    let head = |format| ReplyHead { format, pkg_id: 2, req_id: Uuid::max() };
    let read = |format: Format| {
        let meta = seen(format, &head(format).ok(&json!([]), Some(&meta)).frame).meta.unwrap();
        (meta.total, meta.pages)
    };
    assert_eq!(read(Format::Json), (meta.total, meta.pages));
    assert_eq!(read(Format::Protobuf), (i32::MAX.into(), i32::MAX.into()));
}

#[test]
fn data_that_is_no_json_is_a_bug_and_answered_as_one() {
    let no_json = std::collections::BTreeMap::from([((1, 2), 3)]);
    for format in FORMATS {
        let head = ReplyHead { format, pkg_id: 1, req_id: Uuid::max() };
        let reply = head.ok(&no_json, None);
        assert_eq!(reply.status, Status::Error);
        let seen = seen(format, &reply.frame);
        assert_eq!((seen.status, seen.req_id), (1, Uuid::max()));
        assert_eq!(seen.data, json!({ "code": "internal_error", "msg": "Internal error" }));
    }
    assert!(Push::new(1, &no_json).is_err());
}
