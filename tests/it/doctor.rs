//! `switchboard doctor`: each broken set-up is named with what fixes it.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    thread::spawn,
    time::{Duration, Instant},
};

use jsonwebtoken::Algorithm;
use serde_json::json;
use tempfile::TempDir;

use crate::support::{
    issuer::{Issuer, Mood, SigningKey, now},
    process::{Process, Ran, run, token},
};

/// Runs the doctor with an empty data directory, and settings by name.
pub(crate) fn doctor(settings: &[(&str, &str)], args: &[&str]) -> Ran {
    let data = TempDir::new().unwrap();
    let folder = data.path().join("data");
    let own = [("LISTEN_ADDR", "127.0.0.1:0"), ("DATA_DIR", folder.to_str().unwrap())];
    let ran = run(&[&["doctor"], args].concat(), &[&own, settings].concat());
    assert!(!folder.exists(), "the doctor made something");
    assert_eq!(ran.stderr, "");
    ran
}

/// Asks a doctor that trusts an issuer about a token.
pub(crate) fn asked(issuer: &Issuer, settings: &[(&str, &str)], token: &str, more: &[&str]) -> Ran {
    let url = issuer.url();
    let settings = [&[("OIDC_ISSUER", &*url)], settings].concat();
    let ran = doctor(&settings, &[&["--token", token], more].concat());
    for part in token.split('.').filter(|part| part.len() > 16) {
        assert!(!ran.stdout.contains(part), "{}", ran.stdout);
    }
    ran
}

/// The line that begins so, with the lines that belong to it.
pub(crate) fn entry(ran: &Ran, start: &str) -> String {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut entries: Vec<String> = Vec::new();
    for line in ran.stdout.lines() {
        match entries.last_mut().filter(|_| line.starts_with(' ')) {
            Some(entry) => *entry += &format!(" {}", words(line)),
            None => entries.push(words(line)),
        }
    }
    let found = entries.into_iter().find(|entry| entry.starts_with(start));
    found.unwrap_or_else(|| panic!("no line {start}: {}", ran.stdout))
}

/// The run found a fault, which begins so and has these words.
pub(crate) fn names(ran: &Ran, start: &str, words: &[&str]) {
    assert_eq!(ran.code, Some(1), "{}", ran.stdout);
    let entry = entry(ran, &format!("fault {start}"));
    for word in words {
        assert!(entry.contains(word), "no {word} in: {entry}");
    }
}

pub(crate) fn healthy(ran: &Ran, lines: &[&str]) {
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    assert!(ran.stdout.ends_with("0 faults, 0 warnings\n"), "{}", ran.stdout);
    for line in lines {
        entry(ran, line);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_set_up_is_ok_in_every_line() {
    let checks = ["ok configuration", "ok address", "ok files", "ok database"];
    healthy(&doctor(&[], &[]), &[&checks[..], &["ok dev issuer"]].concat());

    let issuer = Issuer::start().await;
    let token = issuer.token(json!({}));
    let ran = asked(&issuer, &[], &token, &["--pkg", "3"]);
    let provided = ["ok provider", "ok clock", "ok keys 1 usable: rsa (RS256)"];
    healthy(&ran, &[&checks[..], &provided].concat());
    let said = entry(&ran, "ok token serve lets it in: ann (sub 7a1f), issued to switchboard");
    assert!(said.contains("delete-author") && said.contains("expires in"), "{said}");
    entry(&ran, "ok package 3 CREATE_AUTHOR may be called: it needs create-author, which");
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_running_server_all_is_well_and_its_files_stay_as_they_are() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[]);
    let address = process.addr.to_string();
    let token = token(data.path(), &["--user", "ann"]);
    let settings = [("LISTEN_ADDR", &*address), ("DATA_DIR", data.path().to_str().unwrap())];
    let ran = run(&["doctor", "--token", &token], &settings);
    healthy(&ran, &["ok database", "ok dev issuer", "ok token serve lets it in"]);
    assert!(entry(&ran, "ok address").contains("served by a Switchboard that runs"));
    assert!(
        entry(&ran, "ok database")
            .contains("versions are server 3, authors 2, which are the newest")
    );
    process.signal("-TERM");
    assert_eq!(process.end().code, Some(0));

    let list = || {
        let mut names: Vec<_> =
            fs::read_dir(data.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let (before, bytes) = (list(), fs::read(data.path().join("switchboard.db")).unwrap());
    healthy(&run(&["doctor"], &settings), &[]);
    assert_eq!(list(), before);
    assert_eq!(fs::read(data.path().join("switchboard.db")).unwrap(), bytes);
}

#[test]
fn a_running_server_is_probed_by_its_address() {
    let data = TempDir::new().unwrap();
    let hosts = ("ALLOWED_HOSTS", "sb.example");
    let process = Process::start(data.path(), &[hosts, ("OPS_ADDR", "")]);
    let address = process.addr.to_string();
    let settings = [hosts, ("LISTEN_ADDR", &address), ("DATA_DIR", data.path().to_str().unwrap())];
    let ran = run(&["doctor"], &settings);
    healthy(&ran, &[]);
    for path in ["/health/ready", "/metrics"] {
        let line = format!("http://{address}{path} says 200 OK");
        assert!(ran.stdout.contains(&line), "{line}: {}", ran.stdout);
    }
}

#[test]
fn a_running_server_that_refuses_probes_is_a_fault() {
    // An older server behind a list of hosts, which starts.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut head = [0; 1024];
            let read = connection.read(&mut head).unwrap();
            let refused = head[..read].starts_with(b"GET /metrics");
            let status = if refused { "400 Bad Request" } else { "503 Service Unavailable" };
            let answer = format!(
                "HTTP/1.1 {status}\r\nx-correlation-id: 1\r\npermissions-policy: none\r\n\
                 content-length: 0\r\nconnection: close\r\n\r\n"
            );
            connection.write_all(answer.as_bytes()).unwrap();
        }
    });
    let ran = doctor(&[("LISTEN_ADDR", &address)], &[]);
    assert!(entry(&ran, "warning probe").contains("not ready"));
    names(&ran, "probe", &["/metrics says 400", "Prometheus that asks by address is refused"]);
}

