//! What administrators do to open connections.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use switchboard::handlers::roles;

use crate::support::{
    Closed, TestServer,
    handlers::{GATE, Gate, misbehaving},
};

#[tokio::test]
async fn a_disconnected_connection_closes_with_4004_and_the_others_stay() {
    let server = TestServer::start(&[]).await;
    let mut kept = server.client("ann").await;
    let mut client = crate::support::Client::open(server.addr, "/web").await;
    let id = client.authenticate(&server.token("ann")).await["connection_id"].clone();
    let path = format!("/admin/connections/{}", id.as_str().unwrap());

    let answer = server.rest(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    server.until_metric("ws_disconnections_total{code=\"4004\"}", 1.0).await;
    assert_eq!(kept.call(100, json!({})).await["status_code"], 0);

    let again = server.rest(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(again.status(), 404);
}

#[tokio::test]
async fn a_request_is_answered_before_its_connection_is_revoked() {
    let gate = Gate::closed();
    let server = TestServer::with_packages(&[], misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    let held = client.request(GATE, json!({})).await;
    gate.until_begun(1).await;
    let path = "/admin/users/ann/connections";
    assert_eq!(server.rest(Method::DELETE, path).send().await.unwrap().status(), 204);
    gate.release(1);
    let (seen, closed) = client.until_closed().await;
    assert_eq!((seen.len(), closed), (1, Closed::Code(4004)));
    assert_eq!((&seen[0]["req_id"], &seen[0]["status_code"]), (&json!(held), &json!(0)));
}

#[tokio::test]
async fn a_disconnected_user_loses_every_connection() {
    let server = TestServer::start(&[]).await;
    let mut gone = [server.client("ann lee").await, server.client("ann lee").await];
    let mut kept = server.client("bob").await;
    let path = "/admin/users/ann%20lee/connections";
    let answer = server.rest(Method::DELETE, path).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    for client in &mut gone {
        assert_eq!(client.until_closed().await.1, Closed::Code(4004));
    }
    kept.silent_for(Duration::from_millis(100)).await;
}

#[tokio::test]
async fn disconnecting_needs_the_role_and_a_uuid_or_a_name_that_fits() {
    let server = TestServer::start(&[]).await;
    let token = server.token_with("ann", &[roles::GET_AUTHORS]);
    for (path, status) in [("/admin/connections/x", 403), ("/admin/users/x/connections", 403)] {
        let answer = server.request(Method::DELETE, path).bearer_auth(&token).send().await.unwrap();
        assert_eq!(answer.status(), status, "{path}");
    }
    let long = format!("/admin/users/{}/connections", "x".repeat(256));
    for (path, wrong) in [("/admin/connections/x", "id"), (&long, "user")] {
        let answer = server.rest(Method::DELETE, path).send().await.unwrap();
        assert_eq!(answer.status(), 422, "{path}");
        let body: serde_json::Value = answer.json().await.unwrap();
        assert_eq!(body["error"]["details"]["errors"][0]["path"], wrong);
    }
}
