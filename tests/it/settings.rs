//! Values of settings: what production refuses and warns of, bytes that are no text, and lists of hosts and
//! origins.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
};

use reqwest::{Client as Http, Method};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    doctor::{doctor, entry},
    support::{
        Client, TestServer,
        issuer::Issuer,
        process::{Process, Ran, finish, run, switchboard},
    },
};

const PRODUCTION: [(&str, &str); 3] = [
    ("ENV", "production"),
    ("ALLOWED_WS_ORIGINS", "https://app.example"),
    ("OIDC_ISSUER", "https://sso.example"),
];

/// What `switchboard config` says of production with some more settings.
fn production(more: &[(&str, &str)]) -> Ran {
    run(&["config"], &[&PRODUCTION, more].concat())
}

#[test]
fn production_refuses_what_lets_strangers_in() {
    let keycloak = [("KEYCLOAK_BASE_URL", "http://kc.example"), ("KEYCLOAK_REALM", "a")];
    let without_issuer = [&keycloak[..], &[("OIDC_ISSUER", "")]].concat();
    for (more, words) in [
        (&[("OIDC_ISSUER", "http://sso.example")][..], ["OIDC_ISSUER", "http://sso.example"]),
        (&without_issuer, ["KEYCLOAK_BASE_URL", "http://kc.example/realms/a"]),
        (&[("TRUSTED_PROXIES", "10.0.0.1,0.0.0.0/0")], ["TRUSTED_PROXIES", "10.0.0.0/8"]),
        (&[("TRUSTED_PROXIES", "0.0.0.0/1,128.0.0.0/1")], ["TRUSTED_PROXIES", "ENV=production"]),
        (&[("TRUSTED_PROXIES", "::/0")], ["TRUSTED_PROXIES", "ENV=production"]),
        (&[("ALLOWED_WS_ORIGINS", "https://a.example,*")], ["ALLOWED_WS_ORIGINS", "\"*\""]),
    ] {
        let ran = production(more);
        assert_eq!(ran.code, Some(64), "{more:?}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(words.iter().all(|word| ran.stderr.contains(word)), "{}", ran.stderr);
        let staging = [more, &[("ENV", "staging")]].concat();
        assert_eq!(production(&staging).code, Some(0), "{more:?}");
    }
    for good in [
        ("OIDC_ISSUER", "http://localhost:8080"),
        ("OIDC_ISSUER", "http://127.0.0.2:8080"),
        ("OIDC_ISSUER", "http://[::1]:8080"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,172.16.0.0/12,fc00::/7"),
    ] {
        assert_eq!(production(&[good]).code, Some(0), "{good:?}");
    }
}

/// What is weak and can be tried without other machines.
const WEAK: [(&str, &str); 8] = [
    ("ALLOWED_HOSTS", "*"),
    ("CORS_ALLOWED_ORIGINS", "*"),
    ("RATE_LIMIT_PER_MINUTE", "0"),
    ("WS_MAX_STRIKES", "0"),
    ("DB_STATEMENT_TIMEOUT", "0"),
    ("AUDIT_ENABLED", "false"),
    ("JWT_LEEWAY", "61s"),
    ("WS_QUERY_TOKEN", "true"),
];

fn weak_settings() -> BTreeSet<String> {
    // And that /metrics is public.
    WEAK.iter().map(|(name, _)| (*name).to_owned()).chain(["OPS_ADDR".to_owned()]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_weak_in_production_is_a_line_at_the_start_and_one_of_the_doctor() {
    let issuer = Issuer::start().await;
    let url = issuer.url();
    let more = [("OIDC_ISSUER", &*url), ("LISTEN_ADDR", "0.0.0.0:0"), ("METRICS_RATE_LIMIT", "9")];
    let settings = [&PRODUCTION, &WEAK[..], &more].concat();
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &settings);
    process.signal("-TERM");
    let ran = process.end();
    let mut warned = Vec::new();
    for line in ran.stdout.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        if line["message"].as_str().unwrap().starts_with("weak in production: ") {
            assert_eq!(line["level"], "WARN");
            assert!(line["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{line}");
            warned.push(line["setting"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(warned.len(), weak_settings().len(), "{warned:?}");
    assert_eq!(warned.into_iter().collect::<BTreeSet<_>>(), weak_settings());

    let ran = doctor(&settings, &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    for setting in weak_settings() {
        assert!(entry(&ran, &format!("warning production {setting}: ")).contains("fix: "));
    }
    let staging = doctor(&[&settings[..], &[("ENV", "staging")]].concat(), &[]);
    assert!(!staging.stdout.contains("warning  production"), "{}", staging.stdout);
}

#[test]
fn strict_production_refuses_all_that_is_weak() {
    let strict = ("PRODUCTION_STRICT", "true");
    let ran = production(&[&WEAK[..], &[strict, ("LISTEN_ADDR", "0.0.0.0:0")]].concat());
    assert_eq!(ran.code, Some(64), "{ran:?}");
    let named: BTreeSet<_> =
        ran.stderr.lines().map(|line| line.split(':').next().unwrap().to_owned()).collect();
    assert_eq!((named, ran.stderr.lines().count()), (weak_settings(), WEAK.len() + 1));
    let ran = production(&[strict, ("ALLOWED_HOSTS", "api.example")]);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
}

/// The binary with settings of any bytes.
fn with_bytes(args: &[&OsStr], environment: &[(&str, &OsStr)]) -> Ran {
    // A default folder would be made here.
    let folder = TempDir::new().unwrap();
    let mut command = switchboard(&[], &[("LISTEN_ADDR", "127.0.0.1:0"), ("LOG_FORMAT", "human")]);
    command.args(args).envs(environment.iter().copied()).current_dir(folder.path());
    finish(command.spawn().unwrap())
}

#[test]
fn a_value_that_is_not_utf8_is_a_fault_and_never_a_default() {
    let bytes = OsStr::from_bytes(b"https://hush-hush.example\xff");
    for name in [
        "ALLOWED_WS_ORIGINS",
        "ALLOWED_HOSTS",
        "ENV",
        "WS_MAX_CONNECTIONS",
        "OIDC_ISSUER",
        "KEYCLOAK_CLIENT_SECRET",
        "DATABASE_URL",
        "LOG_LEVEL",
    ] {
        let flag = format!("--{}", name.to_lowercase().replace('_', "-"));
        let by_flag = with_bytes(&["serve".as_ref(), flag.as_ref(), bytes], &[]);
        for ran in [with_bytes(&["serve".as_ref()], &[(name, bytes)]), by_flag] {
            assert_eq!((ran.code, &*ran.stdout), (Some(64), ""), "{name}: {ran:?}");
            let named = format!("{name}: ");
            let said = ran.stderr.lines().find(|line| line.starts_with(&named));
            assert!(said.is_some_and(|line| line.contains("not UTF-8")), "{name}: {ran:?}");
            assert!(name != "KEYCLOAK_CLIENT_SECRET" || !ran.stderr.contains("hush"), "{ran:?}");
        }
    }
}

#[test]
fn paths_may_be_any_bytes() {
    let folder = TempDir::new().unwrap();
    let below = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    let data = below(b"caf\xe9 100%/data\xff");
    let settings = [("DATA_DIR", data.as_os_str())];
    let ran = with_bytes(&["migrate".as_ref()], &settings);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
    assert!(data.join("switchboard.db").exists());
    let ran = with_bytes(&["token", "--user", "ann"].map(OsStr::new), &settings);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(data.join("dev-key.pem").exists());
    let ran = with_bytes(&["doctor".as_ref()], &settings);
    assert_eq!(ran.code, Some(0), "{ran:?}");

    let trail = below(b"trail\xff");
    let flag = OsString::from_vec([b"--data-dir=", data.as_os_str().as_bytes()].concat());
    let export = ["audit".as_ref(), "export".as_ref(), &*flag, "--output".as_ref()];
    let ran = with_bytes(&[&export[..], &[trail.as_os_str()]].concat(), &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(trail.exists());

    let (config, secret) = (below(b"config\xff.toml"), below(b"secret\xff"));
    fs::write(&config, "ws_send_queue = 7\n").unwrap();
    fs::write(&secret, "hush-hush\n").unwrap();
    let settings =
        [("CONFIG_FILE", config.as_os_str()), ("KEYCLOAK_CLIENT_SECRET_FILE", secret.as_os_str())];
    let ran = with_bytes(&["config".as_ref()], &settings);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("ws_send_queue = \"7\" # file"), "{}", ran.stdout);
    assert!(ran.stdout.contains("keycloak_client_secret = \"***\""), "{}", ran.stdout);
}

#[tokio::test]
async fn hosts_origins_and_cors_are_read_alike() {
    let origins = "https://App.example.com/, https://*.example.org:443";
    let server = TestServer::start(&[
        ("ALLOWED_WS_ORIGINS", origins),
        ("CORS_ALLOWED_ORIGINS", origins),
        ("ALLOWED_HOSTS", "127.0.0.1, api.example.com:443, *.example.org/"),
    ])
    .await;
    let url = format!("http://{}/authors", server.addr);
    for (origin, allowed) in [
        ("https://app.example.com", true),
        ("https://a.b.example.org", true),
        ("https://example.org", false),
        ("https://evil-example.org", false),
        ("http://app.example.com", false),
    ] {
        let opened = Client::try_open(server.addr, "/web", &[("origin", origin)]).await;
        assert_eq!(opened.is_ok(), allowed, "{origin}");
        let answer = Http::new().get(&url).header("origin", origin).send().await.unwrap();
        let echoed = answer.headers().get("access-control-allow-origin");
        assert_eq!(echoed.is_some_and(|echoed| echoed == origin), allowed, "{origin}");
    }
    for (host, status) in [
        ("api.example.com", 401),
        ("api.example.com:8443", 401),
        ("a.example.org", 401),
        ("example.org", 400),
        ("b.example.com", 400),
    ] {
        let request = server.request(Method::GET, "/authors").header("host", host);
        assert_eq!(request.send().await.unwrap().status(), status, "{host}");
    }
}

#[test]
fn entries_that_can_never_match_are_faults_that_say_what_is_meant() {
    for (name, value, meant) in [
        ("ALLOWED_WS_ORIGINS", "\"https://a.example\"", "allowed: https://a.example"),
        ("ALLOWED_WS_ORIGINS", "a.example", "allowed: https://a.example"),
        ("ALLOWED_WS_ORIGINS", "https://a.example/chat", "allowed: https://a.example"),
        ("CORS_ALLOWED_ORIGINS", "https://a.example;https://b.example", "https://a.example,https"),
        ("CORS_ALLOWED_ORIGINS", "https://a*.example", "https://*.example.com"),
        ("ALLOWED_HOSTS", "https://a.example", "allowed: a.example"),
        ("ALLOWED_HOSTS", "a.example:8000", "allowed: a.example"),
        ("ALLOWED_HOSTS", ".a.example", "*.a.example"),
    ] {
        let ran = doctor(&[(name, value)], &[]);
        assert_eq!(ran.code, Some(64), "{name}={value}: {}", ran.stdout);
        let fault = entry(&ran, &format!("fault configuration {name}: {value:?}"));
        assert!(fault.contains(meant), "{fault}");
    }
}
