//! How fast a client takes what waits for it. One that is too slow is closed: it holds memory meanwhile.

use std::time::Instant;

/// Bytes a second.
const LEAST: f64 = 1024.0;

/// What was written when a client began to be waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// The begin of the wait.
    pub(crate) since: Instant,
    written: u64,
}

impl Pace {
    /// `written` counts all bytes of the connection so far.
    pub(crate) fn new(since: Instant, written: u64) -> Self {
        Self { since, written }
    }

    /// Whether fewer bytes were written since then than 1 KiB/s.
    pub(crate) fn is_slow(self, now: Instant, written: u64) -> bool {
        let taken = written.saturating_sub(self.written) as f64;
        taken < now.saturating_duration_since(self.since).as_secs_f64() * LEAST
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_client_that_takes_under_a_kibibyte_a_second_is_slow() {
        let since = Instant::now();
        let pace = Pace::new(since, 500);
        for (millis, taken, slow) in [
            (10_000, 0, true),
            (10_000, 10_239, true),
            (10_000, 10_240, false),
            (300, 1, true),
            (300, 308, false),
            (25_000, 20_000, true),
        ] {
            let now = since + Duration::from_millis(millis);
            assert_eq!(pace.is_slow(now, 500 + taken), slow, "{taken} bytes in {millis} ms");
        }
    }
}
