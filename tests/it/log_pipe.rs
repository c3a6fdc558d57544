//! The log never stops the server: nobody reads standard output, its reader is gone, or it reads all.

use std::{
    io::{BufRead, BufReader, PipeReader, Read, Write, pipe},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::{Client as Http, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::spawn_blocking;

use crate::support::{
    Client,
    process::{finish, switchboard, token},
};

/// Lines of more than 4 KiB that neither the pipe nor the log's buffer, twice 4 MiB, can hold.
const MANY: usize = 2200;

/// A server whose stdout this test reads, or does not. It is killed when the test is over.
struct Piped {
    data: TempDir,
    child: Option<Child>,
    addr: SocketAddr,
    stdout: Option<BufReader<PipeReader>>,
}

/// Starts it and reads until it listens. Its stderr goes into the same pipe, or into one that is read.
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
    while addr.is_none() {
        let mut line = String::new();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended");
        let line: Value = serde_json::from_str(&line).unwrap();
        if line["message"] == "listening" {
            addr = Some(line["address"].as_str().unwrap().parse().unwrap());
        }
    }
    Piped { data, child: Some(child), addr: addr.unwrap(), stdout: Some(stdout) }
}

impl Drop for Piped {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Reads all that is to come.
fn rest(mut stdout: BufReader<PipeReader>) -> String {
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    text
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
        client
            .send(&json!({ "pkg_id": 1, "req_id": "e7c45528-99de-4ea9-b5ec-3db0c9275fbc" }))
            .await;
        assert_eq!(client.receive().await["status_code"], 0);
        let get = |path: &str| http.get(format!("http://{}{path}", self.addr)).send();
        assert_eq!(get("/health/live").await.unwrap().status(), StatusCode::OK);
        let metrics = get("/metrics").await.unwrap().text().await.unwrap();
        let value = metrics.lines().find_map(|line| line.strip_prefix("log_lines_dropped_total "));
        value.expect("the counter is there").parse().unwrap()
    }

    /// Sends SIGTERM and waits for the end.
    async fn end(&mut self) {
        let child = self.child.take().unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let sent = Instant::now();
        let ran = spawn_blocking(|| finish(child)).await.unwrap();
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
        assert!(sent.elapsed() < Duration::from_secs(10), "{:?}", sent.elapsed());
    }
}

fn impatient() -> Http {
    Http::builder().timeout(Duration::from_secs(5)).build().unwrap()
}

async fn nobody_reads(same_stderr: bool) {
    let mut server = start(same_stderr);
    let http = impatient();
    server.ask(&http, MANY, &"x".repeat(5000)).await;
    assert!(server.works(&http).await > 0);
    server.end().await;
    // A write may be cut where the process ends, nowhere else.
    let text = rest(server.stdout.take().unwrap());
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
    let mut server = start(false);
    let http = impatient();
    server.ask(&http, MANY, &"x".repeat(5000)).await;
    let dropped = server.works(&http).await;
    assert!(dropped > 0);
    let mut stdout = server.stdout.take().unwrap();
    let reader = spawn_blocking(move || {
        loop {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended");
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "log lines were dropped" {
                break (line["lines"].as_u64(), stdout);
            }
        }
    });
    let (told, stdout) = reader.await.unwrap();
    // The socket may have left one more since.
    assert!(told >= Some(dropped), "{told:?} of {dropped}");
    server.ask(&http, 1, "later").await;
    let rest = spawn_blocking(|| rest(stdout));
    server.end().await;
    let rest = rest.await.unwrap();
    assert!(rest.contains("\"/later\"") && rest.ends_with('\n'), "{rest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_reader_is_gone_stops_nothing() {
    let mut server = start(false);
    let http = impatient();
    server.stdout = None;
    server.ask(&http, 1200, "nothing").await;
    assert!(server.works(&http).await > 1000);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_read_loses_no_line() {
    let mut server = start(false);
    let stdout = server.stdout.take().unwrap();
    let all = spawn_blocking(|| rest(stdout));
    let http = impatient();
    server.ask(&http, 1200, "nothing").await;
    assert_eq!(server.works(&http).await, 0);
    server.end().await;
    let all = all.await.unwrap();
    assert_eq!(all.matches("\"endpoint\":\"/nothing\"").count(), 1200);
    let last: Value = serde_json::from_str(all.lines().last().unwrap()).unwrap();
    assert_eq!(last["message"], "stopped");
}

#[test]
fn an_error_that_nobody_reads_does_not_keep_the_process() {
    let data = TempDir::new().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let environment = [("LISTEN_ADDR", &*address), ("DATA_DIR", data.path().to_str().unwrap())];
    let (reader, mut writer) = pipe().unwrap();
    // All that a pipe takes.
    writer.write_all(&[b' '; 64 * 1024]).unwrap();
    let mut command = switchboard(&["serve"], &environment);
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    assert_eq!(finish(command.spawn().unwrap()).code, Some(1));
    drop(reader);
}
