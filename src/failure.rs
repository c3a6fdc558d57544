//! What the process says when an error ends it: one line, in the form that its log has.

use anyhow::Error;
use switchboard::{
    config::{ConfigErrors, Sources},
    telemetry,
};

/// The error as a line; faults of the configuration are a line each. `serve` are the settings of a server,
/// whose log may be JSON: then so are its last words.
pub(crate) fn lines(error: &Error, serve: Option<&Sources>) -> String {
    let texts = match error.downcast_ref::<ConfigErrors>() {
        Some(faults) => faults.faults().to_vec(),
        None => vec![causes(error)],
    };
    let Some(sources) = serve.filter(|sources| telemetry::is_json(sources.log_format())) else {
        return texts.join("\n");
    };
    let line =
        |text: &String| telemetry::error_line("ended by an error", text, sources.environment());
    texts.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// An error and its causes, on one line. A cause that is told already is left out: many libraries put it
/// into their own text, and name it as the cause too.
fn causes(error: &Error) -> String {
    let mut said = String::new();
    for cause in error.chain() {
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if said.contains(&text) {
            continue;
        }
        if !said.is_empty() {
            said += ": ";
        }
        said += &text;
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once_and_on_one_line() {
        let refused = Error::msg("connection refused\n  by the peer");
        let error =
            refused.context("io error: connection refused by the peer").context("cannot open");
        assert_eq!(causes(&error), "cannot open: io error: connection refused by the peer");
        let error = Error::msg("no such file").context("cannot open");
        assert_eq!(causes(&error), "cannot open: no such file");
    }
}
