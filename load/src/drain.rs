//! `drain`: a rolling restart under load, with clients that do as the protocol asks of them.
//!
//! Nodes of its own are restarted one after the other, and the clients find the ones that are up, as a
//! balancer would for them. With `--url` somebody else restarts; this mode counts what it costs.

use std::{thread, time::Duration};

use anyhow::Context as _;

use crate::{
    client::Client,
    load::{SETTLE, seconds},
    machine::Machine,
    mix::Mix,
    script::Script,
    server::{MAX_CONNECTIONS, Program, Server, free_address},
    steady::rate,
    summary::{OutputOption, Summary},
    target::{Target, TargetOption, allow_connections},
    timeline::Timeline,
};

/// Time for a node to let its clients go.
const TIMEOUT: Duration = Duration::from_secs(60);
/// So that a restart does not take longer than need be; `--set DRAIN_SPREAD=10s` for the default.
const SPREAD: (&str, &str) = ("DRAIN_SPREAD", "2s");

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOption,
    /// Connections
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS / 2))]
    connections: u32,
    /// Requests a second over all connections
    #[arg(long, default_value_t = 2000.0, value_parser = rate)]
    rate: f64,
    /// Packages and how often each is called
    #[arg(long, default_value = "100=90,1=9,3=1")]
    mix: String,
    /// Nodes of its own, each of which is restarted
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=16))]
    nodes: u32,
    /// With --url: seconds in which somebody restarts it
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    seconds: f64,
    #[command(flatten)]
    output: OutputOption,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let connections = allow_connections(options.connections * 2)? / 2;
    let mix = Mix::parse(&options.mix).context("--mix")?;
    let target = options.target.start_sockets(&[SPREAD])?;
    let mut nodes = match target.program() {
        Some(program) => Nodes::start(options.nodes, program, &target)?,
        None => Nodes(Vec::new()),
    };
    let addresses = match &nodes.0[..] {
        [] => vec![target.endpoint.address],
        nodes => nodes.iter().map(|node| node.server.address).collect(),
    };
    let script = Script::new(&target.endpoint.host, options.target.wire, &target.tokens, &mix)?;
    let mut client = Client::new(addresses, script, mix.parts().len())?.returning();
    client.open(connections)?;
    client.send_at(options.rate)?;
    let probe = nodes.0.first().map_or(&target.probe, |node| &node.server.probe).clone();
    let duration = Duration::from_secs_f64(options.seconds);
    let mut timeline = Timeline::start(&probe, duration, &[]);
    timeline.follow(&mut client, SETTLE)?;
    if nodes.0.is_empty() {
        timeline.follow(&mut client, duration)?;
    }
    let count = nodes.0.len();
    for node in &mut nodes.0 {
        node.restart(&mut client, &mut timeline, &target)?;
    }
    let overdue = client.overdue();
    client.run(0, SETTLE)?;
    let mut summary = Summary::new("drain", &target);
    summary.timeline = timeline.finish();
    tell(&mut summary, &client, connections, count);
    if overdue > options.rate as u64 / 10 {
        summary.note(format!("{overdue} requests were still waiting for a connection at the end"));
    }
    options.output.write(&summary)
}

fn tell(summary: &mut Summary, client: &Client, connections: usize, restarts: usize) {
    let tally = &client.tally;
    let failed = tally.unanswered + tally.refused.values().sum::<u64>();
    summary.figure("failed", "failed requests", failed as f64, "");
    summary.figure("sent", "requests", tally.sent as f64, "");
    summary.figure("restarts", "restarts", restarts as f64, "");
    summary.figure("connections", "connections", connections as f64, "");
    summary.figure("moved", "connections that were told to move", tally.drains as f64, "");
    let lost: u64 = tally.lost.values().sum();
    summary.figure("lost", "connections lost without a word", lost as f64, "");
    let elsewhere: u64 = tally.failed.values().sum();
    summary.figure("retried", "attempts that a draining node sent on", elsewhere as f64, "");
    summary.latency("all, from when a request was due", &tally.overall());
    for (reason, count) in tally.lost.iter().chain(&tally.refused) {
        summary.note(format!("{count} times: {reason}"));
    }
}

/// A node of the private cluster; without Redis, its clients share nothing but the issuer of tokens.
struct Node<'a> {
    server: Server,
    program: &'a Program,
    settings: Vec<(String, String)>,
}

struct Nodes<'a>(Vec<Node<'a>>);

impl<'a> Nodes<'a> {
    fn start(count: u32, program: &'a Program, target: &Target) -> anyhow::Result<Self> {
        let node = |number| {
            let folder = |name: &str| program.folder().join(name).display().to_string();
            let own = [
                ("DATA_DIR", folder(&format!("node-{number}"))),
                ("DEV_KEY_FILE", folder("dev-key.pem")),
            ];
            let own = own.map(|(name, value)| (name.to_owned(), value));
            let settings = [target.settings.clone(), own.to_vec()].concat();
            let server = start(program, free_address()?, &target.machine, &settings)?;
            Ok(Node { server, program, settings })
        };
        (0..count).map(node).collect::<anyhow::Result<_>>().map(Self)
    }
}

fn start(
    program: &Program,
    address: std::net::SocketAddr,
    machine: &Machine,
    settings: &[(String, String)],
) -> anyhow::Result<Server> {
    let settings: Vec<_> = settings.iter().map(|(name, value)| (&**name, &**value)).collect();
    program.start_at(address, machine, &settings)
}

impl Node<'_> {
    /// Drains it and starts it anew in its place, while the client goes on.
    fn restart(
        &mut self,
        client: &mut Client,
        timeline: &mut Timeline,
        target: &Target,
    ) -> anyhow::Result<()> {
        thread::scope(|scope| {
            let restarting = scope.spawn(|| {
                self.server.drain(TIMEOUT)?;
                let address = self.server.address;
                self.server = start(self.program, address, &target.machine, &self.settings)?;
                anyhow::Ok(())
            });
            while !restarting.is_finished() {
                client.go_on(Duration::from_millis(10))?;
                timeline.step(client);
            }
            restarting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        timeline.follow(client, SETTLE)
    }
}
