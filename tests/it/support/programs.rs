//! Programs that tests need beside the server: found in `PATH`, or installed where that can be done.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use tempfile::TempDir;

/// The first of some names that is a program in `PATH`; else Debian's package is installed, where that can
/// be done, and `missing` says what to do otherwise.
pub(crate) fn program(names: &[&str], package: &str, missing: &str) -> PathBuf {
    found(names).unwrap_or_else(|| {
        let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        assert!(root && Path::new("/usr/bin/apt-get").exists(), "{missing}");
        let install =
            format!("apt-get update -q && apt-get install -qy --no-install-recommends {package}");
        // The package's own service is not to start.
        let installed = Command::new("sh")
            .args(["-c", &install])
            .envs([("DEBIAN_FRONTEND", "noninteractive"), ("RUNLEVEL", "1")])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&installed.stderr);
        found(names).unwrap_or_else(|| panic!("{missing}\napt-get failed: {said}"))
    })
}

fn found(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        .find(|program| program.exists())
}

/// A port that is free, below those that systems give out: it is still free when a program binds it.
pub(crate) fn free_port() -> u16 {
    let port = (0..100).map(|_| 30_000 + u16::try_from(fastrand::u32(..2_700)).unwrap());
    port.into_iter().find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

/// A program that serves on an address, with a folder of its own.
pub(crate) struct Serving {
    pub(crate) addr: SocketAddr,
    folder: PathBuf,
    /// Kills the program and removes the folder when this process ends, in whatever way.
    keeper: Child,
}

impl Serving {
    /// A folder and a port for a program that does not run yet.
    pub(crate) fn prepare() -> (PathBuf, SocketAddr) {
        (TempDir::new().unwrap().keep(), ([127, 0, 0, 1], free_port()).into())
    }

    /// Runs a program, in its folder, and waits until it listens.
    #[expect(clippy::disallowed_methods, reason = "callers give up their worker")]
    pub(crate) fn start(
        program: &Path,
        args: &[String],
        environment: &[(&str, &str)],
        (folder, addr): (PathBuf, SocketAddr),
    ) -> Self {
        let script = r#"trap "" INT TERM HUP; folder=$0; "$@" >log 2>&1 </dev/null & pid=$!
            cat >/dev/null; kill -KILL $pid; cd /; rm -rf "$folder""#;
        let mut keeper = Command::new("sh");
        keeper.args(["-c", script]).arg(&folder).arg(program).args(args).current_dir(&folder);
        keeper.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        keeper.envs(environment.iter().copied());
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let serving = Self { addr, keeper: keeper.spawn().unwrap(), folder };
        for _ in 0..500 {
            if TcpStream::connect(addr).is_ok() {
                return serving;
            }
            sleep(Duration::from_millis(20));
        }
        let log = fs::read_to_string(serving.folder.join("log")).unwrap_or_default();
        panic!("{} does not listen: {log}", program.display());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
    }
}
