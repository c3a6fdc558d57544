//! Servers under test: processes of their own, on a free port, measured from outside.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::param::clock_ticks_per_second;
use tempfile::TempDir;

use crate::{
    client::Client,
    machine::{Machine, pause},
};

/// Users that the connections are spread over; `WS_MAX_CONNECTIONS_PER_USER` has to allow it.
const USERS: usize = 20;
const START_TIMEOUT: Duration = Duration::from_secs(20);
const METRICS_TIMEOUT: Duration = Duration::from_secs(60);

/// Connections that `SETTINGS` allow, less those a mode opens beside the ones it measures.
pub(crate) const MAX_CONNECTIONS: i64 = 19_500;

/// Limits out of the way, but at work: each is checked as in production and never refuses.
const SETTINGS: [(&str, &str); 5] = [
    ("WS_MESSAGE_RATE_LIMIT", "4000000000"),
    ("WS_MAX_CONNECTIONS", "20000"),
    ("WS_MAX_CONNECTIONS_PER_USER", "1000"),
    ("LOG_LEVEL", "warn"),
    ("LOG_FORMAT", "human"),
];

#[derive(clap::Args)]
pub(crate) struct ServerOption {
    /// The Switchboard to measure [default: the one in the folder of this program]
    #[arg(long, value_name = "PATH")]
    server: Option<PathBuf>,
}

impl ServerOption {
    pub(crate) fn program(&self) -> anyhow::Result<Program> {
        let path = match &self.server {
            Some(path) => path.clone(),
            None => env::current_exe()?.with_file_name("switchboard"),
        };
        ensure!(
            path.exists(),
            "{} does not exist: build it with `cargo build --release --workspace`, or name \
             another with --server",
            path.display()
        );
        Program::switchboard("switchboard", path)
    }
}

/// Something that can be started, with a folder for its data.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    path: PathBuf,
    is_bare: bool,
    tokens: Vec<String>,
    folder: TempDir,
}

impl Program {
    /// The baseline, which this executable is as well.
    pub(crate) fn bare() -> anyhow::Result<Self> {
        let tokens = vec!["none".to_owned()];
        let folder = tempfile::tempdir()?;
        Ok(Self { name: "bare", path: env::current_exe()?, is_bare: true, tokens, folder })
    }

    /// A build of Switchboard.
    pub(crate) fn switchboard(name: &'static str, path: PathBuf) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let token = |user| token(&path, folder.path(), &format!("bench-{user}"));
        let tokens = (0..USERS).map(token).collect::<anyhow::Result<_>>()?;
        Ok(Self { name, path, is_bare: false, tokens, folder })
    }

    /// Starts it and waits until it answers.
    pub(crate) fn start(&self, machine: &Machine) -> anyhow::Result<Server> {
        self.start_with(machine, &[])
    }

    /// Starts it with settings of the mode.
    pub(crate) fn start_with(
        &self,
        machine: &Machine,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Server> {
        let address = free_address()?;
        let log = self.folder.path().join("log");
        let output = fs::File::create(&log)?;
        let mut command = machine.command(&self.path);
        if self.is_bare {
            command.args(["bare", &address.to_string()]);
        }
        clean_environment(&mut command, self.folder.path())
            .envs(settings.iter().copied())
            .env("LISTEN_ADDR", address.to_string())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn();
        let child = child.with_context(|| format!("cannot start {}", self.path.display()))?;
        let tokens = self.tokens.clone();
        let mut server = Server { name: self.name, child, address, log, tokens };
        let ready = server.wait_until_ready();
        ready.with_context(|| format!("{} did not start: {}", self.name, server.log()))?;
        Ok(server)
    }
}

/// Asks a build of Switchboard for a token that its servers on `folder` accept.
fn token(path: &Path, folder: &Path, user: &str) -> anyhow::Result<String> {
    let mut command = Command::new(path);
    command.args(["token", "--ttl", "24h", "--user", user]);
    let output = clean_environment(&mut command, folder).output();
    let output = output.with_context(|| format!("cannot start {}", path.display()))?;
    ensure!(
        output.status.success(),
        "`{} token` ended with {}: {}",
        path.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Settings of the caller's shell would change what is measured.
fn clean_environment<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    let path = env::var_os("PATH").unwrap_or_default();
    command.env_clear().env("PATH", path).envs(SETTINGS).env("DATA_DIR", folder)
}

pub(crate) fn free_address() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
    Ok(listener.local_addr()?)
}

/// A running server; dropped, it is killed.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    child: Child,
    pub(crate) address: SocketAddr,
    log: PathBuf,
    tokens: Vec<String>,
}

impl Server {
    /// A client with a token for each user.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        Client::new(self.address, &self.tokens)
    }

    /// CPU time since it was started, in microseconds; the kernel counts in steps of 10 ms.
    pub(crate) fn cpu_micros(&self) -> anyhow::Result<f64> {
        let stat = self.proc("stat")?;
        // The name, in parentheses, may hold anything; after it come the state and numbers.
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
        let mut fields = fields.unwrap_or_default().split_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<u64>().ok();
        let (user, system) = ticks().zip(ticks()).context("/proc/PID/stat is not as expected")?;
        Ok((user + system) as f64 * 1e6 / clock_ticks_per_second() as f64)
    }

    /// Resident memory, exactly: `VmRSS` may be off by some pages for each thread.
    pub(crate) fn rss_kib(&self) -> anyhow::Result<f64> {
        let rollup = self.proc("smaps_rollup")?;
        let rss = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
        let rss = rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.parse().ok());
        rss.context("/proc/PID/smaps_rollup is not as expected")
    }

    /// Reads a metric without labels, as Prometheus does.
    pub(crate) fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let metrics = self.metrics().context("cannot read /metrics")?;
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        let first = || metrics.lines().next().unwrap_or_default();
        value.with_context(|| format!("/metrics has no {name}: {}", first()))
    }

    fn metrics(&self) -> io::Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(METRICS_TIMEOUT))?;
        let host = self.address;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// What it has printed.
    pub(crate) fn log(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<_> = log.lines().rev().take(5).collect();
        if last.is_empty() { "it printed nothing".to_owned() } else { last.join(" | ") }
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/{file}", self.child.id());
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    }

    fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(self.address).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}");
            }
            ensure!(Instant::now() < end, "nothing listens after {START_TIMEOUT:?}");
            pause(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing is left to save: both fail only if it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
