//! Writing and removing rows, on SQLite; `tests/it` reads them on both databases.

use tempfile::TempDir;

use super::*;
use crate::{config::Config, metrics::Metrics};

async fn store(folder: &TempDir) -> Store {
    let data = folder.path().display().to_string();
    let config = Config::read(|name| (name == "DATA_DIR").then(|| data.clone())).unwrap();
    Store::open(&config.store, Metrics::new(&[], "dev").db, None).await.unwrap()
}

fn row(i: u128, timestamp: &str) -> Action {
    Action {
        uid: Uuid::from_u128(i),
        timestamp: timestamp.into(),
        user_id: Some("7a1f".into()),
        username: None,
        user_roles: ["admin".into(), "a \"b\"".into()].into(),
        action_type: "WS:CREATE_AUTHOR".into(),
        resource: "CREATE_AUTHOR".into(),
        outcome: "success".into(),
        ip_address: Some("::1".into()),
        user_agent: None,
        request_id: Some("é".into()),
        request_data: Some(RawValue::from_string(r#"{"name":"x\ny","n":null}"#.into()).unwrap()),
        response_status: Some(0),
        error_message: None,
        duration_ms: Some(1.5),
    }
}

fn text(action: &Action) -> String {
    serde_json::to_string(action).unwrap()
}

fn shown(stored: &StoredAction) -> String {
    text(&stored.action)
}

#[tokio::test]
async fn a_batch_that_is_written_twice_is_there_once_and_as_it_was() {
    let folder = TempDir::new().unwrap();
    let store = store(&folder).await;
    let mut rows =
        vec![row(1, "2026-11-22T10:00:00.000000Z"), row(2, "2026-11-22T10:00:00.000001Z")];
    rows[1].request_data = None;
    store.insert_actions(rows.clone(), 100).await.unwrap();
    store.insert_actions(rows.clone(), 100).await.unwrap();
    rows.push(row(3, "2026-11-22T10:00:00.000002Z"));
    store.insert_actions(rows.clone(), 2).await.unwrap();
    store.insert_actions(Vec::new(), 2).await.unwrap();
    let seen = store.actions_after(None, None, None, 10).await.unwrap().items;
    assert_eq!(
        seen.iter().map(shown).collect::<Vec<_>>(),
        rows.iter().map(text).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn only_rows_from_before_a_time_are_removed_the_oldest_first_and_so_many() {
    let folder = TempDir::new().unwrap();
    let store = store(&folder).await;
    let rows: Vec<_> =
        (0..10).map(|i| row(9 - i, &format!("2026-11-2{i}T00:00:00.000000Z"))).collect();
    store.insert_actions(rows.clone(), 4).await.unwrap();
    let before = "2026-11-27T00:00:00Z".parse().unwrap();
    assert_eq!(store.delete_actions(before, 4).await.unwrap(), 4);
    let left = store.actions_after(None, None, None, 10).await.unwrap().items;
    assert_eq!(shown(&left[0]), text(&rows[4]));
    assert_eq!(store.delete_actions(before, 4).await.unwrap(), 3);
    assert_eq!(store.delete_actions(before, 4).await.unwrap(), 0);
    let left = store.actions_after(None, None, None, 10).await.unwrap().items;
    assert_eq!(
        left.iter().map(shown).collect::<Vec<_>>(),
        rows[7..].iter().map(text).collect::<Vec<_>>()
    );
}

#[test]
fn rows_in_the_spool_are_those_of_the_previous_release() {
    // As that release wrote it.
    let line = r#"{"id":"019aaa3c-5d5e-7c9b-8a52-6f0d5c1b2a10","timestamp":"2026-11-22T10:00:00.123456Z","user_id":null,"username":"ann","user_roles":["admin"],"action_type":"POST","resource":"/authors","outcome":"success","ip_address":"::1","user_agent":null,"request_id":"x","request_data":{"name":"Ann"},"response_status":201,"error_message":null,"duration_ms":1.5}"#;
    let action: Action = serde_json::from_str(line).unwrap();
    assert_eq!(action.uid.to_string(), "019aaa3c-5d5e-7c9b-8a52-6f0d5c1b2a10");
    assert_eq!(text(&action), line);
}
