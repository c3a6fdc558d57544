//! The spool: audit rows that wait on disk while the database is down or slow.
//!
//! The writer [appends](Spool::append) here what it cannot put into the database, and later takes the
//! [next](Spool::next) rows, writes them and [confirms](Spool::confirm) them. A row may come twice,
//! never not at all: the database passes over the ids that it knows. Everything here blocks.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod segment;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use self::segment::{Damage, ENDING, Segment};

/// Bytes after which a new segment is begun: what is confirmed leaves the disk a segment at a time.
const SEGMENT_SIZE: u64 = 8 << 20;
/// Each file of lines that were set aside may have this part of the spool's limit.
const ASIDE: u64 = 16;
/// Lines whose checksum does not fit, as they were found.
const DAMAGED: &str = "damaged";
/// Rows which the database refuses, each with its reason.
const REJECTED: &str = "rejected.jsonl";

/// Why rows were not appended; none of them is in the spool then.
#[derive(Debug, thiserror::Error)]
pub(super) enum AppendError {
    /// It would go over the limit.
    #[error("the spool is full: its limit is {limit} bytes")]
    Full {
        /// In bytes.
        limit: u64,
    },
    /// The disk is full, or broken.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The part of a folder of audit rows which is this process's own.
///
/// Other processes may have theirs in the same folder; the lock of a segment says whose it is.
pub(super) struct Spool {
    folder: PathBuf,
    limit: u64,
    segment_size: u64,
    /// The oldest first.
    segments: VecDeque<Segment>,
    /// The last segment is sound and made by this spool: it takes more rows.
    appending: bool,
    damaged: u64,
    unkept: u64,
}

/// Whether segments with rows lie in a folder: of this host's processes, or of those that died.
pub(crate) fn has_spooled_rows(folder: &Path) -> bool {
    let Ok(files) = folder.read_dir() else { return false };
    let has_rows = |file: fs::DirEntry| {
        file.path().extension().is_some_and(|ending| ending == ENDING)
            && file.metadata().is_ok_and(|of| of.len() > 0)
    };
    files.flatten().any(has_rows)
}

impl Spool {
    /// Opens the spool in a folder, which is made if need be, with what dead processes have left there.
    ///
    /// The limit is in bytes on disk, over all segments of this spool. Reads every byte of what it
    /// adopts, to count the rows.
    pub(super) fn open(folder: &Path, limit: u64) -> io::Result<Self> {
        Self::open_sized(folder, limit, SEGMENT_SIZE)
    }

    fn open_sized(folder: &Path, limit: u64, segment_size: u64) -> io::Result<Self> {
        if !folder.try_exists()? {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
            sync_folder(parent.unwrap_or(Path::new(".")))?;
        }
        let mut spool = Self {
            folder: folder.to_owned(),
            limit,
            segment_size,
            segments: VecDeque::new(),
            appending: false,
            damaged: 0,
            unkept: 0,
        };
        spool.adopt()?;
        Ok(spool)
    }

