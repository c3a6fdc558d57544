use std::{
    collections::VecDeque,
    env,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use proptest::prelude::*;
use tempfile::{TempDir, tempdir};

use super::*;

const PLENTY: u64 = 1 << 30;
/// Bytes of a line of [`row`].
const LINE: usize = 8 + 1 + 12 + 1;
/// A segment holds three appends of one row.
const SMALL: u64 = 2 * LINE as u64 + 1;
/// Tells a child of a test its folder.
const FOLDER: &str = "SPOOL_TEST_FOLDER";

fn row(n: usize) -> String {
    format!(r#"{{"n":"{n:04}"}}"#)
}

fn numbered(range: impl IntoIterator<Item = usize>) -> Vec<String> {
    range.into_iter().map(row).collect()
}

fn small(folder: &TempDir) -> Spool {
    Spool::open_sized(folder.path(), PLENTY, SMALL).unwrap()
}

fn append_one_by_one(spool: &mut Spool, range: impl IntoIterator<Item = usize>) {
    range.into_iter().for_each(|n| spool.append(&[row(n)]).unwrap());
}

/// Takes everything out, some rows at a time.
fn drain(spool: &mut Spool) -> Vec<String> {
    let mut drained = Vec::new();
    loop {
        let rows = spool.next(7).unwrap();
        if rows.is_empty() {
            assert!(spool.is_empty() && spool.rows() == 0);
            return drained;
        }
        spool.confirm(rows.len()).unwrap();
        drained.extend(rows);
    }
}

/// The files with an ending, in order.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|found| found == ending));
    paths.sort();
    paths
}

fn segments(folder: &TempDir) -> Vec<PathBuf> {
    files(folder.path(), ENDING)
}

#[test]
fn rows_come_in_order_over_many_segments() {
    let folder = tempdir().unwrap();
    let mut spool = small(&folder);
    append_one_by_one(&mut spool, 0..100);
    assert_eq!(segments(&folder).len(), 34);
    assert_eq!(spool.rows(), 100);
    assert_eq!(drain(&mut spool), numbered(0..100));
}

#[test]
fn rows_come_again_until_they_are_confirmed() {
    let folder = tempdir().unwrap();
    let mut spool = small(&folder);
    append_one_by_one(&mut spool, 0..10);
    assert_eq!(spool.next(5).unwrap(), numbered(0..5));
    assert_eq!(spool.next(4).unwrap(), numbered(0..4));
    spool.confirm(2).unwrap();
    append_one_by_one(&mut spool, 10..12);
    spool.confirm(1).unwrap();
    assert_eq!(spool.rows(), 9);
    assert_eq!(spool.next(0).unwrap(), numbered([]));
    spool.confirm(1).unwrap();
    assert_eq!(drain(&mut spool), numbered(3..12));
}

#[test]
fn what_is_through_leaves_no_segment_and_appending_goes_on() {
    let folder = tempdir().unwrap();
    let mut spool = small(&folder);
    for round in 0..3 {
        append_one_by_one(&mut spool, 0..round + 1);
        assert_eq!(segments(&folder).len(), 1);
        assert_eq!(drain(&mut spool), numbered(0..round + 1));
        assert_eq!(segments(&folder).len(), 0);
    }
    spool.append(&[""; 0]).unwrap();
    assert_eq!(segments(&folder).len(), 0);
}

#[test]
fn a_new_process_adopts_what_a_dead_one_left_and_begins_its_own_segment() {
    let folder = tempdir().unwrap();
    append_one_by_one(&mut small(&folder), 0..10);
    let mut spool = small(&folder);
    assert_eq!(spool.rows(), 10);
    append_one_by_one(&mut spool, 10..11);
    assert_eq!(segments(&folder).len(), 5);
    assert_eq!(drain(&mut spool), numbered(0..11));
}

#[test]
fn processes_leave_each_others_segments_alone() {
    let folder = tempdir().unwrap();
    let (mut first, mut second) = (small(&folder), small(&folder));
    append_one_by_one(&mut first, 0..5);
    append_one_by_one(&mut second, 10..12);
    second.adopt().unwrap();
    assert_eq!(second.next(9).unwrap(), numbered(10..12));
    drop(first);
    second.adopt().unwrap();
    // What was read is not disturbed, and what was adopted is not appended to.
    second.confirm(2).unwrap();
    append_one_by_one(&mut second, 12..13);
    assert_eq!(segments(&folder).len(), 3);
    assert_eq!(drain(&mut second), numbered((0..5).chain(12..13)));
    assert_eq!(segments(&folder).len(), 0);
}

#[test]
fn nothing_is_lost_between_making_a_segment_and_locking_it() {
    let folder = tempdir().unwrap();
    let (appended, adopted) = thread::scope(|scope| {
        let appending = scope.spawn(|| {
            let mut spool = small(&folder);
            let append_and_drain = |n| {
                spool.append(&[row(n)]).unwrap();
                assert!(spool.segments[0].is_there());
                drain(&mut spool)
            };
            (0..300).flat_map(append_and_drain).collect::<Vec<_>>()
        });
        let mut spool = small(&folder);
        while !appending.is_finished() {
            spool.adopt().unwrap();
        }
        (appending.join().unwrap(), drain(&mut spool))
    });
    assert_eq!(appended, numbered(0..300));
    assert_eq!(adopted, numbered([]));
}

#[test]
fn a_line_torn_anywhere_costs_no_other() {
    let folder = tempdir().unwrap();
    small(&folder).append(&numbered(0..3)).unwrap();
    let file = segments(&folder).remove(0);
    let whole = fs::read(&file).unwrap();
    assert_eq!(whole.len(), 3 * LINE);
    for len in 2 * LINE..whole.len() {
        fs::write(&file, &whole[..len]).unwrap();
        let mut spool = small(&folder);
        // The line break alone is no loss.
        let only_unended = len == whole.len() - 1;
        let torn = u64::from(len > 2 * LINE && !only_unended);
        assert_eq!(drain(&mut spool), numbered(0..if only_unended { 3 } else { 2 }), "{len}");
        assert_eq!((spool.take_damaged(), spool.take_damaged()), (torn, 0), "{len}");
        let kept = fs::read(folder.path().join(DAMAGED)).unwrap_or_default();
        if torn == 1 {
            assert!(kept.ends_with(&[&whole[2 * LINE..len], b"\n"].concat()), "{len}");
        }
        assert_eq!(segments(&folder).len(), 0);
    }
}

#[test]
fn a_flipped_bit_anywhere_costs_no_other_line() {
    let folder = tempdir().unwrap();
    small(&folder).append(&numbered(0..3)).unwrap();
    let file = segments(&folder).remove(0);
    let whole = fs::read(&file).unwrap();
    for at in LINE..2 * LINE - 1 {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            fs::write(&file, &damaged).unwrap();
            let mut spool = small(&folder);
            assert_eq!(drain(&mut spool), numbered([0, 2]), "{at}");
            // One that becomes a line break makes two.
            let lines = 1 + u64::from(damaged[at] == b'\n');
            assert_eq!(spool.take_damaged(), lines, "{at}");
        }
    }
}

