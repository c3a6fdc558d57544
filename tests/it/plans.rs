//! Statements find their rows by an index: the plans of the texts that a server runs, on tables that are
//! long enough for it to matter. And walks by cursor are right while others write.

use std::collections::HashSet;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    Database,
    database::Place,
    on_both,
    process::{Process, run, token},
    rest::add_author,
};

/// The statements that a server runs to answer paths, by their text in its log.
async fn statements(place: &Place, paths: &[&str]) -> Vec<Vec<String>> {
    let settings = [
        ("DATABASE_URL", &*place.url),
        ("LOG_LEVEL", "info,switchboard::store=debug"),
        ("LOG_FORMAT", "json"),
        // Its statements are not asked for.
        ("AUDIT_ENABLED", "false"),
    ];
    let mut all = Vec::new();
    for path in paths {
        let process = Process::start(place.data.path(), &settings);
        let request = reqwest::Client::new().get(format!("http://{}{path}", process.addr));
        let token = token(place.data.path(), &["--user", "ann"]);
        let answer = request.bearer_auth(token).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        process.signal("-TERM");
        let ran = process.end();
        let lines = ran.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let run = lines.filter(|line| line["message"] == "query");
        let run = run.map(|line| line["statement"].as_str().unwrap().to_owned());
        // The server itself asks for names that are to be folded anew, and for logouts.
        let own = ["name_search_of IS", "LEFT JOIN revocations"];
        let asked = run.filter(|statement| !own.iter().any(|own| statement.contains(own)));
        all.push(asked.collect());
    }
    all
}

/// The plan of a statement on Postgres after it was run often enough for a plan that serves every value,
/// and that plan itself.
async fn plans(place: &Place, types: &str, values: &str, statement: &str) -> String {
    let execute = format!("EXECUTE asked ({values});");
    let sql =
        format!("PREPARE asked ({types}) AS {statement}; {} EXPLAIN {execute}", execute.repeat(6));
    let usual = place.execute(&sql).await.join("\n");
    let sql = format!(
        "SET plan_cache_mode = force_generic_plan; PREPARE asked ({types}) AS {statement};
         EXPLAIN {execute}"
    );
    usual + "\n" + &place.execute(&sql).await.join("\n")
}

#[tokio::test]
async fn a_cursor_walk_over_a_million_authors_of_postgres_reads_the_index() {
    let place = Database::Postgres.place().await;
    assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    place
        .execute(
            "INSERT INTO author (name, name_folded, name_search, name_search_of)
             SELECT 'Author ' || i, 'author ' || i, 'author ' || i, 'Author ' || i
             FROM generate_series(1, 1000000) AS i;
             ANALYZE author",
        )
        .await;
    let cursor = BASE64_URL_SAFE_NO_PAD.encode("500000");
    let middle = format!("/authors/paginated?cursor={cursor}");
    let paths = ["/authors/paginated?cursor=", &middle, "/authors?name=Author%20500000"];
    let run = statements(&place, &paths).await;
    let types = "int, text, text, text, bigint, bigint, bigint";
    for (run, values, index) in [
        (&run[0], "NULL, NULL, NULL, NULL, 0, 21, 0", "Index Scan using author_pkey"),
        (&run[1], "NULL, NULL, NULL, NULL, 500000, 21, 0", "Index Scan using author_pkey"),
        (
            &run[2],
            "NULL, 'Author 500000', NULL, NULL, 0, 1000, 0",
            "Index Scan using author_name_key",
        ),
    ] {
        assert_eq!(run.len(), 1, "{run:?}");
        let plans = plans(&place, types, values, &run[0]).await;
        assert_eq!(plans.matches(index).count(), 2, "{plans}");
        assert!(!plans.contains("Seq Scan"), "{plans}");
    }
}

