//! A server seen from outside: its CPU time, its memory, its metrics.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, bail, ensure};
use rustix::param::{clock_ticks_per_second, page_size};

use crate::http::Endpoint;

#[derive(Debug, Clone)]
pub(crate) struct Probe {
    /// Of a server on this machine.
    pub(crate) pid: Option<u32>,
    /// Where its metrics are.
    pub(crate) metrics: Option<Endpoint>,
}

impl Probe {
    /// CPU time since it was started, in microseconds; the kernel counts in steps of 10 ms, the metric
    /// in whole seconds.
    pub(crate) fn cpu_micros(&self) -> anyhow::Result<f64> {
        if self.pid.is_none() {
            return Ok(self.metric("process_cpu_seconds_total")? * 1e6);
        }
        let stat = self.proc("stat")?;
        // The name, in parentheses, may hold anything; after it come the state and numbers.
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
        let mut fields = fields.unwrap_or_default().split_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<u64>().ok();
        let (user, system) = ticks().zip(ticks()).context("/proc/PID/stat is not as expected")?;
        Ok((user + system) as f64 * 1e6 / clock_ticks_per_second() as f64)
    }

    /// Resident memory as the server itself gives it; may be off by some pages for each thread.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<f64> {
        if self.pid.is_none() {
            return self.metric("process_resident_memory_bytes");
        }
        let statm = self.proc("statm")?;
        let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
        Ok(pages.context("/proc/PID/statm is not as expected")? as f64 * page_size() as f64)
    }

    /// Resident memory, exactly, which takes the kernel its time.
    pub(crate) fn rss_kib(&self) -> anyhow::Result<f64> {
        let rollup = self.proc("smaps_rollup")?;
        let rss = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
        let rss = rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.parse().ok());
        rss.context("/proc/PID/smaps_rollup is not as expected")
    }

    /// Reads a series, with its labels if it has some, as Prometheus does.
    pub(crate) fn metric(&self, series: &str) -> anyhow::Result<f64> {
        let [value] = self.metrics([series])?[..] else { bail!("{series} has no value") };
        Ok(value)
    }

    /// Reads some with one scrape.
    pub(crate) fn metrics<'a>(
        &self,
        series: impl IntoIterator<Item = &'a str>,
    ) -> anyhow::Result<Vec<f64>> {
        let text = self.scrape()?;
        let value = |series: &str| {
            let mut lines = text.lines();
            let value = lines
                .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse::<f64>().ok());
            value.with_context(|| format!("/metrics has no {series}"))
        };
        series.into_iter().map(value).collect()
    }

    /// Reads all series whose names begin so.
    pub(crate) fn beginning_with(&self, start: &str) -> anyhow::Result<BTreeMap<String, f64>> {
        let text = self.scrape()?;
        let lines = text.lines().filter(|line| line.starts_with(start));
        let series = lines.filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Ok(series.collect())
    }

    fn scrape(&self) -> anyhow::Result<String> {
        let endpoint = self.metrics.as_ref().context("the server's metrics are not known")?;
        endpoint.ask("GET /metrics", None, None)
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let pid = self.pid.context("only a server on this machine can be asked for that")?;
        let path = format!("/proc/{pid}/{file}");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        ensure!(!text.is_empty(), "{path} is empty: the process has ended");
        Ok(text)
    }
}
