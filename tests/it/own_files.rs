//! The files of a server: no other user can use them, and what the server's own user cannot write is told.

use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use reqwest::{Client as Http, Method};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::process::{Process, Ran, finish, program, run, serve, token};

/// The user without rights, of every Linux.
const NOBODY: u32 = 65534;
const BINARY: &str = env!("CARGO_BIN_EXE_switchboard");

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

async fn post(process: &Process, token: &str) -> u16 {
    let request = Http::new().request(Method::POST, format!("http://{}/authors", process.addr));
    let request = request.bearer_auth(token).json(&json!({ "name": "Ann" }));
    request.send().await.unwrap().status().as_u16()
}

async fn get(process: &Process, path: &str, token: &str) -> u16 {
    let url = format!("http://{}{path}", process.addr);
    Http::new().get(url).bearer_auth(token).send().await.unwrap().status().as_u16()
}

fn end(process: Process) -> Ran {
    process.signal("-TERM");
    process.end()
}

/// The lines of a log with a message.
fn lines(ran: &Ran, message: &str) -> Vec<Value> {
    let lines = ran.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["message"] == message).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_makes_is_of_its_user_alone_and_what_it_finds_is_tightened() {
    let root = TempDir::new().unwrap();
    let data = root.path().join("not/there");
    let names = ["switchboard.db", "switchboard.db-wal", "switchboard.db-shm", "dev-key.pem"];
    let modes = || {
        let folders = ["", "audit"].map(|name| mode(&data.join(name)));
        (folders, names.map(|name| mode(&data.join(name))))
    };
    let process = Process::start(&data, &[]);
    let token = token(&data, &["--user", "ann"]);
    assert_eq!(post(&process, &token).await, 201);
    assert_eq!(mode(&root.path().join("not")), 0o700);
    assert_eq!(modes(), ([0o700; 2], [0o600; 4]));
    // As an older release left them.
    for name in ["", "audit"] {
        set_mode(&data.join(name), 0o755);
    }
    for name in names {
        set_mode(&data.join(name), 0o644);
    }
    // Killed: the journals stay.
    process.signal("-KILL");
    process.end();
    let process = Process::start(&data, &[]);
    assert_eq!(modes(), ([0o700; 2], [0o600; 4]));
    assert!(lines(&end(process), "other users can use files of this server").is_empty());
}

#[test]
fn what_cannot_be_tightened_is_one_warning() {
    let data = TempDir::new().unwrap();
    fs::create_dir(data.path().join("another-program")).unwrap();
    set_mode(data.path(), 0o755);
    let ran = end(Process::start(data.path(), &[]));
    let warnings = lines(&ran, "other users can use files of this server");
    assert_eq!(warnings.len(), 1, "{}", ran.stdout);
    let folder = data.path().to_str().unwrap();
    assert_eq!((&warnings[0]["level"], &warnings[0]["files"]), (&json!("WARN"), &json!(folder)));
    assert!(warnings[0]["fix"].as_str().unwrap().contains("chmod go="), "{}", warnings[0]);
    assert_eq!(mode(data.path()), 0o755, "another program may need it");
    let ran = run(&["doctor"], &[("DATA_DIR", folder), ("LISTEN_ADDR", "127.0.0.1:0")]);
    assert!(ran.stdout.contains("warning  rights"), "{}", ran.stdout);
}

/// A folder whose database its server cannot write: for root, `nobody` serves and root owns the file.
struct Unwritable {
    data: TempDir,
    /// Of a binary that `nobody` can reach.
    _bin: TempDir,
    binary: PathBuf,
    is_root: bool,
}

