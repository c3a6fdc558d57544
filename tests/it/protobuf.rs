//! The same server over `format=protobuf`: the same information in binary frames.

use prost::Message as _;
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Client, Closed, Database, TestServer, on_both,
    wire::{Metadata, Request, Response},
};

const NIL: &str = "00000000-0000-0000-0000-000000000000";
const ID: &str = "550e8400-e29b-41d4-a716-446655440000";

async fn client(server: &TestServer) -> Client {
    server.client_with("ann", &roles::ALL, "protobuf").await
}

fn code(answer: &Response) -> (i32, String) {
    let code = answer.data()["code"].as_str().unwrap_or("-").to_owned();
    (answer.status_code, code)
}

fn fails(status: i32, code: &str) -> (i32, String) {
    (status, code.to_owned())
}

#[tokio::test]
async fn an_echo_comes_back_as_a_binary_response() {
    let server = TestServer::start(&[]).await;
    let mut client = client(&server).await;
    let answer = client.call_protobuf(100, r#"{"a":[1,{"b":null}]}"#).await;
    assert_eq!(answer.status_code, 0);
    assert_eq!(answer.data(), json!({ "a": [1, { "b": null }] }));
    assert_eq!(answer.meta, None);
    for empty in ["", "null", "{}"] {
        assert_eq!(client.call_protobuf(100, empty).await.data(), json!({}), "{empty:?}");
    }
}

async fn both_formats_carry_the_same_answers(database: Database) {
    let server = database.server(&[("WS_BROADCAST_CHANGES", "false")]).await;
    let mut binary = client(&server).await;
    let mut text = server.client("ann").await;
    for i in 1..=5 {
        let answer = binary.call_protobuf(3, &format!(r#"{{"name":"a{i}"}}"#)).await;
        assert_eq!(answer.data(), json!({ "id": i, "name": format!("a{i}") }));
    }
    for (pkg_id, data) in [
        (1, json!({})),
        (1, json!({ "search_term": "A3" })),
        (1, json!({ "id": "x" })),
        (2, json!({ "per_page": 2 })),
        (2, json!({ "per_page": 2, "cursor": "" })),
        (2, json!({ "page": 0 })),
        (3, json!({ "name": "a1" })),
        (3, json!({ "name": "x", "no_such_member": 1 })),
        (4, json!({ "id": 1, "name": "ä\u{1F600}\"" })),
        (4, json!({ "id": 77, "name": "b" })),
        (5, json!({ "id": 77 })),
        (100, json!({ "big": 9_007_199_254_740_993_i64, "f": 0.1 })),
        (999, json!({})),
    ] {
        let json = text.call(i64::from(pkg_id), data.clone()).await;
        let answer = binary.call_protobuf(pkg_id, &data.to_string()).await;
        assert_eq!(json["status_code"], answer.status_code, "{pkg_id} {data}");
        assert_eq!(json["data"], answer.data(), "{pkg_id} {data}");
        assert_eq!(json["meta"], as_json(answer.meta.as_ref()), "{pkg_id} {data}");
    }
}

/// Metadata as the JSON format writes it.
fn as_json(meta: Option<&Metadata>) -> Value {
    let Some(meta) = meta else { return Value::Null };
    let next_cursor = Some(&meta.next_cursor).filter(|cursor| !cursor.is_empty());
    json!({
        "page": meta.page, "per_page": meta.per_page, "total": meta.total, "pages": meta.pages,
        "next_cursor": next_cursor, "has_more": meta.has_more,
    })
}

async fn a_cursor_walk_goes_on_with_the_cursor_of_the_metadata(database: Database) {
    let server = database.server(&[]).await;
    let mut client = client(&server).await;
    for i in 1..=3 {
        client.call_protobuf(3, &format!(r#"{{"name":"a{i}"}}"#)).await;
    }
    let first = client.call_protobuf(2, r#"{"per_page":2,"cursor":""}"#).await;
    let meta = first.meta.unwrap();
    assert!(meta.has_more && !meta.next_cursor.is_empty());
    let next = json!({ "per_page": 2, "cursor": meta.next_cursor }).to_string();
    let last = client.call_protobuf(2, &next).await;
    assert_eq!(last.data(), json!([{ "id": 3, "name": "a3" }]));
    let meta = last.meta.unwrap();
    assert!(!meta.has_more && meta.next_cursor.is_empty());
}

#[tokio::test]
async fn a_missing_role_is_named_in_protobuf_too() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client_with("ann", &[], "protobuf").await;
    let answer = client.call_protobuf(3, r#"{"no_such_member":1}"#).await;
    assert_eq!(code(&answer), fails(3, "permission_denied"));
    assert_eq!(answer.data()["msg"], "No permission for pkg_id 3");
    assert_eq!(answer.data()["details"]["required_roles"], json!(["create-author"]));
}

#[tokio::test]
async fn bytes_that_are_no_request_are_answered_with_the_ids_that_could_be_read() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "0")]).await;
    let mut client = client(&server).await;
    let good = Request { req_id: ID.to_owned(), ..Request::new(100, "{}") };
    let bytes = |request: &Request| request.encode_to_vec();
    let cut =
        [bytes(&Request { data_json: String::new(), ..good.clone() }), vec![0x22, 9]].concat();
    for (case, bytes, pkg_id, req_id) in [
        ("nonsense", b"\xff\xff\xff".to_vec(), 0, NIL),
        ("nothing", Vec::new(), 0, NIL),
        ("cut off", cut, 100, ID),
        ("no req_id", bytes(&Request { req_id: String::new(), ..good.clone() }), 100, NIL),
        ("bad req_id", bytes(&Request { req_id: "no".to_owned(), ..good.clone() }), 100, NIL),
        ("bad data", bytes(&Request { data_json: "{".to_owned(), ..good.clone() }), 100, ID),
        ("a list", bytes(&Request { data_json: "[]".to_owned(), ..good.clone() }), 100, ID),
    ] {
        client.send_frame(Message::binary(bytes)).await;
        let answer = client.receive_protobuf().await;
        assert_eq!(code(&answer), fails(2, "invalid_message"), "{case}");
        assert_eq!((answer.pkg_id, &*answer.req_id), (pkg_id, req_id), "{case}");
    }
    assert_eq!(client.call_protobuf(100, "{}").await.status_code, 0);
}

#[tokio::test]
async fn unknown_fields_are_skipped_and_an_absent_pkg_id_is_zero() {
    let server = TestServer::start(&[]).await;
    let mut client = client(&server).await;
    let request = Request { req_id: ID.to_uppercase(), ..Request::new(100, "{}") };
    // Field 15, of a newer client.
    let bytes = [request.encode_to_vec(), vec![0x7a, 2, b'h', b'i']].concat();
    client.send_frame(Message::binary(bytes)).await;
    let answer = client.receive_protobuf().await;
    assert_eq!((answer.status_code, &*answer.req_id), (0, ID));
    assert_eq!(code(&client.call_protobuf(0, "{}").await), fails(1, "unknown_pkg"));
}

#[tokio::test]
async fn control_frames_are_text_in_protobuf() {
    let server = TestServer::start(&[]).await;
    let mut client = client(&server).await;
    client.send(&json!({ "type": "ping" })).await;
    assert_eq!(client.receive().await, json!({ "type": "pong" }));
    client.send(&json!({ "type": "dance" })).await;
    assert_eq!(client.receive().await["type"], "error");
    assert_eq!(client.call_protobuf(100, "{}").await.status_code, 0);
}

#[tokio::test]
async fn text_without_a_type_closes_a_protobuf_connection() {
    let server = TestServer::start(&[]).await;
    for text in [json!({ "pkg_id": 100, "req_id": ID, "data": {} }).to_string(), "x".to_owned()] {
        let mut client = client(&server).await;
        client.send_frame(Message::text(text)).await;
        assert_eq!(client.next().await.unwrap_err(), Closed::Code(1003));
    }
    server.until_metric(r#"ws_disconnections_total{code="1003"}"#, 2.0).await;
}

#[tokio::test]
async fn a_binary_frame_closes_a_json_connection() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    client.send_frame(Request::new(100, "{}").frame()).await;
    assert_eq!(client.next().await.unwrap_err(), Closed::Code(1003));
}

on_both![
    both_formats_carry_the_same_answers,
    a_cursor_walk_goes_on_with_the_cursor_of_the_metadata,
];
