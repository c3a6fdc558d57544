//! `soak`: everything at once for a long time, and what is left of it afterwards.
//!
//! A steady load, connections that come and go, storms in which everybody reconnects, and slow consumers
//! that never read what is pushed to them. Memory, descriptors and gauges are sampled, and have to be
//! back where they were once everybody has left.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    client::Client,
    http::Endpoint,
    load::{WARM_UP, seconds},
    mix::Mix,
    probe::Probe,
    steady::rate,
    summary::{OutputOption, Summary},
    target::{TargetOption, allow_connections},
    timeline::{Costs, Timeline},
};

const SERIES: &[&str] = &[
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_threads",
    "ws_connections_active",
    "ws_requests_in_flight",
    "audit_queue_size",
    r#"ws_send_queue_dropped_total{reason="slow_consumer"}"#,
];
/// Those of `SERIES` that have to come back to what they were.
const MEMORY: usize = 0;
const FILES: usize = 1;
const GAUGES: std::ops::Range<usize> = 3..6;
/// Slow consumers are filled by this much, this often.
const PUSH_BYTES: usize = 64 * 1024;
const PUSH_EVERY: Duration = Duration::from_millis(40);
const TIMEOUT: Duration = Duration::from_secs(60);
/// Time for memory to be given back: the server looks every five seconds.
const SETTLE: Duration = Duration::from_secs(12);
/// More pushes than a lane needs to hold would only cost memory here.
const SETTINGS: [(&str, &str); 1] = [("WS_SEND_QUEUE", "64")];

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Seconds; twenty minutes are 1200
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    seconds: f64,
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
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections + options.slow)?;
    let target = options.target.start_sockets(&SETTINGS)?;
    let probe = &target.probe;
    let mix = Mix::parse(&options.mix).context("--mix")?;
    let (slow_user, others) = target.tokens.split_last().context("there are no tokens")?;
    ensure!(!others.is_empty(), "slow consumers are a user of their own: at least two tokens");
    let duration = Duration::from_secs_f64(options.seconds);
    let mut timeline = Timeline::start(probe, duration, SERIES);

    // What a server makes once for all crowds, such as its pool of database connections, is not lost.
    let mut first = target.client_of(&mix, others)?.tolerant();
    first.open(connections)?;
    first.run(4, WARM_UP * 4)?;
    drop(first);
    let before = rest(probe)?;

    let mut client = target.client_of(&mix, others)?.returning();
    let slow_tokens = std::slice::from_ref(slow_user);
    let mut slow = target.client_of(&mix, slow_tokens)?.deaf();
    client.open(options.connections as usize)?;
    slow.open(options.slow as usize)?;
    client.send_at(options.rate)?;
    let costs = Costs::start(probe);
    let user = slow.user().to_owned();
    let pusher = Pusher { endpoint: &target.endpoint, token: &others[0], user };
    let storms = blow(options, &mut client, &mut slow, &mut timeline, &pusher)?;
    let (_, own, cpu) = costs.end(probe);
    client.run(0, Duration::from_secs(1))?;
    let mut summary = Summary::new("soak", &target);
    summary.figure("answers", "answers", client.tally.answers() as f64, "");
    summary.figure("storms", "storms", f64::from(storms), "");
    let connects = client.tally.connected.len() as f64;
    summary.figure("connects", "connections opened", connects, "");
    summary.latency("all, from when a request was due", &client.tally.overall());
    if let Some(cpu) = cpu {
        summary.figure("server_cpu", "server CPU", cpu / 1e6 / options.seconds, "of a core");
    }
    summary.judge(&client.tally, own);
    drop((client, slow));
    let after = rest(probe)?;
    let mut nobody = target.silent_client()?;
    timeline.point(&mut nobody);
    summary.timeline = timeline.finish();
    summary.series = SERIES;
    tell(&mut summary, &before, &after);
    options.output.write(&summary)
}

/// Churn, storms and pushes until the end; the number of storms.
fn blow(
    options: &Options,
    client: &mut Client,
    slow: &mut Client,
    timeline: &mut Timeline,
    pusher: &Pusher<'_>,
) -> anyhow::Result<u32> {
    thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let pushing = (options.slow > 0).then(|| scope.spawn(move || pusher.push(&stopped)));
        let storms = weather(options, client, slow, timeline);
        drop(stop);
        if let Some(pushing) = pushing {
            pushing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        storms
    })
}

fn weather(
    options: &Options,
    client: &mut Client,
    slow: &mut Client,
    timeline: &mut Timeline,
) -> anyhow::Result<u32> {
    let end = Instant::now() + Duration::from_secs_f64(options.seconds);
    let every = Duration::from_secs_f64(options.storm_every);
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
    fn push(&self, stopped: &mpsc::Receiver<()>) -> anyhow::Result<()> {
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

/// Waits until everybody is gone and memory has come to rest.
fn rest(probe: &Probe) -> anyhow::Result<Vec<f64>> {
    let gone = Instant::now();
    while probe.metric("ws_connections_active")? > 0.0 && gone.elapsed() < TIMEOUT {
        crate::machine::pause(Duration::from_millis(100));
    }
    crate::machine::pause(SETTLE);
    probe.metrics(SERIES.iter().copied())
}

fn tell(summary: &mut Summary, before: &[f64], after: &[f64]) {
    let mib = |series: &[f64]| series[MEMORY] / 1024.0 / 1024.0;
    summary.figure("before_mib", "memory before", mib(before), "MiB");
    summary.figure("after_mib", "memory afterwards", mib(after), "MiB");
    summary.figure("before_fds", "open files before", before[FILES], "");
    summary.figure("after_fds", "open files afterwards", after[FILES], "");
    summary.figure("slow_closed", "slow consumers closed with 4005", after[6] - before[6], "");
    for index in GAUGES {
        if after[index] != 0.0 {
            summary.note(format!("**{} is {} with nobody there**", SERIES[index], after[index]));
        }
    }
    let left: f64 = GAUGES.map(|index| after[index]).sum();
    summary.figure("left", "connections, requests and audit rows left", left, "");
}