#[test]
fn bad_settings_are_named_all_at_once() {
    let ran = doctor(&[("WS_SEND_QUEUE", "many"), ("JWT_LEEWAY", "soon")], &[]);
    assert_eq!(ran.code, Some(64), "{ran:?}");
    for name in ["WS_SEND_QUEUE: \"many\"", "JWT_LEEWAY: \"soon\""] {
        assert!(entry(&ran, &format!("fault configuration {name}")).contains("allowed: "));
    }
    let ran = doctor(&[("ENV", "production"), ("ALLOWED_WS_ORIGINS", "https://a.example")], &[]);
    assert_eq!(ran.code, Some(64), "{ran:?}");
    let fault = entry(&ran, "fault configuration ENV: production refuses the development token");
    assert!(fault.contains("KEYCLOAK_BASE_URL"), "{fault}");
}

#[test]
fn wrong_usage_says_what_is_allowed() {
    let data = TempDir::new().unwrap();
    let settings = [("DATA_DIR", data.path().to_str().unwrap())];
    for (args, said) in [
        (&["doctor", "--pkg", "1"][..], "--token"),
        (&["doctor", "--token", "a.b.c", "--pkg", "one"], "switchboard packages"),
        (&["doctor", "--token", " "], "a token"),
        (&["doctor", "--token", "-"], "a token"),
    ] {
        let ran = run(args, &settings);
        assert_eq!(ran.code, Some(64), "{ran:?}");
        assert!(ran.stderr.contains(said), "{ran:?}");
    }
}