async fn every_filter_of_the_audit_trail_has_an_index(database: Database) {
    let place = database.place().await;
    assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    let rows: Vec<_> = (0..20_000)
        .map(|i| {
            let outcome = match i % 20 {
                0 => "error",
                1 => "permission_denied",
                _ => "success",
            };
            json!({ "user_id": format!("u{}", i % 500), "username": format!("n{}", i % 500),
                    "action_type": format!("a{}", i % 10), "resource": format!("r{}", i % 50),
                    "outcome": outcome })
        })
        .collect();
    place.audit(&rows).await;
    let filters = [
        ("user_id=u7", "'u7', NULL, NULL, NULL, NULL, NULL, NULL"),
        ("username=n7", "NULL, 'n7', NULL, NULL, NULL, NULL, NULL"),
        ("action_type=a7", "NULL, NULL, 'a7', NULL, NULL, NULL, NULL"),
        ("resource=r7", "NULL, NULL, NULL, 'r7', NULL, NULL, NULL"),
        ("outcome=error", "NULL, NULL, NULL, NULL, 'error', NULL, NULL"),
        (
            "start_date=2026-11-22T05:00:00Z",
            "NULL, NULL, NULL, NULL, NULL, '2026-11-22 05:00+00', NULL",
        ),
        (
            "end_date=2026-11-22T00:30:00Z",
            "NULL, NULL, NULL, NULL, NULL, NULL, '2026-11-22 00:30+00'",
        ),
        (
            "start_date=2026-11-22T01:00:00Z&end_date=2026-11-22T01:30:00Z&outcome=success",
            "NULL, NULL, NULL, NULL, 'success', '2026-11-22 01:00+00', '2026-11-22 01:30+00'",
        ),
    ];
    // In the middle of the time that the rows are of.
    let (time, key) = ("2026-11-22T02:00:00.000000Z", uuid::Uuid::from_u128(7200));
    let cursor = BASE64_URL_SAFE_NO_PAD.encode(format!("{time} {key}"));
    let paths: Vec<_> = filters
        .iter()
        .flat_map(|(query, _)| {
            [format!("/audit-logs?{query}"), format!("/audit-logs?{query}&cursor={cursor}")]
        })
        .collect();
    let paths: Vec<_> = paths.iter().map(String::as_str).collect();
    let run = statements(&place, &paths).await;
    place
        .execute(if matches!(database, Database::Postgres) { "VACUUM ANALYZE" } else { "ANALYZE" })
        .await;
    for ((filter, values), run) in filters.iter().zip(run.chunks(2)) {
        assert_eq!((run[0].len(), run[1].len()), (2, 1), "a page and its count, and one by cursor");
        for statement in run.concat() {
            let plan = match database {
                Database::Postgres => {
                    let types =
                        "text, text, text, text, text, text, text, bigint, bigint, text, text";
                    let execute = format!("EXECUTE asked ({values}, 20, 0, '{time}', '{key}')");
                    let sql = format!(
                        "PREPARE asked ({types}) AS {statement}; {} EXPLAIN {execute}",
                        format!("{execute};").repeat(6)
                    );
                    place.execute(&sql).await
                }
                Database::Sqlite => place.execute(&format!("EXPLAIN QUERY PLAN {statement}")).await,
            };
            let plan = plan.join("\n");
            assert!(plan.contains("user_actions_"), "{filter}: {plan}");
            assert!(
                !plan.contains("Seq Scan") && !plan.contains("SCAN user_actions"),
                "{filter}: {plan}"
            );
            // Newest first by itself: what is left is to order rows of one moment.
            let sorts = plan.contains("Sort Key") || plan.contains("USE TEMP B-TREE FOR ORDER BY");
            assert!(!sorts || plan.contains("Presorted Key"), "{filter}: {plan}");
        }
    }
}

async fn a_walk_sees_all_that_was_there_once_while_others_write(database: Database) {
    let place = database.place().await;
    let server = place.server(&[("WS_BROADCAST_CHANGES", "false")]).await;
    let mut old = HashSet::new();
    for i in 0..60 {
        old.insert(add_author(&server, &format!("old {i}")).await);
    }
    let walk = async {
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let path = format!("/authors/paginated?per_page=3&cursor={cursor}");
            let page = server.rest(Method::GET, &path).send().await.unwrap();
            let page: Value = page.json().await.unwrap();
            let ids = page["items"].as_array().unwrap().iter().map(|item| item["id"].as_i64());
            seen.extend(ids.map(Option::unwrap));
            match page["meta"]["next_cursor"].as_str() {
                Some(next) => cursor = next.to_owned(),
                None => break seen,
            }
        }
    };
    let write = |writer: usize| {
        let server = &server;
        async move {
            for i in 0..25 {
                add_author(server, &format!("new {writer} {i}")).await;
            }
        }
    };
    let (seen, ..) = tokio::join!(walk, write(0), write(1), write(2), write(3));
    let once: HashSet<_> = seen.iter().copied().collect();
    assert_eq!(once.len(), seen.len(), "an author was seen twice: {seen:?}");
    assert!(old.is_subset(&once), "missing: {:?}", old.difference(&once));
    assert!(seen.is_sorted());
}

on_both![
    every_filter_of_the_audit_trail_has_an_index,
    a_walk_sees_all_that_was_there_once_while_others_write,
];
