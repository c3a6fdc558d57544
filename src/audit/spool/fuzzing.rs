//! A segment in any bytes, as a crash or a broken disk may leave it: every row whose checksum fits comes out, once
//! and in order, and nothing else does; rows that are added after it are read too.

use std::{collections::VecDeque, env, process};

use super::*;

const LIMIT: u64 = 1 << 30;

/// Three bytes are how many rows are read and confirmed at once, and when the spool is opened again; then come
/// lines. A line with a plus gets a checksum that fits.
pub(crate) fn spool(input: &[u8]) {
    let [read, reopen, cut, lines @ ..] = input else { return };
    let folder = folder();
    drop(fs::remove_dir_all(&folder));
    fs::create_dir(&folder).expect("a folder for files of a moment can be made");
    let mut file = Vec::new();
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_prefix(b"+") {
            Some(row) => {
                let row = String::from_utf8_lossy(row);
                file.extend(segment::encode(row.trim_end_matches('\n')).into_bytes());
            }
            None => file.extend(line),
        }
    }
    file.truncate(file.len().saturating_sub(usize::from(cut % 32)));
    fs::write(folder.join("0.spool"), &file).expect("a file can be written");
    comes_out(&folder, &file, &String::from_utf8_lossy(lines), usize::from(*read), *reopen);
    fs::remove_dir_all(&folder).expect("the folder is ours");
}

/// In memory where there is such a place: every append waits for its disk.
fn folder() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { env::temp_dir() };
    parent.join(format!("switchboard-fuzz-{}", process::id()))
}

fn comes_out(folder: &Path, file: &[u8], added: &str, read: usize, reopen: u8) {
    let lines: Vec<_> = file.split_inclusive(|byte| *byte == b'\n').collect();
    let (max, confirmed) = (read % 8 + 1, read / 8 + 1);
    let whole: Vec<_> = lines.iter().filter_map(|line| row(line)).collect();
    let mut spool = Spool::open(folder, LIMIT).expect("any file can be adopted");
    assert_eq!(spool.rows(), lines.len() as u64);
    spool.append(&[added]).expect("there is room");
    let added = added.replace('\n', " ");
    let mut waiting: VecDeque<_> = whole.iter().cloned().chain([added.clone()]).collect();
    let mut until_reopened = usize::from(reopen % 16);
    loop {
        let rows = spool.next(max).expect("any file can be read");
        assert_eq!(rows, waiting.iter().take(max).cloned().collect::<Vec<_>>());
        let confirmed = confirmed.min(rows.len());
        spool.confirm(confirmed).expect("files can be deleted");
        waiting.drain(..confirmed);
        if waiting.is_empty() {
            break;
        }
        until_reopened = until_reopened.wrapping_sub(1);
        if until_reopened == 0 {
            drop(spool);
            spool = Spool::open(folder, LIMIT).expect("what was left can be adopted");
            // A segment comes again from its first row.
            if folder.join("0.spool").exists() {
                waiting = whole.iter().cloned().chain([added.clone()]).collect();
            }
        }
    }
    assert!(spool.next(max).expect("nothing is left").is_empty());
    assert!(spool.is_empty() && spool.rows() == 0);
    let left =
        fs::read_dir(folder).expect("the folder is there").map(|entry| entry.map(|e| e.path()));
    let segment = |path: &io::Result<PathBuf>| {
        path.as_ref().is_ok_and(|path| path.extension().is_some_and(|ending| ending == ENDING))
    };
    assert_eq!(left.filter(segment).count(), 0, "a segment that is through stays");
    let damaged = lines.iter().filter(|line| row(line).is_none());
    if reopen.is_multiple_of(16) {
        assert_eq!(spool.take_damaged(), damaged.clone().count() as u64);
        let kept = fs::read(folder.join(DAMAGED)).unwrap_or_default();
        let mut lost: Vec<u8> = damaged.flat_map(|line| line.iter().copied()).collect();
        if !lost.is_empty() && !lost.ends_with(b"\n") {
            lost.push(b'\n');
        }
        assert_eq!(kept, lost, "damage is kept as it was found");
    }
}

/// The row in a line whose checksum fits.
fn row(line: &[u8]) -> Option<String> {
    let line = str::from_utf8(line.strip_suffix(b"\n").unwrap_or(line)).ok()?;
    let (sum, row) = line.split_at_checked(8)?;
    let row = row.strip_prefix(' ')?;
    (sum == format!("{:08x}", checksum(row.as_bytes()))).then(|| row.to_owned())
}

/// CRC-32, bit by bit.
fn checksum(bytes: &[u8]) -> u32 {
    let mut sum = !0_u32;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ ((sum & 1).wrapping_neg() & 0xedb8_8320);
        }
    }
    !sum
}
