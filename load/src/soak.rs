//! `soak`: everything at once for a long time, and what is left of it afterwards.
//!
//! A steady load, connections that come and go, storms in which everybody reconnects, and slow consumers
//! that never read what is pushed to them. Memory, descriptors, tasks and tables are sampled, and have to
//! be back where they were after a first while of the same, once everybody has left. With `--abuse` another
//! address attacks all the while.

use std::{
    collections::BTreeMap,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    abuse::{self, Abuser},
    client::Client,
    http::Endpoint,
    load::seconds,
    mix::Mix,
    probe::Probe,
    steady::rate,
    summary::{OutputOption, Return, Summary},
    target::{Target, TargetOption, allow_connections},
    timeline::{Costs, Timeline},
};

const SERIES: &[&str] = &[
    "process_resident_memory_bytes",
    "process_open_fds",
    "runtime_tasks_alive",
    "ws_connections_active",
    "ws_requests_in_flight",
    "audit_queue_size",
    r#"table_entries{table="connections"}"#,
    r#"table_entries{table="users"}"#,
    r#"table_entries{table="message_limits"}"#,
    r#"table_entries{table="http_limits"}"#,
    r#"table_entries{table="failures"}"#,
    r#"table_entries{table="tokens"}"#,
    SLOW,
];
const SLOW: &str = r#"ws_send_queue_dropped_total{reason="slow_consumer"}"#;
/// What of `SERIES` has to come back, in a reader's words. An actor is a task or two, and a timer is
/// held by a task: none of them outlives its own.
const RETURNS: [&str; 12] = [
    "memory",
    "open files",
    "tasks (actors, sessions, timers)",
    "connections",
    "requests in flight",
    "audit rows to be written",
    "table of connections",
    "table of users",
    "table of message limits",
    "table of REST limits",
    "table of failed logins",
    "table of tokens",
];
/// The share by which memory may differ: what the allocator and the database keep for the next crowd.
const MEMORY_SLACK: f64 = 0.1;
/// Slow consumers are filled by this much, this often.
const PUSH_BYTES: usize = 64 * 1024;
const PUSH_EVERY: Duration = Duration::from_millis(40);
const TIMEOUT: Duration = Duration::from_secs(60);
/// More pushes than a lane needs to hold would only cost memory here.
const SETTINGS: [(&str, &str); 1] = [("WS_SEND_QUEUE", "64")];
/// What has to be limited for an attack to be refused: messages and control frames as by default.
const ABUSED: [(&str, &str); 2] = [("WS_MESSAGE_RATE_LIMIT", "6000"), abuse::ORIGIN];

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Seconds; twenty minutes are 1200
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    seconds: f64,
    /// Seconds of the same before, after which what is there is what has to come back
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    warm_up: f64,
    /// Seconds until memory is given back: the server does so when a crowd has gone, and once more when
    /// connections to the database, which have caches, are closed, 75 seconds later
    #[arg(long, default_value_t = 90.0, value_parser = seconds)]
    settle: f64,
    /// Connections under load
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=9000))]
    connections: u32,
    /// Requests a second over all of them
    #[arg(long, default_value_t = 1000.0, value_parser = rate)]
    rate: f64,
    /// Packages and how often each is called
    #[arg(long, default_value = "100=90,2=9,3=1")]
    mix: String,
    /// Connections that are cut off and come back, a second
    #[arg(long, default_value_t = 20)]
    churn: u32,
    /// Seconds between storms, in which all are cut off and come back
    #[arg(long, default_value_t = 15.0, value_parser = seconds)]
    storm_every: f64,
    /// Connections that do not read what is pushed to them
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=1000))]
    slow: u32,
    /// Another address attacks meanwhile, with each attack of `abuse` in turn
    #[arg(long)]
    abuse: bool,
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let attackers = if options.abuse { abuse::MOST_CONNECTIONS as u32 } else { 0 };
    allow_connections(options.connections + options.slow + attackers)?;
    let settings =
        if options.abuse { [&SETTINGS[..], &ABUSED].concat() } else { SETTINGS.to_vec() };
    let target = options.target.start_sockets(&settings)?;
    let probe = &target.probe;
    // What a server makes once, such as its pool of database connections, is not lost.
    Weather::new(options, &target, options.warm_up)?.blow()?;
    let settle = Duration::from_secs_f64(options.settle);
    let before = rest(probe, settle)?;
    let mut weather = Weather::new(options, &target, options.seconds)?;
    let costs = Costs::start(probe);
    weather.blow()?;
    let (_, own, cpu) = costs.end(probe);
    let Weather { mut client, slow, mut timeline, storms, attacks, .. } = weather;
    client.run(0, Duration::from_secs(1))?;
    let mut summary = Summary::new("soak", &target);
    summary.figure("answers", "answers", client.tally.answers() as f64, "");
    summary.figure("storms", "storms", f64::from(storms), "");
    if options.abuse {
        summary.figure("attacks", "attacks", attacks as f64, "");
        summary.note(format!("attacked from {}: each kind of `abuse` in turn", abuse::SOURCE));
    }
    let connects = client.tally.connected.len() as f64;
    summary.figure("connects", "connections opened", connects, "");
    summary.latency("all, from when a request was due", &client.tally.overall());
    if let Some(cpu) = cpu {
        summary.figure("server_cpu", "server CPU", cpu / 1e6 / options.seconds, "of a core");
    }
    summary.judge(&client.tally, own);
    drop((client, slow));
    let after = rest(probe, settle)?;
    let mut nobody = target.silent_client()?;
    timeline.point(&mut nobody);
    summary.timeline = timeline.finish();
    summary.series = SERIES;
    tell(&mut summary, &before, &after);
    options.output.write(&summary)
}

