//! The way of a log line to stdout: a buffer of bounded size, and a thread that empties it.
//!
//! A reader of stdout may be slow, stuck or gone. Only the thread waits for it: whoever logs copies the
//! line into the buffer, or drops and counts it where the buffer is full.

use std::{
    fs::File,
    io::{self, Write},
    mem,
    os::fd::AsFd,
    sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus::IntCounter;

/// Bytes that wait at most: 15,000 usual lines. As many again may be in the hands of the thread.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// A buffer that a burst made larger is given back.
const KEPT: usize = 64 * 1024;
/// Pause before stdout is tried again, where it was made non-blocking by a process that shares it.
const RETRY: Duration = Duration::from_millis(10);

/// Lines of this process that were lost. A log belongs to a process, so each server shows the same number.
pub(crate) static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
    let help = "Log lines dropped, because nobody read standard output or it could not be written.";
    IntCounter::new("log_lines_dropped_total", help).expect("the name is well formed")
});

static QUEUE: Queue = Queue {
    state: Mutex::new(State { waiting: Vec::new(), refused: 0, writing: false }),
    filled: Condvar::new(),
    emptied: Condvar::new(),
};

struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    emptied: Condvar,
}

struct State {
    /// Whole lines.
    waiting: Vec<u8>,
    /// Lines that found no room since the last batch was taken.
    refused: u64,
    /// Whether the thread holds a batch.
    writing: bool,
}

impl Queue {
    /// No step under this lock waits for anything outside.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + line.len() > MAX_WAITING {
            state.refused += 1;
            drop(state);
            DROPPED.inc();
            return;
        }
        let first = state.waiting.is_empty();
        state.waiting.extend_from_slice(line);
        // The thread takes all that waits: only the first line finds it asleep.
        let wake = first && !state.writing;
        drop(state);
        if wake {
            self.filled.notify_one();
        }
    }

    /// Waits for lines. Swaps them with `batch`, which is empty, and says how many found no room.
    fn take(&self, batch: &mut Vec<u8>) -> u64 {
        let mut state = self.lock();
        state.writing = false;
        if state.waiting.is_empty() {
            self.emptied.notify_all();
        }
        while state.waiting.is_empty() {
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        mem::swap(&mut state.waiting, batch);
        mem::take(&mut state.refused)
    }

    fn flush(&self, limit: Duration) {
        let busy = |state: &mut State| state.writing || !state.waiting.is_empty();
        drop(self.emptied.wait_timeout_while(self.lock(), limit, busy));
    }
}

/// Where the subscriber writes its lines: one `write` is one line.
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until all lines are written, at most for `limit`: a reader may be stuck.
pub(super) fn flush(limit: Duration) {
    QUEUE.flush(limit);
}

/// Starts the thread.
pub(super) fn start() -> io::Result<()> {
    // A file of its own: the lock and the buffer of `io::stdout` would cut lines and copy them.
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    thread::Builder::new().name("log".into()).spawn(move || write_for_ever(stdout))?;
    Ok(())
}

fn write_for_ever(stdout: File) -> ! {
    let mut output = Output { stdout, torn: false };
    let mut batch = Vec::new();
    let mut works = true;
    let mut untold = 0;
    loop {
        untold += QUEUE.take(&mut batch);
        // Told only while writing works: a line that tells of lost lines would be lost as well.
        if works {
            tell(&mut untold);
        }
        let lost = output.write(&batch);
        DROPPED.inc_by(lost);
        untold += lost;
        let worked = mem::replace(&mut works, lost == 0);
        if works && !worked {
            tell(&mut untold);
        }
        batch.clear();
        batch.shrink_to(KEPT);
    }
}

/// Logs how many lines were lost. The buffer was just emptied or shows the gap at its end.
fn tell(untold: &mut u64) {
    if *untold > 0 {
        tracing::warn!(lines = mem::take(untold), "log lines were dropped");
    }
}

struct Output {
    stdout: File,
    /// Whether the last line was written in part.
    torn: bool,
}

impl Output {
    /// Returns how many lines were not written.
    fn write(&mut self, batch: &[u8]) -> u64 {
        if self.torn {
            if !self.write_all(b"\n").is_empty() {
                return lines(batch);
            }
            self.torn = false;
        }
        let rest = self.write_all(batch);
        let written = &batch[..batch.len() - rest.len()];
        self.torn = written.last().is_some_and(|byte| *byte != b'\n');
        lines(rest)
    }

    /// Returns what could not be written: the disk is full, or the reader is gone.
    fn write_all<'a>(&mut self, mut rest: &'a [u8]) -> &'a [u8] {
        while !rest.is_empty() {
            match self.stdout.write(rest) {
                Ok(0) => break,
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::park_timeout(RETRY);
                }
                Err(_) => break,
            }
        }
        rest
    }
}

fn lines(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}
