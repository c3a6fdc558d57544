//! `connect`: how many connections a second are accepted, upgraded and authenticated.

use std::{num::NonZeroU32, time::Duration};

use crate::{
    client::OPENING,
    server::MAX_CONNECTIONS,
    steady::rate,
    summary::{OutputOption, Summary},
    target::{TargetOption, allow_connections},
    timeline::{Costs, Timeline},
};

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Connections, which stay open until the end
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
    /// Connections a second [default: as fast as they come]
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Connections on their way at once
    #[arg(long, value_name = "N", default_value_t = NonZeroU32::new(OPENING as u32).expect("it is not 0"))]
    at_once: NonZeroU32,
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections)?;
    let target = options.target.start_sockets(&[])?;
    let client = target.silent_client()?.tolerant();
    let mut client = client.opening(options.at_once.get() as usize, options.rate);
    let about = options.rate.map_or(1.0, |rate| connections as f64 / rate);
    let mut timeline = Timeline::start(&target.probe, Duration::from_secs_f64(about), &[]);
    let costs = Costs::start(&target.probe);
    client.open_watched(connections, |client| timeline.step(client))?;
    let (elapsed, own, cpu) = costs.end(&target.probe);
    timeline.point(&mut client);

    let mut summary = Summary::new("connect", &target);
    summary.timeline = timeline.finish();
    let open = client.tally.connected.len() as f64;
    let seconds = elapsed.as_secs_f64();
    summary.figure("connections", "connections", open, "");
    summary.figure("connects_per_second", "connections/s", open / seconds, "");
    if let Some(cpu) = cpu.filter(|_| open > 0.0) {
        summary.figure("server_micros_per_connect", "server CPU for each", cpu / open, "µs");
        summary.figure("server_cpu", "server CPU", cpu / 1e6 / seconds, "of a core");
    }
    summary.figure("tool_cpu", "CPU of this tool", own, "of a core");
    summary.latency("from the first packet to auth_ok", &client.tally.connected);
    summary.judge(&client.tally, own);
    let tokens = target.tokens.len();
    summary.note(format!(
        "{tokens} users: a server that remembers tokens checks the signature of each once \
         (--set TOKEN_CACHE_SIZE=0: every time)"
    ));
    options.output.write(&summary)
}
