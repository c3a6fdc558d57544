//! `abuse`: attacks of one address on a server with its default limits, beside honest clients.
//!
//! Each attack has a server of its own, which is measured without it first: neither what an attack has left
//! behind nor a machine that gets slower moves the next figure. The honest clients ask at a fixed rate, from
//! another address. In reading order: `kinds` are the attacks, `attacker` the process that makes one, `siege`
//! starts it, `outcome` has the bounds.

mod attacker;
mod kinds;
mod outcome;
mod siege;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

pub(crate) use attacker::{Options as AttackOptions, SOURCE, run as attack};
pub(crate) use kinds::ORIGIN;
pub(crate) use siege::Abuser;

use crate::{
    client::Client,
    load::{CONNECTIONS, seconds},
    machine::{self, Machine, pause},
    server::{EXPIRED_AFTER, Program, Server, ServerOption},
    steady::rate,
};
use kinds::{Kind, PER_USER};
use outcome::{Outcome, Window};
use siege::Attack;

/// Connections of an attack at most, and those of the server beside them.
pub(crate) const MOST_CONNECTIONS: usize = 12_000;
/// How often memory is read.
const LOOK: Duration = Duration::from_millis(100);
/// Time for the last answers to come, and for a server to end.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
/// A share of a second by which a request may be late when a window ends.
const LATE: f64 = 0.05;

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    /// Attacks, separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// Seconds of each attack, and of the same load without it before
    #[arg(long, default_value_t = 5.0, value_parser = short)]
    seconds: f64,
    /// Seconds of honest load before anything is measured
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    warm_up: f64,
    /// Requests a second over the 50 honest connections
    #[arg(long, default_value_t = 5000.0, value_parser = rate)]
    rate: f64,
    /// Connections that flood with control frames; 1,1000 attacks with one and then with a thousand
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "5", value_parser = clap::value_parser!(u16).range(1..=5000))]
    connections: Vec<u16>,
    /// Connections a second that an attacker opens in place of those that the server has ended or refused;
    /// what it sends on those it has is bounded by its core alone
    #[arg(long, value_name = "RATE", default_value_t = siege::RECONNECTS, value_parser = rate)]
    reconnects: f64,
    /// A setting of the server that is not its default, as its environment has it; may be given again
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
    /// Write all figures as JSON (-: to standard output, for the tables)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A minute of attack would be cut in two by the summaries of the audit trail.
fn short(text: &str) -> Result<f64, String> {
    seconds(text).ok().filter(|seconds| *seconds <= 55.0).ok_or("allowed: 0.1 to 55".to_owned())
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    machine::allow_connections(MOST_CONNECTIONS)?;
    let attackers = usize::from(options.connections.iter().copied().max().unwrap_or(1));
    let users = CONNECTIONS + attackers.div_ceil(PER_USER);
    let program = options.server.program_for(users)?.with_defaults();
    let expired = program.expiring_token()?;
    let made = Instant::now();
    let machine = Machine::new();
    let kinds = if options.kinds.is_empty() { Kind::all() } else { &options.kinds };
    let mut outcomes = Vec::new();
    for kind in kinds.iter().copied() {
        if kind == Kind::ExpiredTokens {
            pause(EXPIRED_AFTER.saturating_sub(made.elapsed()));
        }
        let counts = options.connections.iter().map(|count| usize::from(*count));
        let counts: Vec<_> = match kind.is_control() {
            true => counts.collect(),
            false => vec![kind.connections()],
        };
        for connections in counts {
            let stage = Stage { options, program: &program, machine: &machine, expired: &expired };
            let outcome = stage.attack(kind, connections).with_context(|| kind.name())?;
            eprintln!("{}, {connections} connections: {:?}", kind.name(), outcome.faults());
            outcomes.push(outcome);
        }
    }
    tell(options, &outcomes, &machine)
}

/// Prints the tables, and fails if a bound is missed.
fn tell(options: &Options, outcomes: &[Outcome], machine: &Machine) -> anyhow::Result<()> {
    let json = options.json.as_ref().map(|_| serde_json::to_string_pretty(outcomes)).transpose()?;
    match (options.json.as_deref(), json) {
        (Some(file), Some(json)) if file == Path::new("-") => println!("{json}"),
        (Some(file), Some(json)) => {
            fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
        }
        _ => {}
    }
    let mut faults = Vec::new();
    for outcome in outcomes {
        let of = format!("{}, {} connections", outcome.attack, outcome.connections);
        faults.extend(outcome.faults().iter().map(|fault| format!("{of}: {fault}")));
    }
    if options.json.as_deref() != Some(Path::new("-")) {
        print!("{}{}", outcome::table(outcomes, false), outcome::table(outcomes, true));
        faults.iter().for_each(|fault| println!("- **missed**: {fault}"));
        println!(
            "- {CONNECTIONS} honest connections of as many users, {} requests/s from 127.0.0.1; {} s of each \
             attack from {}, on the core of the honest client and behind it",
            options.rate, options.seconds, SOURCE
        );
        println!(
            "- attempts are requests, connections that are held, or frames written, also those that a server \
             which has closed does not read"
        );
        println!("- a private server with its default limits{}", changed(options, outcomes));
        print!("{machine}");
    }
    match faults.len() {
        0 => Ok(()),
        count => bail!("{count} bounds are missed:\n{}", faults.join("\n")),
    }
}

