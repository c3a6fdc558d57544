//! Standard output of commands: the one place that writes to it.

use std::io::{self, Write as _};

use anyhow::Context as _;

/// Writes all of a text. A reader that is gone, as `head` is, has had enough; anything else that goes wrong is an
/// error, such as a full disk.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    done(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
}

/// The same with the end of a line.
pub(crate) fn line(text: impl Into<String>) -> anyhow::Result<()> {
    print(&(text.into() + "\n"))
}

/// Writes what `--help` and `--version` say, with the styles of a terminal.
pub(crate) fn help(said: &clap::Error) -> anyhow::Result<()> {
    done(said.print().and_then(|()| io::stdout().flush()))
}

fn done(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}