#[test]
fn damage_is_kept_and_counted_once_however_often_it_is_passed() {
    let folder = tempdir().unwrap();
    small(&folder).append(&numbered(0..4)).unwrap();
    let file = OpenOptions::new().write(true).open(&segments(&folder)[0]).unwrap();
    for line in [0, 2] {
        file.write_all_at(b"x", (line * LINE) as u64).unwrap();
    }
    drop(file);
    let mut spool = small(&folder);
    for _ in 0..3 {
        assert_eq!(spool.next(9).unwrap(), numbered([1, 3]));
    }
    assert_eq!((spool.rows(), spool.take_damaged()), (2, 2));
    spool.confirm(1).unwrap();
    assert_eq!(drain(&mut spool), numbered([3]));
    assert_eq!(spool.take_damaged(), 0);
    assert_eq!(fs::read(folder.path().join(DAMAGED)).unwrap().len(), 2 * LINE);
}

#[test]
fn a_segment_whose_damage_cannot_be_copied_is_set_aside() {
    let folder = tempdir().unwrap();
    append_one_by_one(&mut small(&folder), 0..4);
    let first = segments(&folder).remove(0);
    let mut content = fs::read(&first).unwrap();
    content[0] = b'x';
    fs::write(&first, &content).unwrap();
    fs::create_dir(folder.path().join(DAMAGED)).unwrap();
    let mut spool = small(&folder);
    assert_eq!(drain(&mut spool), numbered(1..4));
    assert_eq!(spool.take_damaged(), 1);
    assert_eq!(segments(&folder).len(), 0);
    let kept = files(folder.path(), "damaged");
    assert_eq!(fs::read(&kept[0]).unwrap(), content);
}

