//! The life of the process: ready soon, gone on a signal, and refusing a bad configuration.

use std::{
    fs,
    net::TcpListener,
    time::{Duration, Instant},
};

use reqwest::{Client as Http, StatusCode};
use tempfile::TempDir;

use crate::support::{
    Client, Closed,
    process::{Process, Ran, run, token},
};

#[tokio::test]
async fn the_server_is_ready_soon_after_its_start() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[]);
    // A second in truth; debug builds on busy machines get more.
    assert!(process.took < Duration::from_secs(5), "{:?}", process.took);
    let ready = Http::new().get(format!("http://{}/health/ready", process.addr)).send();
    assert_eq!(ready.await.unwrap().status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_it_with_0_though_connections_are_open() {
    for signal in ["-TERM", "-INT"] {
        let data = TempDir::new().unwrap();
        let process = Process::start(data.path(), &[("DRAIN_SPREAD", "0s")]);
        let mut client = Client::open(process.addr, "/web").await;
        client.authenticate(&token(data.path(), &["--user", "ann"])).await;
        let mut stranger = Client::open(process.addr, "/web").await;
        let _idle = tokio::net::TcpStream::connect(process.addr).await.unwrap();
        let sent = Instant::now();
        process.signal(signal);
        let (seen, closed) = client.until_closed().await;
        assert_eq!(seen[0]["type"], "drain", "{signal}");
        assert_eq!(closed, Closed::Code(1001), "{signal}");
        assert_eq!(stranger.until_closed().await.1, Closed::Code(1001), "{signal}");
        let ran = tokio::task::spawn_blocking(|| process.end()).await.unwrap();
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{signal}");
        assert!(sent.elapsed() < Duration::from_secs(10), "{signal}: {:?}", sent.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_there_after_a_restart() {
    let data = TempDir::new().unwrap();
    let bearer = token(data.path(), &["--user", "ann"]);
    let process = Process::start(data.path(), &[]);
    let url = format!("http://{}/authors", process.addr);
    let create =
        Http::new().post(url).bearer_auth(&bearer).json(&serde_json::json!({ "name": "A" }));
    assert_eq!(create.send().await.unwrap().status(), StatusCode::CREATED);
    process.signal("-TERM");
    assert_eq!(process.end().code, Some(0));
    let process = Process::start(data.path(), &[]);
    let read = Http::new().get(format!("http://{}/authors/1", process.addr)).bearer_auth(bearer);
    assert_eq!(read.send().await.unwrap().status(), StatusCode::OK);
}

fn assert_faults(ran: &Ran, faults: &[&[&str]]) {
    assert_eq!(ran.code, Some(64), "{ran:?}");
    assert_eq!(ran.stdout, "");
    // A server whose standard output is no terminal logs JSON.
    let says = |line: &str| match serde_json::from_str::<serde_json::Value>(line) {
        Ok(line) => line["error"].as_str().unwrap().to_owned(),
        Err(_) => line.to_owned(),
    };
    let lines: Vec<_> = ran.stderr.lines().map(says).collect();
    for parts in faults {
        let found = lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "no line has {parts:?}:\n{}", ran.stderr);
    }
    assert_eq!(ran.stderr.lines().count(), faults.len(), "{}", ran.stderr);
}

#[test]
fn every_fault_of_the_configuration_is_told_at_once_before_a_port_is_bound() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("switchboard.toml");
    fs::write(&file, "ws_send_queue = \"many\"\nws_sendqueue = 5\njwt_leeway = { s = 5 }\n")
        .unwrap();
    let data = folder.path().join("data");
    // Bound first, the port would be the fault.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let ran = run(
        &["serve", "--db-pool-size", "-1", "--ws-max-in-flight=0"],
        &[
            ("CONFIG_FILE", file.to_str().unwrap()),
            ("LISTEN_ADDR", &taken.local_addr().unwrap().to_string()),
            ("DATA_DIR", data.to_str().unwrap()),
            ("OPS_ADDR", "nowhere"),
            ("WS_PING_INTERVAL", "5 years"),
            ("WS_QUERY_TOKEN", "maybe"),
            ("TRUSTED_PROXIES", "10.0.0.0/33"),
            ("LOG_LEVEL", "warning"),
            ("LOG_FORMAT", "xml"),
            ("DATABASE_URL", "mysql://root:secret@db/x"),
        ],
    );
    assert_faults(
        &ran,
        &[
            &["switchboard.toml", "ws_sendqueue", "not a setting"],
            &["switchboard.toml", "jwt_leeway", "must be"],
            &["WS_SEND_QUEUE", "\"many\"", "allowed: a whole number"],
            &["DB_POOL_SIZE", "\"-1\"", "allowed: a whole number from 1"],
            &["WS_MAX_IN_FLIGHT", "\"0\"", "allowed: a whole number from 1"],
            &["OPS_ADDR", "\"nowhere\"", "allowed: "],
            &["WS_PING_INTERVAL", "\"5 years\"", "allowed: a duration"],
            &["WS_QUERY_TOKEN", "\"maybe\"", "allowed: true or false"],
            &["TRUSTED_PROXIES", "\"10.0.0.0/33\"", "allowed: "],
            &["LOG_LEVEL", "\"warning\"", "allowed: error"],
            &["LOG_FORMAT", "\"xml\"", "allowed: auto, json or human"],
            &["DATABASE_URL", "\"mysql\"", "allowed: sqlite://PATH"],
        ],
    );
    assert!(!ran.stderr.contains("secret"));
    assert!(!data.exists(), "nothing was written");
}

#[test]
fn production_refuses_the_development_issuer_and_every_origin() {
    let data = TempDir::new().unwrap();
    let settings = [("ENV", "production"), ("DATA_DIR", data.path().to_str().unwrap())];
    for args in [&["serve"][..], &["token", "--user", "ann"], &[]] {
        assert_faults(
            &run(args, &settings),
            &[
                &["ENV", "production", "allowed"],
                &["ALLOWED_WS_ORIGINS", "\"*\"", "allowed: a list of origins"],
            ],
        );
    }
    assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0, "no key was made");
}

#[test]
fn a_file_that_is_not_there_or_not_toml_is_named_beside_the_other_faults() {
    let folder = TempDir::new().unwrap();
    let bad = folder.path().join("bad.toml");
    fs::write(&bad, "listen_addr = \n").unwrap();
    for (file, reason) in
        [("/nowhere/switchboard.toml", "No such file"), (bad.to_str().unwrap(), "")]
    {
        let ran = run(&["serve", "--config-file", file, "--ws-send-queue", "x"], &[]);
        assert_eq!(ran.code, Some(64), "{ran:?}");
        assert!(ran.stderr.contains(file) && ran.stderr.contains(reason), "{ran:?}");
        assert!(ran.stderr.contains("WS_SEND_QUEUE: \\\"x\\\""), "{ran:?}");
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let data = TempDir::new().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let settings = [("LISTEN_ADDR", &*addr), ("DATA_DIR", data.path().to_str().unwrap())];
    let ran = run(&["serve"], &settings);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains(&addr), "{ran:?}");
}
