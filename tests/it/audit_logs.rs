//! `/audit-logs`: every filter, pages, who may read, and what it makes of odd input.

use reqwest::Method;
use serde_json::{Value, json};
use switchboard::handlers::roles;

use crate::support::{
    Database, TestServer, on_both,
    rest::{path, refused},
};

const DAY: &str = "2026-11-22";
/// Servers that read the trail, and leave nothing in it themselves.
const QUIET: (&str, &str) = ("AUDIT_ENABLED", "false");

async fn get(server: &TestServer, path: &str) -> Value {
    let answer = server.rest(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
    format!("{path}?{query}")
}

/// The `request_id`s that a path answers, which tests use as names of rows.
async fn found(server: &TestServer, path: &str, query: &[(&str, &str)]) -> Vec<String> {
    let page = get(server, &with_query(path, query)).await;
    let items = page["items"].as_array().unwrap();
    assert_eq!(page["meta"]["total"], items.len(), "{query:?}");
    items.iter().map(|item| item["request_id"].as_str().unwrap().to_owned()).collect()
}

async fn an_item_has_all_columns_under_their_names(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    let full = json!({
        "id": 2,
        "uid": "019aaa00-0000-7000-8000-000000000001",
        "timestamp": "2026-11-22T10:00:00.123456Z",
        "user_id": "7a1f",
        "username": "Zoë \"Z\" 🖋",
        "user_roles": ["admin", "get-authors"],
        "action_type": "WS:CREATE_AUTHOR",
        "resource": "CREATE_AUTHOR",
        "outcome": "error",
        "ip_address": "2001:db8::1",
        "user_agent": "curl/8",
        "request_id": "c0ffee",
        "request_data": { "name": "Ann", "deep": [1, { "x": null }], "password": "[redacted]" },
        "response_status": 2,
        "error_message": "line 1\nline 2",
        "duration_ms": 0.125,
    });
    let mut bare = full.clone();
    for (name, value) in bare.as_object_mut().unwrap() {
        match name.as_str() {
            "id" => *value = json!(1),
            "uid" => *value = json!("019aaa00-0000-7000-8000-000000000000"),
            "timestamp" => *value = json!("2026-11-22T09:00:00.000000Z"),
            "user_roles" => *value = json!([]),
            "action_type" | "resource" | "outcome" => {}
            _ => *value = Value::Null,
        }
    }
    place.audit(&[bare.clone(), full.clone()]).await;
    let page = get(&server, "/audit-logs").await;
    assert_eq!(page["items"], json!([full, bare]));
    let meta = json!({ "page": 1, "per_page": 20, "total": 2, "pages": 1,
                       "next_cursor": null, "has_more": false, "total_is_exact": true });
    assert_eq!(page["meta"], meta);
    assert_eq!(page.as_object().unwrap().len(), 2);
    for item in [full, bare] {
        let uid = item["uid"].as_str().unwrap();
        for key in [uid.to_owned(), uid.to_uppercase(), item["id"].to_string()] {
            assert_eq!(get(&server, &format!("/audit-logs/{key}")).await, item);
        }
    }
    for other in ["019aaa00-0000-7000-8000-00000000000f", "3", "9223372036854775807"] {
        let answer =
            server.rest(Method::GET, &format!("/audit-logs/{other}")).send().await.unwrap();
        refused(answer, 404, "not_found").await;
    }
}

async fn each_filter_counts_alone_and_together_with_others(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    place
        .audit(&[
            json!({ "request_id": "a", "user_id": "1", "username": "ann", "action_type": "POST",
                    "resource": "/authors", "outcome": "success" }),
            json!({ "request_id": "b", "user_id": "2", "username": "bob", "action_type": "POST",
                    "resource": "/authors", "outcome": "error" }),
            json!({ "request_id": "c", "user_id": "1", "username": "ann", "action_type": "DELETE",
                    "resource": "/authors/7", "outcome": "permission_denied" }),
            json!({ "request_id": "d", "user_id": null, "username": null, "action_type": "GET",
                    "resource": "/admin%", "outcome": "permission_denied" }),
        ])
        .await;
    for (query, expected) in [
        (&[][..], &["d", "c", "b", "a"][..]),
        (&[("user_id", "1")], &["c", "a"]),
        (&[("username", "bob")], &["b"]),
        (&[("username", "BOB")], &[]),
        (&[("action_type", "POST")], &["b", "a"]),
        (&[("resource", "/authors")], &["b", "a"]),
        (&[("resource", "/admin%")], &["d"]),
        (&[("outcome", "permission_denied")], &["d", "c"]),
        (&[("outcome", "success")], &["a"]),
        (&[("user_id", "1"), ("outcome", "permission_denied")], &["c"]),
        (&[("user_id", "1"), ("username", "bob")], &[]),
        (&[("user_id", "' OR 1=1 --")], &[]),
        (
            &[("user_id", ""), ("outcome", ""), ("start_date", ""), ("unknown", "x")],
            &["d", "c", "b", "a"],
        ),
        (
            &[
                ("user_id", "1"),
                ("username", "ann"),
                ("action_type", "POST"),
                ("resource", "/authors"),
                ("outcome", "success"),
                ("start_date", DAY),
                ("end_date", DAY),
            ],
            &["a"],
        ),
    ] {
        assert_eq!(found(&server, "/audit-logs", query).await, expected, "{query:?}");
    }
    for (path, query, expected) in [
        ("/audit-logs/user/1", &[][..], &["c", "a"][..]),
        ("/audit-logs/user/1", &[("outcome", "success")], &["a"]),
        // The path says who.
        ("/audit-logs/user/1", &[("user_id", "2")], &["c", "a"]),
        ("/audit-logs/user/nobody%20at%2Fall", &[], &[]),
    ] {
        assert_eq!(found(&server, path, query).await, expected, "{path} {query:?}");
    }
}

async fn a_range_includes_both_of_its_ends(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    let at = |name: &str, time: &str| json!({ "request_id": name, "timestamp": time });
    place
        .audit(&[
            at("eve", "2026-11-21T23:59:59.999999Z"),
            at("first", "2026-11-22T00:00:00.000000Z"),
            at("noon", "2026-11-22T12:00:00.000000Z"),
            at("last", "2026-11-22T23:59:59.999999Z"),
            at("next", "2026-11-23T00:00:00.000000Z"),
        ])
        .await;
    for (start, end, expected) in [
        (DAY, DAY, &["last", "noon", "first"][..]),
        (DAY, "", &["next", "last", "noon", "first"]),
        ("", "2026-11-21", &["eve"]),
        ("2026-11-23", "9999-12-31", &["next"]),
        ("0001-01-01", "2026-11-21", &["eve"]),
        ("2026-11-22T12:00:00Z", "2026-11-22T12:00:00Z", &["noon"]),
        // The same moment, as two other places call it.
        ("2026-11-22T13:00:00+01:00", "2026-11-22T04:00:00-08:00", &["noon"]),
        ("2026-11-22T23:59:59.999999Z", "2026-11-23T00:00:00Z", &["next", "last"]),
        ("2026-11-22T12:00:00.000001Z", DAY, &["last"]),
        ("2027-01-01", "2027-12-31", &[]),
    ] {
        let query = [("start_date", start), ("end_date", end), ("username", "ann")];
        assert_eq!(found(&server, "/audit-logs", &query).await, expected, "{start} {end}");
        assert_eq!(found(&server, "/audit-logs", &query[..2]).await, expected, "{start} {end}");
    }
}

async fn pages_are_newest_first_and_rows_of_one_moment_have_an_order(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    // Of 45 rows, the last 30 are of one moment.
    let rows: Vec<_> = (0..45)
        .map(|i| {
            let id = uuid::Uuid::from_u128(i);
            match i {
                0..15 => json!({ "request_id": i.to_string() }),
                _ => json!({ "request_id": i.to_string(), "uid": id, "timestamp": "2026-11-23T00:00:00.000000Z" }),
            }
        })
        .collect();
    place.audit(&rows).await;
    let mut seen = Vec::new();
    for (number, count) in [(1, 20), (2, 20), (3, 5), (4, 0), (500, 0)] {
        let page = get(&server, &format!("/audit-logs?page={number}&username=ann")).await;
        let items = page["items"].as_array().unwrap();
        assert_eq!(items.len(), count, "{number}");
        assert_eq!((&page["meta"]["total"], &page["meta"]["pages"]), (&json!(45), &json!(3)));
        assert_eq!(page["meta"]["has_more"], number < 3);
        seen.extend(items.iter().map(|item| item["request_id"].as_str().unwrap().to_owned()));
    }
    let expected: Vec<_> = (0..45).rev().map(|i| i.to_string()).collect();
    assert_eq!(seen, expected);
    let page = get(&server, "/audit-logs/user/7a1f?page=2&per_page=44").await;
    assert_eq!(page["items"][0]["request_id"], "0");
}

async fn bad_input_is_422_and_says_what_is_allowed(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    for (url, expected, allowed) in [
        ("/audit-logs?page=0", "page", "1 to"),
        ("/audit-logs?page=501", "page", "follow next_cursor"),
        ("/audit-logs?page=2147483647&per_page=1", "page", "follow next_cursor"),
        ("/audit-logs?cursor=x", "cursor", "next_cursor"),
        ("/audit-logs?cursor=MjAyNg", "cursor", "next_cursor"),
        ("/audit-logs?total=maybe", "total", "true or false"),
        ("/audit-logs?per_page=101", "per_page", "1 to 100"),
        ("/audit-logs?per_page=x", "per_page", "i64"),
        ("/audit-logs?outcome=failed", "outcome", "success, error or permission_denied"),
        ("/audit-logs?outcome=SUCCESS", "outcome", "success, error or permission_denied"),
        ("/audit-logs?start_date=yesterday", "start_date", "2026-11-22"),
        ("/audit-logs?start_date=2026-11-22T10:00:00", "start_date", "offset"),
        // A plus that nobody encoded.
        ("/audit-logs?start_date=2026-11-22T10:00:00+01:00", "start_date", "%2B"),
        ("/audit-logs?end_date=2026-02-30", "end_date", "2026-11-22"),
        ("/audit-logs?end_date=%00", "end_date", "2026-11-22"),
        ("/audit-logs?end_date=2026-11-22&user_id=a&start_date=1", "start_date", "2026-11-22"),
        (
            "/audit-logs?start_date=2026-11-23&end_date=2026-11-22",
            "start_date",
            "start_date must not be after end_date",
        ),
        ("/audit-logs?user_id=%00", "user_id", "NUL"),
        ("/audit-logs?username=a%00b", "username", "NUL"),
        ("/audit-logs?action_type=%00", "action_type", "NUL"),
        ("/audit-logs?resource=%00", "resource", "NUL"),
        ("/audit-logs/user/%00", "user_id", "NUL"),
        ("/audit-logs/user/%FF", "user_id", "UTF-8"),
        ("/audit-logs/user/1?outcome=x", "outcome", "success"),
        ("/audit-logs/0", "id", "whole number from 1"),
        ("/audit-logs/-1", "id", "whole number from 1"),
        ("/audit-logs/+1", "id", "whole number from 1"),
        ("/audit-logs/1.0", "id", "whole number from 1"),
        ("/audit-logs/9223372036854775808", "id", "whole number from 1"),
        ("/audit-logs/user", "id", "uid is a UUID"),
        ("/audit-logs/%FF", "id", "UTF-8"),
    ] {
        let answer = server.rest(Method::GET, url).send().await.unwrap();
        let details = refused(answer, 422, "invalid_data").await;
        assert_eq!(path(&details), expected, "{url}");
        let msg = details["errors"][0]["msg"].as_str().unwrap();
        assert!(msg.contains(allowed), "{url}: {msg}");
    }
    // No row has these, and they are no error.
    for url in
        ["/audit-logs?user_id=%FF%FE", "/audit-logs?username=%F0%9F%96%8B", "/audit-logs/user/%25"]
    {
        assert_eq!(get(&server, url).await["items"], json!([]), "{url}");
    }
}

async fn only_administrators_read_it_and_others_learn_nothing_of_it(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    place.audit(&[json!({})]).await;
    let id = uuid::Uuid::nil();
    let others: Vec<_> = roles::ALL.into_iter().filter(|role| *role != roles::ADMIN).collect();
    for url in [
        "/audit-logs".to_owned(),
        "/audit-logs?page=0".into(),
        format!("/audit-logs/{id}"),
        "/audit-logs/x".into(),
        "/audit-logs/user/7a1f".into(),
        "/audit-logs/user/%FF".into(),
    ] {
        let anonymous = server.request(Method::GET, &url).send().await.unwrap();
        refused(anonymous, 401, "unauthorized").await;
        let request = server.request(Method::GET, &url);
        let denied = request.bearer_auth(server.token_with("ann", &others)).send().await.unwrap();
        let details = refused(denied, 403, "permission_denied").await;
        assert_eq!(details, json!({ "required_roles": ["admin"] }));
    }
    let token = server.token_with("op", &[roles::ADMIN]);
    let answer = server.request(Method::GET, "/audit-logs").bearer_auth(token).send().await;
    assert_eq!(answer.unwrap().status(), 200);
    for method in [Method::POST, Method::DELETE, Method::PUT] {
        let answer = server.rest(method, "/audit-logs").send().await.unwrap();
        refused(answer, 405, "method_not_allowed").await;
    }
}

async fn it_is_at_both_addresses_where_operations_have_their_own(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET, ("OPS_ADDR", "127.0.0.1:0")]).await;
    get(&server, "/audit-logs").await;
    let ops = server.ops_addr.unwrap();
    let request = reqwest::Client::new().get(format!("http://{ops}/audit-logs"));
    let answer = request.bearer_auth(server.token("op")).send().await.unwrap();
    assert_eq!(answer.status(), 200, "operators are not sent away with the clients");
}

on_both![
    an_item_has_all_columns_under_their_names,
    each_filter_counts_alone_and_together_with_others,
    a_range_includes_both_of_its_ends,
    pages_are_newest_first_and_rows_of_one_moment_have_an_order,
    bad_input_is_422_and_says_what_is_allowed,
    only_administrators_read_it_and_others_learn_nothing_of_it,
    it_is_at_both_addresses_where_operations_have_their_own,
];