#[test]
fn settings_that_are_rarely_meant_are_warnings() {
    let staging = [
        ("ENV", "staging"),
        ("WS_QUERY_TOKEN", "true"),
        ("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "2048"),
        ("WS_MAX_CONNECTIONS", "1000000000"),
        ("LISTEN_ADDR", "0.0.0.0:0"),
        ("REDIS_URL", "redis://redis.example"),
    ];
    let ran = doctor(&staging, &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    assert!(entry(&ran, "warning origins").contains("ALLOWED_WS_ORIGINS"));
    assert!(entry(&ran, "warning files").contains("WS_MAX_CONNECTIONS"));
    assert!(entry(&ran, "warning cluster").contains("Postgres"));
    assert!(ran.stdout.contains("one address may take all of HTTP_MAX_CONNECTIONS"));
    assert!(ran.stdout.contains("WS_QUERY_TOKEN=false") && ran.stdout.contains("OIDC_ISSUER"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_another_program_has_is_a_fault() {
    let issuer = Issuer::start().await;
    let taken = issuer.addr.to_string();
    let ran = doctor(&[("LISTEN_ADDR", &taken)], &[]);
    names(&ran, "address", &["taken by another program", "LISTEN_ADDR"]);
}

#[test]
fn a_database_that_cannot_be_used_is_a_fault() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "no database at all ".repeat(100)).unwrap();
    let url = |path: &str| format!("sqlite://{}{path}", file.display());
    let ran = doctor(&[("DATABASE_URL", &url(""))], &[]);
    names(&ran, "database", &["not a database", "backup", "DATABASE_URL"]);
    let ran = doctor(&[("DATABASE_URL", &url("/deeper/switchboard.db"))], &[]);
    names(&ran, "database", &["not a directory", "DATA_DIR", "write"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_a_newer_program_is_a_warning_and_one_that_is_locked_a_fault() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[]);
    process.signal("-TERM");
    process.end();
    let file = data.path().join("switchboard.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file);
    let mut database = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let newer = "INSERT INTO _switchboard_migrations
         (version, description, success, checksum, execution_time) VALUES (9999, 'x', 1, x'00', 0)";
    sqlx::query(newer).execute(&mut database).await.unwrap();
    let url = format!("sqlite://{}", file.display());
    let ran = doctor(&[("DATABASE_URL", &url)], &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    let said = entry(&ran, "warning database");
    assert!(said.contains("server 9999, authors 2, newer than this program's server 3"), "{said}");
    sqlx::query("BEGIN IMMEDIATE").execute(&mut database).await.unwrap();
    // The lock of a writer is waited for, and not for long.
    let ran = doctor(&[("DATABASE_URL", &url)], &[]);
    names(&ran, "database", &["another process", "lock"]);
}

#[test]
fn a_development_key_that_is_none_is_a_fault() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("key.pem");
    fs::write(&file, "no key").unwrap();
    let ran = doctor(&[("DEV_KEY_FILE", file.to_str().unwrap())], &[]);
    names(&ran, "dev issuer", &["no EC private key", "remove it", "DEV_KEY_FILE"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_down_is_a_fault_and_is_not_waited_for() {
    let mut issuer = Issuer::start().await;
    issuer.down().await;
    let token = issuer.token(json!({ "exp": now() - 60 }));
    let ran = asked(&issuer, &[], &token, &[]);
    names(&ran, "provider", &["Connection refused", "KEYCLOAK_BASE_URL", "OIDC_ISSUER"]);
    names(&ran, "token", &["no keys"]);
    names(&ran, "time", &["expired since"]);

    issuer.up().await;
    issuer.set_mood(Mood::Slow(Duration::from_secs(60)));
    let started = Instant::now();
    let ran = asked(&issuer, &[("OIDC_TIMEOUT", "1s")], &token, &[]);
    names(&ran, "keys", &["timed out"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    issuer.set_mood(Mood::Failing);
    names(&asked(&issuer, &[], &token, &[]), "provider", &["500", "log"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_realm_that_does_not_exist_is_a_fault() {
    let issuer = Issuer::start().await;
    let base = format!("http://{}", issuer.addr);
    let ran = doctor(&[("KEYCLOAK_BASE_URL", &base), ("KEYCLOAK_REALM", "tset")], &[]);
    names(&ran, "provider", &["404", "KEYCLOAK_REALM"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discovery_document_of_another_issuer_is_a_fault() {
    let issuer = Issuer::start().await;
    for (name, words) in [
        ("https://evil.example/realms/other", &["set OIDC_ISSUER=https://evil.example"][..]),
        ("https://sso.example/realms/test", &["outside of containers", "KC_HOSTNAME"]),
        (&format!("{}/", issuer.url()), &["slash at the end"]),
    ] {
        issuer.set_name(name);
        let ran = doctor(&[("OIDC_ISSUER", &issuer.url())], &[]);
        names(&ran, "provider", &[words, &["is of the issuer", name]].concat());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_sign_nothing_are_a_fault() {
    let encryption = json!({ "use": "enc", "alg": "RSA-OAEP" });
    let key = SigningKey::new("enc", Algorithm::RS256).published_with(encryption);
    let issuer = Issuer::with(vec![key]).await;
    let ran = asked(&issuer, &[], &issuer.token(json!({})), &[]);
    names(&ran, "keys", &["no key that signs tokens", "Realm settings, Keys"]);
    names(&ran, "token", &["no keys"]);
    issuer.set_mood(Mood::Broken);
    names(&doctor(&[("OIDC_ISSUER", &issuer.url())], &[]), "keys", &["no key set"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_differ_by_more_than_the_leeway_are_a_fault() {
    let issuer = Issuer::start().await;
    let run = || doctor(&[("OIDC_ISSUER", &issuer.url())], &[]);
    issuer.set_ahead(300);
    names(&run(), "clock", &["s behind the provider's", "JWT_LEEWAY", "NTP"]);
    issuer.set_ahead(-300);
    names(&run(), "clock", &["s ahead of the provider's", "JWT_LEEWAY", "NTP"]);
    issuer.set_ahead(6);
    let ran = run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    entry(&ran, "warning clock");
}
