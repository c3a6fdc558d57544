//! The machine that a benchmark runs on: its processor, its cores, its limits.

use std::{
    env, fmt, fs,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, clock_gettime,
        timerfd_create, timerfd_settime,
    },
};

/// Descriptors for anything but the connections.
const SPARE_FILES: u64 = 200;

/// The machine, for the report, and the server's core on it; the client has pinned itself to another.
pub(crate) struct Machine {
    /// As taskset has them.
    server: Option<String>,
    pinning: String,
    processor: String,
}

impl Machine {
    /// Pins this process to one core, where there are two and `taskset` is installed.
    pub(crate) fn new() -> Self {
        // Asked now: a pinned process sees one core.
        let processor = processor();
        let (server, pinning) = match pin() {
            Ok([server, client]) => {
                let pinning = format!("server on core {server}, client on core {client}");
                (Some(server.to_string()), pinning)
            }
            Err(why) => (None, format!("not pinned: {why}")),
        };
        Self { server, pinning, processor }
    }

    /// Pins this process to one core, and leaves both to the server.
    pub(crate) fn shared() -> Self {
        let processor = processor();
        match pin() {
            Ok([server, client]) => {
                let pinning =
                    format!("server on cores {server} and {client}, client on core {client}");
                Self { server: Some(format!("{server},{client}")), pinning, processor }
            }
            Err(why) => Self { server: None, pinning: format!("not pinned: {why}"), processor },
        }
    }

    /// For a server that runs already, wherever that is.
    pub(crate) fn with_another_server() -> Self {
        Self { server: None, pinning: "not pinned".to_owned(), processor: processor() }
    }

    /// Processor, cores, and who has which.
    pub(crate) fn description(&self) -> String {
        format!("{}; {}", self.processor, self.pinning)
    }

    /// A command that runs `program` on the server's core, under the process id it is started with.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let Some(cores) = &self.server else { return Command::new(program) };
        let mut command = Command::new("taskset");
        command.args(["-c", cores]).arg(program);
        command
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "- {}", self.description())?;
        writeln!(f, "- {}", date())?;
        writeln!(f, "- `{}`", command())
    }
}

/// Now, as reports give it.
pub(crate) fn date() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string()
}

/// What was typed, without passwords.
pub(crate) fn command() -> String {
    let mut command: Vec<_> = env::args().map(without_login).collect();
    if let Some(name) = command.first_mut() {
        "switchboard-load".clone_into(name);
    }
    command.join(" ")
}

/// An argument as it may be shown: a URL may have a password.
fn without_login(argument: String) -> String {
    match (argument.find("://"), argument.rfind('@')) {
        (Some(scheme), Some(login)) if scheme < login => {
            format!("{}***{}", &argument[..scheme + 3], &argument[login..])
        }
        _ => argument,
    }
}

/// Pins this process, and says which cores are the server's and the client's.
fn pin() -> Result<[usize; 2], &'static str> {
    let cores = allowed_cores();
    let [server, client, ..] = cores[..] else { return Err("fewer than two cores are known") };
    let pid = std::process::id().to_string();
    let taskset = Command::new("taskset").args(["-cp", &client.to_string(), &pid]).output();
    match taskset {
        Ok(output) if output.status.success() => Ok([server, client]),
        Ok(_) => Err("taskset failed"),
        Err(_) => Err("taskset is not on the PATH"),
    }
}

/// The cores this process may run on.
fn allowed_cores() -> Vec<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.map(cores).unwrap_or_default()
}

/// Reads the kernel's lists: `0-3,6`.
fn cores(list: &str) -> Vec<usize> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// The processor and the number of its cores.
fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, model)| model);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {cores} cores")
}

/// Makes sure that this process and the servers it starts can open that many sockets each.
pub(crate) fn allow_connections(connections: usize) -> anyhow::Result<()> {
    let needed = connections as u64 + SPARE_FILES;
    let limit = getrlimit(Resource::Nofile);
    // `None` is no limit.
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    ensure!(
        limit.maximum.is_none_or(|maximum| maximum >= needed),
        "{connections} connections need {needed} file descriptors, and the hard limit is {} \
         (ulimit -Hn)",
        limit.maximum.unwrap_or_default()
    );
    setrlimit(Resource::Nofile, Rlimit { current: Some(needed), ..limit })
        .context("cannot raise the limit of file descriptors")
}

/// Waits. Only for servers to start and for gauges to change; clients wait in epoll.
#[expect(clippy::disallowed_methods, reason = "there is no async worker on this thread")]
pub(crate) fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// CPU time of this process.
pub(crate) fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Wakes epoll at fixed times, to the microsecond: its own timeout counts milliseconds.
pub(crate) struct Timer(OwnedFd);

impl Timer {
    /// Every `gap` from now on, within reason.
    pub(crate) fn start(gap: Duration, registry: &Registry, token: Token) -> anyhow::Result<Self> {
        let gap = gap.clamp(Duration::from_micros(50), Duration::from_millis(20));
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let gap = gap.try_into().context("a gap is too long")?;
        let spec = Itimerspec { it_interval: gap, it_value: gap };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)?;
        registry.register(&mut SourceFd(&timer.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Self(timer))
    }

    /// Is called at each event: a timer that is not read does not go on.
    pub(crate) fn go_on(&self) {
        // Nothing is there to be read where two events came as one.
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use mio::{Events, Poll, Token};

    use super::{Timer, cores, without_login};

    #[test]
    fn a_timer_goes_on_for_as_long_as_it_is_told_to() {
        let (mut poll, mut events) = (Poll::new().unwrap(), Events::with_capacity(8));
        let timer = Timer::start(Duration::from_millis(1), poll.registry(), Token(7)).unwrap();
        let (start, mut wakes) = (Instant::now(), 0);
        while wakes < 20 {
            poll.poll(&mut events, Some(Duration::from_secs(1))).unwrap();
            assert!(!events.is_empty(), "it stood still after {wakes}");
            timer.go_on();
            wakes += 1;
        }
        assert!(start.elapsed() >= Duration::from_millis(10), "{:?}", start.elapsed());
    }

    #[test]
    fn a_command_is_shown_without_passwords() {
        let shown = |argument: &str| without_login(argument.to_owned());
        assert_eq!(
            shown("--postgres=postgres://a:b@c@host/name"),
            "--postgres=postgres://***@host/name"
        );
        assert_eq!(shown("postgres://host/name"), "postgres://host/name");
    }

    #[test]
    fn a_list_of_cores_has_ranges_and_single_ones() {
        assert_eq!(cores("\t0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(cores("7"), [7]);
        assert!(cores("").is_empty());
    }
}
