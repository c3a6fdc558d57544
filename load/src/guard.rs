//! `guard`: what the server costs in figures that hold still, compared with those that were committed and
//! with a frozen base: many small steps must not add up unnoticed.
//!
//! Instructions are counted by valgrind's callgrind. The server has one core and so one thread, but where a
//! message on two threads is compared with one. Each figure is the median of five counts, all of whose messages are answered: a timer or a rare task that falls into
//! one of them does not move it. The kernel's share is in none of them, nor are clock readings, which cost no
//! instruction here.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    bench::{idle, measure, measure_with},
    client::Client,
    fanout::Broadcast,
    http::Endpoint,
    machine::{self, Machine},
    mix::{ECHO, Mix},
    script::{Script, Wire},
    server::{Server, ServerOption, USERS},
    workers,
};

/// The committed figures, one `name value` a line.
const HEADER: &str =
    "# What the server costs; see docs/performance.md. Written by tests/performance.sh --update.\n";
const IDLE: &str = "idle_connection_kib";
/// What an idle connection may come to, whatever was committed.
const MOST_KIB: f64 = 11.0;
const IDLE_CONNECTIONS: usize = 8000;

/// Counts of each thing, and what is in one of them.
const COUNTS: usize = 5;
const MESSAGES: u64 = 2000;
const CONNECTIONS: usize = 100;
const PUSHES: usize = 8;
/// Messages before the first count: what is made for the first is not the cost of any.
const FIRST_MESSAGES: u64 = 1000;
/// For a count; under valgrind everything takes some fifty times as long.
const TIMEOUT: Duration = Duration::from_secs(120);
const TURN: Duration = Duration::from_millis(50);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ServerOption,
    /// The committed figures: a message may cost 2 % more, the others 5 %
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// The frozen figures, which are never written: each may grow by 3 % over all changes, connect by 5 %
    #[arg(long, value_name = "FILE", requires = "baseline")]
    base: Option<PathBuf>,
    /// Write the committed figures anew; what exceeds the frozen ones still fails
    #[arg(long, requires = "baseline")]
    update: bool,
    /// Keep the profiles there, for callgrind_annotate
    #[arg(long, value_name = "FOLDER")]
    profiles: Option<PathBuf>,
}

