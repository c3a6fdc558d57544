//! What commands print and where they refuse: a reader that is gone, a full disk, a file that is not there,
//! nonsense.

use std::{
    fs::{self, File},
    io::pipe,
    net::TcpListener,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::json;
use switchboard::{
    config::Config,
    handlers::{Package, packages},
    server::{self, Listeners, ServeError},
};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::support::{
    Client, Closed, TestServer,
    handlers::Gate,
    process::{Process, Ran, finish, run, switchboard},
    programs::program,
};

/// Every command that prints, and what it needs beside a `DATA_DIR` with a database.
const PRINTERS: [&[&str]; 10] = [
    &["packages"],
    &["config"],
    &["doctor"],
    &["migrate"],
    &["token", "--user", "ann"],
    &["audit", "erase", "--subject", "7a1f", "--dry-run"],
    &["audit", "export"],
    &["healthcheck"],
    &["--help"],
    &["--version"],
];

/// Runs each of them with a standard output beside a server that serves.
fn printed(stdout: impl Fn() -> Stdio) -> Vec<(&'static [&'static str], Ran)> {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[]);
    let address = process.addr.to_string();
    let settings = [("DATA_DIR", data.path().to_str().unwrap()), ("LISTEN_ADDR", &*address)];
    let run = |args: &'static [&'static str]| {
        let mut command = switchboard(args, &settings);
        (args, finish(command.stdout(stdout()).spawn().unwrap()))
    };
    PRINTERS.into_iter().map(run).collect()
}

#[test]
fn a_reader_that_is_gone_ends_a_command_quietly() {
    let gone = || {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        writer.into()
    };
    for (args, ran) in printed(gone) {
        // `token` alone says something beside: whose key it is.
        let quiet =
            ran.stderr.lines().all(|line| line.starts_with("signed with the development key"));
        assert!(ran.code == Some(0) && quiet, "{args:?}: {ran:?}");
    }
}

#[test]
fn a_full_disk_is_an_error_and_no_panic() {
    for (args, ran) in printed(|| File::options().write(true).open("/dev/full").unwrap().into()) {
        assert_eq!(ran.code, Some(1), "{args:?}: {ran:?}");
        let said = ran.stderr.starts_with("cannot write ");
        assert!(said && ran.stderr.contains(": No space left on device"), "{args:?}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
    }
}

/// A server that warns and then ends, on a terminal or not: its standard output.
fn log_of_an_end(terminal: bool, more: &[(&str, &str)]) -> String {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let data = TempDir::new().unwrap();
    let settings = [
        ("LISTEN_ADDR", &*address),
        ("DATA_DIR", data.path().to_str().unwrap()),
        ("LOG_FORMAT", "human"),
        ("WS_MAX_CONNECTIONS", "1000000000"),
    ];
    let settings = [&settings, more].concat();
    let ran = if terminal {
        let script = program(&["script"], "bsdutils", "the tests need script, of util-linux");
        let serve = format!("{} serve", env!("CARGO_BIN_EXE_switchboard"));
        let mut command = Command::new(script);
        command.args(["-qec", &serve, "/dev/null"]).env_clear().envs(settings);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command.spawn().unwrap())
    } else {
        run(&["serve"], &settings)
    };
    assert!(ran.stdout.contains("WARN"), "{ran:?}");
    ran.stdout
}

#[test]
fn a_log_has_colours_on_a_terminal_alone_and_not_with_no_color() {
    let colour = "\u{1b}[";
    assert!(!log_of_an_end(false, &[]).contains(colour));
    assert!(log_of_an_end(true, &[]).contains(colour));
    assert!(log_of_an_end(true, &[("NO_COLOR", "")]).contains(colour), "an empty value is none");
    assert!(!log_of_an_end(true, &[("NO_COLOR", "1")]).contains(colour));
}

