//! `fanout`: one push to everybody, and what each delivery costs beside one bare `send`.

use std::{
    io::Write as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    client::Client,
    frame,
    http::Endpoint,
    load::SETTLE,
    machine::Machine,
    server::{MAX_CONNECTIONS, Program},
    summary::{OutputOption, Summary},
    tally::{Latencies, latencies, nanos},
    target::{TargetOption, allow_connections},
    timeline::{Costs, Timeline, millis},
};

const TIMEOUT: Duration = Duration::from_secs(30);
/// Between pushes, so that one has ended before the next begins.
const PAUSE: Duration = Duration::from_millis(50);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Connections that each push goes to
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    connections: u32,
    /// Pushes of a round; CPU time is counted in steps of 10 ms, too coarse for one
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pushes: u32,
    /// How often server and baseline take turns
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Bytes of text in a push
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=900_000))]
    bytes: u32,
    #[command(flatten)]
    output: OutputOption,
}

/// What pushes have come to.
struct Pushed {
    /// From the request to the last delivery.
    last: Latencies,
    /// From the first delivery to the last.
    spread: Latencies,
    deliveries: u64,
    bytes: usize,
    cpu_micros: Option<f64>,
    /// This tool's share of a core at most.
    own: f64,
}

impl Pushed {
    fn new() -> Self {
        let (last, spread) = (latencies(), latencies());
        Self { last, spread, deliveries: 0, bytes: 0, cpu_micros: Some(0.0), own: 0.0 }
    }

    /// Sends one push by `send`, beside the client, and waits until every connection has it.
    fn push(
        &mut self,
        client: &mut Client,
        send: impl FnOnce() -> anyhow::Result<()> + Send,
    ) -> anyhow::Result<()> {
        client.tally.pushes.restart();
        let everyone = client.ready() as u64;
        let start = Instant::now();
        thread::scope(|scope| {
            let sending = scope.spawn(send);
            while client.tally.pushes.count < everyone {
                client.hold(Duration::from_millis(1))?;
                let count = client.tally.pushes.count;
                ensure!(
                    start.elapsed() < TIMEOUT,
                    "{count} of {everyone} have a push in {TIMEOUT:?}"
                );
                if sending.is_finished() && count == 0 && start.elapsed() > SETTLE {
                    break;
                }
            }
            sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let pushes = &client.tally.pushes;
        let (first, last) = pushes.first.zip(pushes.last).context("no push came")?;
        self.last.saturating_record(nanos(last - start));
        self.spread.saturating_record(nanos(last - first));
        self.deliveries += pushes.count;
        self.bytes = pushes.payload.len();
        client.hold(PAUSE)
    }

    /// Adds what the pushes of a round have cost.
    fn costs(&mut self, own: f64, cpu_micros: Option<f64>) {
        self.cpu_micros = self.cpu_micros.zip(cpu_micros).map(|(sum, more)| sum + more);
        self.own = self.own.max(own);
    }

    /// CPU for each delivery.
    fn cost(&self) -> Option<f64> {
        Some(self.cpu_micros? / self.deliveries as f64)
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections)?;
    let target = options.target.start_sockets(&[])?;
    let text = "x".repeat(options.bytes as usize);
    let body = serde_json::json!({ "pkg_id": 100, "data": { "text": text } }).to_string();
    let broadcast = Broadcast { endpoint: &target.endpoint, token: &target.tokens[0], body };
    let mut summary = Summary::new("fanout", &target);
    let (mut server, mut bare) = (Pushed::new(), Pushed::new());
    let about = Duration::from_secs(4) * options.rounds;
    let mut timeline = Timeline::start(&target.probe, about, &[]);
    for _ in 0..options.rounds {
        let mut client = target.silent_client()?;
        client.open(connections)?;
        timeline.point(&mut client);
        let costs = Costs::start(&target.probe);
        for _ in 0..options.pushes {
            server.push(&mut client, || broadcast.send())?;
            timeline.step(&mut client);
        }
        client.hold(SETTLE)?;
        let (_, own, cpu) = costs.end(&target.probe);
        server.costs(own, cpu);
        let payload = client.tally.pushes.payload.clone();
        drop(client);
        baseline(&mut bare, &payload, connections, options.pushes, &target.machine)?;
    }
    summary.timeline = timeline.finish();
    tell(&mut summary, &server, &bare);
    summary.note(format!(
        "{} rounds of {} pushes to {connections} connections, the baseline after each",
        options.rounds, options.pushes
    ));
    options.output.write(&summary)
}

/// The same pushes by bare `send`s.
fn baseline(
    bare: &mut Pushed,
    payload: &[u8],
    connections: usize,
    pushes: u32,
    machine: &Machine,
) -> anyhow::Result<()> {
    let program = Program::baseline("sender")?;
    let mut server = program.start(machine)?;
    let mut client = server.client()?;
    client.open(connections)?;
    let frame = frame::of_server(frame::TEXT, payload);
    let mut input = server.take_input().context("the baseline has no input")?;
    let costs = Costs::start(&server.probe);
    for _ in 0..pushes {
        bare.push(&mut client, || {
            input.write_all(&(frame.len() as u32).to_be_bytes())?;
            Ok(input.write_all(&frame)?)
        })?;
    }
    let (_, own, cpu) = costs.end(&server.probe);
    bare.costs(own, cpu);
    Ok(())
}

fn tell(summary: &mut Summary, server: &Pushed, bare: &Pushed) {
    summary.figure("bytes", "bytes of a push", server.bytes as f64, "");
    let median = |latencies| millis(latencies, 0.5);
    summary.figure("last_ms", "from the request to the last delivery", median(&server.last), "ms");
    summary.figure(
        "spread_ms",
        "from the first to the last delivery",
        median(&server.spread),
        "ms",
    );
    let each = server.deliveries as f64 / server.last.len() as f64;
    let rate = each * 1e3 / median(&server.last);
    summary.figure("deliveries_per_second", "deliveries/s", rate, "");
    summary.figure("bare_last_ms", "the same by bare `send`s", median(&bare.last), "ms");
    if let (Some(server), Some(bare)) = (server.cost(), bare.cost()) {
        summary.figure("server_micros_per_delivery", "server CPU for a delivery", server, "µs");
        summary.figure("bare_micros_per_delivery", "CPU of one bare `send`", bare, "µs");
        summary.figure("ratio", "server / bare", server / bare, "×");
    }
    summary.latency("a push to its last delivery", &server.last);
    summary.latency("the same by bare sends", &bare.last);
    if server.own >= 0.9 {
        summary.note(format!(
            "**this tool was at its own limit**: it used {:.2} of a core while pushes came in",
            server.own
        ));
    }
}

/// An administrator's push.
pub(crate) struct Broadcast<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) token: &'a str,
    pub(crate) body: String,
}

impl Broadcast<'_> {
    pub(crate) fn send(&self) -> anyhow::Result<()> {
        let sent = self.endpoint.ask("POST /admin/broadcast", Some(self.token), Some(&self.body));
        sent.map(drop).context("a push needs a token with the role `admin`")
    }
}
