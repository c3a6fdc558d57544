//! `compare`: Switchboard beside other WebSocket servers, in one go. `load/compare/run.sh` calls it.
//!
//! All take turns within a round. The bare server and Node's ws answer the same envelope; axum sends back
//! what came. The table is followed by the bars that Switchboard has set itself, and whether they hold.

use std::{path::PathBuf, time::Duration};

use anyhow::ensure;

use crate::{
    bench::{FIRST_CONNECTIONS, idle, measure, messages},
    load::{CONNECTIONS, LoadOption, SETTLE, WARM_UP},
    machine::{self, Machine},
    report::{Column, Rounds, Spread},
    script::Wire,
    server::{MAX_CONNECTIONS, Program, Server, ServerOption},
    timeline::millis,
    workers,
};

const COLUMNS: [Column; 7] = [
    Column::new("CPU a message, 1 in flight", "µs"),
    Column::new("16 in flight", "µs"),
    Column::new("p50 at the same rate", "ms"),
    Column::new("p99", "ms"),
    Column::new("idle connection", "KiB"),
    Column::new("connects/s", "").whole(),
    Column::new("CPU a connect", "µs"),
];
// Of `COLUMNS`.
const ONE: usize = 0;
const MANY: usize = 1;
const IDLE: usize = 4;
const CONNECT: usize = 6;
/// Rows of the table, in the order of the programs.
const BARE: usize = 0;
const JSON: usize = 1;
const PROTOBUF: usize = 2;
const AXUM: usize = 3;

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

/// Rates at which latencies were taken, and the p99 of Switchboard as a multiple of the bare server's.
#[derive(Default)]
struct Rates {
    /// Half of what the weakest can do.
    weakest: Vec<f64>,
    /// Half of what Switchboard can do.
    own: Vec<f64>,
    p99: Vec<f64>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let protobuf = options.server.program()?.speaking("Switchboard, protobuf", Wire::Protobuf);
    let programs = [
        Program::baseline("bare")?.speaking("bare tokio-tungstenite", Wire::Json),
        options.server.program()?.speaking("Switchboard", Wire::Json),
        protobuf,
        Program::other("axum", options.axum.clone(), Vec::new(), Wire::Echo)?,
        Program::other("Node ws", "node".into(), vec![options.ws.clone().into()], Wire::Json)?,
    ];
    let connections = options.connections as usize;
    machine::allow_connections(connections + FIRST_CONNECTIONS)?;
    let machine = Machine::new();
    let names = programs.iter().map(|program| program.name).collect();
    let mut rounds = Rounds::new("one core each", COLUMNS.to_vec(), names).beside_first();
    let mut rates = Rates::default();
    for _ in 0..options.load.rounds {
        let samples = round(&programs, &machine, options.load.duration(), connections, &mut rates)?;
        rounds.push(samples);
    }
    let threads = workers::rounds(&programs[JSON], &Machine::shared(), &options.load)?;
    println!("{rounds}");
    println!("{}", bars(&rounds, &rates, &threads).join("\n"));
    println!(
        "- {} rounds, medians (lowest–highest), ratios within a round; {CONNECTIONS} connections under \
         load, {connections} idle ones; latencies at {:.0} messages/s, half of what the weakest answers \
         with 1 in flight, counted from when each was due",
        options.load.rounds,
        Spread::of(rates.weakest).median
    );
    print!("{machine}");
    Ok(())
}

