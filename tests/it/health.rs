//! What probes see: alive, ready, and healthy part by part.

use std::{fs, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    TestServer,
    rest::{add_author, refused},
};

async fn body(server: &TestServer, path: &str) -> (u16, Value) {
    let answer = server.request(Method::GET, path).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test]
async fn health_names_each_part_and_counts_connections() {
    let server = TestServer::start(&[]).await;
    let healthy = |connections: i32| {
        json!({ "status": "healthy", "database": "healthy", "redis": "disabled",
                "websocket": { "status": "healthy", "active_connections": connections } })
    };
    assert_eq!(body(&server, "/health").await, (200, healthy(0)));
    let _ann = server.client("ann").await;
    assert_eq!(body(&server, "/health").await, (200, healthy(1)));
    assert_eq!(body(&server, "/health/live").await.0, 200);
    assert_eq!(body(&server, "/health/ready").await.0, 200);
}

#[tokio::test]
async fn a_draining_server_is_alive_and_not_ready() {
    let mut server = TestServer::start(&[("DRAIN_GRACE", "3s"), ("DRAIN_SPREAD", "0s")]).await;
    // Somebody has to be there for the drain to last.
    let mut ann = server.client("ann").await;
    server.begin_shutdown();
    assert_eq!(ann.receive().await["type"], "drain");
    let mut ready = 200;
    for _ in 0..50 {
        ready = body(&server, "/health/ready").await.0;
        if ready == 503 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(ready, 503);
    assert_eq!(body(&server, "/health/live").await.0, 200);
    assert_eq!(body(&server, "/health").await.1["websocket"]["status"], "unhealthy");
}

#[tokio::test]
async fn a_database_that_cannot_be_read_is_unhealthy() {
    let data = TempDir::new().unwrap();
    let server = TestServer::start(&[("DATA_DIR", data.path().to_str().unwrap())]).await;
    // What readers have in their caches is out of date.
    add_author(&server, "Ann").await;
    for file in ["switchboard.db", "switchboard.db-wal"] {
        // Emptied in place, as by a full or failing disk.
        fs::File::create(data.path().join(file)).unwrap();
    }
    let read = server.rest(Method::GET, "/authors").send().await.unwrap();
    refused(read, 503, "unavailable").await;
    // An answer is good for all who probe within a quarter of a second.
    tokio::time::sleep(Duration::from_millis(260)).await;
    let (status, health) = body(&server, "/health").await;
    assert_eq!((status, &health["status"]), (503, &json!("unhealthy")));
    assert_eq!((&health["database"], &health["redis"]), (&json!("unhealthy"), &json!("disabled")));
    assert_eq!(health["websocket"]["status"], "healthy");
    assert_eq!(body(&server, "/health/ready").await.0, 503);
    assert_eq!(body(&server, "/health/live").await.0, 200);
}
