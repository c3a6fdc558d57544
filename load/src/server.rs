//! Servers under test: processes of their own, on a free port, measured from outside.

use std::{
    env,
    ffi::OsString,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{
    client::Client,
    http::Endpoint,
    machine::{Machine, pause},
    mix::{ECHO, Mix},
    probe::Probe,
    script::{Script, Wire},
};

/// Users that the connections are spread over; `WS_MAX_CONNECTIONS_PER_USER` has to allow it.
pub(crate) const USERS: usize = 20;
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections that `SETTINGS` allow, less those a mode opens beside the ones it measures.
pub(crate) const MAX_CONNECTIONS: i64 = 19_500;

/// The lifetime of a token that is to expire soon, and the default `JWT_LEEWAY`.
pub(crate) const EXPIRED_AFTER: Duration = Duration::from_secs(12);

/// Limits out of the way, but at work: each is checked as in production and never refuses.
const SETTINGS: [(&str, &str); 7] = [
    ("WS_MESSAGE_RATE_LIMIT", "4000000000"),
    ("RATE_LIMIT_PER_MINUTE", "4000000000"),
    ("WS_MAX_CONNECTIONS", "20000"),
    ("WS_MAX_CONNECTIONS_PER_USER", "20000"),
    ("METRICS_RATE_LIMIT", "0"),
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
        self.program_for(USERS)
    }

    /// The program, and tokens for so many users.
    pub(crate) fn program_for(&self, users: usize) -> anyhow::Result<Program> {
        let path = match &self.server {
            Some(path) => path.clone(),
            None => beside()?,
        };
        ensure!(
            path.exists(),
            "{} does not exist: build it with `cargo build --release --workspace`, or name \
             another with --server",
            path.display()
        );
        Program::switchboard("switchboard", path, users)
    }
}

/// The server in the folder of this program. Where cargo has built and started this program, it builds
/// the server too: it builds one package at a time, and an old server would be measured unnoticed.
fn beside() -> anyhow::Result<PathBuf> {
    let this = env::current_exe()?;
    let server = this.with_file_name("switchboard");
    let by_cargo = env::var_os("CARGO_PKG_NAME").is_some_and(|name| name == env!("CARGO_PKG_NAME"));
    let (Some(cargo), true) = (env::var_os("CARGO"), by_cargo) else { return Ok(server) };
    let folder = this.parent().context("this program is in no folder")?;
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--quiet",
        "--locked",
        "--package",
        "switchboard",
        "--bin",
        "switchboard",
    ]);
    build.arg("--manifest-path").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    // The folder is named after the profile, but for one.
    let profile = folder.file_name().filter(|profile| *profile != "debug");
    build.arg("--profile").arg(profile.unwrap_or("dev".as_ref()));
    if let Some(target) = folder.parent() {
        build.arg("--target-dir").arg(target);
    }
    eprintln!("building the server, if it has changed");
    ensure!(build.status().context("cannot start cargo")?.success(), "the server does not build");
    Ok(server)
}

/// Something that can be started, with a folder for its data.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    path: PathBuf,
    /// A program that runs it, with its arguments.
    under: Vec<OsString>,
    /// What comes before its address on the command line; none: it is told by its environment.
    arguments: Option<Vec<OsString>>,
    wire: Wire,
    tokens: Vec<String>,
    folder: TempDir,
    /// Its limits are as they come.
    defaults: bool,
}

impl Program {
    /// A baseline, which is a mode of this executable.
    pub(crate) fn baseline(mode: &'static str) -> anyhow::Result<Self> {
        Self::other(mode, env::current_exe()?, vec![mode.into()], Wire::Json)
    }

    /// Any program that takes its address as its last argument and is content with any token.
    pub(crate) fn other(
        name: &'static str,
        path: PathBuf,
        arguments: Vec<OsString>,
        wire: Wire,
    ) -> anyhow::Result<Self> {
        let (tokens, folder) = (vec!["none".to_owned()], tempfile::tempdir()?);
        let (under, arguments) = (Vec::new(), Some(arguments));
        Ok(Self { name, path, under, arguments, wire, tokens, folder, defaults: false })
    }

    /// A build of Switchboard.
    pub(crate) fn switchboard(
        name: &'static str,
        path: PathBuf,
        users: usize,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let token = |user| token(&path, folder.path(), &format!("load-{user}"), "24h");
        let tokens = (0..users).map(token).collect::<anyhow::Result<_>>()?;
        let (under, wire) = (Vec::new(), Wire::Json);
        let arguments = None;
        Ok(Self { name, path, under, arguments, wire, tokens, folder, defaults: false })
    }

