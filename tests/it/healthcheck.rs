//! `switchboard healthcheck`, as a container runs it beside its server.

use std::{fs, net::TcpListener, time::Duration};

use tempfile::TempDir;

use crate::support::{
    Client, TestServer,
    process::{Process, Ran, run, token},
};

fn check(settings: &[(&str, &str)]) -> Ran {
    run(&["healthcheck"], settings)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_ready_is_healthy_wherever_it_serves_its_health() {
    let alone = TestServer::start(&[]).await;
    let address = alone.addr.to_string();
    let ran = check(&[("LISTEN_ADDR", &address)]);
    let line = format!("ready: http://{address}/health/ready\n");
    assert_eq!((ran.code, ran.stdout, &*ran.stderr), (Some(0), line, ""));

    let everywhere = format!("0.0.0.0:{}", alone.addr.port());
    assert_eq!(check(&[("LISTEN_ADDR", &everywhere)]).code, Some(0));

    let apart = TestServer::start(&[("OPS_ADDR", "127.0.0.1:0")]).await;
    let (clients, ops) = (apart.addr.to_string(), apart.ops_addr.unwrap().to_string());
    assert_eq!(check(&[("LISTEN_ADDR", &clients), ("OPS_ADDR", &ops)]).code, Some(0));
    assert_eq!(check(&[("LISTEN_ADDR", &clients)]).code, Some(1), "it is not served there");
}

#[test]
fn a_server_for_certain_hosts_is_asked_by_its_address() {
    let data = TempDir::new().unwrap();
    let hosts = ("ALLOWED_HOSTS", "sb.example,other.example");
    let process = Process::start(data.path(), &[hosts]);
    let address = process.addr.to_string();
    // The second knows no name that the server would accept.
    assert_eq!(check(&[hosts, ("LISTEN_ADDR", &address)]).code, Some(0));
    assert_eq!(check(&[("LISTEN_ADDR", &address)]).code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drains_or_is_gone_is_not_healthy() {
    let data = TempDir::new().unwrap();
    let process = Process::start(data.path(), &[("DRAIN_GRACE", "2s"), ("DRAIN_SPREAD", "0s")]);
    let address = process.addr.to_string();
    // Somebody has to be there for the drain to last.
    let mut client = Client::open(process.addr, "/web").await;
    client.authenticate(&token(data.path(), &["--user", "ann"])).await;
    process.signal("-TERM");
    assert_eq!(client.receive().await["type"], "drain");
    let ran = check(&[("LISTEN_ADDR", &address)]);
    assert_eq!((ran.code, &*ran.stdout), (Some(1), ""));
    assert!(ran.stderr.contains("/health/ready says 503"), "{ran:?}");
    drop(client);
    assert_eq!(process.end().code, Some(0));

    let ran = check(&[("LISTEN_ADDR", &address)]);
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1));
    assert!(ran.stderr.contains(&address) && ran.stderr.contains("refused"), "{ran:?}");
}

#[test]
fn a_server_that_never_answers_is_not_waited_for() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let began = std::time::Instant::now();
    assert_eq!(check(&[("LISTEN_ADDR", &address)]).code, Some(1));
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_wrong_setting_is_named() {
    let ran = check(&[("LISTEN_ADDR", "here")]);
    assert_eq!(ran.code, Some(64));
    assert!(ran.stderr.contains("LISTEN_ADDR"), "{ran:?}");
}

#[test]
fn a_secret_is_read_from_the_file_that_its_variable_names() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("database_url");
    fs::write(&path, " postgres://ann:hush-hush@db.example/x\n").unwrap();
    let file = ("DATABASE_URL_FILE", path.to_str().unwrap());
    let ran = run(&["config"], &[file, ("REDIS_URL_FILE", "")]);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
    let line = "database_url = \"postgres://ann:***@db.example/x\" # environment";
    assert!(ran.stdout.lines().any(|shown| shown == line), "{}", ran.stdout);
    // A flag wins over it, as over the variable itself; an empty variable is none.
    let ran = run(&["config", "--database-url", "sqlite://x.db"], &[file, ("DATABASE_URL", "")]);
    assert!(ran.stdout.contains("database_url = \"sqlite://x.db\" # flag"), "{ran:?}");
}

#[test]
fn a_secret_that_cannot_be_read_is_a_fault_that_names_its_variable() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("empty"), "\n").unwrap();
    fs::write(path("full"), "hush-hush").unwrap();
    let (missing, empty, full) = (path("missing"), path("empty"), path("full"));
    let ran = run(
        &["serve"],
        &[
            ("DATABASE_URL_FILE", &missing),
            ("REDIS_URL_FILE", &empty),
            ("KEYCLOAK_CLIENT_SECRET_FILE", &full),
            ("KEYCLOAK_CLIENT_SECRET", "hush"),
            // The file of a setting that is neither a secret nor a URL is nobody's.
            ("ENV_FILE", &missing),
        ],
    );
    assert_eq!(ran.code, Some(64));
    assert!(!ran.stderr.contains("hush"), "{ran:?}");
    for part in [
        format!("DATABASE_URL_FILE: {missing}: No such file"),
        format!("REDIS_URL_FILE: {empty} is empty"),
        "KEYCLOAK_CLIENT_SECRET_FILE: it is not allowed beside KEYCLOAK_CLIENT_SECRET".to_owned(),
    ] {
        assert!(ran.stderr.contains(&part), "{part}: {ran:?}");
    }
    assert_eq!(ran.stderr.lines().count(), 3, "{ran:?}");
}
