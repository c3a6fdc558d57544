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
    load::{CONNECTIONS, LoadOption, SETTLE, WARM_UP},
    machine::{self, Machine},
    report::{Column, Rounds},
    server::{MAX_CONNECTIONS, Program, Server, ServerOption, USERS},
};

/// What is measured, and what it may come to.
const COLUMNS: [Column; 4] = [
    Column::new("message, 1 in flight", "µs").bound("≤ 1.2×"),
    Column::new("message, 16 in flight", "µs").bound("≤ 1.7×"),
    Column::new("idle connection", "KiB").bound("≤ 11 KiB"),
    Column::new("connect and authenticate", "µs").bound("–"),
];
/// Connections before the idle ones: what a server makes for its first connection is not their cost.
pub(crate) const FIRST_CONNECTIONS: usize = 20;

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    /// A second build of Switchboard, measured in the same run
    #[arg(long, value_name = "PATH")]
    other: Option<PathBuf>,
    #[command(flatten)]
    load: LoadOption,
    /// Idle connections; CPU time is counted in steps of 10 ms, too coarse for less than a thousand
    #[arg(long, default_value_t = 8000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut programs = vec![Program::baseline("bare")?, options.server.program()?];
    if let Some(path) = &options.other {
        programs.push(Program::switchboard("other", path.clone(), USERS).context("--other")?);
    }
    let connections = options.connections as usize;
    machine::allow_connections(connections + FIRST_CONNECTIONS)?;
    let machine = Machine::new();
    let names = programs.iter().map(|program| program.name).collect();
    let mut rounds = Rounds::new("server CPU, resident memory", COLUMNS.to_vec(), names);
    for _ in 0..options.load.rounds {
        let load = options.load.duration();
        let mut samples = vec![Vec::new(); programs.len()];
        for (program, sample) in programs.iter().zip(&mut samples) {
            let messages = measure(program, &machine, |server| messages(server, load))?;
            sample.extend(messages.map(|messages| messages.cpu));
        }
        for (program, sample) in programs.iter().zip(&mut samples) {
            let idle = measure(program, &machine, |server| idle(server, connections))?;
            sample.extend([idle.kib, idle.cpu]);
        }
        rounds.push(samples);
    }
    print!("{rounds}");
    println!();
    println!(
        "- {} rounds, medians (lowest–highest); ratios are taken within a round",
        options.load.rounds
    );
    println!("- {CONNECTIONS} connections under load, {connections} idle ones");
    print!("{machine}");
    Ok(())
}

/// Measures a program that is started for it.
pub(crate) fn measure<T>(
    program: &Program,
    machine: &Machine,
    measurement: impl FnOnce(&Server) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    measure_with(program, machine, &[], measurement)
}

/// The same, with settings.
pub(crate) fn measure_with<T>(
    program: &Program,
    machine: &Machine,
    settings: &[(&str, &str)],
    measurement: impl FnOnce(&Server) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let server = program.start_with(machine, settings)?;
    measurement(&server).with_context(|| format!("{} ({})", program.name, server.log()))
}

/// A closed loop.
pub(crate) struct Messages {
    /// Server CPU for each, in microseconds.
    pub(crate) cpu: f64,
    pub(crate) per_second: f64,
}

/// Messages at 1 and at 16 in flight; what else is of interest goes to stderr.
pub(crate) fn messages(server: &Server, duration: Duration) -> anyhow::Result<[Messages; 2]> {
    let mut client = server.client()?;
    client.open(CONNECTIONS)?;
    let mut load = |in_flight| -> anyhow::Result<Messages> {
        client.run(in_flight, WARM_UP)?;
        let (start, before) = (Instant::now(), server.cpu_micros()?);
        let answers = client.run(in_flight, duration)?;
        ensure!(answers > 0, "no answer came");
        let (micros, cpu) = (start.elapsed().as_secs_f64() * 1e6, server.cpu_micros()? - before);
        let per_second = answers as f64 * 1e6 / micros;
        eprintln!(
            "{}: {in_flight} in flight: {per_second:.0} messages/s with {:.2} of a core",
            server.name,
            cpu / micros
        );
        Ok(Messages { cpu: cpu / answers as f64, per_second })
    };
    Ok([load(1)?, load(16)?])
}

/// Connections that were opened at once and do nothing.
pub(crate) struct Idle {
    /// Resident memory and server CPU for each.
    pub(crate) kib: f64,
    pub(crate) cpu: f64,
    pub(crate) per_second: f64,
}

pub(crate) fn idle(server: &Server, connections: usize) -> anyhow::Result<Idle> {
    let mut client = server.client()?;
    client.open(FIRST_CONNECTIONS)?;
    client.hold(SETTLE)?;
    let (memory, cpu, start) = (server.rss_kib()?, server.cpu_micros()?, Instant::now());
    client.open(connections)?;
    let (cpu, seconds) = (server.cpu_micros()? - cpu, start.elapsed().as_secs_f64());
    client.hold(SETTLE)?;
    let (memory, count) = (server.rss_kib()? - memory, connections as f64);
    Ok(Idle { kib: memory / count, cpu: cpu / count, per_second: count / seconds })
}
