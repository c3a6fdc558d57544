//! The signals of `serve`. SIGTERM and SIGINT stop the server; SIGHUP, SIGUSR1 and SIGUSR2, which end a process
//! that does not listen for them, are ignored with a line.

use std::{
    io,
    time::{Duration, Instant},
};

use switchboard::telemetry;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Stop signals within this time are one stop: Ctrl-C in a terminal, and many a supervisor, signals the process and
/// its parent, which passes the signal on.
const ONE_STOP: Duration = Duration::from_secs(1);

/// Every signal that the server listens for.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user_1: Signal,
    user_2: Signal,
}

impl Signals {
    /// From here on no signal but SIGKILL ends the process by itself.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user_1: signal(SignalKind::user_defined1())?,
            user_2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Waits for the signal that stops the server. From then on another one, a second later or more, ends the
    /// process at once.
    pub(crate) async fn stop(mut self) {
        let first = self.next_stop().await;
        tracing::info!(signal = first, "stopping");
        let since = Instant::now();
        tokio::spawn(async move {
            loop {
                let signal = self.next_stop().await;
                if since.elapsed() >= ONE_STOP {
                    tracing::warn!(signal, "a second signal: ending at once");
                    telemetry::flush();
                    std::process::exit(1);
                }
                tracing::info!(signal, "a signal within a second of the first is the same stop");
            }
        });
    }

    /// The next signal that asks for a stop.
    async fn next_stop(&mut self) -> &'static str {
        loop {
            let signal = tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => "SIGHUP",
                _ = self.user_1.recv() => "SIGUSR1",
                _ = self.user_2.recv() => "SIGUSR2",
            };
            tracing::warn!(signal, "a signal is ignored: SIGTERM and SIGINT stop the server");
        }
    }
}
