//! An attack under way: its process, started behind the honest client, and its report. An [`Abuser`] makes
//! one attack after the other, for a soak.

use std::{
    env,
    io::Write as _,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context as _, ensure};

use super::{
    attacker::{Report, Tokens},
    kinds::Kind,
};
use crate::target::Target;

/// Seconds of each attack of an [`Abuser`], and how often it looks whether one is over.
const EACH: f64 = 5.0;
const LOOK: Duration = Duration::from_millis(100);
/// The default of `--reconnects`.
pub(super) const RECONNECTS: f64 = 500.0;

/// What an attack is made with.
pub(crate) struct Attack<'a> {
    pub(crate) kind: Kind,
    pub(crate) seconds: f64,
    /// Connections at once.
    pub(crate) connections: usize,
    /// Connections a second that are opened in place of those that have ended.
    pub(crate) rate: f64,
    /// Of the attacking users.
    pub(crate) tokens: &'a [String],
    pub(crate) expired: &'a str,
}

/// A running attack; dropped, it is ended.
pub(crate) struct Siege(Option<Child>);

impl Attack<'_> {
    pub(crate) fn start(&self, server: SocketAddr) -> anyhow::Result<Siege> {
        let mut command = behind_others()?;
        command.args(["attack", &server.to_string(), "--kind", &self.kind.name()]);
        command.args(["--seconds", &self.seconds.to_string()]);
        command.args(["--connections", &self.connections.to_string()]);
        command.args(["--rate", &self.rate.to_string()]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut siege = Siege(Some(child.context("cannot start the attacker")?));
        let users = self.tokens.to_vec();
        let tokens = Tokens { users, expired: self.expired.to_owned() };
        let input = siege.0.as_mut().and_then(|child| child.stdin.take());
        let tokens = serde_json::to_vec(&tokens)?;
        input.context("the attacker has no input")?.write_all(&tokens)?;
        Ok(siege)
    }
}

impl Siege {
    /// Whether it has ended.
    pub(crate) fn is_over(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.as_mut().map(Child::try_wait).transpose()?.flatten().is_some())
    }

    /// Waits for its end.
    pub(crate) fn report(mut self) -> anyhow::Result<Report> {
        let child = self.0.take().context("the attacker has ended before")?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "the attacker ended with {}", output.status);
        serde_json::from_slice(&output.stdout).context("the attacker reported nothing")
    }
}

impl Drop for Siege {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Both fail only if it has ended already.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Attacks for as long as it is let, with each kind in turn.
pub(crate) struct Abuser<'a> {
    server: SocketAddr,
    tokens: &'a [String],
    expired: String,
}

impl<'a> Abuser<'a> {
    /// As the users of `tokens`.
    pub(crate) fn new(target: &Target, tokens: &'a [String]) -> anyhow::Result<Self> {
        let program = target.program().context("only a private server is attacked")?;
        let (server, expired) = (target.endpoint.address, program.expiring_token()?);
        Ok(Self { server, tokens, expired })
    }

    /// Returns the number of attacks that were begun until `ended`.
    pub(crate) fn attack(&self, ended: Receiver<()>) -> anyhow::Result<u64> {
        let Self { server, tokens, expired } = self;
        for (begun, kind) in (1..).zip(Kind::all().iter().copied().cycle()) {
            let (seconds, connections, rate) = (EACH, kind.connections(), RECONNECTS);
            let attack = Attack { kind, seconds, connections, rate, tokens, expired };
            let mut siege = attack.start(*server)?;
            while !siege.is_over()? {
                if ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected) {
                    return Ok(begun);
                }
            }
            let report = siege.report().with_context(|| kind.name())?;
            ensure!(
                report.attempts + report.connects > 0,
                "{}: nothing was attempted",
                kind.name()
            );
        }
        Ok(0)
    }
}

/// This program on the same core, run only while nobody else wants it: the honest client never waits for
/// the attacker.
fn behind_others() -> anyhow::Result<Command> {
    let program = env::current_exe()?;
    let idle = Command::new("chrt").args(["--idle", "0", "true"]).status();
    let (first, arguments) = match idle.is_ok_and(|status| status.success()) {
        true => ("chrt", ["--idle", "0"]),
        false => ("nice", ["-n", "19"]),
    };
    let mut command = Command::new(first);
    command.args(arguments).arg(program);
    Ok(command)
}
