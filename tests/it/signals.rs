//! Signals of the process: one stop, however often it is said at once; a second one that is meant; and those that
//! mean nothing here.

use std::time::{Duration, Instant};

use reqwest::Client as Http;
use tempfile::TempDir;
use tokio::{
    task::{block_in_place, spawn_blocking},
    time::sleep,
};

use crate::support::{
    Client, Closed,
    process::{Process, token},
};

const LAST: &str = "a second signal: ending at once";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_signals_within_a_moment_are_one_stop() {
    for pair in [["-TERM", "-TERM"], ["-INT", "-TERM"]] {
        let data = TempDir::new().unwrap();
        let process = Process::start(data.path(), &[("DRAIN_SPREAD", "0s")]);
        let mut client = Client::open(process.addr, "/web").await;
        client.authenticate(&token(data.path(), &["--user", "ann"])).await;
        block_in_place(|| pair.map(|signal| process.signal(signal)));
        let (seen, closed) = client.until_closed().await;
        assert_eq!((seen.len(), closed), (1, Closed::Code(1001)), "{pair:?}: {seen:?}");
        let ran = spawn_blocking(|| process.end()).await.unwrap();
        assert_eq!(ran.code, Some(0), "{pair:?}");
        assert!(!ran.stdout.contains(LAST), "{pair:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_after_a_second_ends_the_process_at_once() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[("DRAIN_DELAY", "60s")]);
    block_in_place(|| process.signal("-TERM"));
    sleep(Duration::from_millis(1200)).await;
    let sent = Instant::now();
    block_in_place(|| process.signal("-TERM"));
    let ran = spawn_blocking(|| process.end()).await.unwrap();
    assert_eq!(ran.code, Some(1));
    assert!(ran.stdout.contains(LAST), "{}", ran.stdout);
    assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_signals_are_ignored_with_a_line() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[("DRAIN_DELAY", "1s")]);
    let others = ["HUP", "USR1", "USR2"];
    let live = format!("http://{}/health/live", process.addr);
    let mut again = Vec::new();
    for signal in others {
        block_in_place(|| process.signal(&format!("-{signal}")));
        sleep(Duration::from_millis(50)).await;
        again.push(Http::new().get(&live).send().await.is_ok());
    }
    assert_eq!(again, [true; 3], "the process goes on");
    // During a drain too.
    block_in_place(|| ["-TERM", "-HUP"].map(|signal| process.signal(signal)));
    let ran = spawn_blocking(|| process.end()).await.unwrap();
    assert_eq!(ran.code, Some(0));
    for signal in others {
        let lines = ran.stdout.lines().filter(|line| {
            line.contains("a signal is ignored") && line.contains(&format!("\"SIG{signal}\""))
        });
        assert_eq!(lines.count(), if signal == "HUP" { 2 } else { 1 }, "{signal}: {}", ran.stdout);
    }
}
