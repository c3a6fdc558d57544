//! The tables of the modes: medians over rounds, and what one row costs beside another.

use std::fmt;

#[derive(Clone)]
pub(crate) struct Column {
    title: &'static str,
    unit: &'static str,
    decimals: usize,
    bound: Option<&'static str>,
}

impl Column {
    pub(crate) const fn new(title: &'static str, unit: &'static str) -> Self {
        Self { title, unit, decimals: 2, bound: None }
    }

    /// For figures so large that fractions say nothing.
    pub(crate) const fn whole(mut self) -> Self {
        self.decimals = 0;
        self
    }

    /// What the figure may come to. A table with bounds has ratios too.
    pub(crate) const fn bound(mut self, bound: &'static str) -> Self {
        self.bound = Some(bound);
        self
    }

    fn unit(&self) -> String {
        if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) }
    }
}

/// What figures of some rounds come to.
pub(crate) struct Spread {
    pub(crate) median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut figures: Vec<_> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        let at = |place: Option<&f64>| place.copied().unwrap_or(f64::NAN);
        Self { median: median(&figures), low: at(figures.first()), high: at(figures.last()) }
    }

    /// `5.25 µs (5.06–5.68)`.
    pub(crate) fn text(&self, decimals: usize, unit: &str) -> String {
        let Self { median, low, high } = self;
        format!("{median:.decimals$}{unit} ({low:.decimals$}–{high:.decimals$})")
    }
}

/// One row's figures of one round, by column.
type Sample = Vec<f64>;

/// The figures of all rounds; the first row is what the others are compared with.
pub(crate) struct Rounds {
    title: &'static str,
    columns: Vec<Column>,
    names: Vec<&'static str>,
    /// By round, then by row.
    samples: Vec<Vec<Sample>>,
    /// Each figure has its ratio to that of the first row beside it.
    beside: bool,
}

impl Rounds {
    pub(crate) fn new(title: &'static str, columns: Vec<Column>, names: Vec<&'static str>) -> Self {
        Self { title, columns, names, samples: Vec::new(), beside: false }
    }

    /// The same with ratios in the cells instead of rows of their own.
    pub(crate) fn beside_first(self) -> Self {
        Self { beside: true, ..self }
    }

    /// Adds a round, a sample for each row, and shows it to whoever waits for the table.
    pub(crate) fn push(&mut self, samples: Vec<Sample>) {
        let round = self.samples.len() + 1;
        for (name, sample) in self.names.iter().zip(&samples) {
            let figure = |(column, figure): (&Column, &f64)| {
                format!("{figure:.*}{}", column.decimals, column.unit())
            };
            let figures = self.columns.iter().zip(sample).map(figure).collect::<Vec<_>>();
            eprintln!("round {round}: {name}: {}", figures.join(", "));
        }
        self.samples.push(samples);
    }

    fn row(
        &self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        cell: impl Fn(usize, &Column) -> String,
    ) -> fmt::Result {
        write!(f, "| {title} |")?;
        for (index, column) in self.columns.iter().enumerate() {
            write!(f, " {} |", cell(index, column))?;
        }
        writeln!(f)
    }

    /// What one row has in a column.
    pub(crate) fn figure(&self, row: usize, column: usize) -> Spread {
        Spread::of(self.samples.iter().map(|round| round[row][column]))
    }

    /// One row's figures in a column as multiples of another's, taken within each round.
    pub(crate) fn ratio(&self, one: usize, other: usize, column: usize) -> Spread {
        let ratio = |round: &Vec<Sample>| round[one][column] / round[other][column];
        Spread::of(self.samples.iter().map(ratio))
    }

    fn ratios(&self, f: &mut fmt::Formatter<'_>, one: usize, other: usize) -> fmt::Result {
        let title = format!("{} / {}", self.names[one], self.names[other]);
        self.row(f, &title, |index, _| self.ratio(one, other, index).text(2, "×"))
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = |cell: fn(&Column) -> &'static str| {
            self.columns.iter().map(cell).collect::<Vec<_>>().join(" | ")
        };
        writeln!(f, "| {} | {} |", self.title, cells(|column| column.title))?;
        writeln!(f, "|---|{}", "---|".repeat(self.columns.len()))?;
        for (row, name) in self.names.iter().enumerate() {
            self.row(f, name, |index, column| {
                let cell = self.figure(row, index).text(column.decimals, &column.unit());
                if !self.beside || row == 0 {
                    return cell;
                }
                format!("{cell}, {:.2}×", self.ratio(row, 0, index).median)
            })?;
        }
        if self.columns.iter().all(|column| column.bound.is_none()) {
            return Ok(());
        }
        for row in 1..self.names.len() {
            self.ratios(f, row, 0)?;
        }
        if self.names.len() > 2 {
            self.ratios(f, 2, 1)?;
        }
        writeln!(f, "| bound | {} |", cells(|column| column.bound.unwrap_or("–")))
    }
}

/// Of figures in order.
fn median(figures: &[f64]) -> f64 {
    if figures.is_empty() {
        return f64::NAN;
    }
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
        let columns = vec![Column::new("message", "µs").bound("≤ 2×")];
        let mut rounds = Rounds::new("CPU", columns, vec!["bare", "switchboard"]);
        rounds.push(vec![vec![1.0], vec![2.0]]);
        rounds.push(vec![vec![10.0], vec![30.0]]);
        let table = rounds.to_string();
        assert!(table.contains("| switchboard / bare | 2.50× (2.00–3.00) |"), "{table}");
        assert!(table.contains("| bare | 5.50 µs (1.00–10.00) |"), "{table}");
        assert!(table.ends_with("| bound | ≤ 2× |\n"), "{table}");
    }

    #[test]
    fn a_ratio_may_stand_beside_its_figure() {
        let columns = vec![Column::new("message", "µs")];
        let mut rounds = Rounds::new("CPU", columns, vec!["bare", "other"]).beside_first();
        rounds.push(vec![vec![1.0], vec![2.0]]);
        let rows = "| bare | 1.00 µs (1.00–1.00) |\n| other | 2.00 µs (2.00–2.00), 2.00× |\n";
        assert!(rounds.to_string().ends_with(rows), "{rounds}");
    }

    #[test]
    fn without_bounds_nothing_is_compared() {
        let columns = vec![Column::new("requests/s", "").whole(), Column::new("p50", "ms")];
        let mut rounds = Rounds::new("database", columns, vec!["SQLite", "Postgres"]);
        rounds.push(vec![vec![1000.4, 1.0], vec![2000.0, 2.0]]);
        let rows = "| SQLite | 1000 (1000–1000) | 1.00 ms (1.00–1.00) |\n\
                    | Postgres | 2000 (2000–2000) | 2.00 ms (2.00–2.00) |\n";
        assert!(rounds.to_string().ends_with(rows), "{rounds}");
    }
}
