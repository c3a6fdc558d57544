//! The audit trail when its database stops, hangs or refuses, and when the server itself is killed:
//! every action that was answered is one row.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::json;
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};
use switchboard::config::{Config, DatabasePlace};
use tempfile::TempDir;
use tokio::{
    task::block_in_place,
    time::{sleep, timeout},
};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Client, TestServer,
    audit::rows,
    load::{Answered, Load, compare},
    postgres::{Cluster, database},
    process::{Process, token},
    rest::add_author,
};

/// Clients of these tests do not expect pushes, and write as fast as they can.
const BUSY: [(&str, &str); 2] = [("WS_BROADCAST_CHANGES", "false"), ("WS_MESSAGE_RATE_LIMIT", "0")];

async fn authors(place: &DatabasePlace) -> Vec<String> {
    let sql = "SELECT name FROM author";
    match place {
        DatabasePlace::Sqlite(file) => {
            let url = format!("sqlite://{}", file.display());
            let mut connection = SqliteConnection::connect(&url).await.unwrap();
            sqlx::query_scalar(sql).fetch_all(&mut connection).await.unwrap()
        }
        DatabasePlace::Postgres(url) => {
            let mut connection = PgConnection::connect(url.expose()).await.unwrap();
            sqlx::query_scalar(sql).fetch_all(&mut connection).await.unwrap()
        }
    }
}

async fn server(url: &str, settings: &[(&str, &str)]) -> TestServer {
    TestServer::start(&[&BUSY, settings, &[("DATABASE_URL", url)]].concat()).await
}

