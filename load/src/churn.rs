//! `churn`: everybody comes at once and everybody leaves at once.
//!
//! Shows how long the server needs for both, and whether its memory comes back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::{
    client::Client,
    machine::pause,
    server::MAX_CONNECTIONS,
    summary::{OutputOption, Summary},
    target::{Target, TargetOption, allow_connections},
    timeline::Timeline,
};

const GAUGE: &str = "ws_connections_active";
const MEMORY: &str = "process_resident_memory_bytes";
const HOLD: Duration = Duration::from_secs(1);
/// How often the gauge is read while connections end.
const POLL: Duration = Duration::from_millis(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for memory to be given back after the last connection: the server looks every five seconds.
const SETTLE: Duration = Duration::from_secs(7);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// How often everybody comes and leaves
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Connections
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections)?;
    let target = options.target.start_sockets(&[])?;
    // Scraped, as it is in between, and not yet connected to.
    let active = target.probe.metric(GAUGE)?;
    ensure!(active == 0.0, "{GAUGE} is {active} before anybody came");
    let mib = || anyhow::Ok(target.probe.metric(MEMORY)? / 1024.0 / 1024.0);
    let mut summary = Summary::new("churn", &target);
    summary.figure("connections", "connections, closed with a reset", connections as f64, "");
    summary.figure("before_mib", "memory before the first", mib()?, "MiB");
    let about = (HOLD + SETTLE * 2) * options.rounds;
    let mut timeline = Timeline::start(&target.probe, about, &[]);
    let mut worst = Round::default();
    for number in 1..=options.rounds {
        let failed = || format!("round {number} ({})", target.log());
        let round = round(&target, connections, &mut timeline).with_context(failed)?;
        worst.opened = worst.opened.max(round.opened);
        worst.closed = worst.closed.max(round.closed);
        worst.open_mib = worst.open_mib.max(round.open_mib);
        summary.note(format!(
            "round {number}: opened in {:.2?}, all gone in {:.2?}, {:.1} MiB open, {:.1} MiB afterwards",
            round.opened,
            round.closed,
            round.open_mib,
            mib()?
        ));
    }
    summary.timeline = timeline.finish();
    summary.figure("opened_seconds", "opened, at most", worst.opened.as_secs_f64(), "s");
    summary.figure("closed_seconds", "all gone, at most", worst.closed.as_secs_f64(), "s");
    summary.figure("open_mib", "memory with all", worst.open_mib, "MiB");
    summary.figure("after_mib", "memory after the last round", mib()?, "MiB");
    options.output.write(&summary)
}

#[derive(Default)]
struct Round {
    opened: Duration,
    closed: Duration,
    open_mib: f64,
}

fn round(target: &Target, connections: usize, timeline: &mut Timeline) -> anyhow::Result<Round> {
    let mut client = target.silent_client()?;
    let start = Instant::now();
    client.open_watched(connections, |client| timeline.step(client))?;
    let opened = start.elapsed();
    timeline.follow(&mut client, HOLD)?;
    let active = target.probe.metric(GAUGE)?;
    ensure!(
        active == connections as f64,
        "{connections} connections are open, {GAUGE} is {active}"
    );
    let open_mib = target.probe.metric(MEMORY)? / 1024.0 / 1024.0;
    let start = Instant::now();
    client.cut(connections);
    while target.probe.metric(GAUGE)? > 0.0 {
        ensure!(start.elapsed() < CLOSE_TIMEOUT, "some are there after {CLOSE_TIMEOUT:?}");
        pause(POLL);
        timeline.step(&mut client);
    }
    let closed = start.elapsed();
    rest(&mut client, timeline)?;
    Ok(Round { opened, closed, open_mib })
}

fn rest(client: &mut Client, timeline: &mut Timeline) -> anyhow::Result<()> {
    let end = Instant::now() + SETTLE;
    while Instant::now() < end {
        client.hold(Duration::from_millis(100))?;
        timeline.step(client);
    }
    Ok(())
}
