//! Every mode for a moment against the real server, as somebody would call it; `guard` is called by
//! tests/performance.sh, and `compare`, which needs Node.js, by load/compare/run.sh.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use serde_json::Value;
use tempfile::TempDir;

const TOOL: &str = env!("CARGO_BIN_EXE_switchboard-load");

/// The server beside the tool: a run of the whole workspace has built it, another builds it here.
fn server() -> &'static Path {
    static SERVER: OnceLock<PathBuf> = OnceLock::new();
    SERVER.get_or_init(|| {
        let server = Path::new(TOOL).with_file_name("switchboard");
        if !server.exists() {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet", "--package", "switchboard", "--bin", "switchboard"]);
            assert!(build.status().unwrap().success());
        }
        server
    })
}

/// What a mode says as JSON. Its server is private, unless the arguments name one.
fn run(arguments: &[&str]) -> Value {
    let mut command = Command::new(TOOL);
    command.args(arguments).args(["--json", "-"]);
    if !arguments.contains(&"--url") {
        command.arg("--server").arg(server());
    }
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
}

fn figure(summary: &Value, key: &str) -> f64 {
    summary["figures"][key].as_f64().unwrap_or_else(|| panic!("no {key} in {summary}"))
}

fn notes(summary: &Value) -> String {
    summary["notes"].to_string()
}

#[test]
fn throughput_counts_answers_and_their_latencies_over_both_formats_and_rest() {
    for wire in ["json", "protobuf", "rest"] {
        let mix = if wire == "rest" { "1=2,3=1" } else { "100=8,1=1,3=1" };
        let summary = run(&[
            "throughput",
            "--wire",
            wire,
            "--mix",
            mix,
            "--connections",
            "5",
            "--seconds",
            "1",
            "--warm-up",
            "0.2",
        ]);
        assert!(figure(&summary, "messages_per_second") > 50.0, "{summary}");
        assert!(figure(&summary, "server_micros_per_message") > 0.0, "{summary}");
        let latencies = summary["latencies"].as_array().unwrap();
        let all = latencies.last().unwrap();
        assert_eq!(all["of"], "all");
        assert_eq!(latencies.len(), mix.split(',').count() + 1);
        assert!(all["p50_ms"].as_f64() > Some(0.0) && all["max_ms"].as_f64() > Some(0.0), "{all}");
        assert!(summary["timeline"].as_array().unwrap().len() > 1, "{summary}");
        assert!(!notes(&summary).contains("no success"), "{summary}");
    }
}

#[test]
fn latency_keeps_its_rate_and_says_when_it_cannot() {
    let seconds = ["--connections", "5", "--seconds", "1", "--warm-up", "0.2"];
    let summary = run(&[&["latency", "--rate", "200"], &seconds[..]].concat());
    let count = summary["latencies"][0]["count"].as_f64().unwrap();
    assert!((195.0..=205.0).contains(&count), "{count} of 200: {summary}");
    assert!(!notes(&summary).contains("too high"), "{summary}");

    let summary = run(&[&["latency", "--rate", "1000000"], &seconds[..]].concat());
    assert!(notes(&summary).contains("the rate was too high"), "{summary}");
}

#[test]
fn a_limit_of_the_server_is_named_with_its_setting() {
    let limited = ["throughput", "--connections", "2", "--seconds", "1", "--warm-up", "0.1"];
    let summary = run(&[&limited[..], &["--set", "WS_MESSAGE_RATE_LIMIT=60"]].concat());
    assert!(notes(&summary).contains("WS_MESSAGE_RATE_LIMIT"), "{summary}");
    let rest = [&limited[..], &["--wire", "rest", "--set", "RATE_LIMIT_PER_MINUTE=60"]].concat();
    assert!(notes(&run(&rest)).contains("RATE_LIMIT_PER_MINUTE"));
    let users =
        [&limited[..], &["--users", "1", "--set", "WS_MAX_CONNECTIONS_PER_USER=1"]].concat();
    assert!(notes(&run(&users)).contains("WS_MAX_CONNECTIONS_PER_USER"));
}

