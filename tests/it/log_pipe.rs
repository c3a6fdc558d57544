//! The log never stops the server: nobody reads standard output, its reader is gone, or it reads all.

use std::{
    io::{BufRead, BufReader, PipeReader, Read, pipe},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::{Client as Http, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    Client,
    process::{finish, switchboard, token},
};

/// A server whose stdout this test reads, or does not.
struct Piped {
    data: TempDir,
    child: Child,
    addr: SocketAddr,
    stdout: BufReader<PipeReader>,
}

/// Starts it and reads until it is ready. Its stderr goes into the same pipe, or into one that is read.
fn start(same_stderr: bool) -> Piped {
    let data = TempDir::new().unwrap();
    let (reader, writer) = pipe().unwrap();
    let environment = [
        ("LISTEN_ADDR", "127.0.0.1:0"),
        ("DATA_DIR", data.path().to_str().unwrap()),
        ("DRAIN_DELAY", "0"),
        ("DRAIN_SPREAD", "0s"),
        ("DRAIN_GRACE", "100ms"),
        ("LOG_FORMAT", "json"),
    ];
    let mut command = switchboard(&["serve"], &environment);
    command.stdout(writer.try_clone().unwrap());
    command.stderr(if same_stderr { Stdio::from(writer) } else { Stdio::piped() });
    let child = command.spawn().unwrap();
    // The command holds ends of the pipe that would keep it open.
    drop(command);
    let mut stdout = BufReader::new(reader);
    let mut addr = None;
    loop {
        let mut line = String::new();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended");
        let line: Value = serde_json::from_str(&line).unwrap();
        match line["message"].as_str() {
            Some("listening") => addr = Some(line["address"].as_str().unwrap().parse().unwrap()),
            Some("ready") => break,
            _ => {}
        }
    }
    Piped { data, child, addr: addr.unwrap(), stdout }
}

impl Piped {
    /// Sends requests, each of which is logged with `path`.
    async fn ask(&self, http: &Http, count: usize, path: &str) {
        for asked in 0..count {
            let answer = http.get(format!("http://{}/{path}", self.addr)).send().await;
            let answer = answer.unwrap_or_else(|error| panic!("request {asked}: {error:?}"));
            assert_eq!(answer.status(), StatusCode::NOT_FOUND);
        }
    }

    /// Whether sockets, probes and metrics work; how many lines were dropped.
    async fn works(&self, http: &Http) -> u64 {
        let mut client = Client::open(self.addr, "/web").await;
        client.authenticate(&token(self.data.path(), &["--user", "ann"])).await;
        client.send(&json!({ "pkg_id": 1, "req_id": "r" })).await;
        assert_eq!(client.receive().await["status_code"], 0);
        let get = |path: &str| http.get(format!("http://{}{path}", self.addr)).send();
        assert_eq!(get("/health/live").await.unwrap().status(), StatusCode::OK);
        let metrics = get("/metrics").await.unwrap().text().await.unwrap();
        let value = metrics.lines().find_map(|line| line.strip_prefix("log_lines_dropped_total "));
        value.expect("the counter is there").parse().unwrap()
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
}

fn impatient() -> Http {
    Http::builder().timeout(Duration::from_secs(5)).build().unwrap()
}

async fn nobody_reads(same_stderr: bool) {
    let server = start(same_stderr);
    let http = impatient();
    // Each line is cut at 4 KiB: more than the pipe and the buffer hold.
    server.ask(&http, 2200, &"x".repeat(5000)).await;
    let dropped = server.works(&http).await;
    assert!(dropped > 0);
    server.terminate();
    let sent = Instant::now();
    let Piped { child, mut stdout, .. } = server;
    let ran = tokio::task::spawn_blocking(|| finish(child)).await.unwrap();
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
    assert!(sent.elapsed() < Duration::from_secs(10), "{:?}", sent.elapsed());
    // A write to a pipe may be cut where the process ends, nowhere else.
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    assert!(whole.lines().count() > 5);
    for line in whole.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        let path = line["endpoint"].as_str().unwrap_or_default();
        assert!(path.len() <= 4096 + '…'.len_utf8(), "{}", path.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_stops_nothing() {
    nobody_reads(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_and_errors_in_one_pipe_that_nobody_reads_stop_nothing() {
    nobody_reads(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_read_again_says_how_many_lines_are_missing() {
    let server = start(false);
    let http = impatient();
    server.ask(&http, 2200, &"x".repeat(5000)).await;
    let dropped = server.works(&http).await;
    assert!(dropped > 0);
    let Piped { child, addr, mut stdout, .. } = server;
    let reader = tokio::task::spawn_blocking(move || {
        let mut told = 0;
        loop {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended");
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "log lines were dropped" {
                told += line["lines"].as_u64().unwrap();
                break (told, stdout);
            }
        }
    });
    let (told, mut stdout) = reader.await.unwrap();
    assert!(told >= dropped, "{told} of {dropped}");
    let later = http.get(format!("http://{addr}/later")).send().await.unwrap();
    assert_eq!(later.status(), StatusCode::NOT_FOUND);
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let rest = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let ran = tokio::task::spawn_blocking(|| finish(child)).await.unwrap();
    assert_eq!(ran.code, Some(0));
    let rest = rest.await.unwrap();
    assert!(rest.contains("\"/later\"") && rest.ends_with('\n'), "{rest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_reader_is_gone_stops_nothing() {
    let server = start(false);
    let http = impatient();
    let Piped { data, child, addr, stdout } = server;
    drop(stdout);
    let (reader, _) = pipe().unwrap();
    let server = Piped { data, child, addr, stdout: BufReader::new(reader) };
    server.ask(&http, 1200, "nothing").await;
    assert!(server.works(&http).await >= 1000);
    server.terminate();
    let ran = tokio::task::spawn_blocking(|| finish(server.child)).await.unwrap();
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_read_loses_no_line() {
    let server = start(false);
    let Piped { data, child, addr, mut stdout } = server;
    let all = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let (reader, _) = pipe().unwrap();
    let server = Piped { data, child, addr, stdout: BufReader::new(reader) };
    let http = impatient();
    server.ask(&http, 1200, "nothing").await;
    assert_eq!(server.works(&http).await, 0);
    server.terminate();
    let ran = tokio::task::spawn_blocking(|| finish(server.child)).await.unwrap();
    assert_eq!(ran.code, Some(0));
    let all = all.await.unwrap();
    assert_eq!(all.matches("\"endpoint\":\"/nothing\"").count(), 1200);
    let last: Value = serde_json::from_str(all.lines().last().unwrap()).unwrap();
    assert_eq!(last["message"], "stopped");
}
