//! A Redis of the tests' own: found or installed, in a temporary folder, gone when the tests are. And a
//! network on the way to it that can be cut.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream as StdStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread::sleep,
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::programs::{free_port, program};

const MISSING: &str = "the tests need Redis: install it (Debian and Ubuntu: apt-get install redis-server; \
     macOS: brew install redis) or put its redis-server, or valkey-server, into PATH";

/// The URL of the server that all tests of this process share, and a prefix that no other test has.
pub(crate) fn shared() -> (String, String) {
    static SHARED: OnceLock<Redis> = OnceLock::new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let redis = SHARED.get_or_init(Redis::start);
    (redis.url(), format!("test{}", NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// A server with a folder and a port of its own. It keeps nothing on disk: killed, it has lost all.
pub(crate) struct Redis {
    folder: PathBuf,
    port: u16,
    program: PathBuf,
    /// Kills the server and removes the folder when this process ends, in whatever way.
    keeper: Child,
}

impl Redis {
    /// Starts one.
    pub(crate) fn start() -> Self {
        let redis = Self::stopped();
        redis.start_again();
        redis
    }

    /// One that does not run yet.
    pub(crate) fn stopped() -> Self {
        let program = program(&["redis-server", "valkey-server"], "redis-server", MISSING);
        let folder = TempDir::new().unwrap().keep();
        let script =
            r#"trap "" INT TERM HUP; cat >/dev/null; kill -KILL "$(cat "$0/pid")"; rm -rf "$0""#;
        let mut keeper = Command::new("sh");
        keeper.arg("-c").arg(script).arg(&folder).current_dir("/");
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let keeper = keeper.spawn().unwrap();
        // It has to be free again after a stop.
        Self { folder, port: free_port(), program, keeper }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.addr())
    }

    /// Starts it, empty, and waits until it answers.
    #[expect(clippy::disallowed_methods, reason = "callers give up their worker")]
    pub(crate) fn start_again(&self) {
        let text = |path: &str| self.folder.join(path).display().to_string();
        let (port, folder, log, pid) = (self.port.to_string(), text(""), text("log"), text("pid"));
        let mut command = Command::new(&self.program);
        command.args(["--port", &port, "--bind", "127.0.0.1", "--daemonize", "yes", "--save", ""]);
        command.args(["--dir", &folder, "--logfile", &log, "--pidfile", &pid]);
        assert!(command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success());
        for _ in 0..200 {
            if StdStream::connect(self.addr()).is_ok() {
                assert_eq!(self.command("PING"), "+PONG");
                return;
            }
            sleep(Duration::from_millis(20));
        }
        panic!("Redis does not start: {}", fs::read_to_string(log).unwrap_or_default());
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        self.signal("-KILL");
        // So that the keeper kills nobody who has the same number later.
        fs::remove_file(self.folder.join("pid")).unwrap();
    }

    /// Sends it a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = fs::read_to_string(self.folder.join("pid")).unwrap();
        assert!(Command::new("kill").args([name, pid.trim()]).status().unwrap().success());
    }

    /// What it says to a command: the first line.
    pub(crate) fn command(&self, command: &str) -> String {
        let mut stream = StdStream::connect(self.addr()).unwrap();
        stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
    }
}

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    Open,
    /// Connections end, and new ones too.
    Cut,
    /// Nothing arrives any more, and nobody is told.
    Silent,
}

/// The way of one node to a Redis.
pub(crate) struct Proxy {
    addr: SocketAddr,
    network: watch::Sender<Network>,
}

impl Proxy {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (network, state) = watch::channel(Network::Open);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, target, state.clone()));
            }
        });
        Self { addr, network }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    pub(crate) fn set(&self, network: Network) {
        self.network.send_replace(network);
    }
}

async fn forward(
    mut client: TcpStream,
    target: SocketAddr,
    mut network: watch::Receiver<Network>,
) -> Option<()> {
    network.wait_for(|now| *now != Network::Silent).await.ok()?;
    if *network.borrow_and_update() == Network::Cut {
        return None;
    }
    let mut server = TcpStream::connect(target).await.ok()?;
    let mut both = Box::pin(copy_bidirectional(&mut client, &mut server));
    loop {
        tokio::select! {
            _ = &mut both => return None,
            changed = network.changed() => changed.ok()?,
        }
        network.wait_for(|now| *now != Network::Silent).await.ok()?;
        if *network.borrow() == Network::Cut {
            return None;
        }
    }
}