#[test]
fn connect_idle_storm_and_churn_see_every_connection() {
    for wire in ["json", "protobuf"] {
        let summary = run(&["connect", "--wire", wire, "--connections", "200"]);
        assert_eq!(figure(&summary, "connections"), 200.0);
        assert!(figure(&summary, "connects_per_second") > 10.0, "{summary}");
    }
    let summary = run(&["connect", "--connections", "50", "--rate", "100"]);
    let rate = figure(&summary, "connects_per_second");
    assert!((60.0..=110.0).contains(&rate), "{rate}");

    let summary = run(&["idle", "--connections", "300", "--seconds", "0.5"]);
    assert_eq!(figure(&summary, "connections"), 300.0);
    let memory = figure(&summary, "kib_per_connection");
    assert!((1.0..=200.0).contains(&memory), "{memory}");

    let summary = run(&["storm", "--connections", "200", "--storms", "2"]);
    assert_eq!(summary["latencies"][0]["count"], 400);

    let summary = run(&["churn", "--connections", "200", "--rounds", "1"]);
    assert!(figure(&summary, "closed_seconds") > 0.0, "{summary}");
}

#[test]
fn fanout_delivers_each_push_to_everybody_and_the_baseline_does_too() {
    let summary = run(&[
        "fanout",
        "--connections",
        "200",
        "--pushes",
        "20",
        "--rounds",
        "1",
        "--bytes",
        "50",
    ]);
    for latency in summary["latencies"].as_array().unwrap() {
        assert_eq!(latency["count"], 20, "{latency}");
    }
    assert_eq!(summary["latencies"].as_array().unwrap().len(), 2);
    assert!(figure(&summary, "bytes") > 50.0, "{summary}");
    assert!(figure(&summary, "deliveries_per_second") > 1000.0, "{summary}");
}

#[test]
fn drain_restarts_every_node_and_loses_no_request() {
    let summary = run(&[
        "drain",
        "--connections",
        "20",
        "--rate",
        "200",
        "--set",
        "DRAIN_SPREAD=200ms",
        "--set",
        "DRAIN_GRACE=100ms",
    ]);
    assert_eq!(figure(&summary, "failed"), 0.0, "{summary}");
    assert_eq!(figure(&summary, "restarts"), 2.0);
    assert!(figure(&summary, "moved") >= 20.0, "{summary}");
}

#[test]
fn soak_tells_what_is_left_when_everybody_has_gone() {
    let folder = TempDir::new().unwrap();
    let svg = folder.path().join("soak.svg");
    let summary = run(&[
        "soak",
        "--seconds",
        "3",
        "--warm-up",
        "1",
        "--settle",
        "12",
        "--connections",
        "30",
        "--rate",
        "100",
        "--storm-every",
        "1",
        "--slow",
        "2",
        "--svg",
        &svg.display().to_string(),
    ]);
    assert!(figure(&summary, "storms") >= 2.0, "{summary}");
    let returns = summary["returns"].as_array().unwrap();
    let of = |name: &str| returns.iter().find(|each| each["of"] == name).unwrap();
    for name in ["open files", "tasks (actors, sessions, timers)", "table of connections"] {
        assert_eq!(of(name)["returned"], true, "{summary}");
    }
    // Tasks of the server itself are left, and what the users have used of their limits is known.
    assert!(of("tasks (actors, sessions, timers)")["after"].as_f64() > Some(5.0), "{summary}");
    assert!(of("table of message limits")["after"].as_f64() > Some(1.0), "{summary}");
    let picture = fs::read_to_string(svg).unwrap();
    assert!(picture.starts_with("<svg xmlns") && picture.contains("runtime_tasks_alive"));
    let point = summary["timeline"].as_array().unwrap().last().unwrap();
    assert_eq!(
        point["series"].as_array().unwrap().len(),
        summary["series"].as_array().unwrap().len()
    );
}

