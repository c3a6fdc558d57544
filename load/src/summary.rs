//! What a mode has found, as a table, as JSON and as a page.
//!
//! Every mode fills one in; [`page`](crate::page) draws it.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Serialize, Serializer, ser::SerializeMap as _};

use crate::{
    machine, page,
    tally::{Latencies, Reasons, Tally},
    target::Target,
    timeline::{Point, millis},
};

#[derive(clap::Args)]
pub(crate) struct OutputOption {
    /// Write the figures, the latencies and the timeline as JSON (-: to standard output, for the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with plots, which needs nothing but itself
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the plots over time as one picture
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

impl OutputOption {
    /// Prints the summary, and writes the files that were asked for.
    pub(crate) fn write(&self, summary: &Summary) -> anyhow::Result<()> {
        if self.json.as_deref() == Some(Path::new("-")) {
            println!("{}", serde_json::to_string_pretty(summary)?);
        } else {
            print!("{summary}");
        }
        if let Some(file) = self.json.as_ref().filter(|file| *file != Path::new("-")) {
            write(file, &serde_json::to_string_pretty(summary)?)?;
        }
        if let Some(file) = &self.html {
            write(file, &page::page(summary))?;
        }
        if let Some(file) = &self.svg {
            write(file, &page::svg(summary))?;
        }
        Ok(())
    }
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[derive(Serialize)]
pub(crate) struct Summary {
    pub(crate) mode: &'static str,
    pub(crate) at: String,
    pub(crate) command: String,
    pub(crate) machine: String,
    pub(crate) server: String,
    #[serde(serialize_with = "by_key")]
    pub(crate) figures: Vec<Figure>,
    pub(crate) latencies: Vec<Latency>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) returns: Vec<Return>,
    pub(crate) timeline: Vec<Point>,
    /// What the values of `series` in the timeline are.
    #[serde(skip_serializing_if = "<[&str]>::is_empty")]
    pub(crate) series: &'static [&'static str],
    /// What a reader has to know to judge the figures.
    pub(crate) notes: Vec<String>,
}

pub(crate) struct Figure {
    /// Its name in JSON.
    key: &'static str,
    pub(crate) title: &'static str,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    decimals: usize,
}

impl Figure {
    pub(crate) fn text(&self) -> String {
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        format!("{:.*}{unit}", self.decimals, self.value)
    }
}

fn by_key<S: Serializer>(figures: &[Figure], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(figures.len()))?;
    for figure in figures {
        map.serialize_entry(figure.key, &figure.value)?;
    }
    map.end()
}

/// A distribution in milliseconds.
#[derive(Serialize)]
pub(crate) struct Latency {
    pub(crate) of: String,
    pub(crate) count: u64,
    pub(crate) p50_ms: f64,
    pub(crate) p90_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) max_ms: f64,
    /// Share and milliseconds, for the plot.
    pub(crate) curve: Vec<(f64, f64)>,
}

impl Latency {
    fn new(of: String, latencies: &Latencies) -> Self {
        let at = |share| millis(latencies, share);
        // Ten points for each digit of nines, as long as there are values behind them.
        let tails = (0..=60).map(|step| 1.0 - 10_f64.powf(-f64::from(step) / 10.0));
        let seen = |share: &f64| (1.0 - share) * latencies.len() as f64 >= 1.0;
        let curve = tails.take_while(seen).map(|share| (share, at(share))).collect();
        Self {
            of,
            count: latencies.len(),
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: latencies.max() as f64 / 1e6,
            curve,
        }
    }
}

/// Something that has to be back where it was.
#[derive(Serialize)]
pub(crate) struct Return {
    pub(crate) of: String,
    unit: &'static str,
    before: f64,
    after: f64,
    pub(crate) returned: bool,
}

impl Return {
    /// `slack` is the share of what there was by which more is allowed to be left.
    pub(crate) fn new(of: &str, unit: &'static str, before: f64, after: f64, slack: f64) -> Self {
        let returned = after <= before * (1.0 + slack);
        Self { of: of.to_owned(), unit, before, after, returned }
    }

    pub(crate) fn texts(&self) -> [String; 2] {
        let decimals = if self.unit.is_empty() { 0 } else { 2 };
        [self.before, self.after].map(|value| format!("{value:.decimals$}{}", self.unit))
    }

    pub(crate) fn verdict(&self) -> &'static str {
        if self.returned { "yes" } else { "**no**" }
    }
}

impl Summary {
    pub(crate) fn new(mode: &'static str, target: &Target) -> Self {
        Self {
            mode,
            at: machine::date(),
            command: machine::command(),
            machine: target.machine.description(),
            server: target.description(),
            figures: Vec::new(),
            latencies: Vec::new(),
            returns: Vec::new(),
            timeline: Vec::new(),
            series: &[],
            notes: Vec::new(),
        }
    }

