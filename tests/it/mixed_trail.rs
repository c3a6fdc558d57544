//! The previous release beside this one on one audit trail, while it gets its integer key and afterwards.
//!
//! Ignored, as it needs a binary of the previous release: see `mixed`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{task::block_in_place, time::sleep};

use crate::{
    integer_key::{fill, number},
    support::{
        Database,
        database::Place,
        process::{Process, token},
    },
};

const PATIENCE: Duration = Duration::from_secs(60);

fn previous(place: &Place, data: &Path) -> Process {
    let binary = std::env::var("SWITCHBOARD_PREVIOUS")
        .expect("SWITCHBOARD_PREVIOUS names a binary of the previous release");
    let since = Instant::now();
    block_in_place(|| {
        let child = Process::spawn_of(&binary, data, &[("DATABASE_URL", &place.url)]);
        Process::ready(child, since)
    })
}

fn this(place: &Place, data: &Path) -> Process {
    block_in_place(|| Process::start(data, &[("DATABASE_URL", &place.url)]))
}

async fn ask(node: &Process, data: &Path, method: Method, path: &str, body: Value) -> u16 {
    let request = reqwest::Client::new().request(method, format!("http://{}{path}", node.addr));
    let token = block_in_place(|| token(data, &["--user", "ann"]));
    request.bearer_auth(token).json(&body).send().await.unwrap().status().as_u16()
}

/// Adds an author on each node; each leaves a row.
async fn write(nodes: [(&Process, &Path); 2], made: &mut i64) {
    for (node, data) in nodes {
        *made += 1;
        let body = json!({ "name": format!("author {made}") });
        assert_eq!(ask(node, data, Method::POST, "/authors", body).await, 201);
    }
}

/// Waits for the rows of the authors, which nobody has refused.
async fn all_written(place: &Place, data: [&Path; 2], made: i64) {
    let since = Instant::now();
    let rows =
        "SELECT count(*) FROM user_actions WHERE resource = '/authors' AND action_type = 'POST'";
    while number(place, rows).await != made {
        assert!(since.elapsed() < PATIENCE, "{} of {made}", number(place, rows).await);
        sleep(Duration::from_millis(50)).await;
    }
    for data in data {
        assert!(!data.join("audit/rejected.jsonl").exists(), "a row was refused");
    }
}

fn end(node: Process) {
    node.signal("-TERM");
    assert_eq!(block_in_place(|| node.end()).code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn both_write_to_a_trail_of_postgres_while_it_is_numbered_and_later() {
    let place = Database::Postgres.place().await;
    let folders = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let data = [folders[0].path(), folders[1].path()];
    let old = previous(&place, data[0]);
    fill(&place, 60_000).await;
    let new = this(&place, data[1]);
    let nodes = [(&old, data[0]), (&new, data[1])];
    let mut made = 0;
    while !place.is_numbered().await {
        assert!(made < 4000, "it is never numbered");
        write(nodes, &mut made).await;
        for (node, data) in nodes {
            let read = ask(node, data, Method::GET, "/audit-logs?per_page=1", json!(null)).await;
            let is_over = place.is_numbered().await && read == 500;
            assert!(read == 200 || is_over, "{read}");
        }
    }
    assert!(made > 4, "nothing was written meanwhile");
    write(nodes, &mut made).await;
    all_written(&place, data, made).await;
    assert_eq!(ask(&new, data[1], Method::GET, "/audit-logs", json!(null)).await, 200);
    // It may even start again.
    end(old);
    let old = previous(&place, data[0]);
    write([(&old, data[0]), (&new, data[1])], &mut made).await;
    all_written(&place, data, made).await;
    end(old);
    end(new);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a binary of the previous release"]
async fn what_the_previous_release_records_beside_this_one_on_sqlite_is_written_when_it_has_ended()
{
    let place = Database::Sqlite.place().await;
    let data = place.data.path();
    let old = previous(&place, data);
    let mut made = 1;
    let body = json!({ "name": "first" });
    assert_eq!(ask(&old, data, Method::POST, "/authors", body).await, 201);
    let new = this(&place, data);
    for _ in 0..3 {
        write([(&old, data), (&new, data)], &mut made).await;
    }
    sleep(Duration::from_secs(2)).await;
    end(old);
    end(new);
    let new = this(&place, data);
    all_written(&place, [data, data], made).await;
    assert_eq!(place.execute("PRAGMA integrity_check").await, ["ok"]);
    end(new);
}