#[test]
fn commands_that_read_the_trail_name_the_file_that_is_not_there_and_make_none() {
    let folder = TempDir::new().unwrap();
    let commands: [&[&str]; 2] =
        [&["audit", "export"], &["audit", "erase", "--subject", "7a1f", "--dry-run"]];
    for command in commands {
        let mut switchboard = switchboard(command, &[]);
        let ran = finish(switchboard.current_dir(folder.path()).spawn().unwrap());
        assert_eq!((ran.code, &*ran.stdout), (Some(1), ""), "{ran:?}");
        let path = folder.path().canonicalize().unwrap().join("data/switchboard.db");
        let path = path.to_str().unwrap();
        assert!(ran.stderr.contains(path) && ran.stderr.contains("DATA_DIR"), "{ran:?}");
        assert!(!ran.stderr.contains("migrate"), "{ran:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{command:?} made something");
    }
    // What serves is told what makes it.
    let data = folder.path().join("data");
    let settings = [
        ("DATA_DIR", data.to_str().unwrap()),
        ("DB_AUTO_MIGRATE", "false"),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ];
    let ran = run(&["serve"], &settings);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let file = data.join("switchboard.db");
    assert!(ran.stderr.contains(file.to_str().unwrap()), "{ran:?}");
    assert!(ran.stderr.contains("switchboard migrate") && !file.exists(), "{ran:?}");
}

#[test]
fn a_token_for_nobody_or_for_no_time_is_refused() {
    let data = TempDir::new().unwrap();
    let settings = [("DATA_DIR", data.path().to_str().unwrap())];
    for (args, words) in [
        (&["--user", ""], &["--user: \"\"", "a name that is not empty"]),
        (&["--user", "  "], &["--user: \"  \"", "a name that is not empty"]),
        (&["--user", "ann\nb"], &["--user: \"ann\\nb\"", "control characters"]),
    ] {
        refused(&run(&[&["token"], &args[..]].concat(), &settings), words);
    }
    for ttl in ["0", "0s", "999ms"] {
        let ran = run(&["token", "--user", "ann", "--ttl", ttl], &settings);
        refused(&ran, &[&format!("--ttl: {ttl:?}"), "at least 1s"]);
    }
    assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0, "no key was made");
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!((ran.code, &*ran.stdout), (Some(64), ""), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "no {word} in {ran:?}");
    }
}

#[tokio::test]
async fn two_packages_of_one_id_or_a_reserved_id_end_the_start() {
    let another = |id, name| Package::new(id, name, &[], Gate::closed());
    for (package, words) in [
        (another(3, "SECOND"), ["3", "CREATE_AUTHOR and SECOND"]),
        (another(999, "LAST"), ["999", "LAST"]),
        (another(0, "ZERO"), ["0", "ZERO"]),
    ] {
        let data = TempDir::new().unwrap();
        let folder = data.path().to_str().unwrap();
        let config = Config::read(|name| match name {
            "DATA_DIR" => Some(folder.to_owned()),
            "LISTEN_ADDR" => Some("127.0.0.1:0".to_owned()),
            _ => None,
        });
        let config = config.unwrap();
        let listeners = Listeners::bind(&config.server).await.unwrap();
        let packages = [packages(), vec![package]].concat();
        let served = server::run(config, packages, listeners, std::future::pending());
        let served = timeout(Duration::from_secs(5), served).await.expect("it serves");
        let Err(ServeError::Packages(error)) = served else { panic!("{served:?}") };
        let said = error.to_string();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
}

#[tokio::test]
async fn a_client_whose_token_in_the_address_does_not_count_is_told_why() {
    let server = TestServer::start(&[("WS_AUTH_TIMEOUT", "200ms")]).await;
    for (path, told) in
        [("/web?token=a.b.c", true), ("/web?Authorization=Bearer%20a.b.c", true), ("/web", false)]
    {
        let (seen, closed) = Client::open(server.addr, path).await.until_closed().await;
        assert_eq!((closed, &seen[0]["code"]), (Closed::Code(4002), &json!("auth_timeout")));
        let msg = seen[0]["msg"].as_str().unwrap();
        assert_eq!(msg.contains("WS_QUERY_TOKEN"), told, "{path}: {msg}");
    }
    // Deployed clients send both.
    let mut client = Client::open(server.addr, "/web?token=a.b.c").await;
    client.authenticate(&server.token("ann")).await;
}