/// Postgres and Redis are there: the tests of the server, which come first, install them.
#[test]
fn costs_are_compared_over_rounds() {
    for (mode, rows) in [
        ("bench", ["| bare |", "| switchboard / bare |"]),
        ("database", ["| SQLite |", "| Postgres |"]),
        ("audit", ["| without a trail |", "| with a trail / without a trail |"]),
        ("redis", ["| without Redis |", "| with Redis / without Redis |"]),
    ] {
        let mut command = Command::new(TOOL);
        command.args([mode, "--rounds=1", "--seconds=0.5", "--server"]).arg(server());
        if mode == "bench" {
            command.arg("--connections=1000");
        }
        let output = command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{mode}: {errors}");
        let table = String::from_utf8(output.stdout).unwrap();
        for row in rows {
            assert!(table.contains(row), "{mode}: no {row} in {table}");
        }
    }
}

/// A server that is not the tool's own, gone with the test.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Other {
    /// Starts one on a free port with the limits that it has by default.
    #[expect(clippy::disallowed_methods, reason = "nothing can be polled before the port is open")]
    fn start(folder: &Path, settings: &[(&str, &str)]) -> (Self, String) {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut serve = Command::new(server());
        serve.env("DATA_DIR", folder).env("LISTEN_ADDR", format!("127.0.0.1:{port}"));
        serve.envs(settings.iter().copied());
        let child = serve.stdin(Stdio::null()).stdout(log).stderr(Stdio::null()).spawn();
        let other = Self(child.unwrap());
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        (other, format!("http://127.0.0.1:{port}"))
    }
}