/// Everybody who is there, and what happens to them.
struct Weather<'a> {
    options: &'a Options,
    duration: Duration,
    client: Client,
    slow: Client,
    pusher: Pusher<'a>,
    abuser: Option<Abuser<'a>>,
    timeline: Timeline,
    storms: u32,
    attacks: u64,
}

impl<'a> Weather<'a> {
    fn new(options: &'a Options, target: &'a Target, seconds: f64) -> anyhow::Result<Self> {
        let mix = Mix::parse(&options.mix).context("--mix")?;
        let (slow_user, others) = target.tokens.split_last().context("there are no tokens")?;
        ensure!(!others.is_empty(), "slow consumers are a user of their own: at least two tokens");
        let (abuser, others) = match options.abuse {
            true => {
                let (attacker, others) = others.split_last().context("there are no tokens")?;
                ensure!(
                    !others.is_empty(),
                    "attackers are a user of their own: at least three tokens"
                );
                (Some(Abuser::new(target, std::slice::from_ref(attacker))?), others)
            }
            false => (None, others),
        };
        let duration = Duration::from_secs_f64(seconds);
        let timeline = Timeline::start(&target.probe, duration, SERIES);
        let mut client = target.client_of(&mix, others)?.returning();
        let mut slow = target.client_of(&mix, std::slice::from_ref(slow_user))?.deaf();
        client.open(options.connections as usize)?;
        slow.open(options.slow as usize)?;
        client.send_at(options.rate)?;
        let user = slow.user().to_owned();
        let pusher = Pusher { endpoint: &target.endpoint, token: &others[0], user };
        let (storms, attacks) = (0, 0);
        Ok(Self { options, duration, client, slow, pusher, abuser, timeline, storms, attacks })
    }

