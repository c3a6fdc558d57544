//! `bench`: what Switchboard costs beside the bare baseline, and beside another build of itself.
//!
//! The programs take turns within a round, so that a machine that gets slower or faster does so for all
//! of them; ratios are taken within a round. CPU time holds still where wall-clock figures do not, but
//! not quite: on a busy machine (compilers share the caches) Switchboard was seen to cost half as much
//! again, and the baseline as much as ever. The share of a core beside each load tells the two apart
//! only in part: bounds are for a quiet machine.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    machine::{self, Machine},
    report::{COLUMNS, Rounds, Sample},
    server::{MAX_CONNECTIONS, Program, Server, ServerOption},
};

const LOAD_CONNECTIONS: usize = 50;
const WARM_UP: Duration = Duration::from_millis(500);
/// Connections before the idle ones: what a server makes for its first connection is not their cost.
const FIRST_CONNECTIONS: usize = 20;
/// Time for a server to finish what it does after `auth_ok`.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    /// A second build of Switchboard, measured in the same run
    #[arg(long, value_name = "PATH")]
    other: Option<PathBuf>,
    /// How often everything is measured; the table has medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of load for each figure of a round
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// Idle connections; CPU time is counted in steps of 10 ms, too coarse for less than a thousand
    #[arg(long, default_value_t = 8000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
}

fn seconds(text: &str) -> Result<f64, String> {
    let allowed = text.parse().ok().filter(|seconds| (0.1..=600.0).contains(seconds));
    allowed.ok_or_else(|| "allowed: 0.1 to 600".to_owned())
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut programs = vec![Program::bare()?, options.server.program()?];
    if let Some(path) = &options.other {
        programs.push(Program::switchboard("other", path.clone()).context("--other")?);
    }
    let connections = options.connections as usize;
    machine::allow_connections(connections + FIRST_CONNECTIONS)?;
    let machine = Machine::new();
    let mut rounds = Rounds::new(programs.iter().map(|program| program.name).collect());
    for round in 1..=options.rounds {
        let load = Duration::from_secs_f64(options.seconds);
        let mut samples = vec![Sample::default(); programs.len()];
        for (program, sample) in programs.iter().zip(&mut samples) {
            let [one, many] = measure(program, &machine, |server| messages(server, load))?;
            (sample[0], sample[1]) = (one, many);
        }
        for (program, sample) in programs.iter().zip(&mut samples) {
            let [memory, connect] = measure(program, &machine, |server| idle(server, connections))?;
            (sample[2], sample[3]) = (memory, connect);
        }
        for (program, sample) in programs.iter().zip(&samples) {
            let figures = COLUMNS.iter().zip(sample);
            let figures = figures.map(|(column, figure)| format!("{figure:.2} {}", column.unit));
            let figures = figures.collect::<Vec<_>>().join(", ");
            eprintln!("round {round} of {}: {}: {figures}", options.rounds, program.name);
        }
        rounds.push(samples);
    }
    print!("{rounds}");
    println!();
    println!(
        "- {} rounds, medians (lowest–highest); ratios are taken within a round",
        options.rounds
    );
    println!("- {LOAD_CONNECTIONS} connections under load, {connections} idle ones");
    print!("{machine}");
    Ok(())
}

fn measure(
    program: &Program,
    machine: &Machine,
    measurement: impl FnOnce(&Server) -> anyhow::Result<[f64; 2]>,
) -> anyhow::Result<[f64; 2]> {
    let server = program.start(machine)?;
    measurement(&server).with_context(|| format!("{} ({})", program.name, server.log()))
}

/// CPU time for each message, at 1 and at 16 in flight; what else is of interest goes to stderr.
fn messages(server: &Server, duration: Duration) -> anyhow::Result<[f64; 2]> {
    let mut client = server.client()?;
    client.open(LOAD_CONNECTIONS)?;
    let mut load = |in_flight| -> anyhow::Result<f64> {
        client.run(in_flight, WARM_UP)?;
        let (start, before) = (Instant::now(), server.cpu_micros()?);
        let answers = client.run(in_flight, duration)?;
        ensure!(answers > 0, "no answer came");
        let (micros, cpu) = (start.elapsed().as_secs_f64() * 1e6, server.cpu_micros()? - before);
        eprintln!(
            "{}: {in_flight} in flight: {:.0} messages/s with {:.2} of a core",
            server.name,
            answers as f64 * 1e6 / micros,
            cpu / micros
        );
        Ok(cpu / answers as f64)
    };
    Ok([load(1)?, load(16)?])
}

/// Resident memory and CPU time for each connection.
fn idle(server: &Server, connections: usize) -> anyhow::Result<[f64; 2]> {
    let mut client = server.client()?;
    client.open(FIRST_CONNECTIONS)?;
    client.hold(SETTLE)?;
    let (memory, cpu) = (server.rss_kib()?, server.cpu_micros()?);
    client.open(connections)?;
    let cpu = server.cpu_micros()? - cpu;
    client.hold(SETTLE)?;
    let memory = server.rss_kib()? - memory;
    Ok([memory / connections as f64, cpu / connections as f64])
}
