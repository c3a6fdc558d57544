//! A run over time: rate, latency, the server's CPU and memory, in even steps.
//!
//! A thread of its own asks the server, because a scrape waits for its answer and the client must not.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::{client::Client, machine, probe::Probe, tally};

/// Shorter steps would show the kernel's clock ticks, longer ones would hide what happens.
const SHORTEST: Duration = Duration::from_millis(200);
const STEPS: u32 = 60;
/// CPU time of `/metrics` counts whole seconds.
const COARSE: f64 = 5.0;

/// The end of one step, and what happened in it.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Point {
    pub(crate) seconds: f64,
    pub(crate) rate: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) connections: usize,
    /// Of one core.
    pub(crate) server_cpu: Option<f64>,
    pub(crate) server_mib: Option<f64>,
    pub(crate) tool_cpu: f64,
    /// The series that the mode asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) series: Vec<f64>,
}

/// What the server said last.
#[derive(Clone, Default)]
struct Sample {
    at: Option<Instant>,
    cpu_micros: f64,
    bytes: f64,
    series: Vec<f64>,
}

pub(crate) struct Timeline {
    pub(crate) points: Vec<Point>,
    pub(crate) step: Duration,
    start: Instant,
    last: (Instant, Duration),
    coarse: bool,
    before: Sample,
    latest: Arc<Mutex<Sample>>,
    progress: ProgressBar,
    /// Dropped, it ends the thread.
    _stop: Sender<()>,
}

impl Timeline {
    /// Begins one that will last about `duration`; `series` are asked for at each step.
    pub(crate) fn start(
        probe: &Probe,
        duration: Duration,
        series: &'static [&'static str],
    ) -> Self {
        let step = (duration / STEPS).max(SHORTEST);
        let before = sample(probe, series);
        let latest = Arc::new(Mutex::new(before.clone()));
        let (stop, stopped) = mpsc::channel();
        let (shared, asked) = (Arc::clone(&latest), probe.clone());
        let pause = if probe.pid.is_some() && series.is_empty() { step / 2 } else { step };
        thread::spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
                let sample = sample(&asked, series);
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = sample;
            }
        });
        let progress = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
            progress.set_style(style);
        }
        Self {
            points: Vec::new(),
            step,
            start: Instant::now(),
            last: (Instant::now(), machine::own_cpu()),
            coarse: probe.pid.is_none(),
            before,
            latest,
            progress,
            _stop: stop,
        }
    }

    /// Lets the client go on for `duration`, a point each step; ends early when nobody is left.
    pub(crate) fn follow(&mut self, client: &mut Client, duration: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + duration;
        while let Some(left) =
            end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            client.go_on(self.step.min(left))?;
            self.point(client);
            if client.is_deserted() {
                break;
            }
        }
        Ok(())
    }

    /// Ends a step if it has lasted long enough.
    pub(crate) fn step(&mut self, client: &mut Client) {
        if self.last.0.elapsed() >= self.step {
            self.point(client);
        }
    }

    /// Ends a step here.
    pub(crate) fn point(&mut self, client: &mut Client) {
        let (now, cpu) = (Instant::now(), machine::own_cpu());
        let elapsed = (now - self.last.0).as_secs_f64();
        let connections = client.ready();
        let recent = &mut client.tally.recent;
        let (rate, tool_cpu) =
            (recent.len() as f64 / elapsed, (cpu - self.last.1).as_secs_f64() / elapsed);
        let millis = |share| recent.value_at_quantile(share) as f64 / 1e6;
        let mut point = Point {
            seconds: (now - self.start).as_secs_f64(),
            rate,
            p50_ms: millis(0.5),
            p99_ms: millis(0.99),
            connections,
            tool_cpu,
            ..Point::default()
        };
        recent.reset();
        self.last = (now, cpu);
        self.ask(&mut point);
        self.progress.set_message(line(&point));
        self.progress.tick();
        self.points.push(point);
    }

    fn ask(&mut self, point: &mut Point) {
        let sample = self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (Some(at), Some(before)) = (sample.at, self.before.at) else { return };
        point.server_mib = Some(sample.bytes / 1024.0 / 1024.0);
        point.series.clone_from(&sample.series);
        let elapsed = (at - before).as_secs_f64();
        if elapsed > if self.coarse { COARSE } else { 0.0 } {
            let micros = sample.cpu_micros - self.before.cpu_micros;
            point.server_cpu = Some(micros / 1e6 / elapsed);
            self.before = sample;
        }
    }

    /// Ends it; the line on the terminal makes room for the report.
    pub(crate) fn finish(self) -> Vec<Point> {
        self.progress.finish_and_clear();
        self.points
    }
}

fn sample(probe: &Probe, series: &[&'static str]) -> Sample {
    let asked = || -> anyhow::Result<Sample> {
        Ok(Sample {
            at: Some(Instant::now()),
            cpu_micros: probe.cpu_micros()?,
            bytes: probe.resident_bytes()?,
            series: if series.is_empty() {
                Vec::new()
            } else {
                probe.metrics(series.iter().copied())?
            },
        })
    };
    // A server that does not answer leaves a gap in the plot; whether that is a fault, the mode knows.
    asked().unwrap_or_default()
}

fn line(point: &Point) -> String {
    let Point { rate, p50_ms, p99_ms, connections, .. } = point;
    let mut line =
        format!("{connections} connections, {rate:.0}/s, p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms");
    if let (Some(cpu), Some(mib)) = (point.server_cpu, point.server_mib) {
        line += &format!(", server {cpu:.2} of a core, {mib:.1} MiB");
    }
    line
}

/// CPU time of both sides over a run, read at its start and at its end.
pub(crate) struct Costs {
    start: Instant,
    own: Duration,
    server: Option<f64>,
}

impl Costs {
    pub(crate) fn start(probe: &Probe) -> Self {
        Self { start: Instant::now(), own: machine::own_cpu(), server: probe.cpu_micros().ok() }
    }

    /// Wall time, this tool's share of a core, and the server's microseconds.
    pub(crate) fn end(&self, probe: &Probe) -> (Duration, f64, Option<f64>) {
        let elapsed = self.start.elapsed();
        let own = (machine::own_cpu() - self.own).as_secs_f64() / elapsed.as_secs_f64();
        let server = self.server.and_then(|before| Some(probe.cpu_micros().ok()? - before));
        (elapsed, own, server)
    }
}

/// Quantiles of latencies in milliseconds.
pub(crate) fn millis(latencies: &tally::Latencies, share: f64) -> f64 {
    latencies.value_at_quantile(share) as f64 / 1e6
}