/// A file with tokens for a server on the same folder.
fn tokens(folder: &Path, users: &[&str]) -> String {
    let token = |user: &&str| {
        let mut token = Command::new(server());
        let output = token.args(["token", "--user", user]).env("DATA_DIR", folder).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let file = folder.join("tokens");
    fs::write(&file, users.iter().map(token).collect::<String>()).unwrap();
    file.display().to_string()
}

#[test]
fn another_server_is_measured_by_its_url_with_tokens_of_a_file() {
    let folder = TempDir::new().unwrap();
    let tokens = tokens(folder.path(), &["ann"]);
    // So that connections stay that were told of the limit.
    let (other, url) = Other::start(folder.path(), &[("WS_MAX_STRIKES", "0")]);
    let html = folder.path().join("page.html");
    let pid = other.0.id().to_string();
    let arguments = ["throughput", "--url", &url, "--tokens", &tokens, "--connections", "2"];
    let output = ["--pid", &pid, "--seconds", "1", "--html", &html.display().to_string()];
    let summary = run(&[&arguments[..], &output].concat());
    // 6,000 a minute is what it allows ann.
    assert!(notes(&summary).contains("WS_MESSAGE_RATE_LIMIT"), "{summary}");
    let page = fs::read_to_string(html).unwrap();
    assert!(page.contains("<svg") && page.contains("throughput"), "{page}");
    assert!(
        !page.contains("http-equiv") && !page.contains("src="),
        "the page needs something else"
    );
}

#[test]
fn limits_of_a_server_with_its_defaults_shape_a_result_and_are_named() {
    let folder = TempDir::new().unwrap();
    let tokens = tokens(folder.path(), &["ann", "ben"]);
    let (_other, url) = Other::start(folder.path(), &[]);
    // Two users may have five connections each, and 6,000 messages a minute.
    let arguments = ["throughput", "--url", &url, "--tokens", &tokens, "--seconds", "1"];
    let said = notes(&run(&[&arguments[..], &["--connections", "20"]].concat()));
    assert!(said.contains("a limit of the server shaped this result"), "{said}");
    for limit in ["WS_MESSAGE_RATE_LIMIT", "WS_MAX_CONNECTIONS_PER_USER", "WS_MAX_STRIKES"] {
        assert!(said.contains(limit), "{limit}: {said}");
    }
    let said = notes(&run(&[&arguments[..], &["--wire", "rest"]].concat()));
    assert!(said.contains("RATE_LIMIT_PER_MINUTE"), "{said}");
}

mod keycloak {
    use super::*;

    #[test]
    #[ignore = "needs Keycloak: tests/keycloak.sh"]
    fn users_of_a_real_keycloak_log_in_to_be_measured() {
        let folder = TempDir::new().unwrap();
        let keycloak = std::env::var("KEYCLOAK_TEST_URL").unwrap();
        let settings = [
            ("KEYCLOAK_BASE_URL", &*keycloak),
            ("KEYCLOAK_REALM", "switchboard"),
            ("KEYCLOAK_CLIENT_SECRET", "development"),
        ];
        let (_other, url) = Other::start(folder.path(), &settings);
        let logins = folder.path().join("logins");
        fs::write(&logins, "admin-ann:admin-ann-development\neditor-eve:editor-eve-development\n")
            .unwrap();
        let logins = logins.display().to_string();
        let arguments = ["throughput", "--url", &url, "--logins", &logins, "--mix", "1=9,3=1"];
        let few = ["--connections", "4", "--in-flight", "1", "--seconds", "1"];
        let summary = run(&[&arguments[..], &few].concat());
        assert_eq!(figure(&summary, "connections"), 4.0, "{summary}");
        assert!(figure(&summary, "messages_per_second") > 10.0, "{summary}");
        // Both may read authors and add some.
        assert!(!notes(&summary).contains("permission"), "{summary}");
    }
}

/// Runs an attack for a moment: the outcomes, and what is wrong in words; nothing if all bounds hold.
fn abuse(arguments: &[&str]) -> (Value, String) {
    let mut command = Command::new(TOOL);
    command.args(["abuse", "--seconds", "2", "--warm-up", "0.2", "--rate", "200", "--json", "-"]);
    let output = command.args(arguments).arg("--server").arg(server()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let outcomes = serde_json::from_slice(&output.stdout);
    let outcomes = outcomes.unwrap_or_else(|error| panic!("{arguments:?}: {error}: {errors}"));
    (outcomes, if output.status.success() { String::new() } else { errors })
}

#[test]
fn abuse_attacks_from_one_address_and_counts_what_honest_clients_miss() {
    let kinds = "back-channel,silent-sockets,json-pings,malformed";
    let (outcomes, _) = abuse(&["--kinds", kinds, "--connections", "7"]);
    let outcomes = outcomes.as_array().unwrap();
    assert_eq!(outcomes.len(), 4);
    for outcome in outcomes {
        // Next to the other tests the attacker has little of its core.
        assert!(outcome["report"]["attempts"].as_f64() >= Some(1.0), "{outcome}");
        assert!(outcome["before"]["answers"].as_f64() >= Some(390.0), "{outcome}");
        assert_eq!(outcome["during"]["missed"], 0, "{outcome}");
    }
    let reasons = |index: usize| outcomes[index]["report"]["reasons"].to_string();
    assert!(reasons(0).contains("HTTP 4"), "{}", reasons(0));
    assert!(outcomes[1]["report"]["most_open"].as_f64() >= Some(1.0), "{}", outcomes[1]);
    assert_eq!(outcomes[2]["connections"], 7);
    assert!(reasons(3).contains("close 1008"), "{}", reasons(3));
}

#[test]
fn abuse_fails_where_a_bound_is_missed() {
    let arguments = ["--kinds", "pongs", "--set", "WS_MESSAGE_RATE_LIMIT=2"];
    let (_, faults) = abuse(&arguments);
    assert!(faults.contains("honest answers were missing before it"), "{faults}");
}

#[test]
fn a_soak_may_be_attacked_meanwhile() {
    let times = ["--seconds", "1", "--warm-up", "0.5", "--settle", "0.1", "--storm-every", "1"];
    let crowd = ["--connections", "10", "--rate", "50", "--slow", "0"];
    let summary = run(&[&["soak", "--abuse"], &times[..], &crowd[..]].concat());
    assert!(figure(&summary, "attacks") >= 1.0, "{summary}");
    assert!(figure(&summary, "answers") > 10.0, "{summary}");
    assert!(notes(&summary).contains("127.0.0.66"), "{summary}");
}
