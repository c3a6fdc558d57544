//! `churn`: everybody comes at once and everybody leaves at once, as when a proxy restarts.
//!
//! Shows how long the server needs for both, and whether its memory comes back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::{
    machine::{self, Machine, pause},
    server::{MAX_CONNECTIONS, Server, ServerOption},
};

const GAUGE: &str = "ws_connections_active";
const HOLD: Duration = Duration::from_secs(1);
/// How often the gauge is read while connections end.
const POLL: Duration = Duration::from_millis(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for memory to be given back after the last connection: the server looks every five seconds.
const SETTLE: Duration = Duration::from_secs(7);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    /// How often everybody comes and leaves
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Connections
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let program = options.server.program()?;
    let connections = options.connections as usize;
    machine::allow_connections(connections)?;
    let machine = Machine::new();
    let server = program.start(&machine)?;
    // Scraped, as it is in between, and not yet connected to.
    let active = server.metric(GAUGE)?;
    ensure!(active == 0.0, "{GAUGE} is {active} before anybody came");
    let start_kib = server.rss_kib()?;
    println!("| round | opened in | all gone in | RSS while open | RSS afterwards |");
    println!("|---|---|---|---|---|");
    println!("| start | – | – | – | {start_kib:.0} KiB |");
    for number in 1..=options.rounds {
        let failed = || format!("round {number} ({})", server.log());
        let round = round(&server, connections).with_context(failed)?;
        let Round { opened, closed, open_kib, closed_kib } = round;
        println!(
            "| {number} | {opened:.2?} | {closed:.2?} | {open_kib:.0} KiB | {closed_kib:.0} KiB |"
        );
    }
    println!();
    println!("- {connections} connections, closed with a reset");
    print!("{machine}");
    Ok(())
}

struct Round {
    opened: Duration,
    closed: Duration,
    open_kib: f64,
    closed_kib: f64,
}

fn round(server: &Server, connections: usize) -> anyhow::Result<Round> {
    let mut client = server.client()?;
    let start = Instant::now();
    client.open(connections)?;
    let opened = start.elapsed();
    client.hold(HOLD)?;
    let active = server.metric(GAUGE)?;
    ensure!(
        active == connections as f64,
        "{connections} connections are open, {GAUGE} is {active}"
    );
    let open_kib = server.rss_kib()?;
    let start = Instant::now();
    drop(client);
    loop {
        let active = server.metric(GAUGE)?;
        if active == 0.0 {
            break;
        }
        ensure!(start.elapsed() < CLOSE_TIMEOUT, "{GAUGE} is {active} after {CLOSE_TIMEOUT:?}");
        pause(POLL);
    }
    let closed = start.elapsed();
    pause(SETTLE);
    Ok(Round { opened, closed, open_kib, closed_kib: server.rss_kib()? })
}
