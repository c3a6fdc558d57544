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
        let names = vec!["1 thread", "2 threads"];
        let mut rounds = Rounds::new(program.name, COLUMNS.to_vec(), names);
        for _ in 0..options.load.rounds {
            let mut samples = Vec::new();
            for threads in ["1", "2"] {
                let settings = [("TOKIO_WORKER_THREADS", threads)];
                let load = options.load.duration();
                let costs =
                    measure_with(&program, &machine, &settings, |server| messages(server, load))?;
                samples.push(costs.map(|messages| messages.cpu).to_vec());
            }
            rounds.push(samples);
        }
        println!("{rounds}");
    }
    println!("- server CPU; {} rounds, medians (lowest–highest)", options.load.rounds);
    println!("- {CONNECTIONS} connections");
    print!("{machine}");
    Ok(())
}
