//! Load tools for Switchboard: each mode starts the servers it measures and prints a table.
//!
//! In reading order: `steady`, `fanout`, `connect`, `idle`, `storm`, `churn`, `drain`, `soak`, `abuse`,
//! `bench`, `database`, `audit`, `redis` and `guard` are modes. They measure a `target`,
//! which is a `server` of their own or another's, with a `client`: it drives connections (`link`) with the
//! requests (`script`) of a `mix`, and keeps a `tally`. A `timeline` follows it, a `summary` tells the
//! result, also as a `page`. Linux only: most figures come from `/proc`.

mod abuse;
mod audit;
mod bare;
mod bench;
mod churn;
mod client;
mod compare;
mod connect;
mod database;
mod databases;
mod drain;
mod fanout;
mod frame;
mod guard;
mod http;
mod idle;
mod link;
mod load;
mod machine;
mod mix;
mod page;
mod plot;
mod postgres;
mod probe;
mod redis;
mod report;
mod script;
mod sender;
mod server;
mod soak;
mod steady;
mod storm;
mod summary;
mod tally;
mod target;
mod timeline;
mod workers;

use std::{net::SocketAddr, process::ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Asks as soon as it is answered: messages a second
    Throughput(steady::ThroughputOptions),
    /// Asks at a fixed rate: latency, counted from when a request was due
    Latency(steady::LatencyOptions),
    /// Opens connections: how many a second, and what each costs
    Connect(connect::Options),
    /// Holds connections that do nothing: memory of each
    Idle(idle::Options),
    /// Pushes to everybody: time until the last has it, and the cost of a delivery
    Fanout(fanout::Options),
    /// Cuts everybody off at once, and lets them reconnect
    Storm(storm::Options),
    /// Opens many connections at once and closes them at once
    Churn(churn::Options),
    /// Restarts nodes one after the other: requests that fail
    Drain(drain::Options),
    /// All of that for a long time: memory, files and gauges afterwards
    Soak(soak::Options),
    /// Attacks a server with its default limits, beside honest clients: what they and the server notice
    Abuse(abuse::Options),
    /// Compares Switchboard with a bare WebSocket server: CPU a message, memory an idle connection
    Bench(bench::Options),
    /// Compares the CPU a message costs on one worker thread and on two, beside a bare server
    Workers(workers::Options),
    /// Compares Switchboard with other WebSocket servers (load/compare/run.sh)
    Compare(compare::Options),
    /// Measures requests a second and their latency on SQLite and on Postgres
    Database(database::Options),
    /// Compares the CPU a change costs with an audit trail and without
    Audit(audit::Options),
    /// Compares the CPU a message costs a node of a cluster and a server that is alone
    Redis(redis::Options),
    /// Counts instructions and memory, and compares them with those that were committed
    Guard(guard::Options),
    /// The process of an attacker
    #[command(hide = true)]
    Attack(abuse::AttackOptions),
    /// Serves the baseline of messages
    #[command(hide = true)]
    Bare { address: SocketAddr },
    /// Serves the baseline of pushes
    #[command(hide = true)]
    Sender { address: SocketAddr },
}

fn main() -> ExitCode {
    let result = match Cli::parse().mode {
        Mode::Throughput(options) => steady::throughput(&options),
        Mode::Latency(options) => steady::latency(&options),
        Mode::Connect(options) => connect::run(&options),
        Mode::Idle(options) => idle::run(&options),
        Mode::Fanout(options) => fanout::run(&options),
        Mode::Storm(options) => storm::run(&options),
        Mode::Churn(options) => churn::run(&options),
        Mode::Drain(options) => drain::run(&options),
        Mode::Soak(options) => soak::run(&options),
        Mode::Abuse(options) => abuse::run(&options),
        Mode::Attack(options) => abuse::attack(&options),
        Mode::Bench(options) => bench::run(&options),
        Mode::Workers(options) => workers::run(&options),
        Mode::Compare(options) => compare::run(&options),
        Mode::Database(options) => database::run(&options),
        Mode::Audit(options) => audit::run(&options),
        Mode::Redis(options) => redis::run(&options),
        Mode::Guard(options) => guard::run(&options),
        Mode::Bare { address } => bare::serve(address),
        Mode::Sender { address } => sender::serve(address),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