/// Checks the rows once all of them are there.
async fn settle(server: &TestServer, answered: &[Answered]) {
    let written = server.audited(answered.len()).await;
    // None may come late.
    server.until_metric("audit_spool_rows", 0.0).await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(rows(&server.database()).await.len(), written.len());
    compare(answered, &written, &authors(&server.database()).await);
    assert_eq!(server.metric("audit_logs_dropped_total").await, 0.0);
    server.until_metric("audit_logs_written_total", written.len() as f64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_postgres_that_stops_for_ten_seconds_costs_no_row_and_no_author() {
    let cluster = Cluster::start();
    let server = server(&cluster.url("postgres"), &[]).await;
    let load = Load::start(server.addr, &server.token("ann"), "a", 8);
    sleep(Duration::from_millis(1500)).await;
    block_in_place(|| cluster.stop("fast"));
    sleep(Duration::from_secs(10)).await;
    assert!(server.metric("audit_spool_rows").await > 0.0);
    block_in_place(|| cluster.start_again());
    sleep(Duration::from_millis(1500)).await;
    let answered = load.stop().await;
    let made = answered.iter().filter(|answered| answered.made).count();
    assert!(made > 100 && answered.len() - made > 100, "{made} of {}", answered.len());
    settle(&server, &answered).await;
    assert!(server.metric("audit_logs_spooled_total").await > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_postgres_that_crashes_costs_no_row_and_no_author() {
    let cluster = Cluster::start();
    let server = server(&cluster.url("postgres"), &[("AUDIT_BATCH_TIMEOUT", "200ms")]).await;
    let load = Load::start(server.addr, &server.token("ann"), "b", 8);
    for _ in 0..2 {
        sleep(Duration::from_secs(1)).await;
        block_in_place(|| cluster.crash_and_start());
    }
    sleep(Duration::from_secs(1)).await;
    let answered = load.stop().await;
    let made = answered.iter().filter(|answered| answered.made).count();
    // Eight writers were at it when it crashed.
    assert!(made > 0 && answered.len() > made.max(100), "{made} of {}", answered.len());
    settle(&server, &answered).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_that_are_terminated_cost_no_row_and_no_author() {
    let url = database().await;
    let server = server(&url, &[("AUDIT_BATCH_TIMEOUT", "200ms")]).await;
    let load = Load::start(server.addr, &server.token("ann"), "c", 8);
    let mut other = PgConnection::connect(&url).await.unwrap();
    for _ in 0..10 {
        sleep(Duration::from_millis(300)).await;
        let terminated = sqlx::query_scalar::<_, bool>(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()",
        );
        let terminated = terminated.fetch_all(&mut other).await.unwrap();
        assert!(terminated.contains(&true), "there was no connection");
    }
    sleep(Duration::from_millis(300)).await;
    let answered = load.stop().await;
    assert!(answered.len() > 100, "only {}", answered.len());
    settle(&server, &answered).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_table_that_hangs_sends_rows_to_the_spool_in_time() {
    hanging(&[("AUDIT_BATCH_TIMEOUT", "400ms")], Duration::from_millis(400)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_queue_that_is_nearly_full_goes_to_the_spool_before_its_time() {
    // Nothing is due within the test.
    let full = [("AUDIT_BATCH_TIMEOUT", "2s"), ("AUDIT_BATCH_SIZE", "1000"), ("AUDIT_QUEUE", "20")];
    hanging(&full, Duration::from_secs(2)).await;
}

async fn hanging(settings: &[(&str, &str)], promised: Duration) {
    let url = database().await;
    let server = server(&url, settings).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
    let load = Load::start(server.addr, &server.token("ann"), "d", 4);
    sleep(Duration::from_millis(900)).await;
    let spooled = server.metric("audit_spool_rows").await;
    assert!(spooled > 0.0, "nothing is in the spool yet");
    let answered = load.stop().await;
    assert!(answered.iter().all(|answered| answered.made), "authors do not wait for the trail");
    // A row that is not there after `AUDIT_BATCH_TIMEOUT` is late.
    sleep(promised + Duration::from_millis(150)).await;
    assert_eq!(server.metric("audit_queue_size").await, 0.0);
    assert_eq!(server.metric("audit_spool_rows").await, answered.len() as f64);
    assert_eq!(server.metric("audit_log_errors_total{error_type=\"spool\"}").await, 0.0);
    other.execute("ROLLBACK").await.unwrap();
    settle(&server, &answered).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_stopped_in_the_middle_of_a_batch_has_every_row() {
    let folder = TempDir::new().unwrap();
    let url = format!("sqlite://{}", folder.path().join("kept.db").display());
    let quick = [
        ("AUDIT_BATCH_SIZE", "4"),
        ("AUDIT_BATCH_TIMEOUT", "100ms"),
        // Where the machine is busy, some wait in the spool for the next server.
        ("DATA_DIR", folder.path().to_str().unwrap()),
    ];
    for round in 0..10 {
        let server = server(&url, &quick).await;
        for i in 0..30 {
            add_author(&server, &format!("{round}-{i}")).await;
        }
        server.stop().await.unwrap();
    }
    server(&url, &quick).await.audited(300).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_change_that_outlives_the_server_it_was_cut_off_from_has_its_row() {
    let (url, data) = (database().await, TempDir::new().unwrap());
    let all = [
        ("DATABASE_URL", &*url),
        ("DRAIN_TIMEOUT", "100ms"),
        ("DB_STATEMENT_TIMEOUT", "30s"),
        ("WS_HANDLER_TIMEOUT", "30s"),
    ];
    let process = block_in_place(|| Process::start(data.path(), &all));
    let token = block_in_place(|| token(data.path(), &["--user", "ann"]));
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE author IN EXCLUSIVE MODE").await.unwrap();
    let create = reqwest::Client::new().post(format!("http://{}/authors", process.addr));
    let create = create.bearer_auth(token).json(&json!({ "name": "Ann" })).send();
    let answer = tokio::spawn(create);
    sleep(Duration::from_millis(500)).await;
    process.signal("-TERM");
    // Past the time that requests have to end in order.
    sleep(Duration::from_millis(7500)).await;
    other.execute("COMMIT").await.unwrap();
    let made = answer.await.unwrap().is_ok_and(|answer| answer.status() == 201);
    assert_eq!(block_in_place(|| process.end()).code, Some(0));
    let made = made || authors(&place(&url)).await == ["Ann"];

    let again = block_in_place(|| Process::start(data.path(), &all));
    let started = Instant::now();
    loop {
        let rows = rows(&place(&url)).await;
        if let [row] = &rows[..] {
            let expected = if made { "success" } else { "error" };
            assert_eq!((&row["outcome"], &row["username"]), (&json!(expected), &json!("ann")));
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{rows:?}, made: {made}");
        sleep(Duration::from_millis(50)).await;
    }
    drop(again);
}

#[tokio::test]
async fn a_row_that_the_database_refuses_is_set_aside_and_holds_up_no_other() {
    let url = database().await;
    let server = server(&url, &[("AUDIT_BATCH_TIMEOUT", "200ms")]).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    let check = "ALTER TABLE user_actions ADD CHECK (request_data ->> 'name' <> 'poison')";
    other.execute(check).await.unwrap();
    for name in ["before", "poison", "after"] {
        add_author(&server, name).await;
    }
    let rows = server.audited(2).await;
    assert_eq!(rows[0]["request_data"]["name"], "before");
    assert_eq!(rows[1]["request_data"]["name"], "after");
    let kept = fs::read_to_string(server.data().join("audit/rejected.jsonl")).unwrap();
    assert!(kept.lines().count() == 1 && kept.contains("poison"), "{kept}");
    server.until_metric("audit_spool_rows", 0.0).await;
    assert!(server.metric("audit_log_errors_total{error_type=\"refused\"}").await >= 1.0);
}

#[tokio::test]
async fn a_row_that_cannot_even_be_set_aside_keeps_no_new_row_from_the_database() {
    let url = database().await;
    let quick = [("AUDIT_BATCH_TIMEOUT", "200ms"), ("DB_STATEMENT_TIMEOUT", "300ms")];
    let server = server(&url, &quick).await;
    fs::create_dir(server.data().join("audit/rejected.jsonl")).unwrap();
    let mut other = PgConnection::connect(&url).await.unwrap();
    let check = "ALTER TABLE user_actions ADD CHECK (request_data ->> 'name' <> 'poison')";
    other.execute(check).await.unwrap();
    other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
    add_author(&server, "poison").await;
    server.until_metric("audit_spool_rows", 1.0).await;
    while server.metric("audit_log_errors_total{error_type=\"database\"}").await < 1.0 {
        sleep(Duration::from_millis(20)).await;
    }
    other.execute("ROLLBACK").await.unwrap();
    // The first ones may still follow it into the spool.
    for i in 0..100 {
        if server.metric("audit_logs_written_total").await > 0.0 {
            return;
        }
        add_author(&server, &i.to_string()).await;
        sleep(Duration::from_millis(50)).await;
    }
    panic!("no row is written");
}

#[tokio::test]
async fn rows_are_lost_only_beyond_the_limit_of_the_spool_and_are_counted() {
    let url = database().await;
    let small = [
        ("AUDIT_BATCH_TIMEOUT", "100ms"),
        ("AUDIT_SPOOL_LIMIT", "4KiB"),
        ("AUDIT_QUEUE", "10"),
        ("AUDIT_BATCH_SIZE", "5"),
    ];
    let server = server(&url, &small).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
    for i in 0..60 {
        add_author(&server, &format!("author {i}")).await;
    }
    server.until_metric("audit_queue_size", 10.0).await;
    let lost = server.metric("audit_logs_dropped_total").await;
    let spooled = server.metric("audit_spool_rows").await;
    assert!(lost > 0.0 && spooled > 0.0, "{lost} lost, {spooled} spooled");
    assert!((lost + spooled + 10.0 - 60.0).abs() < f64::EPSILON, "{lost} lost, {spooled} spooled");
    other.execute("ROLLBACK").await.unwrap();
    server.audited(60 - lost as usize).await;
    add_author(&server, "one more").await;
    server.audited(61 - lost as usize).await;
}

/// The queue has its default size: what is done for each row of it, for every row that is lost, takes
/// minutes here.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rows_that_nothing_takes_hold_up_no_answer() {
    let url = database().await;
    let small = [
        ("AUDIT_BATCH_TIMEOUT", "100ms"),
        ("AUDIT_SPOOL_LIMIT", "64KiB"),
        ("AUDIT_DENIALS_PER_USER", "0"),
    ];
    let server = server(&url, &small).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
    let mut client = server.client_with("ann", &[], "json").await;
    let mut denied = 0.0;
    while server.metric("audit_logs_dropped_total").await < 1.0 {
        denied += 50.0;
        deny(&mut client, 50).await;
    }
    let answered = timeout(Duration::from_secs(5), deny(&mut client, 1000)).await;
    assert!(answered.is_ok(), "1,000 denials take longer than 5 s");
    server.until_metric("audit_queue_size", 10_000.0).await;
    let lost = server.metric("audit_logs_dropped_total").await;
    let spooled = server.metric("audit_spool_rows").await;
    assert!(lost >= 1000.0 && spooled > 0.0, "{lost} lost, {spooled} spooled");
    assert_eq!(lost + spooled + 10_000.0, denied + 1000.0, "{lost} lost, {spooled} spooled");
}

/// Asks for what the client may not do, and waits for the answers.
async fn deny(client: &mut Client, count: usize) {
    let denied = json!({ "pkg_id": 5, "req_id": uuid::Uuid::new_v4(), "data": { "id": 1 } });
    let frame = || Message::text(denied.to_string());
    for _ in 0..count / 50 {
        client.send_together((0..50).map(|_| frame())).await;
        for _ in 0..50 {
            assert_eq!(client.receive().await["status_code"], 3);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stop_leaves_as_many_rows_in_the_spool_as_it_takes_and_says_how_many_are_lost() {
    let (url, data) = (database().await, TempDir::new().unwrap());
    let all = [
        ("DATABASE_URL", &*url),
        ("DB_STATEMENT_TIMEOUT", "500ms"),
        // Nothing is due before the stop.
        ("AUDIT_BATCH_TIMEOUT", "60s"),
        ("AUDIT_SPOOL_LIMIT", "4KiB"),
    ];
    let process = block_in_place(|| Process::start(data.path(), &all));
    let token = block_in_place(|| token(data.path(), &["--user", "ann", "--roles", ""]));
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
    let mut client = Client::open(process.addr, "/web").await;
    client.authenticate(&token).await;
    for i in 0..30 {
        assert_eq!(client.call(5, json!({ "id": i })).await["status_code"], 3);
    }
    client.close().await;
    process.signal("-TERM");
    let ran = block_in_place(|| process.end());
    let line = ran.stdout.lines().find(|line| line.contains("audit rows are lost"));
    let line: serde_json::Value = serde_json::from_str(line.unwrap()).unwrap();
    let lost = line["rows"].as_u64().unwrap() as usize;
    // The youngest is the row of the stop itself.
    assert!((2..31).contains(&lost), "{lost} of 31 lost");
    other.execute("ROLLBACK").await.unwrap();

    let again = block_in_place(|| Process::start(data.path(), &all));
    let started = Instant::now();
    loop {
        let rows = rows(&place(&url)).await;
        if rows.iter().map(|row| &row["request_data"]["id"]).eq(&Vec::from_iter(0..31 - lost)) {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{lost} lost, {rows:?}");
        sleep(Duration::from_millis(50)).await;
    }
    drop(again);
}

/// Kills the server under a load, while its database is away if it is given, and starts it again. Says
/// how many rows were lost: none of those that are promised.
async fn killed(url: &str, cluster: Option<&Cluster>) {
    let place = &place(url);
    let data = TempDir::new().unwrap();
    let more = [("RATE_LIMIT_PER_MINUTE", "0"), ("DATABASE_URL", url)];
    let all = [&BUSY[..], &more].concat();
    let process = block_in_place(|| Process::start(data.path(), &all));
    let token = block_in_place(|| token(data.path(), &["--user", "ann"]));
    let load = Load::start(process.addr, &token, "k", 8);
    sleep(Duration::from_millis(2500)).await;
    if let Some(cluster) = cluster {
        block_in_place(|| cluster.stop("immediate"));
        sleep(Duration::from_secs(2)).await;
    }
    process.signal("-KILL");
    let killed_at = Instant::now();
    let answered = load.stop().await;
    assert!(answered.len() > 30, "only {}", answered.len());
    drop(process);

    if let Some(cluster) = cluster {
        block_in_place(|| cluster.start_again());
    }
    let again = block_in_place(|| Process::start(data.path(), &all));
    // `AUDIT_BATCH_TIMEOUT` is 1 s.
    let promised = Duration::from_millis(1100);
    let (old, young): (Vec<_>, Vec<_>) = answered
        .iter()
        .partition(|answered| killed_at.saturating_duration_since(answered.at) > promised);
    let started = Instant::now();
    let missing = loop {
        let rows = rows(place).await;
        let has = |name: &str| rows.iter().any(|row| row["request_data"]["name"] == name);
        let missing: Vec<_> = old.iter().filter(|answered| !has(&answered.name)).collect();
        if missing.is_empty() {
            break young.iter().filter(|answered| !has(&answered.name)).count();
        }
        let late = started.elapsed() > Duration::from_secs(10);
        assert!(!late, "{} of {} old rows are missing: {missing:?}", missing.len(), old.len());
        sleep(Duration::from_millis(100)).await;
    };
    println!("{missing} of {} rows younger than {promised:?} were lost", young.len());
    again.signal("-TERM");
    assert_eq!(block_in_place(|| again.end()).code, Some(0));
    let rows = rows(place).await;
    for Answered { name, .. } in old {
        let of_name = rows.iter().filter(|row| row["request_data"]["name"] == **name).count();
        assert_eq!(of_name, 1, "{name}");
    }
}

fn place(url: &str) -> DatabasePlace {
    let config = Config::read(|name| (name == "DATABASE_URL").then(|| url.to_owned()));
    config.unwrap().store.place
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_killed_has_every_row_older_than_its_batch_timeout_on_postgres() {
    killed(&database().await, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_killed_has_every_row_older_than_its_batch_timeout_on_sqlite() {
    let folder = TempDir::new().unwrap();
    killed(&format!("sqlite://{}", folder.path().join("kept.db").display()), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_killed_while_postgres_is_away_has_them_too() {
    let cluster = Cluster::start();
    killed(&cluster.url("postgres"), Some(&cluster)).await;
}
