//! `audit`: what the audit trail costs the server, a change with it beside a change without it.
//!
//! The trail is written after the answer. So the CPU time of a load is read once the trail has come to
//! rest: everything is in the database, and nothing waits in memory or on disk.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::{
    client::Client,
    databases::DatabaseOption,
    load::{CONNECTIONS, LoadOption, SETTLE, WARM_UP},
    machine::Machine,
    mix::{CREATE_AUTHOR, Mix},
    report::{Column, Rounds},
    server::{Server, ServerOption},
};

/// `AUDIT_ENABLED`, and the name of the row.
const TRAILS: [(&str, &str); 2] = [("false", "without a trail"), ("true", "with a trail")];
const BOUND: &str = "≤ 1.15×";
/// Time for the trail to come to rest after a load.
const REST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    #[command(flatten)]
    database: DatabaseOption,
    #[command(flatten)]
    load: LoadOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let program = options.server.program()?;
    let databases = options.database.databases();
    let machine = Machine::new();
    let column = |name| Column::new(name, "µs").bound(BOUND);
    let columns = databases.all.iter().map(|database| column(database.name)).collect();
    let names = TRAILS.map(|(_, name)| name).to_vec();
    let mut table = Rounds::new("server CPU for a CREATE_AUTHOR", columns, names);
    for _ in 0..options.load.rounds {
        let mut samples = vec![Vec::new(); TRAILS.len()];
        for database in &databases.all {
            for ((enabled, trail), sample) in TRAILS.iter().zip(&mut samples) {
                let settings = [
                    ("DATABASE_URL", &*database.url),
                    ("WS_BROADCAST_CHANGES", "false"),
                    ("AUDIT_ENABLED", enabled),
                ];
                let server = program.start_with(&machine, &settings).context(database.name)?;
                let name = format!("{}, {trail}", database.name);
                let cost = cost(&server, &name, *enabled == "true", options.load.duration());
                sample.push(cost.with_context(|| format!("{name} ({})", server.log()))?);
            }
        }
        table.push(samples);
    }
    print!("{table}");
    println!();
    println!(
        "- {} rounds, medians (lowest–highest); ratios are taken within a round",
        options.load.rounds
    );
    println!("- {CONNECTIONS} connections, one request in flight on each");
    println!("- Postgres: {}; its CPU time does not count", databases.postgres);
    print!("{machine}");
    Ok(())
}

/// CPU time for each change, its row of the trail included; what else is of interest goes to stderr.
fn cost(server: &Server, name: &str, trail: bool, duration: Duration) -> anyhow::Result<f64> {
    let rows = || server.metric("audit_logs_written_total");
    let mut client = server.client()?;
    client.ask_for(&Mix::parse(CREATE_AUTHOR)?)?;
    client.open(CONNECTIONS)?;
    client.run(1, WARM_UP)?;
    rest(server, &mut client)?;
    let (rows_before, before, start) = (rows()?, server.cpu_micros()?, Instant::now());
    let mut answers = client.run(1, duration)?;
    let micros = start.elapsed().as_secs_f64() * 1e6;
    answers += rest(server, &mut client)?;
    let cpu = server.cpu_micros()? - before;
    let rows = rows()? - rows_before;
    ensure!(answers > 0, "no answer came");
    // A row that came late may have been written twice, and is one row all the same.
    let complete = if trail { rows >= answers as f64 } else { rows == 0.0 };
    ensure!(complete, "{rows} rows were written of {answers} changes");
    eprintln!(
        "{name}: {:.0} changes/s; {} rows by way of the spool",
        answers as f64 * 1e6 / micros,
        server.metric("audit_logs_spooled_total")?
    );
    Ok(cpu / answers as f64)
}

/// Waits until nothing is left to do; returns the number of answers that were still on their way.
fn rest(server: &Server, client: &mut Client) -> anyhow::Result<u64> {
    let start = Instant::now();
    let mut answers = 0;
    loop {
        answers += client.run(0, SETTLE)?;
        let waiting = server.metric("audit_queue_size")? + server.metric("audit_spool_rows")?;
        if waiting == 0.0 {
            return Ok(answers);
        }
        ensure!(start.elapsed() < REST_TIMEOUT, "{waiting} rows wait after {REST_TIMEOUT:?}");
    }
}
