//! A Postgres of the tests' own: found or installed, in a temporary folder, gone when the tests are.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread::sleep,
    time::Duration,
};

use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;

const MISSING: &str = "the tests need Postgres: install it (Debian and Ubuntu: apt-get install postgresql; \
     macOS: brew install postgresql) or put its initdb, pg_ctl and pg_basebackup into PATH";

/// The URL of a new, empty database of the server that all tests of this process share.
pub(crate) async fn database() -> String {
    static SHARED: OnceLock<Cluster> = OnceLock::new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let cluster = SHARED.get_or_init(Cluster::start);
    let name = format!("test{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let mut connection = PgConnection::connect(&cluster.url("postgres")).await.unwrap();
    let create = format!("CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0");
    connection.execute(sqlx::AssertSqlSafe(create)).await.unwrap();
    connection.close().await.unwrap();
    cluster.url(&name)
}

/// A server with a data folder and a port of its own.
pub(crate) struct Cluster {
    folder: PathBuf,
    port: u16,
    /// Before each command: Postgres refuses to run as root.
    as_user: Vec<String>,
    tools: PathBuf,
    /// Stops the server and removes the folder when this process ends, in whatever way.
    keeper: Child,
}

impl Cluster {
    /// Makes and starts one.
    pub(crate) fn start() -> Self {
        let tools = tools();
        let folder = TempDir::new().unwrap().keep();
        let as_user = user_for(&folder);
        let data = folder.join("data").display().to_string();
        let initdb = tools.join("initdb").display().to_string();
        let flags = ["-D", &data, "-U", "switchboard", "-A", "trust", "--no-sync", "--no-locale"];
        let mut made = command(&as_user, &initdb, &folder);
        run(made.args(flags).args(["-E", "UTF8"]));
        Self::start_in(folder, as_user, tools)
    }

    /// Starts what is in a folder.
    fn start_in(folder: PathBuf, as_user: Vec<String>, tools: PathBuf) -> Self {
        let keeper = keeper(&as_user, &tools, &folder);
        let mut cluster = Self { folder, port: 0, as_user, tools, keeper };
        // Below the ports that systems give out: it has to be free again after a stop.
        for _ in 0..20 {
            cluster.port = 20_000 + u16::try_from(fastrand::u32(..10_000)).unwrap();
            if cluster.pg_ctl(&cluster.start_flags()).status().unwrap().success() {
                return cluster;
            }
        }
        let log = fs::read_to_string(cluster.folder.join("log")).unwrap_or_default();
        panic!("Postgres does not start: {log}");
    }

    /// Makes and starts a standby that follows this one.
    pub(crate) fn standby(&self) -> Self {
        let tools = tools();
        let folder = TempDir::new().unwrap().keep();
        let as_user = user_for(&folder);
        let program = tools.join("pg_basebackup").display().to_string();
        let data = folder.join("data").display().to_string();
        let mut copied = command(&as_user, &program, &folder);
        copied.args(["-D", &data, "-d", &self.conninfo(), "-X", "stream", "-c", "fast"]);
        run(copied.args(["--no-sync", "-R"]));
        Self::start_in(folder, as_user, tools)
    }

    /// Makes a standby the primary.
    pub(crate) fn promote(&self) {
        run(&mut self.pg_ctl(&["promote".into(), "-w".into(), "-s".into()]));
    }

    /// Starts it again, as a standby that follows another one.
    pub(crate) fn start_behind(&self, primary: &Self) {
        let data = self.folder.join("data");
        fs::write(data.join("standby.signal"), "").unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(data.join("postgresql.auto.conf"));
        let line = format!("primary_conninfo = '{}'\n", primary.conninfo());
        file.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        self.start_again();
    }

    fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=switchboard", self.port)
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// The URL of one of its databases.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://switchboard@{}/{database}", self.addr())
    }

    /// Runs a script of `docker-entrypoint-initdb.d` as the image does: as a superuser, over the socket.
    pub(crate) fn first_start(&self, superuser: &str, script: &str) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path);
        let path = std::env::join_paths([self.tools.clone()].into_iter().chain(folders)).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).current_dir("/").stdin(Stdio::null());
        shell.env("PATH", path).env("PGHOST", &self.folder).env("PGPORT", self.port.to_string());
        run(shell.env("PGUSER", superuser).env("PGDATABASE", "postgres"));
    }

    /// Stops it: `fast` ends connections in order, `immediate` is a crash.
    pub(crate) fn stop(&self, mode: &str) {
        run(self.pg_ctl(&["stop".into(), "-m".into(), mode.into()]).stdout(Stdio::null()));
    }

    /// Starts it again.
    pub(crate) fn start_again(&self) {
        run(&mut self.pg_ctl(&self.start_flags()));
    }

    /// Kills every process of it, and starts it again as soon as the system has cleaned up.
    #[expect(clippy::disallowed_methods, reason = "callers give up their worker")]
    pub(crate) fn crash_and_start(&self) {
        self.signal("-KILL");
        for _ in 0..50 {
            if self.pg_ctl(&self.start_flags()).status().unwrap().success() {
                return;
            }
            sleep(Duration::from_millis(100));
        }
        panic!("Postgres does not start again");
    }

    /// Sends a signal by its name to each of its processes: `-STOP` makes a server that does not answer.
    pub(crate) fn signal(&self, name: &str) {
        let pid_file = fs::read_to_string(self.folder.join("data/postmaster.pid")).unwrap();
        let leader = pid_file.lines().next().unwrap();
        let children = Command::new("ps").args(["-o", "pid=", "--ppid", leader]).output().unwrap();
        let children = String::from_utf8(children.stdout).unwrap();
        let mut pids = vec![leader];
        pids.extend(children.split_whitespace());
        // A child may have ended meanwhile.
        drop(Command::new("kill").arg(name).args(pids).stderr(Stdio::null()).status());
    }

    fn start_flags(&self) -> Vec<String> {
        let log = self.folder.join("log").display().to_string();
        let options = format!(
            "-p {} -k {} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=400",
            self.port,
            self.folder.display()
        );
        ["start", "-w", "-s", "-l", &log, "-o", &options].map(str::to_owned).to_vec()
    }

    fn pg_ctl(&self, args: &[String]) -> Command {
        let pg_ctl = self.tools.join("pg_ctl").display().to_string();
        let mut command = command(&self.as_user, &pg_ctl, &self.folder);
        command.arg("-D").arg(self.folder.join("data")).args(args);
        // The server inherits what its starter has, and would keep a pipe open.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.signal("-CONT");
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
    }
}

