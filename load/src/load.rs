//! How a load is put on a server, the same in every mode that measures one.

use std::time::Duration;

/// Connections under load.
pub(crate) const CONNECTIONS: usize = 50;
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);
/// Time for a server to finish what it does after its last answer, and for that answer to arrive.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct LoadOption {
    /// How often everything is measured; the table has medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Seconds of load for each figure of a round
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
}

impl LoadOption {
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    let allowed = text.parse().ok().filter(|seconds| (0.1..=7200.0).contains(seconds));
    allowed.ok_or_else(|| "allowed: 0.1 to 7200".to_owned())
}
