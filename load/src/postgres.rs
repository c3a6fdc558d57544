//! A private Postgres: found, made in a temporary folder with its ordinary settings, gone afterwards.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

use crate::server::free_address;

/// Where Debian has the programs, by version: not on the PATH.
const DEBIAN: &str = "/usr/lib/postgresql";
/// Runs its arguments and removes the folder `$0` when its input ends, which the end of this process
/// brings about, whatever ends it.
const KEEPER: &str = r#"trap "" INT TERM HUP; cat >/dev/null; "$@" >/dev/null 2>&1; rm -rf "$0""#;

/// A running one; dropped, it is stopped and removed.
pub(crate) struct Cluster {
    /// Of an empty database.
    pub(crate) url: String,
    pub(crate) version: String,
    keeper: Child,
}

impl Cluster {
    /// Makes and starts one. While it runs, everybody on this machine can use it.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let programs = find().with_context(|| {
            format!("initdb and pg_ctl are neither on the PATH nor in {DEBIAN}/*/bin")
        })?;
        let folder = tempfile::tempdir()?;
        let user = user_for(folder.path())?;
        let tools = Tools { programs, user, folder: folder.path().to_owned() };
        let version = run(tools.command("pg_ctl").arg("--version"))?;
        let version = version.trim_start_matches("pg_ctl (PostgreSQL) ").to_owned();
        let keeper = tools.keeper(folder)?;
        let address = free_address()?;
        let url = format!("postgres://postgres@{address}/postgres");
        let cluster = Self { url, version, keeper };
        let data = tools.folder.join("data");
        let settings = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"];
        run(tools.command("initdb").args(settings).arg("-D").arg(&data))?;
        let (log, port) = (tools.folder.join("log"), address.port());
        // Without a socket in the file system: its path might be too long.
        let options = format!("-p {port} -h {} -k ''", address.ip());
        let mut start = tools.command("pg_ctl");
        start.args(["start", "-w", "-s", "-o", &options]).arg("-D").arg(&data).arg("-l").arg(&log);
        run(&mut start).with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        Ok(cluster)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // It has nothing to tell, and an end that cannot be awaited comes all the same.
        drop(self.keeper.wait());
    }
}

/// The programs of Postgres, and how they are run.
struct Tools {
    programs: PathBuf,
    /// Whom they run as where this process is root, as which they refuse to.
    user: Option<[u32; 2]>,
    folder: PathBuf,
}

impl Tools {
    fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = match self.user {
            None => Command::new(program),
            Some([user, group]) => {
                let ids = [format!("--reuid={user}"), format!("--regid={group}")];
                let mut command = Command::new("setpriv");
                command.args(ids).arg("--clear-groups").arg(program);
                command
            }
        };
        // A folder that the user may enter.
        command.current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// Starts what stops the server and removes the folder in the end.
    fn keeper(&self, folder: TempDir) -> anyhow::Result<Child> {
        let mut stop = self.command("pg_ctl");
        stop.args(["stop", "-m", "immediate", "-D"]).arg(self.folder.join("data"));
        let mut shell = Command::new("sh");
        shell.args(["-c", KEEPER]).arg(&self.folder).arg(stop.get_program()).args(stop.get_args());
        shell.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let keeper = shell.spawn().context("cannot start sh")?;
        drop(folder.keep());
        Ok(keeper)
    }
}

/// The folder with `initdb` and `pg_ctl`: the first of the PATH, or the newest of Debian.
fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let version = |folder: &PathBuf| folder.file_name()?.to_str()?.parse::<u32>().ok();
    let installed = fs::read_dir(DEBIAN).into_iter().flatten().flatten();
    let mut installed: Vec<_> = installed.map(|entry| entry.path()).collect();
    installed.sort_by_key(|folder| std::cmp::Reverse(version(folder)));
    let installed = installed.into_iter().map(|folder| folder.join("bin"));
    let has = |folder: &PathBuf| ["initdb", "pg_ctl"].iter().all(|name| folder.join(name).exists());
    env::split_paths(&path).chain(installed).find(has)
}

/// Gives the folder to a user that is not root: `postgres`, where there is one. None if nobody is root.
fn user_for(folder: &Path) -> anyhow::Result<Option<[u32; 2]>> {
    if fs::metadata(folder)?.uid() != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let ids = ids(&users, "postgres").or_else(|| ids(&users, "nobody"));
    let [user, group] = ids.context("root cannot run it, and there is no user nobody")?;
    chown(folder, Some(user), Some(group))?;
    Ok(Some([user, group]))
}

/// The numbers of a user and of its group.
fn ids(users: &str, name: &str) -> Option<[u32; 2]> {
    let user = users.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let mut fields = user.split(':').skip(1);
    Some([fields.next()?.parse().ok()?, fields.next()?.parse().ok()?])
}

/// What a command prints.
fn run(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {}", output.status, error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_user_are_those_of_the_whole_name() {
        let users = "postgres2:x:1:2::/:/bin/sh\npostgres:x:101:104:PostgreSQL:/var:/bin/bash\n";
        assert_eq!(ids(users, "postgres"), Some([101, 104]));
        assert_eq!(ids(users, "nobody"), None);
    }
}
