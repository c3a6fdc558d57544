//! A connection, an answer.

use serde_json::json;

use crate::support::TestServer;

#[tokio::test]
async fn an_echo_returns_its_data_with_all_five_members() {
    let server = TestServer::start(&[]).await;
    let mut client = server.client("ann").await;
    let answer = client.call(100, json!({ "a": [1, { "b": null }] })).await;
    assert_eq!(answer["pkg_id"], 100);
    assert_eq!(answer["status_code"], 0);
    assert_eq!(answer["meta"], json!(null));
    assert_eq!(answer["data"], json!({ "a": [1, { "b": null }] }));
    assert_eq!(answer.as_object().unwrap().len(), 5);
}
