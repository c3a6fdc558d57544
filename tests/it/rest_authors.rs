//! `/authors`: each route, what it answers, and what it makes of odd input.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    Database, TestServer, on_both,
    rest::{add_author, path, refused},
};

async fn get(server: &TestServer, path: &str) -> Value {
    let answer = server.rest(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
    format!("{path}?{query}")
}

/// The names that `GET /authors` answers to a query.
async fn names(server: &TestServer, query: &[(&str, &str)]) -> Vec<String> {
    let authors = get(server, &with_query("/authors", query)).await;
    authors
        .as_array()
        .unwrap()
        .iter()
        .map(|author| author["name"].as_str().unwrap().to_owned())
        .collect()
}

async fn an_author_is_created_read_renamed_and_deleted(database: Database) {
    let server = database.server(&[]).await;
    let created =
        server.rest(Method::POST, "/authors").json(&json!({ "name": "Ann" })).send().await.unwrap();
    assert_eq!(created.status(), 201);
    let location = created.headers()["location"].to_str().unwrap().to_owned();
    let author: Value = created.json().await.unwrap();
    assert_eq!(location, format!("/authors/{}", author["id"]));
    assert_eq!(author, json!({ "id": author["id"].as_i64().unwrap(), "name": "Ann" }));

    assert_eq!(get(&server, &location).await, author);
    assert_eq!(get(&server, "/authors").await, json!([author]));

    let renamed =
        server.rest(Method::PUT, &location).json(&json!({ "name": "Bea" })).send().await.unwrap();
    assert_eq!(renamed.status(), 200);
    let bea = json!({ "id": author["id"], "name": "Bea" });
    assert_eq!(renamed.json::<Value>().await.unwrap(), bea);
    assert_eq!(get(&server, &location).await, bea);

    let deleted = server.rest(Method::DELETE, &location).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    assert_eq!(deleted.bytes().await.unwrap().len(), 0);
    refused(server.rest(Method::GET, &location).send().await.unwrap(), 404, "not_found").await;
}

async fn an_author_that_is_not_there_is_404(database: Database) {
    let server = database.server(&[]).await;
    for path in ["/authors/1", "/authors/0", "/authors/-1", "/authors/2147483647"] {
        for method in [Method::GET, Method::PUT, Method::DELETE] {
            let request = server.rest(method.clone(), path);
            let request =
                if method == Method::PUT { request.json(&json!({ "name": "x" })) } else { request };
            let details = refused(request.send().await.unwrap(), 404, "not_found").await;
            assert_eq!(details, json!(null));
        }
    }
}

async fn a_taken_name_is_a_conflict_and_ones_own_is_not(database: Database) {
    let server = database.server(&[]).await;
    let ann = add_author(&server, "Ann").await;
    let bea = add_author(&server, "Bea").await;
    let create = server.rest(Method::POST, "/authors").json(&json!({ "name": "Ann" }));
    refused(create.send().await.unwrap(), 409, "conflict").await;
    let rename = |id| server.rest(Method::PUT, &format!("/authors/{id}"));
    let taken = rename(bea).json(&json!({ "name": "Ann" })).send().await.unwrap();
    refused(taken, 409, "conflict").await;
    let own = rename(ann).json(&json!({ "name": "Ann" })).send().await.unwrap();
    assert_eq!(own.status(), 200);
    assert_eq!(names(&server, &[]).await, ["Ann", "Bea"]);
}

async fn parallel_creates_of_one_name_make_one_author(database: Database) {
    let server = database.server(&[]).await;
    let create = || server.rest(Method::POST, "/authors").json(&json!({ "name": "Ann" })).send();
    let answers = futures_util::future::join_all((0..8).map(|_| create())).await;
    let mut statuses: Vec<_> = answers.into_iter().map(|a| a.unwrap().status().as_u16()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409, 409, 409, 409, 409]);
    assert_eq!(names(&server, &[]).await, ["Ann"]);
}