#[test]
fn the_limit_keeps_what_is_there_and_confirming_makes_room() {
    let folder = tempdir().unwrap();
    let limit = 6 * LINE as u64;
    let mut spool = Spool::open_sized(folder.path(), limit, SMALL).unwrap();
    append_one_by_one(&mut spool, 0..5);
    let full = spool.append(&numbered(5..7)).unwrap_err();
    assert!(matches!(full, AppendError::Full { limit: l } if l == limit), "{full}");
    append_one_by_one(&mut spool, 5..6);
    assert!(spool.append(&[row(6)]).is_err());
    assert_eq!(spool.next(3).unwrap(), numbered(0..3));
    spool.confirm(3).unwrap();
    spool.append(&numbered(6..9)).unwrap();
    assert!(spool.append(&[row(9)]).is_err());
    drop(spool);
    let mut adopted = Spool::open_sized(folder.path(), limit, SMALL).unwrap();
    assert!(adopted.append(&[row(9)]).is_err());
    assert_eq!(drain(&mut adopted), numbered(3..9));
    adopted.append(&[row(9)]).unwrap();
}

#[test]
fn rows_with_line_breaks_between_tokens_stay_one_row() {
    let folder = tempdir().unwrap();
    let mut spool = small(&folder);
    spool.append(&["{\n  \"a\": \"b\\nü\"\n}".to_owned(), row(1)]).unwrap();
    assert_eq!(drain(&mut spool), ["{   \"a\": \"b\\nü\" }", &row(1)]);
    assert_eq!(spool.take_damaged(), 0);
}

#[test]
fn a_row_that_the_database_refuses_is_kept_with_the_reason() {
    let folder = tempdir().unwrap();
    let spool = small(&folder);
    spool.reject(&row(1), "value \"x\"\ntoo long").unwrap();
    spool.reject("{\n\"n\": 2}", "").unwrap();
    let kept = fs::read_to_string(folder.path().join(REJECTED)).unwrap();
    assert_eq!(
        kept,
        "{\"why\":\"value \\\"x\\\"\\ntoo long\",\"row\":{\"n\":\"0001\"}}\n\
         {\"why\":\"\",\"row\":{ \"n\": 2}}\n"
    );
}

#[test]
fn only_the_owner_reads_the_files() {
    let parent = tempdir().unwrap();
    let folder = parent.path().join("data/audit");
    let mut spool = Spool::open(&folder, PLENTY).unwrap();
    spool.append(&[row(1)]).unwrap();
    spool.reject(&row(1), "").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(mode(&files(&folder, ENDING)[0]), 0o600);
    assert_eq!(mode(&folder.join(REJECTED)), 0o600);
}

#[test]
fn a_segment_that_is_deleted_under_our_feet_is_not_appended_to() {
    let folder = tempdir().unwrap();
    let mut spool = Spool::open(folder.path(), PLENTY).unwrap();
    append_one_by_one(&mut spool, 0..2);
    fs::remove_file(&segments(&folder)[0]).unwrap();
    append_one_by_one(&mut spool, 2..4);
    assert_eq!(segments(&folder).len(), 1);
    assert_eq!(drain(&mut spool), numbered(0..4));
    fs::remove_dir(folder.path()).unwrap();
    assert!(matches!(spool.append(&[row(4)]), Err(AppendError::Io(_))));
    assert!(spool.adopt().is_err());
    assert!(spool.is_empty());
}

#[test]
fn a_segment_that_is_cut_under_our_feet_costs_its_end() {
    let folder = tempdir().unwrap();
    let mut spool = Spool::open(folder.path(), PLENTY).unwrap();
    append_one_by_one(&mut spool, 0..4);
    let file = OpenOptions::new().write(true).open(&segments(&folder)[0]).unwrap();
    file.set_len(2 * LINE as u64).unwrap();
    assert_eq!(drain(&mut spool), numbered(0..2));
    assert_eq!(spool.take_damaged(), 1);
    append_one_by_one(&mut spool, 4..5);
    assert_eq!(drain(&mut spool), numbered(4..5));
}

#[test]
fn a_folder_that_cannot_be_is_an_error() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(Spool::open(&file, PLENTY).is_err());
    assert!(Spool::open(&file.join("audit"), PLENTY).is_err());
    fs::create_dir(folder.path().join("x.spool")).unwrap();
    assert!(Spool::open(folder.path(), PLENTY).is_err());
}

/// This binary with one of the children below.
fn child(name: &str, folder: &TempDir) -> String {
    let binary = env::current_exe().unwrap();
    let (binary, folder) = (binary.display(), folder.path().display());
    let module = module_path!().split_once("::").unwrap().1;
    format!("{FOLDER}='{folder}' exec '{binary}' --exact {module}::{name} --ignored --nocapture")
}

#[test]
#[ignore = "the child of a_process_that_is_killed_loses_nothing"]
fn child_appends_for_ever() {
    let Ok(folder) = env::var(FOLDER) else { return };
    let mut spool = Spool::open_sized(Path::new(&folder), PLENTY, 5 * SMALL).unwrap();
    for n in 0.. {
        spool.append(&numbered(3 * n..3 * n + 3)).unwrap();
        writeln!(std::io::stdout(), "\nappended {n}").unwrap();
    }
}

