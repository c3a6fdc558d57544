//! `compare`: Switchboard beside other WebSocket servers, in one go. `load/compare/run.sh` calls it.
//!
//! All take turns within a round. `bare` and `ws` answer the same envelope; `axum` sends back what came.

use std::{path::PathBuf, time::Duration};

use anyhow::ensure;

use crate::{
    bench::{FIRST_CONNECTIONS, idle, measure, messages},
    load::{CONNECTIONS, LoadOption, SETTLE, WARM_UP},
    machine::{self, Machine},
    report::{Column, Rounds},
    script::Wire,
    server::{MAX_CONNECTIONS, Program, Server, ServerOption},
    timeline::millis,
};

const COLUMNS: [Column; 6] = [
    Column::new("CPU/message, 1 in flight", "µs"),
    Column::new("CPU/message, 16 in flight", "µs"),
    Column::new("p50 at half of the weakest", "ms"),
    Column::new("p99", "ms"),
    Column::new("idle connection", "KiB"),
    Column::new("connects/s", "").whole(),
];

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    /// A server that takes its address as an argument and sends back what comes
    #[arg(long, value_name = "PATH")]
    axum: PathBuf,
    /// A script for Node that takes its address as an argument and answers the envelope
    #[arg(long, value_name = "PATH")]
    ws: PathBuf,
    #[command(flatten)]
    load: LoadOption,
    /// Idle connections
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let programs = [
        options.server.program()?,
        Program::baseline("bare")?,
        Program::other("axum", options.axum.clone(), Vec::new(), Wire::Echo)?,
        Program::other("ws", "node".into(), vec![options.ws.clone().into()], Wire::Json)?,
    ];
    let connections = options.connections as usize;
    machine::allow_connections(connections + FIRST_CONNECTIONS)?;
    let machine = Machine::new();
    let names = programs.iter().map(|program| program.name).collect();
    let mut rounds = Rounds::new("one core each", COLUMNS.to_vec(), names);
    let mut rates = Vec::new();
    for _ in 0..options.load.rounds {
        let duration = options.load.duration();
        let mut samples = vec![Vec::new(); programs.len()];
        let mut weakest = f64::INFINITY;
        for (program, sample) in programs.iter().zip(&mut samples) {
            let [one, many] = measure(program, &machine, |server| messages(server, duration))?;
            sample.extend([one.cpu, many.cpu]);
            weakest = weakest.min(many.per_second);
        }
        let rate = (weakest / 2.0).round();
        rates.push(rate);
        for (program, sample) in programs.iter().zip(&mut samples) {
            sample.extend(measure(program, &machine, |server| latency(server, rate, duration))?);
        }
        for (program, sample) in programs.iter().zip(&mut samples) {
            let idle = measure(program, &machine, |server| idle(server, connections))?;
            sample.extend([idle.kib, idle.per_second]);
        }
        rounds.push(samples);
    }
    rates.sort_by(f64::total_cmp);
    print!("{rounds}");
    println!();
    println!("- {} rounds, medians (lowest–highest)", options.load.rounds);
    println!(
        "- {CONNECTIONS} connections under load, {connections} idle ones; latencies at {:.0} messages/s, \
         counted from when each was due",
        rates[rates.len() / 2]
    );
    print!("{machine}");
    Ok(())
}

/// Half and all but one in a hundred stay below these milliseconds.
fn latency(server: &Server, rate: f64, duration: Duration) -> anyhow::Result<[f64; 2]> {
    let mut client = server.client()?;
    client.open(CONNECTIONS)?;
    client.send_at(rate)?;
    client.go_on(WARM_UP)?;
    client.forget();
    client.go_on(duration)?;
    let overdue = client.overdue();
    ensure!((overdue as f64) < rate / 10.0, "{overdue} requests could not be sent in time");
    client.run(0, SETTLE)?;
    let latencies = client.tally.overall();
    ensure!(!latencies.is_empty(), "no answer came");
    Ok([millis(&latencies, 0.5), millis(&latencies, 0.99)])
}
