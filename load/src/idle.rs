//! `idle`: memory of connections that do nothing, as the server itself gives it.

use std::time::Duration;

use anyhow::Context as _;

use crate::{
    load::seconds,
    server::MAX_CONNECTIONS,
    summary::{OutputOption, Summary},
    target::{TargetOption, allow_connections},
    timeline::{Costs, Timeline},
};

const MEMORY: &str = "process_resident_memory_bytes";
/// What a server makes for its first connections is not the cost of any of them.
const FIRST: usize = 20;
/// Time for what a crowd's arrival has left to be given back: the server looks every five seconds.
const SETTLE: Duration = Duration::from_secs(6);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Connections
    #[arg(long, default_value_t = 8000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS - FIRST as i64))]
    connections: u32,
    /// Seconds for which they are held after memory has come to rest
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    seconds: f64,
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections)?;
    let target = options.target.start_sockets(&[])?;
    let probe = &target.probe;
    let duration = Duration::from_secs_f64(options.seconds);
    let mut client = target.silent_client()?.tolerant();
    let mut timeline = Timeline::start(probe, duration + SETTLE * 2, &[]);
    client.open(FIRST)?;
    timeline.follow(&mut client, SETTLE)?;
    let before = probe.metric(MEMORY).context("its memory is what this mode is about")?;
    client.open(connections)?;
    timeline.follow(&mut client, SETTLE)?;
    let costs = Costs::start(probe);
    timeline.follow(&mut client, duration)?;
    let (elapsed, own, cpu) = costs.end(probe);
    let after = probe.metric(MEMORY)?;

    let mut summary = Summary::new("idle", &target);
    summary.timeline = timeline.finish();
    let open = client.ready().saturating_sub(FIRST).max(1) as f64;
    summary.figure("connections", "idle connections", open, "");
    summary.figure(
        "kib_per_connection",
        "memory for each",
        (after - before) / 1024.0 / open,
        "KiB",
    );
    summary.figure("before_mib", "memory of the server before", before / 1024.0 / 1024.0, "MiB");
    summary.figure("after_mib", "memory of the server with them", after / 1024.0 / 1024.0, "MiB");
    if let Some(cpu) = cpu {
        let share = cpu / 1e6 / elapsed.as_secs_f64();
        summary.figure("server_cpu", "server CPU while they are held", share, "of a core");
    }
    summary.judge(&client.tally, own);
    options.output.write(&summary)
}
