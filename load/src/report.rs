//! The table of `bench`.

use std::fmt;

pub(crate) struct Column {
    title: &'static str,
    pub(crate) unit: &'static str,
    bound: &'static str,
}

/// What is measured, and what it may come to.
pub(crate) const COLUMNS: [Column; 4] = [
    Column { title: "message, 1 in flight", unit: "µs", bound: "≤ 1.25×" },
    Column { title: "message, 16 in flight", unit: "µs", bound: "≤ 1.9×" },
    Column { title: "idle connection", unit: "KiB", bound: "≤ 12 KiB" },
    Column { title: "connect and authenticate", unit: "µs", bound: "–" },
];

/// One program's figures of one round, by column.
pub(crate) type Sample = [f64; COLUMNS.len()];

/// The figures of all rounds; the first program is what the others are compared with.
pub(crate) struct Rounds {
    names: Vec<&'static str>,
    /// By round, then by program.
    samples: Vec<Vec<Sample>>,
}

impl Rounds {
    pub(crate) fn new(names: Vec<&'static str>) -> Self {
        Self { names, samples: Vec::new() }
    }

    /// Adds a round: a sample for each program.
    pub(crate) fn push(&mut self, samples: Vec<Sample>) {
        self.samples.push(samples);
    }

    /// A cell for each column: the median, lowest and highest of what `figure` gets from a round.
    fn row(
        &self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        unit: impl Fn(&Column) -> String,
        figure: impl Fn(&[Sample], usize) -> f64,
    ) -> fmt::Result {
        write!(f, "| {title} |")?;
        for (index, column) in COLUMNS.iter().enumerate() {
            let mut figures: Vec<_> =
                self.samples.iter().map(|round| figure(round, index)).collect();
            figures.sort_by(f64::total_cmp);
            if let (Some(lowest), Some(highest)) = (figures.first(), figures.last()) {
                let unit = unit(column);
                write!(f, " {:.2}{unit} ({lowest:.2}–{highest:.2}) |", median(&figures))?;
            }
        }
        writeln!(f)
    }

    fn ratio(&self, f: &mut fmt::Formatter<'_>, one: usize, other: usize) -> fmt::Result {
        let title = format!("{} / {}", self.names[one], self.names[other]);
        self.row(
            f,
            &title,
            |_| "×".into(),
            |round, column| round[one][column] / round[other][column],
        )
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| server CPU, resident memory | {} |", COLUMNS.map(|c| c.title).join(" | "))?;
        writeln!(f, "|---|{}", "---|".repeat(COLUMNS.len()))?;
        for (program, name) in self.names.iter().enumerate() {
            let unit = |column: &Column| format!(" {}", column.unit);
            self.row(f, name, unit, |round, column| round[program][column])?;
        }
        for program in 1..self.names.len() {
            self.ratio(f, program, 0)?;
        }
        if self.names.len() > 2 {
            self.ratio(f, 2, 1)?;
        }
        writeln!(f, "| bound | {} |", COLUMNS.map(|c| c.bound).join(" | "))
    }
}

/// Of figures in order.
fn median(figures: &[f64]) -> f64 {
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 {
        figures[middle]
    } else {
        (figures[middle - 1] + figures[middle]) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut rounds = Rounds::new(vec!["bare", "switchboard"]);
        rounds.push(vec![[1.0; 4], [2.0; 4]]);
        rounds.push(vec![[10.0; 4], [30.0; 4]]);
        let table = rounds.to_string();
        assert!(table.contains("| switchboard / bare | 2.50× (2.00–3.00) |"), "{table}");
        assert!(table.contains("| bare | 5.50 µs (1.00–10.00) |"), "{table}");
    }
}