    /// Takes over what processes have left which died since the spool was opened.
    ///
    /// Its rows come after those that wait already, so that it does not disturb a `next` that is yet
    /// to be confirmed.
    pub(super) fn adopt(&mut self) -> io::Result<()> {
        let entries = fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.path()));
        let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|ending| ending == ENDING));
        paths.sort();
        for path in paths {
            let named = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            };
            if let Some(segment) = Segment::adopt(path.clone()).map_err(named)? {
                self.segments.push_back(segment);
                // Its last line may be torn, and what follows would be torn with it.
                self.appending = false;
            }
        }
        Ok(())
    }

    /// Whether rows of so many bytes would take from the last quarter, which is for the rows of users.
    pub(super) fn is_short_of(&self, bytes: usize) -> bool {
        self.on_disk() + bytes as u64 > self.limit - self.limit / 4
    }

    fn on_disk(&self) -> u64 {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Adds rows, each a text of JSON: all of them, and safe from a crash, or none.
    pub(super) fn append(&mut self, rows: &[impl AsRef<str>]) -> Result<(), AppendError> {
        if rows.is_empty() {
            return Ok(());
        }
        let lines: String = rows.iter().map(|row| segment::encode(row.as_ref())).collect();
        if self.on_disk() + lines.len() as u64 > self.limit {
            return Err(AppendError::Full { limit: self.limit });
        }
        let appended = match self.segments.back_mut() {
            Some(last) if self.appending && last.len() < self.segment_size && last.is_there() => {
                last.append(&lines, rows.len())
            }
            _ => self.append_to_new(&lines, rows.len()),
        };
        // After a failure nobody knows what of the file is on the disk: no more is added to it.
        self.appending = appended.is_ok();
        Ok(appended?)
    }

    fn append_to_new(&mut self, lines: &str, rows: usize) -> io::Result<()> {
        let mut segment = Segment::create(&self.folder)?;
        // First what is in the file, then its name: a name on disk without content would be no row.
        let appended = segment.append(lines, rows).and_then(|()| sync_folder(&self.folder));
        match appended {
            Ok(()) => self.segments.push_back(segment),
            // Should it stay, then it is adopted one day, and these rows come twice.
            Err(_) => drop(segment.remove()),
        }
        appended
    }

    /// The oldest rows, at most so many, which come again until they are confirmed.
    ///
    /// None means that nothing waits. Damaged lines are put into a file of their own on the way; see
    /// [`Self::take_damaged`].
    pub(super) fn next(&mut self, max_rows: usize) -> io::Result<Vec<String>> {
        let mut rows = Vec::new();
        self.segments.iter_mut().for_each(Segment::rewind);
        for segment in &mut self.segments {
            let mut damage = Damage::default();
            let read = segment.read(&mut rows, max_rows, &mut damage);
            self.damaged += damage.lines;
            if damage.lines > 0 {
                match append_whole(&self.folder, DAMAGED, &damage.text, self.limit / ASIDE) {
                    Ok(()) => {}
                    Err(AppendError::Full { .. }) => self.unkept += damage.lines,
                    // A disk that is too full for it must not keep the rows from leaving.
                    Err(AppendError::Io(_)) => segment.set_aside(),
                }
            }
            match read {
                Err(error) if rows.is_empty() => return Err(error),
                // It comes again when it stands first.
                Err(_) => break,
                Ok(()) if rows.len() >= max_rows => break,
                Ok(()) => {}
            }
        }
        // Of those with nothing but damage; `confirm` tries again, and tells.
        drop(self.remove_finished());
        Ok(rows)
    }

    /// The first of the rows of the last [`Self::next`], so many, are in the database.
    ///
    /// How far it is in a segment is in memory alone: after a crash the segment's rows come again from
    /// its first one, which does no harm and saves a write for each batch. After an error the rows
    /// are confirmed all the same, and a file stays that should be gone.
    pub(super) fn confirm(&mut self, mut rows: usize) -> io::Result<()> {
        for segment in &mut self.segments {
            rows -= segment.confirm(rows);
        }
        self.remove_finished()
    }

    fn remove_finished(&mut self) -> io::Result<()> {
        while let Some(segment) = self.segments.front()
            && segment.is_finished()
        {
            segment.remove()?;
            self.segments.pop_front();
        }
        Ok(())
    }

    /// Keeps a row which the database refuses for good, for people to look at, up to a part of the limit.
    /// A row of the spool is still to be confirmed.
    pub(super) fn reject(&self, row: &str, why: &str) -> Result<(), AppendError> {
        let (row, why) = (segment::one_line(row), serde_json::Value::from(why));
        let line = format!("{{\"why\":{why},\"row\":{row}}}\n");
        append_whole(&self.folder, REJECTED, line.as_bytes(), self.limit / ASIDE)
    }

    /// How many damaged lines were found since it was last asked.
    ///
    /// A line that was found before a crash may be found, and kept, again after it.
    pub(super) fn take_damaged(&mut self) -> u64 {
        std::mem::take(&mut self.damaged)
    }

    /// How many of them did not fit into their file, since it was last asked.
    pub(super) fn take_unkept(&mut self) -> u64 {
        std::mem::take(&mut self.unkept)
    }

    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.segments.iter().all(Segment::is_finished)
    }

    /// Rows that wait, with damaged ones as long as they are not found.
    pub(super) fn rows(&self) -> u64 {
        self.segments.iter().map(Segment::rows).sum()
    }
}

/// Adds to a file which all processes share, and which has a limit of bytes.
fn append_whole(folder: &Path, name: &str, text: &[u8], limit: u64) -> Result<(), AppendError> {
    let path = folder.join(name);
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    // Who cuts back what failed must not cut off what another has added meanwhile.
    file.lock()?;
    let len = file.metadata()?.len();
    if len + text.len() as u64 > limit {
        return Err(AppendError::Full { limit });
    }
    segment::write_whole(&mut file, text, len)?;
    if len == 0 {
        sync_folder(folder)?;
    }
    Ok(())
}

/// Makes the names of new files in a folder last.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