async fn a_list_is_ordered_by_id_and_filtered_by_exact_name_and_by_id(database: Database) {
    let server = database.server(&[]).await;
    let zoe = add_author(&server, "Zoe").await;
    add_author(&server, "Ann").await;
    add_author(&server, "Anna").await;
    assert_eq!(names(&server, &[]).await, ["Zoe", "Ann", "Anna"]);
    assert_eq!(names(&server, &[("name", "Ann")]).await, ["Ann"]);
    assert!(names(&server, &[("name", "ann")]).await.is_empty());
    assert_eq!(names(&server, &[("id", &zoe.to_string())]).await, ["Zoe"]);
    assert!(names(&server, &[("id", &zoe.to_string()), ("name", "Ann")]).await.is_empty());
    assert_eq!(names(&server, &[("unknown", "x"), ("id", "")]).await.len(), 3);
}

async fn search_wins_over_id_and_name(database: Database) {
    let server = database.server(&[]).await;
    let zoe = add_author(&server, "Zoe").await;
    add_author(&server, "Ann").await;
    let query = [("search", "nn"), ("id", &zoe.to_string()), ("name", "Zoe")];
    assert_eq!(names(&server, &query).await, ["Ann"]);
}

async fn a_search_folds_case_in_every_script_and_takes_wildcards_literally(database: Database) {
    let server = database.server(&[]).await;
    for name in ["ÅSA Öberg", "Лев ТОЛСТОЙ", "100% Ann", "a_b", "axb", r"back\slash", "Ann"]
    {
        add_author(&server, name).await;
    }
    for (search, expected) in [
        ("åsa ö", vec!["ÅSA Öberg"]),
        ("толст", vec!["Лев ТОЛСТОЙ"]),
        ("ЛЕВ", vec!["Лев ТОЛСТОЙ"]),
        ("%", vec!["100% Ann"]),
        ("_", vec!["a_b"]),
        ("A_B", vec!["a_b"]),
        (r"\", vec![r"back\slash"]),
        ("ANN", vec!["100% Ann", "Ann"]),
        ("nobody", vec![]),
        ("' OR 1=1 --", vec![]),
    ] {
        assert_eq!(names(&server, &[("search", search)]).await, expected, "{search}");
        let page = get(&server, &with_query("/authors/paginated", &[("name", search)])).await;
        let on_page: Vec<_> =
            page["items"].as_array().unwrap().iter().map(|a| a["name"].as_str().unwrap()).collect();
        assert_eq!(on_page, expected, "{search}");
        assert_eq!(page["meta"]["total"], expected.len());
    }
}

async fn a_page_has_items_and_all_of_meta(database: Database) {
    let server = database.server(&[]).await;
    for i in 1..=25 {
        add_author(&server, &format!("a{i:02}")).await;
    }
    let meta = |page: i64, per_page: i64, pages: i64, has_more: bool| {
        json!({ "page": page, "per_page": per_page, "total": 25, "pages": pages,
                "next_cursor": null, "has_more": has_more })
    };
    for (query, first, len, expected) in [
        ("", Some("a01"), 20, meta(1, 20, 2, true)),
        ("?page=2", Some("a21"), 5, meta(2, 20, 2, false)),
        ("?page=3&per_page=10", Some("a21"), 5, meta(3, 10, 3, false)),
        ("?per_page=25", Some("a01"), 25, meta(1, 25, 1, false)),
        ("?per_page=100", Some("a01"), 25, meta(1, 100, 1, false)),
        ("?page=2147483647&per_page=100", None, 0, meta(2_147_483_647, 100, 1, false)),
    ] {
        let page = get(&server, &format!("/authors/paginated{query}")).await;
        assert_eq!(page.as_object().unwrap().len(), 2, "{query}");
        let items = page["items"].as_array().unwrap();
        assert_eq!(items.len(), len, "{query}");
        assert_eq!(items.first().map(|a| a["name"].as_str().unwrap()), first, "{query}");
        assert_eq!(page["meta"], expected, "{query}");
    }
    let one = get(&server, "/authors/paginated?id=3&name=A0").await;
    assert_eq!(one["items"], json!([{ "id": 3, "name": "a03" }]));
}

async fn a_cursor_walk_sees_each_author_once_though_others_come_and_go(database: Database) {
    let server = database.server(&[]).await;
    for i in 1..=20 {
        add_author(&server, &format!("old{i:02}")).await;
    }
    let (mut cursor, mut seen, mut round) = (String::new(), Vec::new(), 0);
    loop {
        // `page` is there to be ignored.
        let url = format!("/authors/paginated?page=7&per_page=3&cursor={cursor}");
        let page = get(&server, &url).await;
        for author in page["items"].as_array().unwrap() {
            seen.push(author["name"].as_str().unwrap().to_owned());
        }
        let meta = &page["meta"];
        assert_eq!(
            (&meta["page"], &meta["total"], &meta["pages"]),
            (&json!(1), &json!(0), &json!(0))
        );
        assert_eq!(meta["has_more"], meta["next_cursor"].is_string());
        let Some(next) = meta["next_cursor"].as_str() else { break };
        cursor = next.to_owned();
        round += 1;
        if round <= 3 {
            add_author(&server, &format!("new{round}")).await;
            // Behind the walk: offsets would slide.
            let gone = server.rest(Method::DELETE, &format!("/authors/{round}"));
            assert_eq!(gone.send().await.unwrap().status(), 204);
        }
    }
    let mut expected: Vec<_> = (1..=20).map(|i| format!("old{i:02}")).collect();
    expected.extend((1..=3).map(|i| format!("new{i}")));
    assert_eq!(seen, expected);
}

async fn values_out_of_range_are_422_and_named_by_their_path(database: Database) {
    let server = database.server(&[]).await;
    for (url, expected) in [
        ("/authors?id=2147483648", "id"),
        ("/authors?id=99999999999999999999", "id"),
        ("/authors?id=x", "id"),
        ("/authors?id=1.5", "id"),
        ("/authors/2147483648", "id"),
        ("/authors/99999999999999999999", "id"),
        ("/authors/x", "id"),
        ("/authors/%00", "id"),
        ("/authors?name=%00", "name"),
        ("/authors?search=a%00b", "search"),
        ("/authors/paginated?name=%00", "name"),
        ("/authors/paginated?page=0", "page"),
        ("/authors/paginated?page=-1", "page"),
        ("/authors/paginated?page=2147483648", "page"),
        ("/authors/paginated?page=x", "page"),
        ("/authors/paginated?per_page=0", "per_page"),
        ("/authors/paginated?per_page=101", "per_page"),
        ("/authors/paginated?cursor=garbage", "cursor"),
        ("/authors/paginated?cursor=%00", "cursor"),
        // Base64, but of `x` and of an id beyond the column.
        ("/authors/paginated?cursor=eA", "cursor"),
        ("/authors/paginated?cursor=MjE0NzQ4MzY0OA", "cursor"),
        ("/authors/paginated?id=2147483648", "id"),
    ] {
        let answer = server.rest(Method::GET, url).send().await.unwrap();
        let details = refused(answer, 422, "invalid_data").await;
        assert_eq!(path(&details), expected, "{url}");
    }
    for url in ["/authors/x", "/authors/2147483648"] {
        for method in [Method::PUT, Method::DELETE] {
            let request = server.rest(method, url).json(&json!({ "name": "Ann" }));
            let details = refused(request.send().await.unwrap(), 422, "invalid_data").await;
            assert_eq!(path(&details), "id", "{url}");
        }
    }
}

async fn a_body_that_does_not_fit_is_422_and_named_by_its_path(database: Database) {
    let server = database.server(&[]).await;
    let id = add_author(&server, "Ann").await;
    for (body, expected) in [
        (json!({}), ""),
        (json!([]), ""),
        (json!("Ann"), ""),
        (json!(null), ""),
        (json!({ "name": null }), "name"),
        (json!({ "name": 7 }), "name"),
        (json!({ "name": "" }), "name"),
        (json!({ "name": "a\u{0}b" }), "name"),
        (json!({ "name": "é".repeat(256) }), "name"),
        (json!({ "name": "Bea", "more": 1 }), "more"),
        (json!({ "name": "Bea", "id": 1 }), "id"),
    ] {
        for (method, url) in
            [(Method::POST, "/authors".to_owned()), (Method::PUT, format!("/authors/{id}"))]
        {
            let answer = server.rest(method, &url).json(&body).send().await.unwrap();
            let details = refused(answer, 422, "invalid_data").await;
            assert_eq!(path(&details), expected, "{body}");
        }
    }
    assert_eq!(names(&server, &[]).await, ["Ann"]);
}

async fn a_name_of_255_characters_and_of_any_script_comes_back_as_it_was(database: Database) {
    let server = database.server(&[]).await;
    for name in ["é".repeat(255), "李白 🖋\u{200d}".to_owned(), " spaces ".to_owned()] {
        let id = add_author(&server, &name).await;
        assert_eq!(get(&server, &format!("/authors/{id}")).await["name"], json!(name));
        assert_eq!(names(&server, &[("name", &name)]).await, [name]);
    }
}

async fn a_change_over_rest_reaches_open_connections_as_a_push(database: Database) {
    let server = database.server(&[]).await;
    let mut client = server.client("watcher").await;
    let id = add_author(&server, "Ann").await;
    let push = client.receive().await;
    assert_eq!(push["pkg_id"], 3);
    assert_eq!(push["data"], json!({ "id": id, "name": "Ann" }));
}

async fn a_list_without_a_page_has_a_limit_and_says_how_to_ask_for_pages(database: Database) {
    let server = database.server(&[("MAX_ROWS", "3"), ("WS_BROADCAST_CHANGES", "false")]).await;
    let mut client = server.client("ann").await;
    for name in ["Ann", "Ben", "Cem"] {
        add_author(&server, name).await;
    }
    assert_eq!(names(&server, &[]).await.len(), 3);
    assert_eq!(client.call(1, json!({})).await["data"].as_array().unwrap().len(), 3);
    add_author(&server, "Eve").await;

    let answer = client.call(1, json!({})).await;
    assert_eq!(
        (&answer["status_code"], &answer["data"]["code"]),
        (&json!(2), &json!("invalid_data"))
    );
    let over_rest = server.rest(Method::GET, "/authors").send().await.unwrap();
    let details = refused(over_rest, 422, "invalid_data").await;
    assert_eq!(path(&details), "");
    for msg in [
        &answer["data"]["msg"],
        &answer["data"]["details"]["errors"][0]["msg"],
        &details["errors"][0]["msg"],
    ] {
        let msg = msg.as_str().unwrap();
        for part in ["More than 3 ", "MAX_ROWS", "GET_PAGINATED_AUTHORS (pkg_id 2)"] {
            assert!(msg.contains(part), "{msg}");
        }
    }
    // What matches counts, not what there is.
    assert_eq!(names(&server, &[("search", "e")]).await, ["Ben", "Cem", "Eve"]);
    let page = client.call(2, json!({ "per_page": 4 })).await;
    assert_eq!(page["data"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn a_list_has_no_limit_where_an_operator_lifts_it() {
    let server = TestServer::start(&[("MAX_ROWS", "0")]).await;
    add_author(&server, "Ann").await;
    assert_eq!(names(&server, &[]).await, ["Ann"]);
}

on_both![
    a_list_without_a_page_has_a_limit_and_says_how_to_ask_for_pages,
    an_author_is_created_read_renamed_and_deleted,
    an_author_that_is_not_there_is_404,
    a_taken_name_is_a_conflict_and_ones_own_is_not,
    parallel_creates_of_one_name_make_one_author,
    a_list_is_ordered_by_id_and_filtered_by_exact_name_and_by_id,
    search_wins_over_id_and_name,
    a_search_folds_case_in_every_script_and_takes_wildcards_literally,
    a_page_has_items_and_all_of_meta,
    a_cursor_walk_sees_each_author_once_though_others_come_and_go,
    values_out_of_range_are_422_and_named_by_their_path,
    a_body_that_does_not_fit_is_422_and_named_by_its_path,
    a_name_of_255_characters_and_of_any_script_comes_back_as_it_was,
    a_change_over_rest_reaches_open_connections_as_a_push,
];
