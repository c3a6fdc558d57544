//! What must never stand in a log, looked for in the output of the real binary at its most talkative.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use switchboard::auth::DevIssuer;
use tempfile::TempDir;

use crate::support::{Client, Closed};

/// Ends the process also when a test fails.
struct Process(std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
async fn a_token_is_never_logged_in_any_way_to_authenticate() {
    let data = TempDir::new().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_switchboard"))
        .env_clear()
        .env("DATA_DIR", data.path())
        .env("LISTEN_ADDR", "127.0.0.1:0")
        .env("LOG_LEVEL", "trace")
        .env("LOG_FORMAT", "json")
        .env("WS_QUERY_TOKEN", "true")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let process = Process(child);
    let listening = lines.by_ref().find(|line| line.contains("\"listening\"")).unwrap();
    let listening: Value = serde_json::from_str(&listening).unwrap();
    let addr = listening["address"].as_str().unwrap().parse().unwrap();
    // Up to the last line that the test causes: a process that is killed has not written all of its log.
    let rest = tokio::task::spawn_blocking(move || {
        let mut seen = Vec::new();
        for line in lines {
            let last = line.contains("connection refused");
            seen.push(line);
            if last {
                break;
            }
        }
        seen
    });

    let issuer = DevIssuer::open(&data.path().join("dev-key.pem"), "switchboard").unwrap();
    let token = issuer.token("ann", &[], Duration::from_secs(600));
    let header = format!("Bearer {token}");
    Client::open(addr, "/web").await.authenticate(&token).await;
    let by_header = [("authorization", &*header)];
    let mut client = Client::try_open(addr, "/web", &by_header).await.unwrap();
    assert_eq!(client.receive().await["type"], "auth_ok");
    for query in [format!("token={token}"), format!("Authorization=Bearer%20{token}")] {
        let mut client = Client::open(addr, &format!("/web?{query}")).await;
        assert_eq!(client.receive().await["type"], "auth_ok");
    }
    // One that is refused, by its signature alone, in all of these ways.
    let bad = format!("{}AAAA", &token[..token.len() - 4]);
    let header = format!("Bearer {bad}");
    assert!(Client::try_open(addr, "/web", &[("authorization", &header)]).await.is_err());
    assert!(Client::try_open(addr, &format!("/web?token={bad}"), &[]).await.is_err());
    let mut client = Client::open(addr, "/web").await;
    client.send(&json!({ "type": "auth", "token": format!("Bearer {bad}") })).await;
    assert_eq!(client.until_closed().await.1, Closed::Code(4001));

    let log = tokio::time::timeout(Duration::from_secs(10), rest).await;
    let log = log.expect("the last line is missing").unwrap().join("\n");
    drop(process);
    assert_eq!(log.matches("connection opened").count(), 4, "{log}");
    assert_eq!(log.matches("connection refused").count(), 1, "{log}");
    for part in token.split('.') {
        assert!(!log.contains(part), "{log}");
    }
}
