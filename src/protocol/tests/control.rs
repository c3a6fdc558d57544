//! Control frames: the same text in both formats.

use super::*;

fn auth(token: Option<&str>) -> ClientControl {
    ClientControl::Auth { token: token.map(ToOwned::to_owned) }
}

fn refresh(token: Option<&str>) -> ClientControl {
    ClientControl::Refresh { token: token.map(ToOwned::to_owned) }
}

fn unknown(kind: &str) -> ClientControl {
    ClientControl::Unknown(kind.into())
}

#[test]
fn a_text_with_a_string_type_is_control_in_both_formats() {
    let cases = [
        (r#"{"type":"auth","token":"Bearer x"}"#, auth(Some("Bearer x"))),
        (r#" { "token" : "Bearer \u0078" , "type" : "auth" } "#, auth(Some("Bearer x"))),
        (r#"{"type":"auth","token":"Bearer x","client":"web"}"#, auth(Some("Bearer x"))),
        (r#"{"type":"auth"}"#, auth(None)),
        (r#"{"type":"auth","token":null}"#, auth(None)),
        (r#"{"type":"auth","token":["Bearer x"]}"#, auth(None)),
        (r#"{"type":"auth","token":1e999}"#, auth(None)),
        (r#"{"type":"refresh","token":"Bearer x"}"#, refresh(Some("Bearer x"))),
        (r#" { "token" : "" , "t\u0079pe" : "refresh", "pkg_id": 1 } "#, refresh(Some(""))),
        (r#"{"type":"refresh"}"#, refresh(None)),
        (r#"{"type":"refresh","token":null}"#, refresh(None)),
        (r#"{"type":"refresh","token":{"token":"Bearer x"}}"#, refresh(None)),
        (r#"{"type":"refresh","token":"\ud800"}"#, refresh(None)),
        (r#"{"type":"Refresh","token":"Bearer x"}"#, unknown("Refresh")),
        (r#"{"type":"refresh","token":"a","token":"b"}"#, unknown("")),
        (r#"{"type":"ping"}"#, ClientControl::Ping),
        (r#"{"\u0074ype":"p\u0069ng"}"#, ClientControl::Ping),
        (r#"{"type":"ping","token":1e999}"#, ClientControl::Ping),
        (r#"{"type":"ping","pkg_id":1,"req_id":"x"}"#, ClientControl::Ping),
        (r#"{"type":"ping","pkg_id":"x","data":[]}"#, ClientControl::Ping),
        (r#"{"type":"PING"}"#, unknown("PING")),
        (r#"{"type":""}"#, unknown("")),
        (r#"{"type":"subscribe","topic":"a"}"#, unknown("subscribe")),
        // Twice, or not to be read: control, but of no type that is known.
        (r#"{"type":"ping","type":"ping"}"#, unknown("")),
        (r#"{"type":"\ud800"}"#, unknown("")),
    ];
    for (text, expected) in cases {
        for format in FORMATS {
            match decode_text(format, text) {
                Incoming::Control(control) => assert_eq!(control, expected, "{format:?} {text}"),
                other => panic!("{format:?} {text}: {other:?}"),
            }
        }
    }
}

#[test]
fn control_frames_of_the_server_are_text() {
    let id = Uuid::max();
    for (control, expected) in [
        (
            ServerControl::AuthOk { connection_id: id, user: "ann \"🦀\"", expires_in: 60 },
            json!({ "type": "auth_ok", "connection_id": id, "user": "ann \"🦀\"", "expires_in": 60 }),
        ),
        (
            ServerControl::Error { code: "auth_timeout", msg: "too late", retry_after_ms: None },
            json!({ "type": "error", "code": "auth_timeout", "msg": "too late" }),
        ),
        (
            ServerControl::Error { code: "x", msg: "later", retry_after_ms: Some(7) },
            json!({ "type": "error", "code": "x", "msg": "later", "retry_after_ms": 7 }),
        ),
        (
            ServerControl::RefreshOk { expires_in: 300, gained: &[3, 4], lost: &[] },
            json!({ "type": "refresh_ok", "expires_in": 300, "gained": [3, 4], "lost": [] }),
        ),
        (
            ServerControl::AuthExpiring { expires_in: 59 },
            json!({ "type": "auth_expiring", "expires_in": 59 }),
        ),
        (ServerControl::Pong, json!({ "type": "pong" })),
        (
            ServerControl::Drain { reconnect_after_ms: 1500 },
            json!({ "type": "drain", "reconnect_after_ms": 1500 }),
        ),
    ] {
        let Message::Text(text) = control.frame() else { panic!("{control:?} is no text") };
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
    }
}

#[test]
fn a_format_is_chosen_by_its_exact_name() {
    assert_eq!(Format::parse("json"), Ok(Format::Json));
    assert_eq!(Format::parse("protobuf"), Ok(Format::Protobuf));
    for name in ["", "JSON", "msgpack", "json "] {
        let error = Format::parse(name).unwrap_err();
        assert_eq!(error, format!("unknown format {name:?}: json and protobuf are allowed"));
    }
}
