//! The files and folders of this server: made for its user alone, and asked whether they can be used.

use std::{
    fs::{self, DirBuilder, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Access, access},
    io::Errno,
    process::geteuid,
};

use crate::machine;

/// Rights of the group and of all others.
const OTHERS: u32 = 0o077;
/// Of a folder such as `/tmp`, where each user has files.
const STICKY: u32 = 0o1000;
/// Folders that a folder of ours may have: the spool, and what file systems make.
const INNER: [&str; 2] = ["audit", "lost+found"];

/// Makes a folder, with those above it, that its user alone can use. One that is there stays as it is.
pub(crate) fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Makes an empty file that its user alone can use. One that is there stays as it is.
pub(crate) fn make_file(file: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(file) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map(drop),
    }
}

/// Takes the rights of other users away from a folder and from files; returns those that others can still use.
/// A folder that has more than our files keeps its rights: other programs may need them.
pub(crate) fn tighten(folder: &Path, files: &[PathBuf]) -> Vec<PathBuf> {
    open_but_for(folder, files, close)
}

/// Those that others can use and that [`tighten`] cannot change.
pub(crate) fn left_open(folder: &Path, files: &[PathBuf]) -> Vec<PathBuf> {
    open_but_for(folder, files, is_own)
}

/// Those that others can use, but for those of ours that are `mended`.
fn open_but_for(folder: &Path, files: &[PathBuf], mended: fn(&Path) -> bool) -> Vec<PathBuf> {
    let files = files.iter().map(|file| (&**file, !is_of_another(file, folder)));
    let all = files.chain([(folder, !is_shared(folder))]);
    all.filter(|(path, ours)| is_open(path) && !(*ours && mended(path)))
        .map(|(path, _)| path.to_owned())
        .collect()
}

fn is_open(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.mode() & OTHERS != 0)
}

fn is_own(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.uid() == geteuid().as_raw())
}

/// Takes the rights of others away; false where it is not this user's own, or the file system refuses.
fn close(path: &Path) -> bool {
    let Ok(found) = path.metadata() else { return false };
    let mode = Permissions::from_mode(found.mode() & 0o7777 & !OTHERS);
    // Root may change files of others, and would lock their owners' groups out.
    is_own(path) && fs::set_permissions(path, mode).is_ok()
}

/// Whether somebody else decides what is at a path: root would close what a link of theirs leads to.
fn is_of_another(path: &Path, folder: &Path) -> bool {
    let mut way = path.ancestors().take_while(|part| *part != folder);
    geteuid().is_root()
        && (way.any(|part| part.symlink_metadata().is_ok_and(|found| found.is_symlink()))
            || path.parent().is_some_and(|parent| parent.exists() && !is_own(parent)))
}

/// Whether other programs, too, have something in a folder.
fn is_shared(folder: &Path) -> bool {
    if folder.metadata().is_ok_and(|found| found.mode() & STICKY != 0) {
        return true;
    }
    let mut entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.any(|entry| {
        let name = entry.file_name();
        let is_inner = INNER.iter().any(|inner| name == *inner);
        !is_inner && (!is_own(&entry.path()) || entry.path().is_dir())
    })
}

/// Why this user cannot write, and the command that mends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unwritable {
    /// The path, its owner and its mode.
    pub(crate) says: String,
    /// To be followed by nothing.
    pub(crate) fix: String,
}

/// Asks whether this user may write a folder and those of the files that are there. Changes nothing.
pub(crate) fn unwritable(folder: &Path, files: &[PathBuf]) -> Option<Unwritable> {
    let needed = |path: &Path| match path == folder {
        true => Access::WRITE_OK | Access::EXEC_OK,
        false => Access::WRITE_OK | Access::READ_OK,
    };
    let refused = |path: &Path| match access(path, needed(path)) {
        // `fs::metadata` says less of a folder that cannot be entered.
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => None,
        Err(error) => Some((path.to_owned(), error)),
    };
    let all = files.iter().map(|file| &**file).chain([folder]);
    let refused: Vec<_> = all.filter_map(refused).collect();
    let (first, error) = refused.first()?;
    let (user, shown) = (machine::user(), first.display());
    if *error == Errno::ROFS {
        return Some(Unwritable {
            says: format!("{shown} is on a file system that is mounted read-only"),
            fix: format!("mount the file system of {} for writing", folder.display()),
        });
    }
    let paths: Vec<_> = refused.iter().map(|(path, _)| path.display().to_string()).collect();
    let paths = paths.join(" ");
    let fix = match is_own(first) {
        true => format!("run `chmod u+rwX {paths}`"),
        false => format!("run `chown {user} {paths}` as root"),
    };
    let says = match first.metadata() {
        Ok(found) => {
            let (owner, mode) = (machine::user_named(found.uid()), found.mode() & 0o777);
            let what = if access(first, Access::READ_OK).is_ok() { "write" } else { "read" };
            format!(
                "{shown} belongs to {owner} and has the mode {mode:03o}: {user} cannot {what} it"
            )
        }
        Err(_) => format!("{user} cannot write {shown}: {error}"),
    };
    Some(Unwritable { says, fix })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    fn open_to_all(path: &Path) {
        let mode = if path.is_dir() { 0o755 } else { 0o644 };
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_is_made_is_of_its_user_alone_and_what_is_there_stays() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        make_folder(&folder).unwrap();
        assert_eq!((mode(&folder), mode(&root.path().join("a"))), (0o700, 0o700));
        let file = folder.join("file");
        make_file(&file).unwrap();
        assert_eq!(mode(&file), 0o600);
        fs::write(&file, "text").unwrap();
        make_file(&file).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"text");
    }

    #[test]
    fn a_folder_of_other_programs_keeps_its_rights_and_is_told() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("switchboard.db");
        for path in [&file, &root.path().join("server.log")] {
            make_file(path).unwrap();
        }
        fs::create_dir(root.path().join("audit")).unwrap();
        let files = [file.clone(), root.path().join("not-there")];
        open_to_all(root.path());
        open_to_all(&file);
        assert!(left_open(root.path(), &files).is_empty());
        assert!(tighten(root.path(), &files).is_empty());
        assert_eq!((mode(root.path()), mode(&file)), (0o700, 0o600));

        fs::create_dir(root.path().join("another-program")).unwrap();
        open_to_all(root.path());
        open_to_all(&file);
        assert_eq!(left_open(root.path(), &files), [root.path()]);
        assert_eq!(tighten(root.path(), &files), [root.path()]);
        assert_eq!((mode(root.path()), mode(&file)), (0o755, 0o600));
    }
}
