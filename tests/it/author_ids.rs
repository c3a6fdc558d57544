//! Ids of authors run out without harm, and rows that cannot be read are left out of lists.

use std::collections::HashSet;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    Database, TestServer, on_both,
    process::{Process, run, token},
    rest::add_author,
};

async fn get(server: &TestServer, path: &str) -> Value {
    let answer = server.rest(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

fn ids(rows: &Value) -> Vec<i64> {
    rows.as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()).collect()
}

/// The ids that a walk by cursor sees.
async fn walk(server: &TestServer) -> Vec<i64> {
    let (mut cursor, mut seen) = (String::new(), Vec::new());
    loop {
        let path = format!("/authors/paginated?per_page=1&cursor={cursor}");
        let page = get(server, &path).await;
        seen.extend(ids(&page["items"]));
        assert_eq!(page["meta"]["has_more"], page["meta"]["next_cursor"].is_string());
        let Some(next) = page["meta"]["next_cursor"].as_str() else { return seen };
        next.clone_into(&mut cursor);
    }
}

async fn an_author_past_the_last_id_is_refused_before_it_is_added(database: Database) {
    let place = database.place().await;
    let server = place.server(&[]).await;
    add_author(&server, "Ann").await;
    place
        .execute(match database {
            Database::Sqlite => "UPDATE sqlite_sequence SET seq = 2147483646",
            Database::Postgres => {
                "SELECT setval(pg_get_serial_sequence('author', 'id'), 2147483646)::text"
            }
        })
        .await;
    assert_eq!(add_author(&server, "Last").await, 2_147_483_647);
    let mut client = server.client("ann").await;
    for i in 0..3 {
        let create = server.rest(Method::POST, "/authors");
        let answer = create.json(&json!({ "name": format!("a{i}") })).send().await.unwrap();
        assert_eq!(answer.status(), 507);
        let error: Value = answer.json().await.unwrap();
        assert_eq!(error["error"]["code"], "out_of_ids");
        assert!(error["error"]["msg"].as_str().unwrap().contains("no id is left"), "{error}");
        let answer = client.call(3, json!({ "name": format!("b{i}") })).await;
        assert_eq!(
            (&answer["status_code"], &answer["data"]["code"]),
            (&json!(1), &json!("out_of_ids"))
        );
    }
    let failed = r#"db_errors_total{error_type="other",operation="insert"}"#;
    assert_eq!(server.metric(failed).await, 6.0);
    assert_eq!(ids(&get(&server, "/authors").await), [1, 2_147_483_647]);
    assert_eq!(place.execute("SELECT CAST(count(*) AS TEXT) FROM author").await, ["2"]);
    // Ids that are free are not given again, and what is there can be changed.
    let rename = server.rest(Method::PUT, "/authors/2147483647").json(&json!({ "name": "x" }));
    assert_eq!(rename.send().await.unwrap().status(), 200);
    // After a restart too.
    drop(server);
    let again = place.server(&[]).await;
    assert_eq!(walk(&again).await, [1, 2_147_483_647]);
}

async fn ids_below_one_are_ids(database: Database) {
    let place = database.place().await;
    let server = place.server(&[]).await;
    let overriding = match database {
        Database::Sqlite => "",
        Database::Postgres => "OVERRIDING SYSTEM VALUE",
    };
    place
        .execute(&format!(
            "INSERT INTO author (id, name, name_folded) {overriding}
             VALUES (-2147483648, 'a', 'a'), (-5, 'b', 'b'), (0, 'c', 'c'), (7, 'd', 'd')"
        ))
        .await;
    let all = [-2_147_483_648, -5, 0, 7];
    assert_eq!(ids(&get(&server, "/authors").await), all);
    assert_eq!(walk(&server).await, all);
    assert_eq!(get(&server, "/authors/-5").await["name"], "b");
}

async fn rows_of_the_trail_that_cannot_be_read_are_left_out(database: Database) {
    let place = database.place().await;
    let server = place.server(&[("AUDIT_ENABLED", "false")]).await;
    place.audit(&[json!({}), json!({}), json!({}), json!({})]).await;
    let spoil = match database {
        Database::Sqlite => {
            "UPDATE user_actions SET user_roles = 'none'
                 WHERE timestamp LIKE '%00:00:01%' OR timestamp LIKE '%00:00:03%';
             UPDATE user_actions SET resource = x'ff' WHERE timestamp LIKE '%00:00:02%'"
        }
        Database::Postgres => {
            "UPDATE user_actions SET user_roles = '{}'
                 WHERE timestamp >= '2026-11-22T00:00:01Z' AND timestamp < '2026-11-22T00:00:04Z'"
        }
    };
    place.execute(spoil).await;
    place.audit(&[json!({ "uid": "01900000-0000-7000-8000-000000000000", "timestamp": "2026-11-23T00:00:00.000000Z" })]).await;
    let page = get(&server, "/audit-logs").await;
    let times: Vec<_> =
        page["items"].as_array().unwrap().iter().map(|row| &row["timestamp"]).collect();
    assert_eq!(times, ["2026-11-23T00:00:00.000000Z", "2026-11-22T00:00:00.000000Z"]);
    let counted = server.metric(r#"db_unreadable_rows_total{table="user_actions"}"#).await;
    assert_eq!(counted, 3.0);
    let ran = run(&["audit", "export", "--format", "jsonl"], &place.settings());
    assert_eq!((ran.code, ran.stdout.lines().count()), (Some(1), 2), "{ran:?}");
    assert!(ran.stderr.contains("3 rows cannot be read and are left out"), "{ran:?}");
    // Nobody is to believe that the person is gone.
    let ran = run(&["audit", "erase", "--subject", "7a1f"], &place.settings());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.starts_with("changed 2 of "), "{ran:?}");
    assert!(ran.stderr.contains("3 rows cannot be read, and may still have the person"), "{ran:?}");
}

on_both![
    an_author_past_the_last_id_is_refused_before_it_is_added,
    ids_below_one_are_ids,
    rows_of_the_trail_that_cannot_be_read_are_left_out,
];

#[tokio::test]
async fn a_row_that_cannot_be_read_is_left_out_logged_once_and_counted() {
    let place = Database::Sqlite.place().await;
    let server = place.server(&[]).await;
    let good = [add_author(&server, "a1").await, add_author(&server, "a2").await];
    place
        .execute(
            "DROP TRIGGER author_id_of_new;
             INSERT INTO author (id, name, name_folded) VALUES
                 (-3000000000, 'a far below', 'a far below'), (5, x'6100ff', 'a'),
                 (6, CAST(x'61ff' AS TEXT), 'a'), (7, 'a7', 'a7'), (8, x'61', 'a'),
                 (3000000000, 'a far above', 'a far above')",
        )
        .await;
    drop(server);

    let process = Process::start(place.data.path(), &[("DATABASE_URL", &place.url)]);
    let token = token(place.data.path(), &["--user", "ann"]);
    let ask = async |method: Method, path: &str| {
        let url = format!("http://{}{path}", process.addr);
        let ask = reqwest::Client::new().request(method, url).bearer_auth(&token);
        let answer = ask.json(&json!({ "name": "a8" })).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let readable = [&good[..], &[7]].concat();
    for path in ["/authors", "/authors?search=A", "/authors"] {
        let (status, list) = ask(Method::GET, path).await;
        assert_eq!((status, ids(&list)), (200, readable.clone()), "{path}");
    }
    for (id, status) in [(5, 404), (6, 404), (7, 200), (8, 404)] {
        assert_eq!(ask(Method::GET, &format!("/authors/{id}")).await.0, status, "{id}");
    }
    // Pages go on after such rows, which have their place in them.
    let (_, page) = ask(Method::GET, "/authors/paginated?per_page=3&page=2").await;
    assert_eq!((ids(&page["items"]), &page["meta"]["total"]), (vec![7], &json!(8)));
    let (_, page) = ask(Method::GET, "/authors/paginated?per_page=3&page=3").await;
    assert_eq!(ids(&page["items"]), Vec::<i64>::new());
    let (mut cursor, mut seen) = (String::new(), Vec::new());
    loop {
        let path = format!("/authors/paginated?per_page=1&cursor={cursor}");
        let (status, page) = ask(Method::GET, &path).await;
        assert_eq!(status, 200);
        seen.extend(ids(&page["items"]));
        let Some(next) = page["meta"]["next_cursor"].as_str() else { break };
        next.clone_into(&mut cursor);
    }
    assert_eq!(seen, readable);
    // A name that can be read makes the row an author again.
    assert_eq!(ask(Method::PUT, "/authors/8").await.0, 200);
    assert_eq!(ask(Method::GET, "/authors/8").await.1["name"], "a8");

    let series = reqwest::get(format!("http://{}/metrics", process.addr)).await.unwrap();
    let series = series.text().await.unwrap();
    let counted = series.lines().find(|line| line.contains(r#"rows_total{table="author""#));
    let counted: f64 = counted.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(counted > 20.0, "{counted}");
    process.signal("-TERM");
    let ran = process.end();
    let lines: Vec<_> = ran.stdout.lines().filter(|line| line.contains("cannot be read")).collect();
    let rows: HashSet<_> = lines
        .iter()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["row"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!((lines.len(), rows.len()), (5, 5), "{lines:?}");
}