    /// Adds a line of the table; the key is its name in JSON.
    pub(crate) fn figure(
        &mut self,
        key: &'static str,
        title: &'static str,
        value: f64,
        unit: &'static str,
    ) {
        let decimals = match unit {
            "µs" | "ms" | "s" | "KiB" | "MiB" | "of a core" | "×" => 2,
            _ => 0,
        };
        self.figures.push(Figure { key, title, value, unit, decimals });
    }

    pub(crate) fn latency(&mut self, of: impl Into<String>, latencies: &Latencies) {
        if !latencies.is_empty() {
            self.latencies.push(Latency::new(of.into(), latencies));
        }
    }

    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// What went wrong, what was a limit of the server's, and what was this tool's.
    pub(crate) fn judge(&mut self, tally: &Tally, own_share: f64) {
        for (what, reasons) in [
            ("answers were no success", &tally.refused),
            ("connections failed", &tally.failed),
            ("connections were lost", &tally.lost),
        ] {
            for (reason, count) in reasons {
                self.note(format!("{count} {what}: {reason}"));
            }
        }
        for limit in limits(&[&tally.refused, &tally.failed, &tally.lost]) {
            self.note(format!("**a limit of the server shaped this result**: {limit}"));
        }
        if tally.unanswered > 0 {
            self.note(format!(
                "{} requests had no answer when their connection ended",
                tally.unanswered
            ));
        }
        if own_share >= 0.9 {
            self.note(format!(
                "**this tool was at its own limit**: it used {own_share:.2} of a core; the server may \
                 be faster than this"
            ));
        }
    }
}

/// The limits that reasons tell of.
fn limits(reasons: &[&Reasons]) -> Vec<&'static str> {
    let known = [
        ("rate_limit_exceeded", "WS_MESSAGE_RATE_LIMIT"),
        ("overloaded", "WS_HANDLER_CONCURRENCY and WS_HANDLER_QUEUE"),
        ("connection_limit", "WS_MAX_CONNECTIONS_PER_USER"),
        ("429", "429: RATE_LIMIT_PER_MINUTE, or AUTH_FAILURES_PER_MINUTE at an upgrade"),
        ("503", "503: WS_MAX_CONNECTIONS, or the server was draining"),
        ("closed it with 1008", "close 1008: WS_MAX_STRIKES, or WS_MAX_CONNECTIONS_PER_USER"),
        ("closed it with 4005", "close 4005: this client read too slowly for WS_SEND_QUEUE"),
    ];
    let seen = |sign: &str| {
        reasons.iter().any(|reasons| reasons.keys().any(|reason| reason.contains(sign)))
    };
    known.iter().filter(|(sign, _)| seen(sign)).map(|(_, limit)| *limit).collect()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| {} | |\n|---|---|", self.mode)?;
        for figure in &self.figures {
            writeln!(f, "| {} | {} |", figure.title, figure.text())?;
        }
        if !self.latencies.is_empty() {
            writeln!(f, "\n| latency, ms | count | p50 | p90 | p99 | p99.9 | max |")?;
            writeln!(f, "|---|---|---|---|---|---|---|")?;
        }
        for Latency { of, count, p50_ms, p90_ms, p99_ms, p999_ms, max_ms, .. } in &self.latencies {
            write!(f, "| {of} | {count} | {p50_ms:.2} | {p90_ms:.2} | {p99_ms:.2} ")?;
            writeln!(f, "| {p999_ms:.2} | {max_ms:.2} |")?;
        }
        if !self.returns.is_empty() {
            writeln!(f, "\n| left behind | before | after | returned |\n|---|---|---|---|")?;
        }
        for each in &self.returns {
            let [before, after] = each.texts();
            writeln!(f, "| {} | {before} | {after} | {} |", each.of, each.verdict())?;
        }
        writeln!(f)?;
        for note in &self.notes {
            writeln!(f, "- {note}")?;
        }
        writeln!(f, "- {}", self.server)?;
        writeln!(f, "- {}\n- {}\n- `{}`", self.machine, self.at, self.command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::count;

    #[test]
    fn a_limit_of_the_server_is_named_by_its_setting() {
        let mut refused = Reasons::new();
        count(&mut refused, "rate_limit_exceeded");
        count(&mut refused, "conflict");
        let mut failed = Reasons::new();
        count(&mut failed, "the upgrade was refused: HTTP/1.1 503 Service Unavailable");
        let limits = limits(&[&refused, &failed]);
        assert_eq!(limits.len(), 2);
        assert_eq!(limits[0], "WS_MESSAGE_RATE_LIMIT");
        assert!(limits[1].contains("WS_MAX_CONNECTIONS"), "{limits:?}");
    }

    #[test]
    fn a_curve_ends_where_no_value_is_left() {
        let mut latencies = crate::tally::latencies();
        for micros in 1..=1000 {
            latencies.record(micros * 1000).unwrap();
        }
        let latency = Latency::new("echo".to_owned(), &latencies);
        let (share, millis) = latency.curve.last().copied().unwrap();
        assert!((0.998..=0.9991).contains(&share), "{share}");
        assert!((0.99..=1.01).contains(&millis), "{millis}");
    }
}