/// The settings that were no defaults, in words.
fn changed(options: &Options, outcomes: &[Outcome]) -> String {
    let mut text: String =
        options.settings.iter().map(|setting| format!(", but {setting}")).collect();
    for kind in Kind::all() {
        if let Some((name, value)) = kind.setting()
            && outcomes.iter().any(|outcome| outcome.attack == kind.title())
        {
            text += &format!(
                "; for {} {name}={value}, as by default no origin is foreign",
                kind.name()
            );
        }
    }
    text
}

/// What every attack is made with.
struct Stage<'a> {
    options: &'a Options,
    program: &'a Program,
    machine: &'a Machine,
    expired: &'a str,
}

impl Stage<'_> {
    /// One attack on a server of its own.
    fn attack(&self, kind: Kind, connections: usize) -> anyhow::Result<Outcome> {
        let Self { options, program, .. } = self;
        let folder = tempfile::tempdir()?;
        let mut server = self.start(kind, folder.path())?;
        let (honest, attackers) = server.tokens.split_at(CONNECTIONS);
        let mut client = server.client_of(honest)?.tolerant();
        client.open(CONNECTIONS)?;
        ensure!(client.ready() == CONNECTIONS, "no honest connection: {:?}", client.tally.failed);
        self.look(&server, &mut client, options.warm_up)?;
        let before = self.look(&server, &mut client, options.seconds)?;
        let (seconds, rate) = (options.seconds, options.reconnects);
        let expired = self.expired;
        let attack = Attack { kind, seconds, connections, rate, tokens: attackers, expired };
        let siege = attack.start(server.address)?;
        let mut during = self.look(&server, &mut client, options.seconds)?;
        // Connections that were lost are not there to be asked.
        during.missed += (CONNECTIONS - client.ready().min(CONNECTIONS)) as u64;
        let report = siege.report()?;
        drop(client);
        let waiting = rows_known(&server);
        let fault = server.drain(DRAIN_TIMEOUT).err();
        let fault = fault.map(|error| format!("the server did not end well: {error:#}"));
        drop(server);
        let trail = program.ask(&["audit", "export"], folder.path())?;
        let rows = trail.lines().count() as u64;
        // What honest clients did, what the server did itself, and the one row of a session that logged in.
        let is_other = |line: &&str| {
            line.contains(r#""ip_address":"127.0.0.1""#)
                || line.contains(r#""action_type":"SERVER:"#)
                || line.contains(r#""action_type":"WS:AUTH""#)
                    && line.contains(r#""outcome":"success""#)
        };
        let others = trail.lines().filter(is_other).count() as u64;
        Ok(Outcome {
            attack: kind.title(),
            authenticated: kind.authenticates(),
            connections,
            report,
            before,
            during,
            audit_rows: rows.max(waiting).saturating_sub(others),
            fault,
        })
    }

    /// A server with data of its own, which knows the tokens of all.
    fn start(&self, kind: Kind, folder: &Path) -> anyhow::Result<Server> {
        let (folder, key) =
            (folder.display().to_string(), self.program.folder().join("dev-key.pem"));
        let key = key.display().to_string();
        let mut settings = vec![("DATA_DIR", &*folder), ("DEV_KEY_FILE", &*key)];
        settings.extend(kind.setting());
        for setting in &self.options.settings {
            let named = setting.split_once('=').with_context(|| format!("{setting}: NAME=VALUE"));
            settings.push(named?);
        }
        self.program.start_with(self.machine, &settings)
    }

    /// Has the honest clients ask for a while, and watches the server meanwhile.
    fn look(&self, server: &Server, client: &mut Client, seconds: f64) -> anyhow::Result<Window> {
        client.forget();
        client.send_at(self.options.rate)?;
        let (end, cpu) = (Instant::now() + Duration::from_secs_f64(seconds), server.cpu_micros()?);
        let mut most = 0_f64;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            client.go_on(LOOK.min(left))?;
            most = most.max(server.resident_bytes()?);
        }
        let (cpu, answers) = (server.cpu_micros()? - cpu, client.tally.answers());
        let overdue = client.overdue();
        let overdue = if overdue as f64 > self.options.rate * LATE { overdue } else { 0 };
        client.run(0, Duration::ZERO)?;
        let last = Instant::now() + LAST_ANSWERS;
        while client.tally.answers() < client.tally.sent && Instant::now() < last {
            client.go_on(Duration::from_millis(20))?;
        }
        Ok(Window {
            answers: client.tally.answers(),
            missed: client.tally.sent - client.tally.answers() + overdue,
            p99_ms: client.tally.overall().value_at_quantile(0.99) as f64 / 1e6,
            micros: cpu / answers as f64,
            mib: most / 1024.0 / 1024.0,
        })
    }
}

/// Rows of the audit trail that are written or wait for it; a server that is too busy to say has none.
fn rows_known(server: &Server) -> u64 {
    let series = ["audit_logs_written_total", "audit_queue_size", "audit_spool_rows"];
    server.metrics(series).map_or(0, |rows| rows.iter().sum::<f64>() as u64)
}
