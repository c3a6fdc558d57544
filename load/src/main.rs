//! Load tools for Switchboard: each mode starts the servers it measures and prints a table.
//!
//! In reading order: `bench`, `churn`, `database`, `audit` and `redis` are modes; `server` runs the programs under
//! test, of which `bare` is the baseline, on `databases`; `client` drives the connections (`link`) with the frames (`frame`) of a
//! `script`. Linux only: the figures come from `/proc`.

mod audit;
mod bare;
mod bench;
mod churn;
mod client;
mod database;
mod databases;
mod frame;
mod link;
mod load;
mod machine;
mod postgres;
mod redis;
mod report;
mod script;
mod server;

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
    /// Compares Switchboard with a bare WebSocket server: CPU a message, memory an idle connection
    Bench(bench::Options),
    /// Opens many connections at once and closes them at once
    Churn(churn::Options),
    /// Measures requests a second and their latency on SQLite and on Postgres
    Database(database::Options),
    /// Compares the CPU a change costs with an audit trail and without
    Audit(audit::Options),
    /// Compares the CPU a message costs a node of a cluster and a server that is alone
    Redis(redis::Options),
    /// Serves the baseline
    #[command(hide = true)]
    Bare { address: SocketAddr },
}

fn main() -> ExitCode {
    let result = match Cli::parse().mode {
        Mode::Bench(options) => bench::run(&options),
        Mode::Churn(options) => churn::run(&options),
        Mode::Database(options) => database::run(&options),
        Mode::Audit(options) => audit::run(&options),
        Mode::Redis(options) => redis::run(&options),
        Mode::Bare { address } => bare::serve(address),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
