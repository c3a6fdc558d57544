//! A Redis of the tests' own, of whatever kind: found or installed, in a temporary folder, gone when the
//! tests are. And a network on the way to it that can be cut.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    path::{Path, PathBuf},
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
    io::{AsyncReadExt, AsyncWriteExt},
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

    /// Starts one whose configuration has more lines.
    pub(crate) fn with(lines: &[&str]) -> Self {
        let redis = Self::configured(lines);
        redis.start_again();
        redis
    }

    /// One that does not run yet.
    pub(crate) fn stopped() -> Self {
        Self::configured(&[])
    }

    fn configured(lines: &[&str]) -> Self {
        let program = program(&["redis-server", "valkey-server"], "redis-server", MISSING);
        let folder = TempDir::new().unwrap().keep();
        let script =
            r#"trap "" INT TERM HUP; cat >/dev/null; kill -KILL "$(cat "$0/pid")"; rm -rf "$0""#;
        let mut keeper = Command::new("sh");
        keeper.arg("-c").arg(script).arg(&folder).current_dir("/");
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let keeper = keeper.spawn().unwrap();
        // It has to be free again after a stop.
        let redis = Self { folder, port: port(), program, keeper };
        let text = |path: &str| redis.folder.join(path).display().to_string();
        let file = format!(
            "port {}\nbind 127.0.0.1\ndaemonize yes\nsave \"\"\ndir {}\nlogfile {}\npidfile {}\n{}\n",
            redis.port,
            text(""),
            text("log"),
            text("pid"),
            lines.join("\n").replace("PORT", &redis.port.to_string())
        );
        fs::write(redis.folder.join("conf"), file).unwrap();
        redis
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
        let (conf, log) = (self.folder.join("conf"), self.folder.join("log"));
        let lines = fs::read_to_string(&conf).unwrap();
        let mut command = Command::new(&self.program);
        command.arg(conf);
        if lines.contains("\nsentinel ") {
            command.arg("--sentinel");
        }
        assert!(command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success());
        for _ in 0..200 {
            if StdStream::connect(self.addr()).is_ok() {
                let answers = ["+PONG", "-NOAUTH Authentication required."];
                let tls = lines.contains("\ntls-port ");
                assert!(tls || answers.contains(&&*self.command("PING")));
                return;
            }
            sleep(Duration::from_millis(20));
        }
        panic!("Redis does not start: {}", fs::read_to_string(log).unwrap_or_default());
    }

    /// Kills it, and waits until it is gone: connections that it still took would break.
    #[expect(clippy::disallowed_methods, reason = "callers give up their worker")]
    pub(crate) fn kill(&self) {
        self.signal("-KILL");
        let mut tries = 0..1000;
        while StdStream::connect(self.addr()).is_ok() {
            tries.next().expect("a killed process ends");
            sleep(Duration::from_millis(2));
        }
        // So that the keeper kills nobody who has the same number later.
        fs::remove_file(self.folder.join("pid")).unwrap();
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = fs::read_to_string(self.folder.join("pid")).unwrap();
        assert!(Command::new("kill").args([name, pid.trim()]).status().unwrap().success());
    }

    /// All that it says to a command.
    pub(crate) fn said(&self, command: &str) -> String {
        let mut stream = StdStream::connect(self.addr()).unwrap();
        stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        // It closes, once it has answered.
        stream.shutdown(Shutdown::Write).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        said
    }

    /// Waits until what it says to a command has some words.
    #[expect(clippy::disallowed_methods, reason = "callers give up their worker")]
    pub(crate) fn until_said(&self, command: &str, words: &str) {
        let mut said = String::new();
        for _ in 0..500 {
            said = self.said(command);
            if said.contains(words) {
                return;
            }
            sleep(Duration::from_millis(20));
        }
        panic!("{command} never said {words}: {said}");
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

/// A free port, whose neighbour on which the nodes of a cluster talk is free too.
fn port() -> u16 {
    let free = |port: &u16| StdListener::bind(("127.0.0.1", *port + 10_000)).is_ok();
    std::iter::repeat_with(free_port).find(free).unwrap()
}

/// A Redis Cluster: three masters, and a replica of the one that has a key.
pub(crate) fn cluster(key: &str) -> [Redis; 4] {
    let [a, b, c, replica] = [(); 4].map(|()| {
        Redis::with(&[
            "cluster-enabled yes",
            "cluster-node-timeout 1000",
            "cluster-replica-validity-factor 0",
            "repl-diskless-sync-delay 0",
        ])
    });
    let slot: usize = a.command(&format!("CLUSTER KEYSLOT {key}"))[1..].parse().unwrap();
    let mut owner = String::new();
    for (i, master) in [&a, &b, &c].into_iter().enumerate() {
        let slots = 16_384 * i / 3..16_384 * (i + 1) / 3;
        if slots.contains(&slot) {
            owner = master.said("CLUSTER MYID").lines().nth(1).unwrap().to_owned();
        }
        let slots: Vec<_> = slots.map(|slot| slot.to_string()).collect();
        assert_eq!(master.command(&format!("CLUSTER ADDSLOTS {}", slots.join(" "))), "+OK");
        assert_eq!(master.command(&format!("CLUSTER SET-CONFIG-EPOCH {}", i + 1)), "+OK");
    }
    for other in [&b, &c, &replica] {
        assert_eq!(a.command(&format!("CLUSTER MEET 127.0.0.1 {}", other.port)), "+OK");
    }
    replica.until_said("CLUSTER NODES", &owner);
    assert_eq!(replica.command(&format!("CLUSTER REPLICATE {owner}")), "+OK");
    replica.until_said("INFO replication", "master_link_status:up");
    for node in [&a, &b, &c, &replica] {
        node.until_said("CLUSTER INFO", "cluster_state:ok");
        node.until_said("CLUSTER INFO", "cluster_known_nodes:4");
        node.until_said("CLUSTER NODES", &format!("slave {owner}"));
    }
    // The owner first.
    let is_owner = |node: &Redis| node.said("CLUSTER MYID").contains(&owner);
    let mut masters = [a, b, c];
    masters.sort_by_key(|node| !is_owner(node));
    let [owner, one, two] = masters;
    [owner, replica, one, two]
}

/// A sentinel of a master named `main` and its replica, with failovers in a hurry.
pub(crate) fn sentinel(master: &Redis, lines: &[&str]) -> Redis {
    let main = [
        &*format!("sentinel monitor main 127.0.0.1 {} 1", master.port),
        "sentinel down-after-milliseconds main 500",
        "sentinel failover-timeout main 2000",
    ];
    Redis::with(&[&main, lines].concat())
}

/// Makes an authority, `ca.pem`, and a certificate for 127.0.0.1 of it, `cert.pem` with `key.pem`.
pub(crate) fn certify(folder: &Path) {
    let missing = "the tests need openssl: install it, or put it into PATH";
    let openssl = program(&["openssl"], "openssl", missing);
    let script = r#"set -e; new="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        "$0" req -x509 $new -days 2 -subj /CN=authority -keyout ca.key -out ca.pem
        "$0" req $new -subj /CN=redis -keyout key.pem -out request.pem
        echo subjectAltName=IP:127.0.0.1 >names
        "$0" x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
            -extfile names -out cert.pem"#;
    let made = Command::new("sh").args(["-c", script]).arg(openssl).current_dir(folder).output();
    let made = made.unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    Open,
    /// Connections end, and new ones too.
    Cut,
    /// Nothing arrives any more, and nobody is told.
    Silent,
    /// A connection ends as soon as Redis has done what has these words.
    CutAfter(&'static str),
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
    let (mut asked, mut said) = ([0; 16_384], [0; 16_384]);
    loop {
        tokio::select! {
            bytes = client.read(&mut asked) => {
                let bytes = bytes.ok().filter(|bytes| *bytes > 0)?;
                server.write_all(&asked[..bytes]).await.ok()?;
                let Network::CutAfter(words) = *network.borrow() else { continue };
                if asked[..bytes].windows(words.len()).any(|some| some == words.as_bytes()) {
                    server.readable().await.ok();
                    return None;
                }
                continue;
            }
            bytes = server.read(&mut said) => {
                let bytes = bytes.ok().filter(|bytes| *bytes > 0)?;
                client.write_all(&said[..bytes]).await.ok()?;
                continue;
            }
            changed = network.changed() => changed.ok()?,
        }
        network.wait_for(|now| *now != Network::Silent).await.ok()?;
        if *network.borrow() == Network::Cut {
            return None;
        }
    }
}