type Figures = BTreeMap<String, f64>;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    machine::allow_connections(IDLE_CONNECTIONS)?;
    let machine = Machine::new();
    let temporary = tempfile::tempdir()?;
    let folder = options.profiles.as_deref().unwrap_or(temporary.path());
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let profile = folder.join("profile");
    let mut file = OsString::from("--callgrind-out-file=");
    file.push(&profile);
    // Without lines a profile has one row a function, with what was inlined into it.
    let callgrind = ["valgrind", "--tool=callgrind", "--quiet", "--dump-line=no"];
    let callgrind = callgrind.map(OsString::from).into_iter().chain([file]).collect();
    let program = options.server.program()?;
    let mut figures = Figures::new();
    let memory = measure(&program, &machine, |server| idle(server, IDLE_CONNECTIONS))?;
    figures.insert(IDLE.to_owned(), memory.kib);
    let program = program.under(callgrind);
    measure(&program, &machine, |server| instructions(server, &profile, &mut figures))?;
    let threads = [("TOKIO_WORKER_THREADS", "2")];
    measure_with(&program, &machine, &threads, |server| {
        let mut callgrind = Callgrind::of(server, &profile)?;
        messages(server, &mut callgrind, Wire::Json, "_2_threads", &mut figures)
    })?;
    let known = |file: &Option<PathBuf>| file.as_deref().map_or(Ok(Figures::new()), read);
    let (committed, base) = (known(&options.baseline)?, known(&options.base)?);
    print!("{}\n{machine}", table(&figures, &committed, &base));
    let Some(file) = &options.baseline else { return Ok(()) };
    let mut faults = over_base(&figures, &base);
    faults.extend(over_one_thread(&figures));
    if options.update {
        write(file, &figures)?;
    } else {
        faults.extend(over_committed(&figures, &committed));
        for gain in gains(&figures, &committed) {
            eprintln!("{gain}: keep that with tests/performance.sh --update");
        }
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// Counts what each thing costs, on a server that runs under callgrind.
fn instructions(server: &Server, profile: &Path, figures: &mut Figures) -> anyhow::Result<()> {
    let mut callgrind = Callgrind::of(server, profile)?;
    for wire in [Wire::Json, Wire::Protobuf] {
        messages(server, &mut callgrind, wire, "", figures)?;
    }
    let mut client = server.client()?.opening(1, None);
    // Every token is remembered from here on.
    client.open(USERS)?;
    let cost = callgrind.count("connect", || {
        client.open(CONNECTIONS)?;
        Ok(CONNECTIONS as u64)
    })?;
    figures.insert("connect".to_owned(), cost);
    let endpoint = Endpoint::new(server.address);
    let body = r#"{"pkg_id":100,"data":{"text":"a push"}}"#.to_owned();
    let broadcast = Broadcast { endpoint: &endpoint, token: &server.tokens[0], body };
    push(&mut client, &broadcast)?;
    let cost = callgrind.count("push_delivery", || {
        for _ in 0..PUSHES {
            push(&mut client, &broadcast)?;
        }
        Ok((PUSHES * client.ready()) as u64)
    })?;
    figures.insert("push_delivery".to_owned(), cost);
    Ok(())
}

/// Counts what a message costs, at 1 and at 16 in flight; `on` ends the names of the figures.
fn messages(
    server: &Server,
    callgrind: &mut Callgrind,
    wire: Wire,
    on: &str,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let mix = Mix::parse(ECHO)?;
    let script = Script::new(&server.address.to_string(), wire, &server.tokens, &mix)?;
    let mut client = Client::new(vec![server.address], script, mix.parts().len())?;
    client.open(1)?;
    for in_flight in [1, 16] {
        ask(&mut client, in_flight, FIRST_MESSAGES)?;
        let name = format!("message_{}_{in_flight}{on}", wire.name());
        let cost = callgrind.count(&name, || ask(&mut client, in_flight, MESSAGES))?;
        figures.insert(name, cost);
    }
    Ok(())
}

/// Has at least so many messages answered, all that were sent; returns how many.
fn ask(client: &mut Client, in_flight: usize, wanted: u64) -> anyhow::Result<u64> {
    client.forget_answers();
    let end = Instant::now() + TIMEOUT;
    client.run(in_flight, Duration::ZERO)?;
    while client.tally.answers() < wanted {
        client.go_on(TURN)?;
        ensure!(Instant::now() < end, "{wanted} messages are not answered after {TIMEOUT:?}");
    }
    client.run(0, Duration::ZERO)?;
    while client.tally.answers() < client.tally.sent {
        client.go_on(TURN)?;
        ensure!(Instant::now() < end, "the last messages are not answered after {TIMEOUT:?}");
    }
    Ok(client.tally.answers())
}

/// Pushes to everybody, and waits until all have it.
fn push(client: &mut Client, broadcast: &Broadcast<'_>) -> anyhow::Result<()> {
    client.tally.pushes.restart();
    let end = Instant::now() + TIMEOUT;
    broadcast.send()?;
    while client.tally.pushes.count < client.ready() as u64 {
        client.go_on(TURN)?;
        ensure!(Instant::now() < end, "a push is not with everybody after {TIMEOUT:?}");
    }
    Ok(())
}

/// A process that runs under callgrind.
struct Callgrind {
    pid: u32,
    /// Where it writes, with a number behind.
    profile: PathBuf,
    taken: u32,
}

impl Callgrind {
    /// Of a server that was started under it.
    fn of(server: &Server, profile: &Path) -> anyhow::Result<Self> {
        let pid = server.probe.pid.context("the server has no process")?;
        Ok(Self { pid, profile: profile.to_owned(), taken: 0 })
    }

    /// Instructions for each of what `work` does and counts: the median of several counts.
    fn count(
        &mut self,
        name: &str,
        mut work: impl FnMut() -> anyhow::Result<u64>,
    ) -> anyhow::Result<f64> {
        self.take("before")?;
        let mut costs = [0.0; COUNTS];
        for cost in &mut costs {
            let done = work()?;
            *cost = self.take(name)? / done as f64;
        }
        costs.sort_by(f64::total_cmp);
        Ok(costs[COUNTS / 2])
    }

    /// Instructions since this was last called; the profile is kept under `name`.
    fn take(&mut self, name: &str) -> anyhow::Result<f64> {
        let pid = self.pid.to_string();
        let output = Command::new("callgrind_control").args(["--dump", &pid]).output();
        let output = output.context("cannot start callgrind_control, which comes with valgrind")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "callgrind_control failed: {}", said.trim());
        self.taken += 1;
        let written = self.profile.with_extension(self.taken.to_string());
        let text = fs::read_to_string(&written)
            .with_context(|| format!("callgrind has not written {}: {said}", written.display()))?;
        fs::write(self.profile.with_file_name(name), without_open_calls(&text))?;
        fs::remove_file(&written)?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: ")?.parse().ok());
        total.context("a profile without a total")
    }
}

