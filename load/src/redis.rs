//! `redis`: what a message costs a node of a cluster, beside a server that is alone.
//!
//! The path of a message does not ask Redis. What is measured is what holding a connection to it and
//! keeping the state of a cluster cost beside that path.

use std::{
    env,
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

use crate::{
    bench::messages,
    load::{CONNECTIONS, LoadOption},
    machine::{Machine, pause},
    report::{Column, Rounds},
    server::{ServerOption, free_address},
};

const BOUND: &str = "≤ 1.05×";
const START_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    #[command(flatten)]
    load: LoadOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let program = options.server.program()?;
    // Before this process is pinned: it is to run on any core.
    let redis = Redis::start()?;
    let url = format!("redis://{}", redis.address);
    let machine = Machine::new();
    let column = |title| Column::new(title, "µs").bound(BOUND);
    let columns = vec![column("message, 1 in flight"), column("message, 16 in flight")];
    let rows = [("without Redis", ""), ("with Redis", &*url)];
    let mut table = Rounds::new("server CPU", columns, rows.map(|(name, _)| name).to_vec());
    for round in 0..options.load.rounds as usize {
        let mut samples = vec![Vec::new(); rows.len()];
        // Each is the first in every second round.
        for row in [round % 2, 1 - round % 2] {
            let (name, url) = rows[row];
            let server = program.start_with(&machine, &[("REDIS_URL", url)]).context(name)?;
            let connected = server.metric("redis_connected")? == 1.0;
            ensure!(connected != url.is_empty(), "{name}: redis_connected is {connected}");
            let cost = messages(&server, options.load.duration());
            let cost = cost.with_context(|| format!("{name} ({})", server.log()))?;
            samples[row].extend(cost.map(|messages| messages.cpu));
        }
        table.push(samples);
    }
    print!("{table}");
    println!();
    println!(
        "- {} rounds, medians (lowest–highest); ratios are taken within a round",
        options.load.rounds
    );
    println!(
        "- {CONNECTIONS} connections; {}, on any core; its CPU time does not count",
        redis.version
    );
    print!("{machine}");
    Ok(())
}

/// A private one, which keeps nothing on disk; dropped, it is killed.
struct Redis {
    address: SocketAddr,
    version: String,
    child: Child,
    _folder: TempDir,
}

impl Redis {
    fn start() -> anyhow::Result<Self> {
        let path = env::var_os("PATH").unwrap_or_default();
        let program = env::split_paths(&path)
            .flat_map(|folder| ["redis-server", "valkey-server"].map(|name| folder.join(name)))
            .find(|program| program.exists())
            .context("neither redis-server nor valkey-server is on the PATH")?;
        let version = Command::new(&program).arg("--version").output()?;
        let version = String::from_utf8_lossy(&version.stdout);
        let version = version.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
        let (address, folder) = (free_address()?, tempfile::tempdir()?);
        let mut command = Command::new(&program);
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""]);
        command.arg("--dir").arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().context("cannot start Redis")?;
        let redis = Self { address, version, child, _folder: folder };
        let since = Instant::now();
        while TcpStream::connect(address).is_err() {
            ensure!(since.elapsed() < START_TIMEOUT, "Redis does not listen");
            pause(Duration::from_millis(20));
        }
        Ok(redis)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // Nothing is left to save: both fail only if it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
