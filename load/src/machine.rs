//! The machine that a benchmark runs on: its processor, its cores, its limits.

use std::{env, fs, process::Command, thread, time::Duration};

use anyhow::{Context as _, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors for anything but the connections.
const SPARE_FILES: u64 = 200;

/// Which core the server runs on; the client has pinned itself to another.
pub(crate) struct Pinning {
    server: Option<usize>,
    /// For the report.
    pub(crate) note: String,
}

impl Pinning {
    /// Pins this process to one core, where there are two and `taskset` is installed.
    pub(crate) fn new() -> Self {
        let unpinned = |why: &str| Self { server: None, note: format!("not pinned: {why}") };
        let [server, client] = match allowed_cores().as_slice() {
            [server, client, ..] => [*server, *client],
            _ => return unpinned("fewer than two cores are known"),
        };
        let pid = std::process::id().to_string();
        let own = Command::new("taskset").args(["-cp", &client.to_string(), &pid]).output();
        match own {
            Ok(output) if output.status.success() => Self {
                server: Some(server),
                note: format!("server on core {server}, client on core {client}"),
            },
            Ok(_) => unpinned("taskset failed"),
            Err(_) => unpinned("taskset is not on the PATH"),
        }
    }

    /// A command that runs `program` on the server's core, under the process id it is started with.
    pub(crate) fn command(&self, program: &std::path::Path) -> Command {
        let Some(core) = self.server else { return Command::new(program) };
        let mut command = Command::new("taskset");
        command.args(["-c", &core.to_string()]).arg(program);
        command
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
pub(crate) fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, model)| model);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {cores} cores")
}

/// The command that this process was started with.
pub(crate) fn command_line() -> String {
    env::args().collect::<Vec<_>>().join(" ")
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

#[cfg(test)]
mod tests {
    use super::cores;

    #[test]
    fn a_list_of_cores_has_ranges_and_single_ones() {
        assert_eq!(cores("\t0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(cores("7"), [7]);
        assert!(cores("").is_empty());
    }
}
