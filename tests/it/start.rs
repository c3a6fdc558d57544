//! The start of a server: it says what it waits for and what keeps it, and a signal ends each of its phases.

use std::{
    fs::{self, File},
    net::TcpListener,
    process::{Child, Command},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::sleep;

use crate::support::process::{Process, Ran, finish, run};

/// Settings by name.
type Settings<'a> = &'a [(&'a str, &'a str)];

const LISTEN: (&str, &str) = ("LISTEN_ADDR", "127.0.0.1:0");

fn messages(ran: &Ran) -> Vec<String> {
    let lines = ran.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| line["message"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn listening_is_the_last_that_a_start_says() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[("OPS_ADDR", "127.0.0.1:0")]);
    let address = process.addr.to_string();
    process.signal("-TERM");
    let ran = process.end();
    let messages = messages(&ran);
    let at = |message: &str| messages.iter().position(|said| said == message);
    assert!(at("ready") < at("listening") && at("listening") < at("draining"), "{messages:?}");
    let line = ran.stdout.lines().nth(at("listening").unwrap()).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((&line["address"], &line["development_tokens"]), (&address.into(), &true.into()));
    assert!(line["ops_address"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_waits_for_a_lock_says_so_and_gives_up() {
    let data = TempDir::new().unwrap();
    let folder = data.path().to_str().unwrap();
    let lock = File::open(data.path()).unwrap();
    lock.lock().unwrap();
    let settings = [LISTEN, ("DATA_DIR", folder), ("DB_START_TIMEOUT", "500ms")];
    let serve = run(&["serve"], &settings);
    assert_eq!(
        messages(&serve),
        ["waiting for another process that has locked the folder of the database"]
    );
    let migrate = run(&["migrate"], &settings);
    assert!(migrate.stdout.contains("waiting for another process"), "{migrate:?}");
    for ran in [serve, migrate] {
        assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{ran:?}");
        for word in [folder, "500ms (DB_START_TIMEOUT)", "fuser"] {
            assert!(ran.stderr.contains(word), "no {word} in {ran:?}");
        }
    }
    // What changes nothing waits for nobody: it finds that there is no database.
    let ran = run(&["serve"], &[LISTEN, ("DATA_DIR", folder), ("DB_AUTO_MIGRATE", "false")]);
    assert!(ran.stderr.contains("switchboard migrate"), "{ran:?}");

    let waiting = Process::spawn(data.path(), &[]);
    await_handler(&waiting).await;
    lock.unlock().unwrap();
    let process = Process::ready(waiting, Instant::now());
    process.signal("-TERM");
    assert_eq!(process.end().code, Some(0));
}

/// Waits until a process has handlers of SIGTERM: before that it ends at once by itself.
async fn await_handler(child: &Child) {
    let started = Instant::now();
    let handles = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() >> 14 & 1 == 1
    };
    while !handles() {
        assert!(started.elapsed() < Duration::from_secs(10), "it handles no signals");
        sleep(Duration::from_millis(10)).await;
    }
}

fn fifo(path: &std::path::Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_each_phase_of_the_start() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let postgres = format!("postgres://ann:hush-hush@{}/x", silent.local_addr().unwrap());
    type Prepare = fn(&std::path::Path) -> Option<File>;
    let phases: [(&str, Settings<'_>, Prepare); 4] = [
        ("the lock on the folder", &[], |data| {
            let lock = File::open(data).unwrap();
            lock.lock().unwrap();
            Some(lock)
        }),
        ("the development key", &[], |data| {
            fifo(&data.join("dev-key.pem"));
            None
        }),
        ("the spool", &[], |data| {
            fs::create_dir(data.join("audit")).unwrap();
            fifo(&data.join("audit/0.spool"));
            None
        }),
        ("Postgres", &[("DATABASE_URL", &*postgres)], |_| None),
    ];
    let begun: Vec<_> = phases
        .into_iter()
        .map(|(name, settings, prepare)| {
            let data = TempDir::new().unwrap();
            let held = prepare(data.path());
            (name, Process::spawn(data.path(), settings), data, held)
        })
        .collect();
    for (_, child, ..) in &begun {
        await_handler(child).await;
    }
    // From there to what keeps it.
    sleep(Duration::from_millis(500)).await;
    for (name, child, ..) in begun {
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let sent = Instant::now();
        let ran = finish(child);
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{name}: {ran:?}");
        assert!(sent.elapsed() < Duration::from_secs(5), "{name}: {:?}", sent.elapsed());
        let messages = messages(&ran);
        assert!(messages.iter().any(|said| said == "stopped before the start was done"), "{name}");
        assert!(!messages.iter().any(|said| said == "listening"), "{name}: {messages:?}");
    }
}

#[test]
fn an_error_of_the_start_says_once_what_was_tried_why_not_and_what_to_do() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).display().to_string();
    let (file, no_key) = (path("file"), path("dev-key.pem"));
    for path in [&file, &no_key] {
        fs::write(path, "neither a database nor a key ".repeat(100)).unwrap();
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (data, below, url) = (path("data"), format!("{file}/below"), format!("sqlite://{file}"));
    fs::create_dir(&data).unwrap();
    fs::write(path("data/audit"), "no folder").unwrap();
    let fresh = path("fresh");
    let cases: [(Settings<'_>, [&str; 3]); 6] = [
        (&[("LISTEN_ADDR", &address)], [&address, "in use", "set LISTEN_ADDR"]),
        (&[("DATA_DIR", &below)], [&below, "Not a directory", "set DEV_KEY_FILE"]),
        (&[("DATABASE_URL", &url)], [&file, "file is not a database", "switchboard doctor"]),
        (&[("DEV_KEY_FILE", &no_key)], [&no_key, "no EC private key", "set DEV_KEY_FILE"]),
        (&[("DATA_DIR", &data)], ["data/audit", "Not a directory", "set DATA_DIR"]),
        (
            &[
                ("DATABASE_URL", "postgres://ann:hush-hush@127.0.0.1:1/x"),
                ("DB_START_TIMEOUT", "1s"),
            ],
            ["postgres://ann:***@127.0.0.1:1/x", "Connection refused", "DB_START_TIMEOUT"],
        ),
    ];
    for (settings, words) in cases {
        for format in ["json", "human"] {
            let own = [("LOG_FORMAT", format), LISTEN, ("DATA_DIR", &*fresh)];
            let ran = run(&["serve"], &[&own, settings].concat());
            assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{ran:?}");
            assert!(!ran.stdout.contains("listening"), "{ran:?}");
            let said = match format {
                "human" => ran.stderr.trim().to_owned(),
                _ => {
                    let line: Value = serde_json::from_str(&ran.stderr).unwrap();
                    assert_eq!(
                        (&line["level"], &line["environment"]),
                        (&"ERROR".into(), &"dev".into())
                    );
                    assert!(
                        line["timestamp"].is_string() && line["message"] == "ended by an error"
                    );
                    line["error"].as_str().unwrap().to_owned()
                }
            };
            assert!(!said.contains("hush-hush"));
            for word in words {
                assert!(said.contains(word), "no {word} in {said}");
            }
            // The reason, once.
            assert_eq!(said.matches(words[1]).count(), 1, "{said}");
        }
    }
}

#[test]
fn faults_of_the_configuration_are_json_where_the_log_is() {
    let settings = [("LOG_FORMAT", "json"), ("ENV", "staging"), ("WS_SEND_QUEUE", "many"), LISTEN];
    let ran = run(&["serve"], &settings);
    let line: Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(
        (ran.code, &line["level"], &line["environment"]),
        (Some(64), &"ERROR".into(), &"staging".into())
    );
    assert!(line["error"].as_str().unwrap().contains("WS_SEND_QUEUE: \"many\""), "{line}");
    let human = [("LOG_FORMAT", "human"), settings[2]];
    assert!(run(&["serve"], &human).stderr.starts_with("WS_SEND_QUEUE: \"many\""));
}
