//! What an attack did to the server and its honest clients, as a row of a table, and its bounds.

use std::fmt::Write as _;

use serde::Serialize;

use super::attacker::Report;

/// Server CPU for an honest answer, as a multiple of that without an attack.
const MOST_CPU: f64 = 1.5;
const MOST_MIB: f64 = 20.0;
/// Rows of the audit trail in a minute. No attack here takes longer, and its last rows are written when
/// the server ends: all of them are rows of one minute.
const MOST_ROWS: u64 = 100;
/// Reasons that a row has room for.
const REASONS: usize = 4;

/// What the honest clients and the server's process saw for a while.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(super) struct Window {
    pub(super) answers: u64,
    /// Requests that were due and have no good answer.
    pub(super) missed: u64,
    pub(super) p99_ms: f64,
    /// CPU of the server for each honest answer.
    pub(super) micros: f64,
    /// Resident memory, at most.
    pub(super) mib: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) attack: String,
    pub(super) authenticated: bool,
    pub(super) connections: usize,
    pub(super) report: Report,
    /// Just before the attack, and during it.
    pub(super) before: Window,
    pub(super) during: Window,
    pub(super) audit_rows: u64,
    /// The server did not end as it should.
    pub(super) fault: Option<String>,
}

impl Outcome {
    fn ratio(&self) -> f64 {
        self.during.micros / self.before.micros
    }

    fn growth(&self) -> f64 {
        self.during.mib - self.before.mib
    }

    /// What is out of bounds, in words.
    pub(super) fn faults(&self) -> Vec<String> {
        let mut faults: Vec<_> = self.fault.iter().cloned().collect();
        if self.report.attempts + self.report.connects == 0 {
            faults.push("nothing was attempted".to_owned());
        }
        if self.during.missed > 0 {
            faults.push(format!("{} honest answers are missing, allowed: 0", self.during.missed));
        }
        if self.before.missed > 0 {
            faults.push(format!("{} honest answers were missing before it", self.before.missed));
        }
        // A ratio to nothing is none: `NaN` has to fail too.
        if self.ratio().partial_cmp(&MOST_CPU).is_none_or(|order| order.is_gt()) {
            let ratio = self.ratio();
            faults.push(format!("{ratio:.2}x the server CPU for an answer, at most {MOST_CPU}x"));
        }
        if self.growth() > MOST_MIB {
            let growth = self.growth();
            faults.push(format!("{growth:.1} MiB more memory, at most {MOST_MIB:.0} MiB"));
        }
        if self.audit_rows >= MOST_ROWS {
            faults.push(format!("{} audit rows in a minute, under {MOST_ROWS}", self.audit_rows));
        }
        faults
    }

    fn row(&self) -> String {
        let per_second = |count: u64| count as f64 / self.report.seconds.max(f64::MIN_POSITIVE);
        format!(
            "| {} | {} | {:.0} | {:.0} | {} | {:.2} ms ({:.2}) | {:.1} µs, {:.2}× | {:+.1} MiB | {} | {} |",
            self.attack,
            self.connections,
            per_second(self.report.attempts),
            per_second(self.report.connects),
            self.during.missed,
            self.during.p99_ms,
            self.before.p99_ms,
            self.during.micros,
            self.ratio(),
            self.growth(),
            self.audit_rows,
            self.reasons()
        )
    }

    /// The most frequent answers and ends.
    fn reasons(&self) -> String {
        let mut reasons: Vec<_> = self.report.reasons.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let shown = reasons.iter().take(REASONS).map(|(reason, count)| format!("{count} {reason}"));
        let text = shown.collect::<Vec<_>>().join(", ");
        let open = self.report.most_open;
        let separator = if text.is_empty() { "" } else { "; " };
        format!("{text}{separator}{open} open at most")
    }
}

/// The table of the attacks before or after `auth_ok`; empty where there was none.
pub(super) fn table(outcomes: &[Outcome], authenticated: bool) -> String {
    let rows: Vec<_> =
        outcomes.iter().filter(|outcome| outcome.authenticated == authenticated).collect();
    if rows.is_empty() {
        return String::new();
    }
    let title = if authenticated { "after `auth_ok`" } else { "before `auth_ok`" };
    let mut table = format!(
        "| {title} | connections | attempts/s | connects/s | honest answers missed | their p99 (without) \
         | server CPU for each | memory | audit rows a minute | ends and answers of the attack |\n\
         |---|---|---|---|---|---|---|---|---|---|\n"
    );
    for outcome in rows {
        // A string takes what is written to it.
        let _ = writeln!(table, "{}", outcome.row());
    }
    let _ = writeln!(
        table,
        "| bound | | | | 0 | | ≤ {MOST_CPU}× | ≤ +{MOST_MIB:.0} MiB | < {MOST_ROWS} | |\n"
    );
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> Outcome {
        let before = Window { answers: 1000, missed: 0, p99_ms: 1.0, micros: 40.0, mib: 20.0 };
        Outcome {
            attack: "pings".to_owned(),
            authenticated: true,
            connections: 5,
            report: Report { attempts: 10, seconds: 2.0, ..Report::default() },
            before,
            during: Window { micros: 60.0, mib: 40.0, ..before },
            audit_rows: 99,
            fault: None,
        }
    }

    #[test]
    fn an_attack_within_all_bounds_has_no_faults() {
        assert!(outcome().faults().is_empty(), "{:?}", outcome().faults());
    }

    #[test]
    fn each_bound_that_is_missed_is_named() {
        type Spoil = fn(&mut Outcome);
        let spoilt: [(Spoil, &str); 7] = [
            (|outcome| outcome.during.missed = 3, "3 honest answers are missing"),
            (|outcome| outcome.before.missed = 3, "missing before"),
            (|outcome| outcome.during.micros = 60.5, "1.51x the server CPU"),
            (|outcome| outcome.before.micros = f64::NAN, "NaNx the server CPU"),
            (|outcome| outcome.during.mib = 40.1, "20.1 MiB more memory"),
            (|outcome| outcome.audit_rows = 100, "100 audit rows"),
            (|outcome| outcome.report.attempts = 0, "nothing was attempted"),
        ];
        for (spoil, expected) in spoilt {
            let mut outcome = outcome();
            spoil(&mut outcome);
            let faults = outcome.faults();
            assert!(faults.len() == 1 && faults[0].contains(expected), "{expected}: {faults:?}");
        }
    }

    #[test]
    fn a_table_has_the_attacks_of_its_side_alone() {
        let outcomes = [outcome()];
        assert!(table(&outcomes, false).is_empty());
        let table = table(&outcomes, true);
        assert!(
            table.contains("| pings | 5 | 5 | 0 | 0 | 1.00 ms (1.00) | 60.0 µs, 1.50× |"),
            "{table}"
        );
    }
}
