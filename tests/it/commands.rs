//! The commands beside `serve`: `token`, `packages`, `config`, `--help`; and the development key.

use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt, time::Instant};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::{Client as Http, Method};
use serde_json::{Value, json};
use switchboard::config::SETTINGS;
use tempfile::TempDir;

use crate::support::{
    Client,
    process::{Process, finish, run, switchboard, token},
};

fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap()
}

async fn status(process: &Process, method: Method, token: &str) -> u16 {
    let request = Http::new().request(method, format!("http://{}/authors", process.addr));
    let request = request.bearer_auth(token).json(&json!({ "name": "Ann" }));
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn token_prints_a_token_that_works_and_nothing_else() {
    let data = TempDir::new().unwrap();
    let environment = [("DATA_DIR", data.path().to_str().unwrap())];
    let ran = run(&["token", "--user", "ann", "--ttl", "5m"], &environment);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let all = ran.stdout.strip_suffix('\n').unwrap();
    assert_eq!(all.split('.').count(), 3);
    assert!(all.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)), "{all}");
    let said = claims(all);
    assert_eq!(said["exp"].as_u64().unwrap() - said["iat"].as_u64().unwrap(), 300);
    assert_eq!(said["preferred_username"], "ann");

    let process = Process::start(data.path(), &[]);
    assert_eq!(status(&process, Method::POST, all).await, 201);
    let mut client = Client::open(process.addr, "/web").await;
    assert_eq!(client.authenticate(all).await["user"], "ann");

    let reader = token(data.path(), &["--user", "ann", "--roles", "get-authors"]);
    assert_eq!(status(&process, Method::GET, &reader).await, 200);
    assert_eq!(status(&process, Method::POST, &reader).await, 403);
    let nobody = token(data.path(), &["--user", "ann", "--roles", ""]);
    assert_eq!(status(&process, Method::GET, &nobody).await, 403);
}

#[test]
fn a_user_has_the_same_subject_from_every_key() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let subject = |data: &TempDir, user| {
        let claims = claims(&token(data.path(), &["--user", user]));
        claims["sub"].as_str().unwrap().to_owned()
    };
    assert_eq!(subject(&here, "ann"), subject(&there, "ann"));
    assert_ne!(subject(&here, "ann"), subject(&here, "bea"));
    let key = |data: &TempDir| fs::read(data.path().join("dev-key.pem")).unwrap();
    assert_ne!(key(&here), key(&there));
}

#[test]
fn token_refuses_what_it_cannot_read() {
    let data = TempDir::new().unwrap();
    let environment = [("DATA_DIR", data.path().to_str().unwrap())];
    let ran = run(&["token", "--user", "ann", "--ttl", "soon"], &environment);
    assert_eq!(ran.code, Some(64));
    assert!(ran.stderr.contains("--ttl: \"soon\"") && ran.stderr.contains("allowed"), "{ran:?}");
    let ran = run(&["token"], &environment);
    assert!(ran.code != Some(0) && ran.stderr.contains("--user"), "{ran:?}");
}

