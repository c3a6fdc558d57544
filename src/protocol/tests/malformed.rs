//! Frames that are no requests: what is echoed, and what the sender is told.

use super::*;

const ID: &str = "550e8400-e29b-41d4-a716-446655440000";
const NIL: &str = "00000000-0000-0000-0000-000000000000";

const PKG_ID: &str = "pkg_id must be an integer of 32 bits";
const REQ_ID: &str = "req_id must be a UUID";
const METHOD: &str = "method must be a string, null or absent";
const DATA: &str = "data must be an object, null or absent";

fn refused(incoming: Incoming) -> Malformed {
    match incoming {
        Incoming::Malformed(malformed) => malformed,
        other => panic!("no malformed frame: {other:?}"),
    }
}

#[test]
fn json_frames_are_refused_with_their_ids_and_every_reason() {
    let object = "a message must be a JSON object";
    let cases: &[(&str, i32, &str, &[&str])] = &[
        ("[]", 0, NIL, &[object]),
        (r#"[null,1,"550e8400-e29b-41d4-a716-446655440000",null,{}]"#, 0, NIL, &[object]),
        ("null", 0, NIL, &[object]),
        ("1", 0, NIL, &[object]),
        (r#""ping""#, 0, NIL, &[object]),
        ("{}", 0, NIL, &[PKG_ID, REQ_ID]),
        (r#"{"pkg_id":7}"#, 7, NIL, &[REQ_ID]),
        (r#"{"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":null,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":"7","req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":7.0,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":7e0,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":true,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":2147483648,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":-2147483649,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":1e999,"req_id":"ID"}"#, 0, ID, &[PKG_ID]),
        (r#"{"pkg_id":7,"req_id":null}"#, 7, NIL, &[REQ_ID]),
        (r#"{"pkg_id":7,"req_id":1}"#, 7, NIL, &[REQ_ID]),
        (r#"{"pkg_id":7,"req_id":""}"#, 7, NIL, &[REQ_ID]),
        (r#"{"pkg_id":7,"req_id":"550e8400"}"#, 7, NIL, &[REQ_ID]),
        (r#"{"pkg_id":7,"req_id":"ID","method":1}"#, 7, ID, &[METHOD]),
        (r#"{"pkg_id":7,"req_id":"ID","method":{}}"#, 7, ID, &[METHOD]),
        (r#"{"pkg_id":7,"req_id":"ID","data":[]}"#, 7, ID, &[DATA]),
        (r#"{"pkg_id":7,"req_id":"ID","data":"{}"}"#, 7, ID, &[DATA]),
        (r#"{"pkg_id":7,"req_id":"ID","data":1e999}"#, 7, ID, &[DATA]),
        (r#"{"pkg_id":7,"req_id":"x","data":{"n":1e999}}"#, 7, NIL, &[REQ_ID]),
        (r#"{"pkg_id":7,"req_id":"x","data":{"s":"\ud800"}}"#, 7, NIL, &[REQ_ID]),
        (
            r#"{"pkg_id":"x","req_id":1,"method":2,"data":3}"#,
            0,
            NIL,
            &[PKG_ID, REQ_ID, METHOD, DATA],
        ),
        (r#"{"type":{"a":1},"pkg_id":7}"#, 7, NIL, &[REQ_ID]),
        (r#"{"type":null}"#, 0, NIL, &[PKG_ID, REQ_ID]),
        (
            r#"{"pkg_id":7,"req_id":"ID","pkg_id":7}"#,
            7,
            ID,
            &["a member stands twice in the message"],
        ),
    ];
    for (text, pkg_id, req_id, reasons) in cases {
        let expected =
            Malformed { pkg_id: *pkg_id, req_id: req_id.parse().unwrap(), msg: reasons.join("; ") };
        let text = text.replace("ID", ID);
        assert_eq!(refused(decode_text(Format::Json, &text)), expected, "{text}");
        assert!(matches!(decode_text(Format::Protobuf, &text), Incoming::WrongKind), "{text}");
    }
}

#[test]
fn text_that_is_no_json_has_no_ids() {
    let whole = format!(r#"{{"pkg_id":7,"req_id":"{ID}","data":{{}}}}"#);
    for text in ["", " ", "{", "hello", "\u{feff}{}", "\u{a0}{}", "{'pkg_id':7}"]
        .into_iter()
        .map(str::to_owned)
        .chain([format!("{whole}x"), format!("{whole}{whole}"), whole.replace('}', ",}")])
    {
        let Malformed { pkg_id, req_id, msg } = refused(decode_text(Format::Json, &text));
        assert_eq!((pkg_id, req_id), (0, Uuid::nil()), "{text}");
        assert!(msg.starts_with("the message is not valid JSON: "), "{text}: {msg}");
    }
}

#[test]
fn depth_does_not_hide_the_ids() {
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let text = format!(r#"{{"pkg_id":7,"req_id":"{ID}","data":{deep}}}"#);
    let expected = Malformed { pkg_id: 7, req_id: ID.parse().unwrap(), msg: DATA.into() };
    assert_eq!(refused(decode_text(Format::Json, &text)), expected);

    let text = format!(r#"{{"pkg_id":7,"req_id":"{ID}","data":{{"a":{deep}}}}}"#);
    let (pkg_id, ..) = decoded(Format::Json, &Message::text(text));
    assert_eq!(pkg_id, 7);
}

#[test]
fn protobuf_frames_are_refused_with_their_ids_and_the_reason() {
    let object = "data_json must be the JSON text of an object";
    let not_json = "data_json is not valid JSON: ";
    for (req_id, data_json, echoed, reason) in [
        ("", "", NIL, REQ_ID),
        ("x", "{}", NIL, REQ_ID),
        (ID, "[]", ID, object),
        (ID, "1", ID, object),
        (ID, r#""{}""#, ID, object),
        (ID, " ", ID, not_json),
        (ID, "{", ID, not_json),
        (ID, "{}{}", ID, not_json),
    ] {
        let frame = wire::Request {
            pkg_id: -7,
            req_id: req_id.into(),
            data_json: data_json.into(),
            ..Default::default()
        };
        let frame = frame.encode_to_vec();
        let malformed = refused(decode_binary(Format::Protobuf, &frame));
        let echoed: Uuid = echoed.parse().unwrap();
        assert_eq!((malformed.pkg_id, malformed.req_id), (-7, echoed), "{req_id} {data_json}");
        assert!(malformed.msg.starts_with(reason), "{req_id} {data_json}: {}", malformed.msg);
        assert!(matches!(decode_binary(Format::Json, &frame), Incoming::WrongKind));
    }
}

#[test]
fn protobuf_bytes_are_refused_with_what_was_read_before_the_fault() {
    let whole = wire::Request {
        pkg_id: 7,
        req_id: ID.into(),
        method: String::new(),
        data_json: "{}".into(),
    }
    .encode_to_vec();
    // 2 bytes of pkg_id, 38 of req_id, 4 of data_json.
    assert_eq!(whole.len(), 44);
    let text_of_invalid_utf8 = [&whole[..40], b"\x22\x01\xff"].concat();
    let wrong_wire_type = [&whole[..40], b"\x0a\x01a"].concat();
    for (bytes, pkg_id, req_id) in [
        (&b"\xff"[..], 0, NIL),
        (b"{\"pkg_id\":7}", 0, NIL),
        (&whole[..1], 0, NIL),
        (&whole[..20], 7, NIL),
        (&whole[..41], 7, ID),
        (&whole[..43], 7, ID),
        (&text_of_invalid_utf8, 7, ID),
        (&wrong_wire_type, 7, ID),
    ] {
        let malformed = refused(decode_binary(Format::Protobuf, bytes));
        let echoed = (pkg_id, req_id.parse().unwrap());
        assert_eq!((malformed.pkg_id, malformed.req_id), echoed, "{bytes:?}");
        assert!(malformed.msg.starts_with("the message is not a protobuf Request: "), "{bytes:?}");
    }
}
