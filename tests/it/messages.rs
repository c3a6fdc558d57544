//! Requests and answers in JSON: shapes, refusals and their order, and the built-in packages.

use futures_util::future::join_all;
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::support::{Client, Database, TestServer, on_both, on_both_runtimes};

on_both_runtimes!(
    a_pkg_id_without_handler_is_answered_and_the_connection_lives,
    a_message_that_is_no_request_is_answered_with_the_ids_that_could_be_read,
    optional_members_may_be_absent_or_null_and_unknown_ones_are_ignored,
    every_spelling_of_a_req_id_comes_back_in_lower_case_with_dashes,
    a_missing_role_is_named,
    the_handler_is_looked_for_before_the_role_and_the_role_before_the_data,
    data_that_does_not_fit_is_refused_with_its_path,
    data_is_json_and_not_text_of_json,
    deeply_nested_data_harms_nobody,
);

const NIL: &str = "00000000-0000-0000-0000-000000000000";
const ID: &str = "550e8400-e29b-41d4-a716-446655440000";

fn code(answer: &Value) -> (i64, &str) {
    (answer["status_code"].as_i64().unwrap(), answer["data"]["code"].as_str().unwrap_or("-"))
}

async fn send_text(client: &mut Client, text: &str) -> Value {
    client.send_frame(Message::text(text)).await;
    let answer = client.receive().await;
    assert_eq!(answer.as_object().unwrap().len(), 5, "{answer}");
    assert_eq!(answer["meta"], json!(null));
    answer
}

async fn a_pkg_id_without_handler_is_answered_and_the_connection_lives() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    for pkg_id in [999, 0, -1, 2_147_483_647, -2_147_483_648] {
        let answer = client.call(pkg_id, json!({})).await;
        assert_eq!(code(&answer), (1, "unknown_pkg"));
        assert_eq!(answer["data"]["msg"], format!("No handler found for pkg_id {pkg_id}"));
        assert_eq!(answer["pkg_id"], pkg_id);
    }
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