#[tokio::test]
async fn processes_that_start_at_once_agree_on_one_key_of_their_owner_alone() {
    let data = TempDir::new().unwrap();
    let folder = data.path().join("not/yet/there");
    let environment = [("DATA_DIR", folder.to_str().unwrap())];
    let started = Instant::now();
    let servers: Vec<_> = (0..4).map(|_| Process::spawn(&folder, &[])).collect();
    let tokens: Vec<_> = (0..6)
        .map(|_| switchboard(&["token", "--user", "ann"], &environment).spawn().unwrap())
        .collect();
    let tokens: Vec<_> = tokens.into_iter().map(finish).collect();
    for server in servers {
        let server = Process::ready(server, started);
        for ran in &tokens {
            assert_eq!(ran.code, Some(0), "{ran:?}");
            assert_eq!(status(&server, Method::GET, ran.stdout.trim()).await, 200);
        }
    }
    let mode = fs::metadata(folder.join("dev-key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let left: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("switchboard.db") && name != "audit")
        .collect();
    assert_eq!(left, ["dev-key.pem"], "no drafts are left");
}

#[test]
fn packages_lists_every_package_with_its_role() {
    let ran = run(&["packages"], &[]);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
    let rows: Vec<Vec<&str>> =
        ran.stdout.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(
        rows,
        [
            ["pkg_id", "name", "roles"],
            ["1", "GET_AUTHORS", "get-authors"],
            ["2", "GET_PAGINATED_AUTHORS", "get-authors"],
            ["3", "CREATE_AUTHOR", "create-author"],
            ["4", "UPDATE_AUTHOR", "update-author"],
            ["5", "DELETE_AUTHOR", "delete-author"],
            ["100", "ECHO", "-"],
        ]
    );
}

/// What `switchboard config` prints: key → value and source.
fn effective(args: &[&str], environment: &[(&str, &str)]) -> HashMap<String, (String, String)> {
    let ran = run(args, environment);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
    ran.stdout
        .lines()
        .map(|line| {
            let (key, rest) = line.split_once(" = ").unwrap();
            let (value, source) = rest.rsplit_once(" # ").unwrap();
            (key.to_owned(), (value.trim_matches('"').to_owned(), source.to_owned()))
        })
        .collect()
}

#[test]
fn flags_win_over_the_environment_over_the_file_over_defaults() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("switchboard.toml");
    let text = "ws_send_queue = 11\nws_max_strikes = 12\nws_max_in_flight = 13\n\
                ws_query_token = true\nallowed_hosts = [\"a.example\", \"b.example\"]\n";
    fs::write(&file, text).unwrap();
    let environment = [
        ("CONFIG_FILE", file.to_str().unwrap()),
        ("WS_SEND_QUEUE", "21"),
        ("WS_MAX_STRIKES", "22"),
    ];
    for args in [&["config", "--ws-send-queue", "31"], &["--ws-send-queue", "31", "config"]] {
        let config = effective(args, &environment);
        for (key, value, source) in [
            ("ws_send_queue", "31", "flag"),
            ("ws_max_strikes", "22", "environment"),
            ("ws_max_in_flight", "13", "file"),
            ("ws_query_token", "true", "file"),
            ("allowed_hosts", "a.example,b.example", "file"),
            ("jwt_leeway", "10s", "default"),
        ] {
            assert_eq!(config[key], (value.to_owned(), source.to_owned()), "{key}");
        }
        assert_eq!(config.len(), SETTINGS.len());
    }
    let later = ["--ws-send-queue", "1", "config", "--ws-send-queue", "2"];
    assert_eq!(effective(&later, &[])["ws_send_queue"].0, "2");
}

#[test]
fn config_never_shows_a_password() {
    for url in [
        "mysql://ann:hush-hush@db.example/x",
        "postgres://ann:hush-hush@odd@db.example/x?sslmode=maybe",
        "postgres://db.example/x?sslpassword=hush-hush&user=ann",
        "ann:hush-hush@db.example",
    ] {
        for args in [&["config"][..], &["config", "--database-url", url], &["serve"]] {
            let ran = run(args, &[("DATABASE_URL", url)]);
            assert_eq!(ran.code, Some(64), "{ran:?}");
            assert!(!(ran.stdout + &ran.stderr).contains("hush-hush"), "{url}: {args:?}");
        }
    }
    for (url, shown) in [
        ("postgres://ann:hush-hush@db.example/x", "postgres://ann:***@db.example/x"),
        (
            "postgres://ann:hush-hush@odd@db.example/x?sslmode=require",
            "postgres://ann:***@db.example/x?sslmode=require",
        ),
        ("postgres://db.example/x?user=ann&password=hush-hush", "user=ann&password=***"),
    ] {
        for args in [&["config"][..], &["config", "--database-url", url]] {
            let ran = run(args, &[("DATABASE_URL", url)]);
            assert_eq!(ran.code, Some(0), "{ran:?}");
            assert!(!ran.stdout.contains("hush-hush") && ran.stdout.contains(shown), "{ran:?}");
        }
    }
}

#[test]
fn help_lists_every_setting_with_its_variable_and_default() {
    for args in [&["--help"][..], &["serve", "--help"]] {
        let ran = run(args, &[]);
        assert_eq!(ran.code, Some(0));
        let help = ran.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        for setting in SETTINGS {
            assert!(help.contains(&format!("--{} ", setting.flag())), "{}", setting.name);
            assert!(help.contains(&format!("[env: {}]", setting.name)), "{}", setting.name);
        }
        for default in ["[default: 127.0.0.1:8000]", "[default: 64KiB]", "[default: empty]"] {
            assert!(help.contains(default), "{default}");
        }
    }
}