    /// Churn, storms, pushes and attacks until the end.
    fn blow(&mut self) -> anyhow::Result<()> {
        let Self { options, duration, client, slow, pusher, abuser, timeline, storms, attacks } =
            self;
        thread::scope(|scope| {
            let (stop, stopped) = mpsc::channel::<()>();
            let pushing = (options.slow > 0).then(|| scope.spawn(|| pusher.push(stopped)));
            let (peace, ended) = mpsc::channel::<()>();
            let abuser = abuser.as_ref();
            let attacking = abuser.map(|abuser| scope.spawn(|| abuser.attack(ended)));
            let blown = storm(options, *duration, client, slow, timeline);
            drop((stop, peace));
            if let Some(pushing) = pushing {
                pushing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            if let Some(attacking) = attacking {
                *attacks =
                    attacking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            *storms = blown?;
            Ok(())
        })
    }
}

/// Cuts off some all the time and everybody now and then; the number of storms.
fn storm(
    options: &Options,
    duration: Duration,
    client: &mut Client,
    slow: &mut Client,
    timeline: &mut Timeline,
) -> anyhow::Result<u32> {
    let end = Instant::now() + duration;
    // At least one, also while it warms up.
    let every = Duration::from_secs_f64(options.storm_every).min(duration / 2);
    let (mut next, mut storms) = (Instant::now() + every, 0);
    while Instant::now() < end {
        client.go_on(Duration::from_millis(200))?;
        slow.go_on(Duration::from_millis(1))?;
        timeline.step(client);
        let storm = Instant::now() >= next;
        if storm {
            storms += 1;
            next += every;
            slow.cut(options.slow as usize);
        }
        client.cut(if storm { client.ready() } else { options.churn.div_ceil(5) as usize });
    }
    Ok(storms)
}

/// Fills the lanes of those who do not read.
struct Pusher<'a> {
    endpoint: &'a Endpoint,
    token: &'a str,
    user: String,
}

impl Pusher<'_> {
    fn push(&self, stopped: mpsc::Receiver<()>) -> anyhow::Result<()> {
        let data = serde_json::json!({ "text": "x".repeat(PUSH_BYTES) });
        let body =
            serde_json::json!({ "pkg_id": 100, "data": data, "user": self.user }).to_string();
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PUSH_EVERY) {
            self.endpoint
                .ask("POST /admin/broadcast", Some(self.token), Some(&body))
                .context("slow consumers need a token with the role `admin` (or --slow 0)")?;
        }
        Ok(())
    }
}

/// What there is once everybody is gone.
struct Rest {
    /// By `SERIES`.
    values: Vec<f64>,
    /// Every table of the server, by its series: also one that `SERIES` does not know.
    tables: BTreeMap<String, f64>,
}

/// Waits until everybody is gone and memory has come to rest.
fn rest(probe: &Probe, settle: Duration) -> anyhow::Result<Rest> {
    let gone = Instant::now();
    while probe.metric("ws_connections_active")? > 0.0 && gone.elapsed() < TIMEOUT {
        crate::machine::pause(Duration::from_millis(100));
    }
    crate::machine::pause(settle);
    let tables = probe.beginning_with("table_entries{")?;
    Ok(Rest { values: probe.metrics(SERIES.iter().copied())?, tables })
}

fn tell(summary: &mut Summary, before: &Rest, after: &Rest) {
    let (slow, mib) = (SERIES.len() - 1, 1024.0 * 1024.0);
    let slow = after.values[slow] - before.values[slow];
    summary.figure("slow_closed", "slow consumers closed with 4005", slow, "");
    for (index, of) in RETURNS.iter().enumerate() {
        let (before, after) = (before.values[index], after.values[index]);
        summary.returns.push(match index {
            0 => Return::new(of, " MiB", before / mib, after / mib, MEMORY_SLACK),
            _ => Return::new(of, "", before, after, 0.0),
        });
    }
    for (table, after) in &after.tables {
        if !SERIES.contains(&&**table) {
            let before = before.tables.get(table).copied().unwrap_or_default();
            summary.returns.push(Return::new(table, "", before, *after, 0.0));
        }
    }
    let left = summary.returns.iter().filter(|each| !each.returned).count();
    summary.figure("left", "not returned", left as f64, "");
    summary.note(format!("memory counts as returned within {:.0} %", MEMORY_SLACK * 100.0));
}
