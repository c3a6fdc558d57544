//! Searches for authors fold case as Unicode does, also in names that older releases stored.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    histories::make_shared,
    support::{Database, TestServer, database::Place, on_both, process::run, rest::add_author},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Names, and terms that find each of them and no other.
const NAMES: [(&str, &[&str]); 5] = [
    ("ΟΔΥΣΣΕΥΣ ΕΛΥΤΗΣ", &["ΟΔΥΣ", "οδυσσευς", "Ελυτησ"]),
    ("Straße", &["STRASSE", "strasse", "STRAẞE", "aß"]),
    ("İstanbul", &["istanbul", "ISTANBUL", "İSTAN", "ıstanbul"]),
    ("Rene\u{301}e", &["RENÉE", "renée"]),
    ("100 %_\\", &["%_\\"]),
];

/// The names that a search finds: of the list, of a page, and over WebSocket.
async fn found(server: &TestServer, term: &str) -> Value {
    let part: String = form_urlencoded::byte_serialize(term.as_bytes()).collect();
    let names = |rows: &Value| -> Value {
        rows.as_array().unwrap().iter().map(|row| row["name"].clone()).collect()
    };
    let path = format!("/authors?search={part}");
    let list = server.rest(Method::GET, &path).send().await.unwrap();
    assert_eq!(list.status(), 200, "{term}");
    let list = names(&list.json().await.unwrap());
    let mut client = server.client("ann").await;
    let page = client.call(2, json!({ "filters": { "name": term } })).await;
    assert_eq!(names(&page["data"]), list, "{term}");
    assert_eq!(page["meta"]["total"], list.as_array().unwrap().len(), "{term}");
    list
}

async fn finds_each_name(server: &TestServer) {
    for (name, terms) in NAMES {
        for term in terms {
            assert_eq!(found(server, term).await, json!([name]), "{term}");
        }
    }
    assert_eq!(found(server, "renee").await, json!([]), "accents count");
}

/// Stores names as an older release does.
async fn store_as_before(place: &Place, names: &[&str]) {
    for name in names {
        let lower = name.to_lowercase();
        place
            .execute(&format!(
                "INSERT INTO author (name, name_folded) VALUES ('{name}', '{lower}')"
            ))
            .await;
    }
}

async fn a_search_folds_case_fully(database: Database) {
    let server = database.server(&[]).await;
    for (name, _) in NAMES {
        add_author(&server, name).await;
    }
    finds_each_name(&server).await;
    // A name that was changed is found as it is now.
    let id = add_author(&server, "x").await;
    let rename = server.rest(Method::PUT, &format!("/authors/{id}"));
    let renamed = rename.json(&json!({ "name": "Weißensee" })).send().await.unwrap();
    assert_eq!(renamed.status(), 200);
    assert_eq!(found(&server, "WEISSENSEE").await, json!(["Weißensee"]));
    assert_eq!(found(&server, "x").await, json!([]));
}

async fn a_term_that_grows_when_it_is_folded_is_looked_for(database: Database) {
    let server = database.server(&[]).await;
    let name = "ΐ".repeat(255);
    add_author(&server, &name).await;
    assert_eq!(found(&server, &name).await, json!([name]));
    assert_eq!(found(&server, &"ﷺ".repeat(255)).await, json!([]));
}

async fn names_of_earlier_releases_are_folded_anew_by_migrate(database: Database) {
    let place = database.place().await;
    make_shared(database, &place, 2).await;
    store_as_before(&place, &NAMES.map(|(name, _)| name)).await;
    let ran = run(&["migrate"], &place.settings());
    assert!(ran.stdout.ends_with("5 names of authors were folded anew for searches\n"), "{ran:?}");
    let ran = run(&["migrate"], &place.settings());
    assert!(ran.stdout.starts_with("nothing to do"), "{ran:?}");
    finds_each_name(&place.server(&[]).await).await;
}

async fn names_of_earlier_releases_are_folded_anew_by_a_start(database: Database) {
    let place = database.place().await;
    make_shared(database, &place, 2).await;
    store_as_before(&place, &NAMES.map(|(name, _)| name)).await;
    let server = place.server(&[]).await;
    until_folded(&place).await;
    finds_each_name(&server).await;
}

async fn until_folded(place: &Place) {
    let unfolded = "SELECT name FROM author WHERE name_search_of IS NULL OR name_search_of <> name";
    let since = Instant::now();
    while !place.execute(unfolded).await.is_empty() {
        assert!(since.elapsed() < PATIENCE, "names are not folded anew");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn an_older_node_writes_beside_this_one_and_both_find_all(database: Database) {
    let place = database.place().await;
    let server = place.server(&[]).await;
    let weg = add_author(&server, "Weg").await;
    add_author(&server, "Gasse").await;
    // This node has folded, and the next time is in a minute.
    store_as_before(&place, &["Straße"]).await;
    let rename =
        format!("UPDATE author SET name = 'Größe', name_folded = 'größe' WHERE id = {weg}");
    place.execute(&rename).await;
    // Until then, names are found as the older node folded them.
    assert_eq!(found(&server, "STRASS").await, json!([]));
    let terms = [("STRAß", "Straße"), ("Stra", "Straße"), ("GRÖ", "Größe"), ("gasse", "Gasse")];
    for (term, name) in terms {
        assert_eq!(found(&server, term).await, json!([name]), "{term}");
    }
    assert_eq!(found(&server, "weg").await, json!([]), "it has another name");
    let ran = run(&["migrate"], &place.settings());
    assert!(ran.stdout.ends_with("2 names of authors were folded anew for searches\n"), "{ran:?}");
    for (term, name) in [("STRASSE", "Straße"), ("GRÖSSE", "Größe")] {
        assert_eq!(found(&server, term).await, json!([name]), "{term}");
    }
    // The older node looks for lower case.
    let lower = place.execute("SELECT name_folded FROM author ORDER BY name_folded").await;
    assert_eq!(lower, ["gasse", "größe", "straße"]);
}

on_both![
    a_search_folds_case_fully,
    a_term_that_grows_when_it_is_folded_is_looked_for,
    names_of_earlier_releases_are_folded_anew_by_migrate,
    names_of_earlier_releases_are_folded_anew_by_a_start,
    an_older_node_writes_beside_this_one_and_both_find_all,
];
