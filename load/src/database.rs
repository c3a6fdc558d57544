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
    mix::{CREATE_AUTHOR, GET_AUTHORS, Mix},
    report::{Column, Rounds},
    server::{Program, Server, ServerOption},
    timeline::millis,
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
    let reads = rounds(&options.load, &mut subjects, GET_AUTHORS)?;
    let writes = rounds(&options.load, &mut subjects, CREATE_AUTHOR)?;
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
    mix: &str,
) -> anyhow::Result<Vec<Vec<[f64; 3]>>> {
    let round = |round| {
        eprintln!("package {mix}: round {round} of {}", load.rounds);
        subjects.iter_mut().map(|subject| subject.measure(mix, load.duration())).collect()
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
        first.ask_for(&Mix::parse(CREATE_AUTHOR)?)?;
        first.open(AUTHORS)?;
        // One request on each connection, and no other once that is answered.
        let made = first.run(1, Duration::ZERO)? + first.run(0, SETTLE)?;
        ensure!(made == AUTHORS as u64, "{}: {made} of {AUTHORS} authors are made", database.name);
        let mut client = server.client()?;
        client.open(CONNECTIONS)?;
        Ok(Self { name: database.name, client, server, _program: program })
    }

    /// Requests a second, and the latencies that half and all but one in a hundred stay below.
    fn measure(&mut self, mix: &str, duration: Duration) -> anyhow::Result<[f64; 3]> {
        let mut measure = || {
            self.client.ask_for(&Mix::parse(mix)?)?;
            self.client.run(1, WARM_UP)?;
            self.client.run(0, SETTLE)?;
            self.client.forget();
            let start = Instant::now();
            let answers = self.client.run(1, duration)?;
            let elapsed = start.elapsed().as_secs_f64();
            ensure!(answers > 0, "no answer came");
            let latencies = self.client.tally.overall();
            Ok([answers as f64 / elapsed, millis(&latencies, 0.5), millis(&latencies, 0.99)])
        };
        measure().with_context(|| format!("{}: package {mix} ({})", self.name, self.server.log()))
    }
}