/// A sample for each program.
fn round(
    programs: &[Program],
    machine: &Machine,
    duration: Duration,
    connections: usize,
    rates: &mut Rates,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut samples = vec![Vec::new(); programs.len()];
    let mut capacities = Vec::new();
    for (program, sample) in programs.iter().zip(&mut samples) {
        let [one, many] = measure(program, machine, |server| messages(server, duration))?;
        sample.extend([one.cpu, many.cpu]);
        capacities.push(one.per_second);
    }
    let weakest = (capacities.iter().copied().fold(f64::INFINITY, f64::min) / 2.0).round();
    for (program, sample) in programs.iter().zip(&mut samples) {
        sample.extend(measure(program, machine, |server| latency(server, weakest, duration))?);
    }
    let own = (capacities[JSON] / 2.0).round();
    let p99 = |program| measure(program, machine, |server| latency(server, own, duration));
    let ([_, bare], [_, switchboard]) = (p99(&programs[BARE])?, p99(&programs[JSON])?);
    eprintln!("p99 at {own} messages/s: Switchboard {switchboard:.2} ms, bare {bare:.2} ms");
    rates.weakest.push(weakest);
    rates.own.push(own);
    // Beside a rate that the bare server did not keep, any time would look good.
    if bare.is_finite() {
        rates.p99.push(switchboard / bare);
    }
    for (program, sample) in programs.iter().zip(&mut samples) {
        let idle = measure(program, machine, |server| idle(server, connections))?;
        sample.extend([idle.kib, idle.per_second, idle.cpu]);
    }
    Ok(samples)
}

/// Half and all but one in a hundred stay below these milliseconds; no bound is known where the rate was
/// too high, as it can be on a busy machine.
fn latency(server: &Server, rate: f64, duration: Duration) -> anyhow::Result<[f64; 2]> {
    let mut client = server.client()?;
    client.open(CONNECTIONS)?;
    client.send_at(rate)?;
    client.go_on(WARM_UP)?;
    client.forget();
    client.go_on(duration)?;
    let overdue = client.overdue();
    if overdue as f64 > rate / 10.0 {
        eprintln!("{}: {overdue} requests could not be sent in time", server.name);
        return Ok([f64::INFINITY; 2]);
    }
    client.run(0, SETTLE)?;
    let latencies = client.tally.overall();
    ensure!(!latencies.is_empty(), "no answer came");
    Ok([millis(&latencies, 0.5), millis(&latencies, 0.99)])
}

/// A line for each bar.
fn bars(rounds: &Rounds, rates: &Rates, threads: &Rounds) -> Vec<String> {
    let ratio = |one, other, column| rounds.ratio(one, other, column);
    let p99 = Spread::of(rates.p99.iter().copied());
    let own = Spread::of(rates.own.iter().copied()).median;
    let half = format!("p99 at half of Switchboard's capacity ({own:.0} messages/s) beside bare");
    vec![
        bar("a message at 1 in flight beside bare", &ratio(JSON, BARE, ONE), "×", 1.2),
        bar("a message at 16 in flight beside bare", &ratio(JSON, BARE, MANY), "×", 1.7),
        bar("a message at 1 in flight beside axum", &ratio(JSON, AXUM, ONE), "×", 1.0),
        bar("protobuf beside JSON, 1 in flight", &ratio(PROTOBUF, JSON, ONE), "×", 1.0),
        bar("protobuf beside JSON, 16 in flight", &ratio(PROTOBUF, JSON, MANY), "×", 1.0),
        bar(&half, &p99, "×", 1.5),
        bar("an idle connection", &rounds.figure(JSON, IDLE), " KiB", 11.0),
        bar("to connect with a token seen before", &rounds.figure(JSON, CONNECT), " µs", 150.0),
        bar("two threads beside one, 1 in flight", &threads.ratio(1, 0, 0), "×", workers::MOST[0]),
        bar("two threads beside one, 16 in flight", &threads.ratio(1, 0, 1), "×", workers::MOST[1]),
    ]
}

fn bar(what: &str, spread: &Spread, unit: &str, most: f64) -> String {
    let verdict = if spread.median <= most {
        "holds".to_owned()
    } else {
        format!("**missed by {:.1} %**", (spread.median / most - 1.0) * 100.0)
    };
    format!("- {what}: {}, at most {most}{unit}: {verdict}", spread.text(2, unit))
}

#[cfg(test)]
mod tests {
    use super::{Spread, bar};

    #[test]
    fn a_bar_is_held_by_the_median_or_missed_by_a_share() {
        let figures = [1.0, 1.3, 1.1];
        assert_eq!(
            bar("a message", &Spread::of(figures), "×", 1.1),
            "- a message: 1.10× (1.00–1.30), at most 1.1×: holds"
        );
        assert!(bar("a message", &Spread::of(figures), "×", 1.0).ends_with("**missed by 10.0 %**"));
    }
}