/// A shell that outlives this process by what it takes to clean up.
fn keeper(as_user: &[String], tools: &Path, folder: &Path) -> Child {
    let script = r#"trap "" INT TERM HUP; folder=$0; cat >/dev/null; "$@" >/dev/null 2>&1; rm -rf "$folder""#;
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(folder).args(as_user).arg(tools.join("pg_ctl"));
    shell.arg("-D").arg(folder.join("data")).args(["stop", "-m", "immediate"]);
    shell.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    shell.spawn().unwrap()
}

/// Where `initdb`, `pg_ctl` and `pg_basebackup` are; Debian keeps them out of PATH.
fn tools() -> PathBuf {
    found().unwrap_or_else(|| {
        let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        assert!(root && Path::new("/usr/bin/apt-get").exists(), "{MISSING}");
        let install = "apt-get update -q && apt-get install -qy --no-install-recommends postgresql";
        let installed = Command::new("sh")
            .args(["-c", install])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&installed.stderr);
        found().unwrap_or_else(|| panic!("{MISSING}\napt-get failed: {said}"))
    })
}

fn found() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    let mut versions: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path().join("bin"))
        .collect();
    versions.sort();
    folders.extend(versions.into_iter().rev());
    folders.into_iter().find(|folder| {
        ["initdb", "pg_ctl", "pg_basebackup"].iter().all(|t| folder.join(t).exists())
    })
}

/// What makes a command run as a user that is not root, and the folder that user's.
fn user_for(folder: &Path) -> Vec<String> {
    if fs::metadata(folder).unwrap().uid() != 0 {
        return Vec::new();
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let user = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2).map(|id| id.parse::<u32>().unwrap());
        Some((ids.next()?, ids.next()?))
    };
    let (uid, gid) = user("postgres").or_else(|| user("nobody")).expect("there is a nobody");
    chown(folder, Some(uid), Some(gid)).unwrap();
    let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={gid}"));
    ["setpriv", &uid, &gid, "--clear-groups", "--"].map(str::to_owned).to_vec()
}

fn command(as_user: &[String], program: &str, folder: &Path) -> Command {
    let mut words = as_user.iter().map(String::as_str).chain([program]);
    let mut command = Command::new(words.next().unwrap());
    // A folder that the user may enter.
    command.args(words).current_dir(folder);
    command
}

fn run(command: &mut Command) {
    let ran = command.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{command:?}: {said}");
}