    /// The same under another name, asked in another format.
    pub(crate) fn speaking(self, name: &'static str, wire: Wire) -> Self {
        Self { name, wire, ..self }
    }

    /// The same, run by another program under the process id it is started with.
    pub(crate) fn under(self, under: Vec<OsString>) -> Self {
        Self { under, ..self }
    }

    /// The same with the limits it comes with.
    pub(crate) fn with_defaults(self) -> Self {
        Self { defaults: true, ..self }
    }

    /// A token that is expired once [`EXPIRED_AFTER`] has passed.
    pub(crate) fn expiring_token(&self) -> anyhow::Result<String> {
        token(&self.path, self.folder(), "load-expired", "1s")
    }

    /// Runs a command of a build of Switchboard on the data in `folder`; what it has printed.
    pub(crate) fn ask(&self, arguments: &[&str], folder: &Path) -> anyhow::Result<String> {
        ask(&self.path, arguments, folder)
    }

    /// Where it keeps its data.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
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
        self.start_at(free_address()?, machine, settings)
    }

    /// Starts it on an address that was used before, or is another's neighbour.
    pub(crate) fn start_at(
        &self,
        address: SocketAddr,
        machine: &Machine,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Server> {
        let log = self.folder.path().join(format!("log-{}", address.port()));
        let output = fs::File::create(&log)?;
        let mut words = self.under.iter().map(OsString::as_os_str).chain([self.path.as_os_str()]);
        let mut command = machine.command(words.next().unwrap_or_default().as_ref());
        command.args(words);
        if let Some(arguments) = &self.arguments {
            command.args(arguments).arg(address.to_string());
        }
        clean_environment(&mut command, self.folder.path());
        if self.defaults {
            for (name, _) in SETTINGS {
                command.env_remove(name);
            }
        }
        command
            .envs(settings.iter().copied())
            .env("LISTEN_ADDR", address.to_string())
            .stdin(if self.arguments.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn();
        let child = child.with_context(|| format!("cannot start {}", self.path.display()))?;
        let tokens = self.tokens.clone();
        let metrics = Some(Endpoint::new(address));
        let probe = Probe { pid: Some(child.id()), metrics };
        let (name, wire) = (self.name, self.wire);
        let mut server = Server { name, child, address, probe, wire, log, tokens };
        let ready = server.wait_until_ready();
        ready.with_context(|| format!("{} did not start: {}", self.name, server.log()))?;
        Ok(server)
    }
}

/// Asks a build of Switchboard for a token that its servers on `folder` accept.
fn token(path: &Path, folder: &Path, user: &str, lifetime: &str) -> anyhow::Result<String> {
    let token = ask(path, &["token", "--ttl", lifetime, "--user", user], folder)?;
    Ok(token.trim().to_owned())
}

fn ask(path: &Path, arguments: &[&str], folder: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(path);
    command.args(arguments);
    let output = clean_environment(&mut command, folder).output();
    let output = output.with_context(|| format!("cannot start {}", path.display()))?;
    ensure!(
        output.status.success(),
        "`{} {}` ended with {}: {}",
        path.display(),
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
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
    pub(crate) probe: Probe,
    wire: Wire,
    log: PathBuf,
    pub(crate) tokens: Vec<String>,
}

/// It is looked at in its probe.
impl Deref for Server {
    type Target = Probe;

    fn deref(&self) -> &Probe {
        &self.probe
    }
}

impl Server {
    /// A client with a token for each user, which sends echoes.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        self.client_of(&self.tokens)
    }

    /// The same, of some users.
    pub(crate) fn client_of(&self, tokens: &[String]) -> anyhow::Result<Client> {
        let mix = Mix::parse(ECHO)?;
        let script = Script::new(&self.address.to_string(), self.wire, tokens, &mix)?;
        Client::new(vec![self.address], script, mix.parts().len())
    }

    /// What a baseline is told by.
    pub(crate) fn take_input(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Tells it to drain, and waits for its end.
    pub(crate) fn drain(&mut self, timeout: Duration) -> anyhow::Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).context("cannot tell the server to end")?;
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "it ended with {status} ({})", self.log());
                return Ok(());
            }
            ensure!(Instant::now() < end, "it has not ended after {timeout:?}");
            pause(Duration::from_millis(10));
        }
    }

    /// What it has printed.
    pub(crate) fn log(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<_> = log.lines().rev().take(5).collect();
        if last.is_empty() { "it printed nothing".to_owned() } else { last.join(" | ") }
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
