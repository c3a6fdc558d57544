//! `workers`: what a second worker thread adds to the CPU of a message, beside the bare server.
//!
//! Both cores are the server's, and the client takes a part of one. One thread and two take turns within a
//! round; ratios are taken within a round.

use crate::{
    bench::{measure_with, messages},
    load::{CONNECTIONS, LoadOption},
    machine::Machine,
    report::{Column, Rounds},
    server::{Program, ServerOption},
};

const COLUMNS: [Column; 2] = [
    Column::new("message, 1 in flight", "µs").bound("≤ 1.25×"),
    Column::new("message, 16 in flight", "µs").bound("≤ 1.15×"),
];
/// What two threads may cost beside one, at 1 and at 16 in flight.
pub(crate) const MOST: [f64; 2] = [1.25, 1.15];

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    #[command(flatten)]
    load: LoadOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let machine = Machine::shared();
    for program in [Program::baseline("bare")?, options.server.program()?] {
        println!("{}", rounds(&program, &machine, &options.load)?);
    }
    println!("- server CPU; {} rounds, medians (lowest–highest)", options.load.rounds);
    println!("- {CONNECTIONS} connections");
    print!("{machine}");
    Ok(())
}

/// What a message costs a program on one thread and on two, beside one.
pub(crate) fn rounds(
    program: &Program,
    machine: &Machine,
    load: &LoadOption,
) -> anyhow::Result<Rounds> {
    let mut rounds = Rounds::new(program.name, COLUMNS.to_vec(), vec!["1 thread", "2 threads"]);
    for _ in 0..load.rounds {
        let mut samples = Vec::new();
        for threads in ["1", "2"] {
            let settings = [("TOKIO_WORKER_THREADS", threads)];
            let costs = measure_with(program, machine, &settings, |server| {
                messages(server, load.duration())
            })?;
            samples.push(costs.map(|messages| messages.cpu).to_vec());
        }
        rounds.push(samples);
    }
    Ok(rounds)
}
