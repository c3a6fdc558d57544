//! `database`: how many requests Switchboard answers a second, and how soon, on each database.
//!
//! The databases take turns within a round. Reads have all their rounds first, while the table is short.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::{
    client::Client,
    databases::{Database, DatabaseOption},
    load::{CONNECTIONS, LoadOption, SETTLE, WARM_UP},
    machine::Machine,
    report::{Column, Rounds},
    script::Package,
    server::{Program, Server, ServerOption},
};

/// Authors in the table while it is read.
const AUTHORS: usize = 10;
const COLUMNS: [Column; 6] = [
    Column::new("GET_AUTHORS, requests/s", "").whole(),
    Column::new("p50", "ms"),
    Column::new("p99", "ms"),
    Column::new("CREATE_AUTHOR, requests/s", "").whole(),
    Column::new("p50", "ms"),
    Column::new("p99", "ms"),
];

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
    let databases = options.database.databases();
    let machine = Machine::new();
    let subject = |database| Subject::start(options.server.program()?, database, &machine);
    let subjects = databases.all.iter().map(subject);
    let mut subjects = subjects.collect::<anyhow::Result<Vec<_>>>()?;
    let reads = rounds(&options.load, &mut subjects, Package::GetAuthors)?;
    let writes = rounds(&options.load, &mut subjects, Package::CreateAuthor)?;
    let names = subjects.iter().map(|subject| subject.name).collect();
    let mut table = Rounds::new("database", COLUMNS.to_vec(), names);
    for (reads, writes) in reads.into_iter().zip(writes) {
        let both = reads.into_iter().zip(writes).map(|(read, write)| [read, write].concat());
        table.push(both.collect());
    }
    print!("{table}");
    println!();
    println!("- {} rounds, medians (lowest–highest)", options.load.rounds);
    println!(
        "- {CONNECTIONS} connections, one request in flight on each; {AUTHORS} authors are read; \
         the audit trail is kept"
    );
    println!("- Postgres: {}", databases.postgres);
    print!("{machine}");
    Ok(())
}

/// A figure for each column of a package, by round and then by database.
fn rounds(
    load: &LoadOption,
    subjects: &mut [Subject],
    package: Package,
) -> anyhow::Result<Vec<Vec<[f64; 3]>>> {
    let round = |round| {
        eprintln!("{package:?}: round {round} of {}", load.rounds);
        subjects.iter_mut().map(|subject| subject.measure(package, load.duration())).collect()
    };
    (1..=load.rounds).map(round).collect()
}

/// Switchboard on a database.
struct Subject {
    name: &'static str,
    client: Client,
    server: Server,
    /// Has the folder, which goes last.
    _program: Program,
}

impl Subject {
    fn start(program: Program, database: &Database, machine: &Machine) -> anyhow::Result<Self> {
        let settings = [("DATABASE_URL", &*database.url), ("WS_BROADCAST_CHANGES", "false")];
        let server = program.start_with(machine, &settings).context(database.name)?;
        let mut first = server.client()?;
        first.ask_for(Package::CreateAuthor);
        first.open(AUTHORS)?;
        // One request on each connection, and no other once that is answered.
        let made = first.run(1, Duration::ZERO)? + first.run(0, SETTLE)?;
        ensure!(made == AUTHORS as u64, "{}: {made} of {AUTHORS} authors are made", database.name);
        let mut client = server.client()?;
        client.open(CONNECTIONS)?;
        Ok(Self { name: database.name, client, server, _program: program })
    }

    /// Requests a second, and the latencies that half and all but one in a hundred stay below.
    fn measure(&mut self, package: Package, duration: Duration) -> anyhow::Result<[f64; 3]> {
        let mut measure = || {
            self.client.ask_for(package);
            self.client.run(1, WARM_UP)?;
            self.client.run(0, SETTLE)?;
            let start = Instant::now();
            let mut latencies = self.client.latencies(duration)?;
            let elapsed = start.elapsed().as_secs_f64();
            ensure!(!latencies.is_empty(), "no answer came");
            latencies.sort_unstable();
            let millis = |share| quantile(&latencies, share).as_secs_f64() * 1e3;
            Ok([latencies.len() as f64 / elapsed, millis(0.5), millis(0.99)])
        };
        measure().with_context(|| format!("{}: {package:?} ({})", self.name, self.server.log()))
    }
}

/// The smallest of sorted durations that this share of them does not exceed.
fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_one_of_the_durations() {
        let sorted: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(quantile(&sorted, 0.5), Duration::from_millis(100));
        assert_eq!(quantile(&sorted, 0.99), Duration::from_millis(198));
        assert_eq!(quantile(&sorted[..1], 0.5), Duration::from_millis(1));
        assert_eq!(quantile(&sorted, 1.0), Duration::from_millis(200));
    }
}