/// Leaves out calls that began before: callgrind_annotate takes what they cost for their callers' own.
fn without_open_calls(profile: &str) -> String {
    let mut lines = profile.lines();
    let mut kept = String::with_capacity(profile.len());
    while let Some(line) = lines.next() {
        if line.starts_with("calls=0 ") {
            lines.next();
        } else {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

fn read(file: &Path) -> anyhow::Result<Figures> {
    let text = fs::read_to_string(file);
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    let figure = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| figure(line).with_context(|| format!("{line}: a name and a value"))).collect()
}

fn write(file: &Path, figures: &Figures) -> anyhow::Result<()> {
    let lines = figures.iter().map(|(name, value)| format!("{name} {}\n", shown(name, *value)));
    let text = HEADER.to_owned() + &lines.collect::<String>();
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn shown(name: &str, value: f64) -> String {
    format!("{value:.*}", if name == IDLE { 2 } else { 0 })
}

/// Share that one change may add to a figure.
fn step(name: &str) -> f64 {
    if name.starts_with("message_") { 0.02 } else { 0.05 }
}

/// Share that all changes together may add to the frozen figure. A connection has more rules to pass
/// than a message, and there are few of them.
fn budget(name: &str) -> f64 {
    if name == "connect" { 0.05 } else { 0.03 }
}

/// `+1.2 %`; nothing where a figure is not known.
fn change(now: f64, known: Option<&f64>) -> String {
    known.map_or("–".to_owned(), |known| format!("{:+.1} %", (now / known - 1.0) * 100.0))
}

fn table(figures: &Figures, committed: &Figures, base: &Figures) -> String {
    let mut table =
        "| | now | committed | change | base | change |\n|---|---|---|---|---|---|\n".to_owned();
    for (name, now) in figures {
        let [committed, base] = [committed, base].map(|known| {
            let known = known.get(name);
            let figure = known.map_or("–".to_owned(), |known| shown(name, *known));
            format!("{figure} | {}", change(*now, known))
        });
        // A string takes what is written to it.
        let _ = writeln!(table, "| {name} | {} | {committed} | {base} |", shown(name, *now));
    }
    table
}

/// What costs more than one change may add. What costs less never is a fault.
fn over_committed(figures: &Figures, committed: &Figures) -> Vec<String> {
    let fault = |(name, now): (&String, &f64)| {
        let (known, now_shown, most) = (committed.get(name), shown(name, *now), step(name) * 100.0);
        let Some(known) = known else {
            return Some(format!("{name} is {now_shown}, and none was committed"));
        };
        let change = change(*now, Some(known));
        let known_shown = shown(name, *known);
        (*now > known * (1.0 + step(name))).then(|| {
            format!("{name} is {now_shown}, {known_shown} was committed ({change}, at most +{most:.0} %)")
        })
    };
    figures.iter().filter_map(fault).collect()
}

/// What costs more than all changes together may add, whatever was committed. A figure that is younger
/// than the base has no budget.
fn over_base(figures: &Figures, base: &Figures) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, now) in figures {
        let (now_shown, most) = (shown(name, *now), budget(name) * 100.0);
        if let Some(known) = base.get(name)
            && *now > known * (1.0 + budget(name))
        {
            let (change, known) = (change(*now, Some(known)), shown(name, *known));
            faults.push(format!(
                "{name} is {now_shown}, {known} is the base ({change}, at most +{most:.0} % over all changes)"
            ));
        }
        if name == IDLE && *now > MOST_KIB {
            faults.push(format!("{name} is {now_shown}, {MOST_KIB} is the most"));
        }
    }
    faults
}

/// A message that costs more on two threads than it may beside one.
fn over_one_thread(figures: &Figures) -> Vec<String> {
    let fault = |(in_flight, most): (u32, f64)| {
        let one = figures.get(&format!("message_json_{in_flight}"))?;
        let name = format!("message_json_{in_flight}_2_threads");
        let ratio = figures.get(&name)? / one;
        (ratio > most)
            .then(|| format!("{name} is {ratio:.2} times that on one thread, {most} is the most"))
    };
    [1, 16].into_iter().zip(workers::MOST).filter_map(fault).collect()
}

/// What costs so much less that it is worth keeping.
fn gains(figures: &Figures, committed: &Figures) -> Vec<String> {
    let gain = |(name, now): (&String, &f64)| {
        let known = committed.get(name)?;
        let change = change(*now, Some(known));
        (*now < known * (1.0 - step(name)))
            .then(|| format!("{name} is {} ({change})", shown(name, *now)))
    };
    figures.iter().filter_map(gain).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        Figures, IDLE, gains, over_base, over_committed, over_one_thread, without_open_calls,
    };

    #[test]
    fn a_call_that_began_before_costs_its_caller_nothing() {
        let profile = "fn=(1) main\ncfn=(2) serve\ncalls=0 29\n360 99\n1 7\ncalls=2 3\n4 5\n";
        let kept = "fn=(1) main\ncfn=(2) serve\n1 7\ncalls=2 3\n4 5\n";
        assert_eq!(without_open_calls(profile), kept);
    }

    fn of(name: &str, value: f64) -> Figures {
        Figures::from([(name.to_owned(), value)])
    }

    /// Faults against the committed figure and against the base, both of which are 100.
    fn faults(name: &str, now: f64) -> [usize; 2] {
        let (now, known) = (of(name, now), of(name, 100.0));
        [over_committed(&now, &known).len(), over_base(&now, &known).len()]
    }

    #[test]
    fn one_change_may_add_a_fiftieth_to_a_message_and_a_twentieth_to_the_others() {
        assert_eq!(faults("message_json_1", 101.9)[0], 0);
        assert_eq!(faults("message_protobuf_16", 102.1)[0], 1);
        for name in ["push_delivery", "connect", IDLE] {
            assert_eq!(faults(name, 104.9)[0], 0, "{name}");
            assert_eq!(faults(name, 105.1)[0], 1, "{name}");
        }
    }

    #[test]
    fn all_changes_together_have_a_budget_of_the_base() {
        for (name, within, over) in [
            ("message_json_1", 102.9, 103.1),
            ("push_delivery", 102.9, 103.1),
            ("connect", 104.9, 105.1),
        ] {
            assert_eq!([faults(name, within)[1], faults(name, over)[1]], [0, 1], "{name}");
        }
    }

    #[test]
    fn a_message_on_two_threads_has_a_bound_beside_one() {
        let faults = |many: f64| {
            let figures = [("message_json_16", 100.0), ("message_json_16_2_threads", many)];
            over_one_thread(&figures.map(|(name, value)| (name.to_owned(), value)).into()).len()
        };
        assert_eq!([faults(114.9), faults(115.1)], [0, 1]);
    }

    #[test]
    fn small_steps_that_were_all_committed_exceed_the_base() {
        let name = "message_json_16";
        let (now, committed, base) = (of(name, 103.5), of(name, 102.0), of(name, 100.0));
        assert!(over_committed(&now, &committed).is_empty());
        let faults = over_base(&now, &base);
        assert!(faults[0].contains("100 is the base (+3.5 %, at most +3 %"), "{faults:?}");
    }

    #[test]
    fn what_costs_less_is_a_hint_and_no_fault() {
        for name in ["message_json_1", "push_delivery", "connect"] {
            assert_eq!(faults(name, 50.0), [0, 0], "{name}");
            assert_eq!(gains(&of(name, 50.0), &of(name, 100.0)).len(), 1, "{name}");
            assert!(gains(&of(name, 99.0), &of(name, 100.0)).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_figure_that_nobody_committed_is_a_fault_and_one_younger_than_the_base_is_none() {
        let now = of("connect", 1.0);
        assert_eq!(over_committed(&now, &Figures::new()).len(), 1);
        assert!(over_base(&now, &Figures::new()).is_empty());
    }

    #[test]
    fn an_idle_connection_has_a_bound_that_nobody_can_commit_away() {
        let faults = |now| over_base(&of(IDLE, now), &of(IDLE, now)).len();
        assert_eq!([faults(11.0), faults(11.2)], [0, 1]);
    }
}
