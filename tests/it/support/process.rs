//! The real binary: run to its end, or serving until it is told to stop.

use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread::{JoinHandle, sleep, spawn},
    time::{Duration, Instant},
};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);

/// The binary with nothing of this process's environment but `PATH`.
pub(crate) fn switchboard(args: &[&str], environment: &[(&str, &str)]) -> Command {
    program(env!("CARGO_BIN_EXE_switchboard"), args, environment)
}

/// The same of another binary.
pub(crate) fn program(path: &str, args: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(path);
    command.args(args).env_clear().envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end.
pub(crate) fn run(args: &[&str], environment: &[(&str, &str)]) -> Ran {
    finish(switchboard(args, environment).spawn().unwrap())
}

/// Waits for a command to end by itself. What goes elsewhere than into a pipe of its own is empty.
pub(crate) fn finish(mut child: Child) -> Ran {
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        spawn(move || {
            let mut text = String::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_string(&mut text).unwrap();
            }
            text
        })
    };
    let stdout = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let code = wait(&mut child);
    Ran { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// The exit code; none after a signal.
#[expect(
    clippy::disallowed_methods,
    reason = "a process is waited for; there is nothing to be polled"
)]
fn wait(child: &mut Child) -> Option<i32> {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        sleep(Duration::from_millis(10));
    }
    drop(child.kill());
    panic!("the process did not end");
}

/// A token of the development issuer whose key is in `data`.
pub(crate) fn token(data: &Path, more: &[&str]) -> String {
    let args = [&["token"], more].concat();
    let ran = run(&args, &[("DATA_DIR", data.to_str().unwrap())]);
    assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
    ran.stdout.trim_end().to_owned()
}

/// A command that serves on a free port.
pub(crate) fn serve(binary: &str, data: &Path, environment: &[(&str, &str)]) -> Command {
    let all = [
        &[
            ("LISTEN_ADDR", "127.0.0.1:0"),
            ("DATA_DIR", data.to_str().unwrap()),
            ("DRAIN_DELAY", "0"),
            ("METRICS_RATE_LIMIT", "0"),
            ("AUDIT_LOGINS", "false"),
            ("DRAIN_GRACE", "100ms"),
        ],
        environment,
    ]
    .concat();
    program(binary, &["serve"], &all)
}

/// A serving binary. It is killed when the test is over.
pub(crate) struct Process {
    child: Child,
    pub(crate) addr: SocketAddr,
    /// From the start to the last line of it.
    pub(crate) took: Duration,
    first: Vec<String>,
    lines: Option<JoinHandle<Vec<String>>>,
    errors: Option<JoinHandle<String>>,
}

impl Process {
    /// Starts it on a free port, logging JSON, and waits until it is ready.
    pub(crate) fn start(data: &Path, environment: &[(&str, &str)]) -> Self {
        Self::ready(Self::spawn(data, environment), Instant::now())
    }

    /// Starts it without waiting.
    pub(crate) fn spawn(data: &Path, environment: &[(&str, &str)]) -> Child {
        Self::spawn_of(env!("CARGO_BIN_EXE_switchboard"), data, environment)
    }

    /// The same of another binary.
    pub(crate) fn spawn_of(binary: &str, data: &Path, environment: &[(&str, &str)]) -> Child {
        serve(binary, data, environment).spawn().unwrap()
    }

    /// Waits until it is ready.
    pub(crate) fn ready(mut child: Child, started: Instant) -> Self {
        let mut stderr = child.stderr.take().unwrap();
        let errors = spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        // `listening` comes last; the previous release says `ready` last.
        let (mut addr, mut is_ready, mut first) = (None, false, Vec::new());
        while addr.is_none() || !is_ready {
            let Some(line) = lines.next() else {
                panic!("it ended: {first:?} {}", errors.join().unwrap())
            };
            first.push(line.clone());
            let Ok(line) = serde_json::from_str::<Value>(&line) else { continue };
            if line["message"] == "listening" {
                addr = Some(line["address"].as_str().unwrap().parse().unwrap());
            }
            is_ready |= line["message"] == "ready";
        }
        let took = started.elapsed();
        let lines = Some(spawn(move || lines.collect()));
        Self { child, addr: addr.unwrap(), took, first, lines, errors: Some(errors) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// Waits for its end; what it wrote is all that it ever wrote.
    pub(crate) fn end(mut self) -> Ran {
        let code = wait(&mut self.child);
        let mut lines = std::mem::take(&mut self.first);
        lines.extend(self.lines.take().unwrap().join().unwrap());
        Ran { code, stdout: lines.join("\n"), stderr: self.errors.take().unwrap().join().unwrap() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
