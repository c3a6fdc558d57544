//! Many connections at once: what they leave behind, and how they are sent away.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use futures_util::{StreamExt, future::join_all, stream};
use tempfile::TempDir;
use tokio::time::sleep;

use crate::support::{
    Client, Closed,
    process::{Process, token},
};

const CROWD: usize = 1000;
const SETTINGS: &[(&str, &str)] = &[("WS_MAX_CONNECTIONS_PER_USER", "0"), ("DRAIN_SPREAD", "0s")];

async fn crowd(addr: SocketAddr, data: &Path) -> Vec<Client> {
    // A shell's default of 1,024 open files is too few for both ends of a crowd.
    switchboard::machine::raise_file_limit();
    let bearer = token(data, &["--user", "ann"]);
    stream::iter(0..CROWD)
        .map(|_| async {
            let mut client = Client::open(addr, "/web").await;
            client.authenticate(&bearer).await;
            client
        })
        .buffer_unordered(50)
        .collect()
        .await
}

/// Resident memory in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_left_gives_its_memory_back() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), SETTINGS);
    let before = resident(process.pid());
    let clients = crowd(process.addr, data.path()).await;
    let grown = resident(process.pid()) - before;
    assert!(grown > 5 * CROWD as u64, "{grown} KiB");
    drop(clients);
    let mut left = grown;
    // It looks every five seconds.
    for _ in 0..200 {
        left = resident(process.pid()).saturating_sub(before);
        if left < grown / 2 {
            crowd(process.addr, data.path()).await;
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("of {grown} KiB, {left} KiB stayed");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_a_crowd_is_told_to_go_before_the_process_ends_with_0() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), SETTINGS);
    let mut clients = crowd(process.addr, data.path()).await;
    process.signal("-TERM");
    for (seen, closed) in join_all(clients.iter_mut().map(|client| client.until_closed())).await {
        assert_eq!(seen[0]["type"], "drain");
        assert_eq!(closed, Closed::Code(1001));
    }
    let ran = tokio::task::spawn_blocking(|| process.end()).await.unwrap();
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
}
