//! What the checks found: a line each, and what to change where something is wrong.

use std::fmt;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    /// It works, though perhaps not as meant.
    Warning,
    /// It does not work.
    Fault,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Fault => "fault",
        }
    }
}

#[derive(Debug)]
struct Line {
    verdict: Verdict,
    about: &'static str,
    says: String,
    /// What to change; empty where nothing has to be.
    fix: String,
}

/// The lines, in the order of the checks.
#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// How many faults there are.
    pub fn faults(&self) -> usize {
        self.count(Verdict::Fault)
    }

    pub(super) fn ok(&mut self, about: &'static str, says: impl Into<String>) {
        self.add(Verdict::Ok, about, says.into(), String::new());
    }

    pub(super) fn warning(
        &mut self,
        about: &'static str,
        says: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.add(Verdict::Warning, about, says.into(), fix.into());
    }

    pub(super) fn fault(
        &mut self,
        about: &'static str,
        says: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.add(Verdict::Fault, about, says.into(), fix.into());
    }

    fn add(&mut self, verdict: Verdict, about: &'static str, says: String, fix: String) {
        self.lines.push(Line { verdict, about, says, fix });
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.lines.iter().filter(|line| line.verdict == verdict).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { verdict, about, says, fix } in &self.lines {
            writeln!(f, "{:<7}  {about:<13}  {}", verdict.as_str(), plain(says))?;
            if !fix.is_empty() {
                writeln!(f, "{:24}fix: {}", "", plain(fix))?;
            }
        }
        let (faults, warnings) = (self.faults(), self.count(Verdict::Warning));
        let s = |count| if count == 1 { "" } else { "s" };
        writeln!(f, "{faults} fault{}, {warnings} warning{}", s(faults), s(warnings))
    }
}

/// A text without what could move the cursor of a terminal or begin a line that looks like a verdict:
/// claims and answers of others stand in it.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.trim_end().chars() {
        match c {
            '\n' => plain.push_str("\n                        "),
            c if c.is_control() => plain.extend(c.escape_default()),
            c => plain.push(c),
        }
    }
    plain
}
