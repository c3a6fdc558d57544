//! A segment: one file of the spool, appended at its end, read from its front, deleted when it is through.
//!
//! A line is `crc32 SP json LF`. The process that owns a segment holds the lock of its file; the kernel
//! gives it back when the process dies, however it dies.

use std::{
    borrow::Cow,
    collections::VecDeque,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use uuid::Uuid;

/// Of the names of segments.
pub(super) const ENDING: &str = "spool";
/// Bytes read at once.
const BUFFER: usize = 64 << 10;

pub(super) struct Segment {
    path: PathBuf,
    /// Open, and locked, as long as the segment is ours.
    file: File,
    /// The end of the last whole append.
    len: u64,
    /// The beginning of the first row that waits.
    confirmed: u64,
    /// Rows that wait.
    rows: u64,
    /// Where the rows end that were read and are not confirmed.
    read: VecDeque<u64>,
    /// Damage before this offset is known already.
    seen: u64,
    /// Instead of being deleted, for the damage in it.
    set_aside: bool,
}

/// What was found damaged.
#[derive(Default)]
pub(super) struct Damage {
    pub(super) lines: u64,
    /// The lines as they were found, each ended.
    pub(super) text: Vec<u8>,
}

impl Segment {
    /// Makes an empty one. Names sort in the order of making.
    pub(super) fn create(folder: &Path) -> io::Result<Self> {
        loop {
            let path = folder.join(format!("{}.{ENDING}", Uuid::now_v7()));
            let mut options = OpenOptions::new();
            let options = options.read(true).append(true).create_new(true).mode(0o600);
            let file = options.open(&path)?;
            // Until it is locked, another process may adopt the file, and delete it as empty.
            if own(&file)? {
                return Ok(Self::new(path, file));
            }
        }
    }

    /// Takes over a file, unless it is another's, or gone meanwhile, or empty, which deletes it.
    pub(super) fn adopt(path: PathBuf) -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).append(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if !own(&file)? {
            return Ok(None);
        }
        let mut segment = Self::new(path, file);
        let mut reader = BufReader::with_capacity(BUFFER, &segment.file);
        loop {
            match reader.skip_until(b'\n')? {
                0 => break,
                line => segment.len += line as u64,
            }
            segment.rows += 1;
        }
        if segment.is_finished() {
            segment.remove()?;
            return Ok(None);
        }
        Ok(Some(segment))
    }

    fn new(path: PathBuf, file: File) -> Self {
        let read = VecDeque::new();
        Self { path, file, len: 0, confirmed: 0, rows: 0, read, seen: 0, set_aside: false }
    }

    /// Adds lines, all or none.
    pub(super) fn append(&mut self, lines: &str, rows: usize) -> io::Result<()> {
        write_whole(&mut self.file, lines.as_bytes(), self.len)?;
        self.len += lines.len() as u64;
        self.rows += rows as u64;
        Ok(())
    }

    /// Reads on after what [`Self::confirm`] has put behind us, until there are so many rows.
    ///
    /// Damage that was not seen before is added to `damage`, also in case of an error.
    pub(super) fn read(
        &mut self,
        rows: &mut Vec<String>,
        max_rows: usize,
        damage: &mut Damage,
    ) -> io::Result<()> {
        let mut at = self.confirmed;
        (&self.file).seek(SeekFrom::Start(at))?;
        let mut reader = BufReader::with_capacity(BUFFER, (&self.file).take(self.len - at));
        let mut line = Vec::new();
        while rows.len() < max_rows && at < self.len {
            line.clear();
            match reader.read_until(b'\n', &mut line)? {
                // Somebody has cut the file: the rest counts as one damaged line.
                0 => at = self.len,
                read => at += read as u64,
            }
            if let Some(row) = decode(&line) {
                rows.push(row);
                self.read.push_back(at);
                continue;
            }
            // It goes with the row before it.
            *self.read.back_mut().unwrap_or(&mut self.confirmed) = at;
            if at > self.seen {
                self.seen = at;
                self.rows = self.rows.saturating_sub(1);
                damage.add(&line);
            }
        }
        Ok(())
    }

    /// Forgets what was read and not confirmed.
    pub(super) fn rewind(&mut self) {
        self.read.clear();
    }

    /// Puts the first of the rows that were read behind us, at most so many; returns how many.
    pub(super) fn confirm(&mut self, max_rows: usize) -> usize {
        let rows = max_rows.min(self.read.len());
        if let Some(end) = self.read.drain(..rows).next_back() {
            self.confirmed = end;
        }
        self.rows = self.rows.saturating_sub(rows as u64);
        rows
    }

    /// Deletes the file, or takes it out of the way. The lock is still held: nobody adopts it meanwhile.
    pub(super) fn remove(&self) -> io::Result<()> {
        let removed = if self.set_aside {
            fs::rename(&self.path, self.path.with_extension("damaged"))
        } else {
            fs::remove_file(&self.path)
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Has the file kept in the end.
    pub(super) fn set_aside(&mut self) {
        self.set_aside = true;
    }

    /// The file still has a name, without which a crash would take what is added to it.
    pub(super) fn is_there(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.nlink() > 0)
    }

    /// No row waits.
    pub(super) fn is_finished(&self) -> bool {
        self.confirmed == self.len
    }

    /// Bytes on disk.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Rows that wait.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }
}

impl Drop for Segment {
    /// Gives the lock back at once. Closing the file would not, while a child process that is being made
    /// still has a copy of it.
    fn drop(&mut self) {
        drop(self.file.unlock());
    }
}

impl Damage {
    fn add(&mut self, line: &[u8]) {
        self.lines += 1;
        self.text.extend_from_slice(line);
        if !line.ends_with(b"\n") {
            self.text.push(b'\n');
        }
    }
}

/// Locks a file, unless another has it, or has deleted it while we had it open and not yet locked.
fn own(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        // Only who holds the lock deletes a segment: this answer stays true.
        Ok(()) => Ok(file.metadata()?.nlink() > 0),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Adds text to a file of `len` bytes, down to the disk, or else cuts it back.
pub(super) fn write_whole(file: &mut File, text: &[u8], len: u64) -> io::Result<()> {
    let written = file.write_all(text).and_then(|()| file.sync_data());
    if written.is_err() {
        // If this fails too, half a line stays, which its checksum gives away.
        drop(file.set_len(len));
    }
    written
}

/// A row as a line.
pub(super) fn encode(row: &str) -> String {
    let row = one_line(row);
    format!("{} {row}\n", checksum(&row))
}

/// JSON on one line: the raw value in a row may have a client's line breaks, but only between tokens.
pub(super) fn one_line(json: &str) -> Cow<'_, str> {
    if json.contains('\n') { json.replace('\n', " ").into() } else { json.into() }
}

/// The row in a line, if it is whole. One that lacks nothing but its line break is.
fn decode(line: &[u8]) -> Option<String> {
    let line = std::str::from_utf8(line).ok()?;
    let (sum, row) = line.strip_suffix('\n').unwrap_or(line).split_once(' ')?;
    (sum == checksum(row)).then(|| row.to_owned())
}

fn checksum(row: &str) -> String {
    format!("{:08x}", crc32fast::hash(row.as_bytes()))
}
