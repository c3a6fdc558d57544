//! `storm`: everybody is cut off in one moment and reconnects in the next, as when a proxy restarts.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::{
    client::Client,
    load::SETTLE,
    server::MAX_CONNECTIONS,
    summary::{OutputOption, Summary},
    tally::{latencies, nanos},
    target::{TargetOption, allow_connections},
    timeline::{Costs, Timeline},
};

const TIMEOUT: Duration = Duration::from_secs(120);
const STEP: Duration = Duration::from_millis(5);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Connections
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS / 2))]
    connections: u32,
    /// How often they are cut off
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    storms: u32,
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections)?;
    let target = options.target.start_sockets(&[])?;
    let mut client = target.silent_client()?.returning();
    client.open(connections)?;
    let mut client = client.opening(connections, None);
    client.forget();
    let about = Duration::from_secs(3) * options.storms;
    let mut timeline = Timeline::start(&target.probe, about, &[]);
    let costs = Costs::start(&target.probe);
    let mut back = latencies();
    for _ in 0..options.storms {
        back.saturating_record(nanos(storm(&mut client, connections, &mut timeline)?));
        timeline.follow(&mut client, SETTLE)?;
    }
    let (elapsed, own, cpu) = costs.end(&target.probe);

    let mut summary = Summary::new("storm", &target);
    summary.timeline = timeline.finish();
    summary.figure("connections", "connections", connections as f64, "");
    let longest = back.max() as f64 / 1e9;
    summary.figure("back_seconds", "until all are back, at most", longest, "s");
    summary.figure(
        "connects_per_second",
        "connections/s in that storm",
        connections as f64 / longest,
        "",
    );
    let failed: u64 = client.tally.failed.values().sum();
    summary.figure("failed_attempts", "attempts that failed", failed as f64, "");
    if let Some(cpu) = cpu {
        let each = cpu / (f64::from(options.storms) * connections as f64);
        summary.figure(
            "server_micros_per_reconnect",
            "server CPU for each, its end included",
            each,
            "µs",
        );
    }
    summary.latency("from the first packet to auth_ok", &client.tally.connected);
    // The rests between them cost this tool nothing.
    let stormy = back.mean() / 1e9 * f64::from(options.storms);
    summary.judge(&client.tally, own * elapsed.as_secs_f64() / stormy);
    summary.note(format!("{} storms, with a second of rest after each", options.storms));
    options.output.write(&summary)
}

/// Cuts everybody off, and returns how long it took until all were back.
fn storm(
    client: &mut Client,
    connections: usize,
    timeline: &mut Timeline,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    client.cut(connections);
    timeline.point(client);
    while client.ready() < connections {
        client.go_on(STEP)?;
        timeline.step(client);
        let ready = client.ready();
        ensure!(start.elapsed() < TIMEOUT, "{ready} of {connections} are back after {TIMEOUT:?}");
    }
    Ok(start.elapsed())
}