#[test]
fn a_process_that_is_killed_loses_nothing() {
    let appended = |line: &String| line.starts_with("appended");
    for kill_after in [1, 10, 37] {
        let folder = tempdir().unwrap();
        let command = child("child_appends_for_ever", &folder);
        let mut child =
            Command::new("sh").arg("-c").arg(command).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let before = lines.by_ref().filter(appended).take(kill_after).count();
        assert_eq!(before, kill_after);
        assert!(small(&folder).is_empty(), "its segments are its own while it lives");
        child.kill().unwrap();
        child.wait().unwrap();
        let promised = 3 * (before + lines.filter(appended).count());
        let rows = drain(&mut small(&folder));
        assert!(rows.len() >= promised, "{} of {promised}", rows.len());
        assert_eq!(rows, numbered(0..rows.len()));
    }
}

#[test]
#[ignore = "the child of an_append_that_fails_half_way_leaves_nothing_behind"]
fn child_appends_until_the_disk_is_full() {
    let Ok(folder) = env::var(FOLDER) else { return };
    let mut spool = Spool::open(Path::new(&folder), PLENTY).unwrap();
    let mut n = 0;
    let error = loop {
        match spool.append(&numbered(n..n + 3)) {
            Ok(()) => n += 3,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AppendError::Io(_)), "{error}");
    let file = files(Path::new(&folder), ENDING).remove(0);
    assert_eq!(fs::metadata(file).unwrap().len(), (n * LINE) as u64);
    // A new segment that fails half-way goes as a whole.
    assert!(spool.append(&numbered(0..1000)).is_err());
    assert_eq!(files(Path::new(&folder), ENDING).len(), 1);
    spool.append(&[row(n)]).unwrap();
    assert_eq!(files(Path::new(&folder), ENDING).len(), 2);
    assert_eq!(drain(&mut spool), numbered(0..=n));
    assert_eq!(spool.take_damaged(), 0);
    writeln!(std::io::stdout(), "\nfull at {n}").unwrap();
}

#[test]
fn an_append_that_fails_half_way_leaves_nothing_behind() {
    let folder = tempdir().unwrap();
    // No file may grow beyond a few KiB, and going beyond is an error instead of a signal.
    let command = child("child_appends_until_the_disk_is_full", &folder);
    let command = format!("trap '' XFSZ; ulimit -f 5; {command}");
    let output = Command::new("sh").arg("-c").arg(command).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("\nfull at "), "{output:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Append(usize),
    Next(usize),
    Confirm(usize),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..6_usize).prop_map(Step::Append),
        4 => (1..12_usize).prop_map(Step::Next),
        4 => (0..12_usize).prop_map(Step::Confirm),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_is_a_queue_that_survives(steps in proptest::collection::vec(step(), 1..40)) {
        const LIMIT: u64 = 30 * LINE as u64;
        let folder = tempdir().unwrap();
        let open = || Spool::open_sized(folder.path(), LIMIT, SMALL).unwrap();
        let (mut spool, mut waiting, mut read) = (open(), VecDeque::new(), 0);
        let mut made = 0;
        for step in steps {
            match step {
                Step::Append(count) => match spool.append(&numbered(made..made + count)) {
                    Ok(()) => {
                        waiting.extend(made..made + count);
                        made += count;
                    }
                    Err(error) => {
                        let full = matches!(error, AppendError::Full { .. });
                        prop_assert!(full, "{}", error);
                        // What is confirmed of a segment still counts.
                        prop_assert!(waiting.len() + count + 7 > 30);
                    }
                },
                Step::Next(max) => {
                    let rows = spool.next(max).unwrap();
                    read = rows.len();
                    prop_assert_eq!(rows, numbered(waiting.iter().copied().take(max)));
                }
                Step::Confirm(max) => {
                    let count = max.min(read);
                    spool.confirm(count).unwrap();
                    waiting.drain(..count);
                    read -= count;
                }
                Step::Reopen => {
                    drop(spool);
                    spool = open();
                    // The beginning of the first segment comes again.
                    let again = spool.rows() as usize - waiting.len();
                    prop_assert!(again < 7);
                    waiting = (made - spool.rows() as usize..made).collect();
                    read = 0;
                }
            }
            prop_assert_eq!(spool.rows() as usize, waiting.len());
            prop_assert_eq!(spool.is_empty(), waiting.is_empty());
            prop_assert!(!waiting.is_empty() || segments(&folder).is_empty());
        }
        prop_assert_eq!(drain(&mut spool), numbered(waiting));
        prop_assert_eq!(spool.take_damaged(), 0);
    }
}