async fn a_message_that_is_no_request_is_answered_with_the_ids_that_could_be_read() {
    let server = TestServer::start(&[("WS_MAX_STRIKES", "0")]).await;
    let mut client = server.client("ann").await;
    for (text, pkg_id, req_id) in [
        ("nonsense".to_owned(), 0, NIL),
        (String::new(), 0, NIL),
        ("{".to_owned(), 0, NIL),
        ("[]".to_owned(), 0, NIL),
        ("7".to_owned(), 0, NIL),
        ("null".to_owned(), 0, NIL),
        (format!(r#"[100, "{ID}"]"#), 0, NIL),
        ("{}".to_owned(), 0, NIL),
        (r#"{"pkg_id":100}"#.to_owned(), 100, NIL),
        (format!(r#"{{"req_id":"{ID}"}}"#), 0, ID),
        (format!(r#"{{"pkg_id":null,"req_id":"{ID}"}}"#), 0, ID),
        (format!(r#"{{"pkg_id":"100","req_id":"{ID}"}}"#), 0, ID),
        (format!(r#"{{"pkg_id":1.5,"req_id":"{ID}"}}"#), 0, ID),
        (format!(r#"{{"pkg_id":2147483648,"req_id":"{ID}"}}"#), 0, ID),
        (format!(r#"{{"pkg_id":-2147483649,"req_id":"{ID}"}}"#), 0, ID),
        (r#"{"pkg_id":100,"req_id":"no"}"#.to_owned(), 100, NIL),
        (r#"{"pkg_id":100,"req_id":7}"#.to_owned(), 100, NIL),
        (format!(r#"{{"pkg_id":100,"req_id":"{ID}","data":[]}}"#), 100, ID),
        (format!(r#"{{"pkg_id":100,"req_id":"{ID}","data":"x"}}"#), 100, ID),
        (format!(r#"{{"pkg_id":100,"req_id":"{ID}","method":7}}"#), 100, ID),
        (format!(r#"{{"pkg_id":100,"req_id":"{ID}","type":7,"data":1}}"#), 100, ID),
        // No JSON as a whole: nothing in it can be trusted.
        (format!(r#"{{"pkg_id":100,"req_id":"{ID}","data":{{"x":NaN}}}}"#), 0, NIL),
    ] {
        let answer = send_text(&mut client, &text).await;
        assert_eq!(code(&answer), (2, "invalid_message"), "{text}");
        assert_eq!(answer["pkg_id"], pkg_id, "{text}");
        assert_eq!(answer["req_id"], req_id, "{text}");
        assert!(answer["data"]["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{text}");
    }
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
}

async fn optional_members_may_be_absent_or_null_and_unknown_ones_are_ignored() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    for more in [
        "",
        r#","method":null,"data":null"#,
        r#","method":"","data":{}"#,
        r#","method":"anything""#,
        r#","trace":{"id":[1]},"type":7,"TYPE":"x""#,
    ] {
        let text = format!(r#"{{"pkg_id":100,"req_id":"{ID}"{more}}}"#);
        let answer = send_text(&mut client, &text).await;
        assert_eq!((&answer["status_code"], &answer["data"]), (&json!(0), &json!({})), "{text}");
    }
}

async fn every_spelling_of_a_req_id_comes_back_in_lower_case_with_dashes() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    for spelling in [
        ID.to_owned(),
        ID.to_uppercase(),
        ID.replace('-', ""),
        format!("urn:uuid:{ID}"),
        format!("{{{ID}}}"),
    ] {
        let text = json!({ "pkg_id": 100, "req_id": spelling, "data": {} }).to_string();
        let answer = send_text(&mut client, &text).await;
        assert_eq!((&answer["status_code"], &answer["req_id"]), (&json!(0), &json!(ID)), "{text}");
        let text = json!({ "pkg_id": 100, "req_id": spelling, "data": 1 }).to_string();
        assert_eq!(send_text(&mut client, &text).await["req_id"], ID, "{text}");
    }
}

async fn a_missing_role_is_named() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client_with("ann", &["admin"], "json").await;
    for (pkg_id, role) in [
        (1, roles::GET_AUTHORS),
        (2, roles::GET_AUTHORS),
        (3, roles::CREATE_AUTHOR),
        (4, roles::UPDATE_AUTHOR),
        (5, roles::DELETE_AUTHOR),
    ] {
        let answer = client.call(pkg_id, json!({})).await;
        assert_eq!(code(&answer), (3, "permission_denied"));
        assert_eq!(answer["data"]["msg"], format!("No permission for pkg_id {pkg_id}"));
        assert_eq!(answer["data"]["details"]["required_roles"], json!([role]));
        let mut other = server.client_with("bob", &[role], "json").await;
        let data = json!({ "id": 1, "name": "x" });
        assert_ne!(other.call(pkg_id, data).await["status_code"], 3);
    }
    let mut nobody = server.client_with("cat", &[], "json").await;
    assert_eq!(nobody.call(100, json!({})).await["status_code"], 0);
}

async fn the_handler_is_looked_for_before_the_role_and_the_role_before_the_data() {
    let server = TestServer::start(&[]).await;
    let mut nobody = server.client_with("ann", &[], "json").await;
    let bad = json!({ "no_such_member": 1 });
    assert_eq!(code(&nobody.call(999, bad.clone()).await), (1, "unknown_pkg"));
    assert_eq!(code(&nobody.call(3, bad.clone()).await), (3, "permission_denied"));
    let mut everybody = server.client("bob").await;
    assert_eq!(code(&everybody.call(3, bad).await), (2, "invalid_data"));
}

async fn data_that_does_not_fit_is_refused_with_its_path() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    for (pkg_id, data, path) in [
        (1, json!({ "id": "x" }), "id"),
        (1, json!({ "color": 1 }), "color"),
        (1, json!({ "id": 2_147_483_648_i64 }), "id"),
        (1, json!({ "search_term": "a\u{0}b" }), "search_term"),
        (2, json!({ "page": 0 }), "page"),
        (2, json!({ "page": -1 }), "page"),
        (2, json!({ "per_page": 0 }), "per_page"),
        (2, json!({ "per_page": 101 }), "per_page"),
        (2, json!({ "cursor": "!" }), "cursor"),
        (2, json!({ "filters": { "id": "x" } }), "filters.id"),
        (2, json!({ "filters": { "age": 1 } }), "filters.age"),
        (3, json!({}), ""),
        (3, json!({ "name": "" }), "name"),
        (3, json!({ "name": "x".repeat(256) }), "name"),
        (3, json!({ "name": 1 }), "name"),
        (3, json!({ "name": "a\u{0}b" }), "name"),
        (3, json!({ "name": "x", "id": 1 }), "id"),
        (4, json!({ "id": 1 }), ""),
        (4, json!({ "id": 1, "name": "" }), "name"),
        (4, json!({ "id": 1, "name": "x", "more": 1 }), "more"),
        (5, json!({ "id": 1.5 }), "id"),
        (5, json!({ "id": 1, "more": 1 }), "more"),
    ] {
        let answer = client.call(pkg_id, data.clone()).await;
        assert_eq!(code(&answer), (2, "invalid_data"), "{pkg_id} {data}");
        let errors = answer["data"]["details"]["errors"].as_array().unwrap();
        assert_eq!(errors[0]["path"], path, "{pkg_id} {data}");
        assert!(errors[0]["msg"].as_str().is_some_and(|msg| !msg.is_empty()));
    }
}

async fn authors_are_created_read_renamed_and_deleted(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    let longest = "ä".repeat(255);
    for name in ["Ann", "Bob", &longest] {
        let answer = client.call(3, json!({ "name": name })).await;
        assert_eq!((&answer["status_code"], &answer["data"]["name"]), (&json!(0), &json!(name)));
    }
    let all = client.call(1, json!({})).await;
    assert_eq!(all["data"].as_array().unwrap().len(), 3);
    assert_eq!(all["data"][0], json!({ "id": 1, "name": "Ann" }));
    for (query, ids) in [
        (json!({ "id": 2 }), json!([2])),
        (json!({ "name": "Ann" }), json!([1])),
        (json!({ "name": "An" }), json!([])),
        (json!({ "search_term": "N" }), json!([1])),
        (json!({ "search_term": "N", "id": 2, "name": "Bob" }), json!([1])),
        (json!({ "id": 2, "name": "Ann" }), json!([])),
    ] {
        let found = client.call(1, query.clone()).await;
        let found: Vec<_> = found["data"].as_array().unwrap().iter().map(|a| &a["id"]).collect();
        assert_eq!(json!(found), ids, "{query}");
    }
    let renamed = client.call(4, json!({ "id": 2, "name": "Bo" })).await;
    assert_eq!(renamed["data"], json!({ "id": 2, "name": "Bo" }));
    assert_eq!(client.call(5, json!({ "id": 2 })).await["data"], json!({}));
    assert_eq!(client.call(1, json!({ "id": 2 })).await["data"], json!([]));
}

async fn a_taken_name_is_a_conflict_and_a_missing_author_is_not_found(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    client.call(3, json!({ "name": "Ann" })).await;
    client.call(3, json!({ "name": "Bob" })).await;
    let taken = json!({ "name": "Ann" });
    assert_eq!(code(&client.call(3, taken).await), (2, "conflict"));
    let taken = json!({ "id": 2, "name": "Ann" });
    assert_eq!(code(&client.call(4, taken).await), (2, "conflict"));
    let missing = json!({ "id": 77, "name": "Cat" });
    assert_eq!(code(&client.call(4, missing).await), (1, "not_found"));
    assert_eq!(code(&client.call(5, json!({ "id": 77 })).await), (1, "not_found"));
}

async fn eight_creates_of_one_name_at_once_make_one_author(database: Database) {
    let server = database.server(&[("WS_BROADCAST_CHANGES", "false")]).await;
    let mut clients = join_all((0..8).map(|_| server.client("ann"))).await;
    let answers = join_all(clients.iter_mut().map(|c| c.call(3, json!({ "name": "One" })))).await;
    let mut codes: Vec<_> = answers.iter().map(code).collect();
    codes.sort_unstable();
    assert_eq!(codes[0], (0, "-"));
    assert!(codes[1..].iter().all(|code| *code == (2, "conflict")), "{codes:?}");
    let all = clients[0].call(1, json!({})).await;
    assert_eq!(all["data"].as_array().unwrap().len(), 1);
}

async fn pages_say_where_they_stand(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    for i in 1..=5 {
        client.call(3, json!({ "name": format!("a{i}") })).await;
    }
    for (query, ids, page, pages, has_more) in [
        (json!({ "per_page": 2 }), json!([1, 2]), 1, 3, true),
        (json!({ "per_page": 2, "page": 3 }), json!([5]), 3, 3, false),
        (json!({ "per_page": 2, "page": 9 }), json!([]), 9, 3, false),
    ] {
        let answer = client.call(2, query).await;
        let found: Vec<_> = answer["data"].as_array().unwrap().iter().map(|a| &a["id"]).collect();
        assert_eq!(json!(found), ids);
        let meta = json!({
            "page": page, "per_page": 2, "total": 5, "pages": pages,
            "next_cursor": null, "has_more": has_more,
        });
        assert_eq!(answer["meta"], meta);
    }
    let whole = client.call(2, json!({})).await;
    assert_eq!((&whole["meta"]["page"], &whole["meta"]["per_page"]), (&json!(1), &json!(20)));
    for filters in [json!({ "id": 4 }), json!({ "id": 4, "name": "a" })] {
        let one = client.call(2, json!({ "filters": filters })).await;
        assert_eq!(one["data"], json!([{ "id": 4, "name": "a4" }]));
    }
    let one = client.call(2, json!({ "filters": { "name": "A3" } })).await;
    assert_eq!((&one["data"][0]["id"], &one["meta"]["total"]), (&json!(3), &json!(1)));
}

async fn a_cursor_walk_sees_every_author_once(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    for i in 1..=5 {
        client.call(3, json!({ "name": format!("a{i}") })).await;
    }
    let mut cursor = json!("");
    let mut seen = Vec::new();
    for _ in 0..3 {
        // `page` is there to be ignored.
        let walk = json!({ "page": 9, "per_page": 2, "cursor": cursor });
        let answer = client.call(2, walk).await;
        let meta = &answer["meta"];
        let (one, none) = (json!(1), json!(0));
        assert_eq!((&meta["page"], &meta["total"], &meta["pages"]), (&one, &none, &none));
        seen.extend(answer["data"].as_array().unwrap().iter().map(|a| a["id"].as_i64().unwrap()));
        assert_eq!(answer["meta"]["has_more"], answer["meta"]["next_cursor"].is_string());
        cursor = answer["meta"]["next_cursor"].clone();
    }
    assert_eq!((seen, cursor), (vec![1, 2, 3, 4, 5], json!(null)));
}

async fn an_answer_has_the_id_of_its_request(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    let ids: Vec<_> = (0..50).map(|_| Uuid::new_v4()).collect();
    let frame = |id| {
        Message::text(json!({ "pkg_id": 100, "req_id": id, "data": { "id": id } }).to_string())
    };
    client.send_together(ids.iter().map(frame)).await;
    let mut seen = Vec::new();
    for _ in &ids {
        let answer = client.receive().await;
        assert_eq!(answer["req_id"], answer["data"]["id"]);
        seen.push(Uuid::parse_str(answer["req_id"].as_str().unwrap()).unwrap());
    }
    seen.sort_unstable();
    let mut ids = ids;
    ids.sort_unstable();
    assert_eq!(seen, ids);
}

async fn page_zero_is_refused_and_no_internal_error(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    for query in [json!({ "page": 0 }), json!({ "per_page": 0 }), json!({ "page": i64::MIN })] {
        assert_eq!(code(&client.call(2, query).await), (2, "invalid_data"));
    }
    let last = json!({ "page": i32::MAX, "per_page": 100 });
    assert_eq!(client.call(2, last).await["status_code"], 0);
}

async fn data_is_json_and_not_text_of_json() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    let made = client.call(3, json!({ "name": "\"quoted\" ä \u{1F600} \\" })).await;
    assert!(made["data"].is_object(), "{made}");
    assert_eq!(made["data"]["name"], "\"quoted\" ä \u{1F600} \\");
    assert!(client.call(1, json!({})).await["data"][0].is_object());
}

async fn deeply_nested_data_harms_nobody() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    let deep = [&"[".repeat(30_000), &*"]".repeat(30_000)].concat();
    for (pkg_id, status) in [(100, 0), (1, 2), (999, 1)] {
        let text = format!(r#"{{"pkg_id":{pkg_id},"req_id":"{ID}","data":{{"id":{deep}}}}}"#);
        client.send_frame(Message::text(text)).await;
        // Too deep for a parser that builds a tree.
        let Ok(Message::Text(answer)) = client.next().await else { panic!("no answer") };
        assert!(answer.contains(&format!(r#""status_code":{status}"#)), "{pkg_id}");
    }
    let text = format!(r#"{{"pkg_id":"x","data":{deep}}}"#);
    assert_eq!(code(&send_text(&mut client, &text).await), (2, "invalid_message"));
}

async fn a_search_term_longer_than_any_name_is_invalid_data(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("ann").await;
    for (pkg_id, data, path) in [
        (1, json!({ "search_term": "%".repeat(30_000) }), "search_term"),
        (2, json!({ "filters": { "name": "x".repeat(60_000) } }), "filters.name"),
    ] {
        let answer = client.call(pkg_id, data).await;
        assert_eq!(answer["status_code"], 2, "{answer}");
        assert_eq!(answer["data"]["details"]["errors"][0]["path"], path);
    }
}

on_both![
    authors_are_created_read_renamed_and_deleted,
    a_taken_name_is_a_conflict_and_a_missing_author_is_not_found,
    eight_creates_of_one_name_at_once_make_one_author,
    pages_say_where_they_stand,
    a_cursor_walk_sees_every_author_once,
    an_answer_has_the_id_of_its_request,
    page_zero_is_refused_and_no_internal_error,
    a_search_term_longer_than_any_name_is_invalid_data,
];