impl Unwritable {
    fn new() -> Self {
        let (data, bin) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        end(Process::start(data.path(), &[]));
        let is_root = data.path().metadata().unwrap().uid() == 0;
        let binary = bin.path().join("switchboard");
        if fs::hard_link(BINARY, &binary).is_err() {
            fs::copy(BINARY, &binary).unwrap();
        }
        set_mode(bin.path(), 0o755);
        let made = Self { data, _bin: bin, binary, is_root };
        if is_root {
            for name in ["", "audit", "dev-key.pem"] {
                chown(made.data.path().join(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
            set_mode(&made.file(), 0o644);
        } else {
            set_mode(&made.file(), 0o444);
        }
        made
    }

    fn file(&self) -> PathBuf {
        self.data.path().join("switchboard.db")
    }

    fn start(&self) -> Process {
        let mut command = serve(self.binary.to_str().unwrap(), self.data.path(), &[]);
        if self.is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        Process::ready(command.spawn().unwrap(), Instant::now())
    }

    fn doctor(&self) -> Ran {
        let settings =
            [("DATA_DIR", self.data.path().to_str().unwrap()), ("LISTEN_ADDR", "127.0.0.1:0")];
        let mut command = program(self.binary.to_str().unwrap(), &["doctor"], &settings);
        if self.is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        finish(command.spawn().unwrap())
    }

    /// What the fix says.
    fn mend(&self) {
        match self.is_root {
            true => chown(self.file(), Some(NOBODY), Some(NOBODY)).unwrap(),
            false => set_mode(&self.file(), 0o644),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_be_written_is_not_ready_until_it_is_mended() {
    let place = Unwritable::new();
    let process = place.start();
    let token = token(place.data.path(), &["--user", "ann"]);
    let metrics = format!("http://{}/metrics", process.addr);
    let metrics = reqwest::get(metrics).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("\ndb_up 0\n"), "a scrape says so before anybody asks for health");
    assert_eq!(get(&process, "/health/ready", "").await, 503);
    assert_eq!(get(&process, "/health/live", "").await, 200);
    assert_eq!(get(&process, "/authors", &token).await, 200);
    assert_eq!(post(&process, &token).await, 503);

    let file = place.file().display().to_string();
    let words = match place.is_root {
        true => ["belongs to root and has the mode 644".to_owned(), format!("chown nobody {file}")],
        false => ["has the mode 444".to_owned(), format!("chmod u+rwX {file}")],
    };
    let doctor = place.doctor();
    assert_eq!(doctor.code, Some(1), "{doctor:?}");
    let said = doctor.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    for word in words.iter().chain([&file]) {
        assert!(said.contains(&**word), "no {word} in {said}");
    }
    assert!(!said.contains("can be written"), "{said}");

    place.mend();
    // An answer is good for all who probe within a quarter of a second.
    let started = Instant::now();
    while get(&process, "/health/ready", "").await != 200 {
        assert!(started.elapsed() < Duration::from_secs(5), "it is still not ready");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(post(&process, &token).await, 201, "without a restart");

    let ran = end(process);
    let errors = lines(&ran, "the database cannot be written");
    assert_eq!(errors.len(), 1, "{}", ran.stdout);
    let said = format!("{} {}", errors[0]["error"], errors[0]["fix"]);
    for word in words.iter().chain([&file]) {
        assert!(said.contains(&**word), "no {word} in {said}");
    }
}

#[test]
fn a_database_that_cannot_be_written_and_has_to_be_migrated_ends_the_start_with_what_mends_it() {
    let place = Unwritable::new();
    // Without tables.
    let rights = mode(&place.file());
    set_mode(&place.file(), 0o644);
    fs::write(place.file(), "").unwrap();
    set_mode(&place.file(), rights);
    let mut command = serve(place.binary.to_str().unwrap(), place.data.path(), &[]);
    if place.is_root {
        command.uid(NOBODY).gid(NOBODY);
    }
    let ran = finish(command.spawn().unwrap());
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{ran:?}");
    let file = place.file().display().to_string();
    let fix = if place.is_root { "chown nobody" } else { "chmod u+rwX" };
    for word in [&*file, fix] {
        assert!(ran.stderr.contains(word), "no {word} in {ran:?}");
    }
}
