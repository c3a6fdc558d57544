//! `throughput` and `latency`: a steady load on a fixed number of connections.
//!
//! `throughput` asks again as soon as it is answered: what the server can do. `latency` asks at fixed
//! times, and counts from the time at which a request was due, not from when it could be sent: a server
//! that stands still for a second has made everybody wait who would have come in it.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::{
    client::Client,
    load::{SETTLE, seconds},
    mix::Mix,
    script::{MAX_IN_FLIGHT, Wire},
    server::MAX_CONNECTIONS,
    summary::{OutputOption, Summary},
    target::{Target, TargetOption, allow_connections},
    timeline::{Costs, Timeline},
};

#[derive(clap::Args)]
pub(crate) struct SteadyOption {
    #[command(flatten)]
    target: TargetOption,
    /// Connections
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    seconds: f64,
    /// Seconds of the same load before that
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    warm_up: f64,
    /// Packages and how often each is called: 100=90,1=9,3=1 [default: 100, over REST 1]
    #[arg(long)]
    mix: Option<String>,
    /// What a package of the mix is given; ######## stands for eight digits that are never the same
    #[arg(long, value_name = "PKG=JSON")]
    data: Vec<String>,
    #[command(flatten)]
    output: OutputOption,
}

#[derive(clap::Args)]
pub(crate) struct ThroughputOptions {
    #[command(flatten)]
    steady: SteadyOption,
    /// Requests in flight on each connection [default: 16, over REST 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_IN_FLIGHT as i64))]
    in_flight: Option<u32>,
}

#[derive(clap::Args)]
pub(crate) struct LatencyOptions {
    #[command(flatten)]
    steady: SteadyOption,
    /// Requests a second over all connections
    #[arg(long, default_value_t = 5000.0, value_parser = rate)]
    rate: f64,
}

pub(crate) fn rate(text: &str) -> Result<f64, String> {
    let allowed = text.parse().ok().filter(|rate| (0.1..=1e6).contains(rate));
    allowed.ok_or_else(|| "allowed: 0.1 to 1000000".to_owned())
}

/// How requests are paced.
enum Load {
    InFlight(usize),
    Rate(f64),
}

pub(crate) fn throughput(options: &ThroughputOptions) -> anyhow::Result<()> {
    let rest = options.steady.target.wire == Wire::Rest;
    let in_flight = options.in_flight.unwrap_or(if rest { 1 } else { 16 }) as usize;
    ensure!(!rest || in_flight == 1, "over REST a connection has one request in flight");
    run("throughput", &options.steady, &Load::InFlight(in_flight))
}

pub(crate) fn latency(options: &LatencyOptions) -> anyhow::Result<()> {
    run("latency", &options.steady, &Load::Rate(options.rate))
}

fn run(mode: &'static str, options: &SteadyOption, load: &Load) -> anyhow::Result<()> {
    let default = if options.target.wire == Wire::Rest { "1" } else { "100" };
    let mix = Mix::parse(options.mix.as_deref().unwrap_or(default)).context("--mix")?;
    let mix = mix.with_data(&options.data).context("--data")?;
    let connections = allow_connections(options.connections)?;
    let target = options.target.start(&[("WS_BROADCAST_CHANGES", "false")])?;
    let mut client = target.client(&mix)?.tolerant();
    client.open(connections)?;
    ensure!(client.ready() > 0, "no connection came to be: {:?}", client.tally.failed.keys());
    let mut summary = Summary::new(mode, &target);
    measure(&mut summary, &target, &mut client, options, load)?;
    describe(&mut summary, &client, &mix);
    options.output.write(&summary)
}

fn measure(
    summary: &mut Summary,
    target: &Target,
    client: &mut Client,
    options: &SteadyOption,
    load: &Load,
) -> anyhow::Result<()> {
    let begin = |client: &mut Client, warm_up| match load {
        Load::InFlight(in_flight) => client.run(*in_flight, warm_up).map(drop),
        Load::Rate(rate) => {
            client.send_at(*rate)?;
            client.go_on(warm_up).map(drop)
        }
    };
    begin(client, Duration::from_secs_f64(options.warm_up))?;
    client.forget_answers();
    if let Load::Rate(rate) = load {
        client.send_at(*rate)?;
    }
    let duration = Duration::from_secs_f64(options.seconds);
    let costs = Costs::start(&target.probe);
    let mut timeline = Timeline::start(&target.probe, duration, &[]);
    timeline.follow(client, duration)?;
    let (elapsed, own, cpu) = costs.end(&target.probe);
    let seconds = elapsed.as_secs_f64();
    let (answers, overdue) = (client.tally.answers(), client.overdue());
    if let Load::Rate(rate) = load {
        // Those under way count as well, or the slowest would be left out.
        client.run(0, SETTLE)?;
        summary.figure("rate_wanted", "requests/s that were due", *rate, "");
    }
    summary.timeline = timeline.finish();
    summary.figure("messages_per_second", "answers/s", answers as f64 / seconds, "");
    if let Some(cpu) = cpu.filter(|_| answers > 0) {
        summary.figure("server_cpu", "server CPU", cpu / 1e6 / seconds, "of a core");
        let each = cpu / answers as f64;
        summary.figure("server_micros_per_message", "server CPU for an answer", each, "µs");
    }
    summary.figure("tool_cpu", "CPU of this tool", own, "of a core");
    summary.figure("connections", "connections at the end", client.ready() as f64, "");
    summary.figure("seconds", "measured", seconds, "s");
    // Those of the last moment would have been sent in the next.
    if overdue > 10 && overdue > client.tally.sent / 50 {
        summary.note(format!(
            "**the rate was too high**: {overdue} requests that were due were not sent by the end, \
             because no connection had room; they are not among the latencies"
        ));
    }
    summary.judge(&client.tally, own);
    if client.is_deserted() {
        summary.note("**nobody was left** at the end");
    }
    if let Load::InFlight(in_flight) = load {
        summary.note(format!("{in_flight} requests in flight on each connection"));
    }
    Ok(())
}

/// The latencies of each package, where there is more than one.
fn describe(summary: &mut Summary, client: &Client, mix: &Mix) {
    for (part, latencies) in mix.parts().iter().zip(&client.tally.answered) {
        summary.latency(format!("package {}", part.package), latencies);
    }
    if mix.parts().len() > 1 {
        summary.latency("all", &client.tally.overall());
    }
}
