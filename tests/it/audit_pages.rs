//! Pages of `/audit-logs`: by cursor, and by number with a total that is optional and bounded.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    Database, TestServer, on_both,
    process::run,
    rest::{path, refused},
};

/// Servers that read the trail, and leave nothing in it themselves.
const QUIET: (&str, &str) = ("AUDIT_ENABLED", "false");

async fn get(server: &TestServer, path: &str) -> Value {
    let answer = server.rest(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

fn names(page: &Value) -> Vec<String> {
    let items = page["items"].as_array().unwrap();
    items.iter().map(|item| item["request_id"].as_str().unwrap().to_owned()).collect()
}

async fn a_total_is_counted_up_to_a_bound_or_not_at_all(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    let rows: Vec<_> = (0..10_021).map(|i| json!({ "request_id": i.to_string() })).collect();
    place.audit(&rows).await;
    let all = get(&server, "/audit-logs").await;
    let meta = |page: &Value| {
        let names = ["total", "pages", "total_is_exact", "has_more"];
        json!(names.map(|name| page["meta"][name].clone()))
    };
    assert_eq!(meta(&all), json!([10_000, 500, false, true]));
    // The last page that there is by number, from which the cursor goes on.
    let last = get(&server, "/audit-logs?page=500").await;
    assert_eq!((meta(&last), names(&last).len()), (json!([10_000, 500, false, true]), 20));
    let cursor = last["meta"]["next_cursor"].as_str().unwrap();
    let next = get(&server, &format!("/audit-logs?cursor={cursor}")).await;
    assert_eq!((&*names(&next)[0], &*names(&next)[19]), ("20", "1"));
    let deep = server.rest(Method::GET, "/audit-logs?page=501").send().await.unwrap();
    let details = refused(deep, 422, "invalid_data").await;
    assert_eq!(path(&details), "page");
    assert!(details.to_string().contains("next_cursor"), "{details}");

    let uncounted = get(&server, "/audit-logs?total=false").await;
    assert_eq!(meta(&uncounted), json!([0, 0, false, true]));
    assert_eq!(names(&uncounted), names(&all));
    let few = get(&server, "/audit-logs?start_date=2026-11-22T02:47:00Z&total=true").await;
    assert_eq!(meta(&few), json!([1, 1, true, false]));
}

async fn a_walk_by_cursor_sees_every_row_once_newest_first_while_rows_come(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUIET]).await;
    // Most are of one moment, and the walk is of one user.
    let rows: Vec<_> = (0..90)
        .map(|i| {
            let user = if i % 3 == 0 { "other" } else { "7a1f" };
            let mut row = json!({ "request_id": i.to_string(), "user_id": user });
            if i >= 20 {
                row["timestamp"] = json!("2026-11-23T00:00:00.000000Z");
            }
            row
        })
        .collect();
    place.audit(&rows).await;
    let (mut seen, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let query = format!("user_id=7a1f&per_page=7&page=9&cursor={cursor}");
        let page = get(&server, &format!("/audit-logs?{query}")).await;
        let meta = &page["meta"];
        assert_eq!(
            (&meta["page"], &meta["total"], &meta["pages"]),
            (&json!(1), &json!(0), &json!(0))
        );
        assert_eq!(meta["has_more"], meta["next_cursor"].is_string());
        seen.extend(names(&page));
        pages += 1;
        // What is newer is not of this walk.
        let new = uuid::Uuid::new_v4();
        place.audit(&[json!({ "uid": new, "timestamp": "2026-11-24T00:00:00.000000Z" })]).await;
        match meta["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    let expected: Vec<_> = (0..90).rev().filter(|i| i % 3 != 0).map(|i| i.to_string()).collect();
    assert_eq!((seen, pages), (expected, 9));
}

on_both![
    a_total_is_counted_up_to_a_bound_or_not_at_all,
    a_walk_by_cursor_sees_every_row_once_newest_first_while_rows_come,
];

#[tokio::test]
async fn a_trail_that_cannot_be_counted_in_time_still_has_its_pages() {
    let place = Database::Postgres.place().await;
    assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    // Each row takes its time, as in a trail of many millions: to count all would take seconds.
    place
        .execute(
            "INSERT INTO user_actions (uid, timestamp, user_roles, action_type, resource, outcome)
             SELECT gen_random_uuid(), now() - i * interval '1 second', '[]', 'POST', '/', 'success'
             FROM generate_series(1, 60000) AS i;
             ALTER TABLE user_actions RENAME TO all_actions;
             CREATE FUNCTION slow(id BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS
             $$ BEGIN FOR i IN 1..1000 LOOP END LOOP; RETURN true; END $$;
             CREATE VIEW user_actions AS SELECT * FROM all_actions WHERE slow(id);
             ANALYZE all_actions",
        )
        .await;
    let server = place.server(&[QUIET, ("DB_STATEMENT_TIMEOUT", "300ms")]).await;
    let page = get(&server, "/audit-logs").await;
    let meta = &page["meta"];
    assert_eq!(page["items"].as_array().unwrap().len(), 20);
    assert_eq!((&meta["total_is_exact"], &meta["has_more"]), (&json!(false), &json!(true)));
    let total = meta["total"].as_i64().unwrap();
    assert!((20..=10_000).contains(&total), "{meta}");
}
