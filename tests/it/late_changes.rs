//! Changes that outlive the time of their requests, their clients, or the sight of their database: trail and
//! push tell what really came of them.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};
use switchboard::config::DatabasePlace;
use tokio::time::sleep;

use crate::support::{
    Client, Database, TestServer,
    audit::rows,
    handlers::{Gate, PANICS, misbehaving},
    on_both,
    postgres::database,
    redis::{Network, Proxy},
    rest::{add_author, refused},
};

on_both!(
    a_change_that_outlives_its_timeout_is_recorded_and_pushed_when_it_ends,
    a_change_whose_client_was_told_timeout_is_done_before_the_server_stops,
);

const CREATE: i64 = 3;
const QUICK: (&str, &str) = ("AUDIT_BATCH_TIMEOUT", "200ms");
const SHORT: (&str, &str) = ("WS_HANDLER_TIMEOUT", "300ms");

/// Keeps all changes of authors waiting, reads not.
enum Lock {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Lock {
    async fn take(place: &DatabasePlace) -> Self {
        match place {
            DatabasePlace::Sqlite(file) => {
                let url = format!("sqlite://{}", file.display());
                let mut connection = SqliteConnection::connect(&url).await.unwrap();
                connection.execute("BEGIN IMMEDIATE").await.unwrap();
                Self::Sqlite(connection)
            }
            DatabasePlace::Postgres(url) => Self::on(url.expose()).await,
        }
    }

    async fn on(url: &str) -> Self {
        let mut connection = PgConnection::connect(url).await.unwrap();
        connection.execute("BEGIN; LOCK TABLE author IN EXCLUSIVE MODE").await.unwrap();
        Self::Postgres(connection)
    }

    async fn release(&mut self) {
        match self {
            Self::Sqlite(connection) => drop(connection.execute("COMMIT").await.unwrap()),
            Self::Postgres(connection) => drop(connection.execute("COMMIT").await.unwrap()),
        }
    }
}

/// Asks for an author while none can be made, and hears `timeout` in time.
async fn told_timeout(client: &mut Client, name: &str) {
    let begun = Instant::now();
    let answer = client.call(CREATE, json!({ "name": name })).await;
    assert_eq!(answer["data"]["code"], "timeout", "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

/// Checks what a row says of a change whose client was told `timeout`.
fn is_late(row: &Value, name: &str, outcome: &str, then: &str) {
    assert_eq!((&row["request_data"]["name"], &row["outcome"]), (&json!(name), &json!(outcome)));
    let told = row["error_message"].as_str().unwrap_or_default();
    assert!(told.contains("`timeout`") && told.contains(then), "{row}");
    assert!(row["duration_ms"].as_f64().unwrap() > 300.0, "{row}");
}

async fn a_change_that_outlives_its_timeout_is_recorded_and_pushed_when_it_ends(
    database: Database,
) {
    let place = database.place().await;
    let server = place.server(&[SHORT, QUICK]).await;
    add_author(&server, "taken").await;
    server.audited(1).await;
    let (mut ann, mut bob) = (server.client("ann").await, server.client("bob").await);
    let mut lock = Lock::take(&place.place()).await;
    told_timeout(&mut ann, "late").await;
    told_timeout(&mut ann, "taken").await;
    sleep(Duration::from_millis(400)).await;
    assert_eq!(rows(&place.place()).await.len(), 1, "it has not ended yet");
    lock.release().await;
    let push = bob.receive().await;
    assert_eq!((&push["pkg_id"], &push["data"]["name"]), (&json!(CREATE), &json!("late")));
    let rows = server.audited(3).await;
    let of = |name: &str| {
        rows.iter().skip(1).find(|row| row["request_data"]["name"] == name).unwrap_or(&Value::Null)
    };
    is_late(of("late"), "late", "success", "done");
    assert_eq!(of("late")["response_status"], 0);
    is_late(of("taken"), "taken", "error", "This name is taken");
    assert_eq!(of("taken")["response_status"], 2);
    for outcome in ["success", "error"] {
        let series = format!("ws_late_changes_total{{outcome=\"{outcome}\"}}");
        server.until_metric(&series, 1.0).await;
    }
    // A late end brings no second answer, and its place is free again.
    ann.silent_for(Duration::from_millis(50)).await;
    assert_eq!(ann.call(CREATE, json!({ "name": "next" })).await["status_code"], 0);
}

async fn a_change_whose_client_was_told_timeout_is_done_before_the_server_stops(
    database: Database,
) {
    let place = database.place().await;
    let server = place.server(&[SHORT, QUICK]).await;
    let mut ann = server.client("ann").await;
    let mut lock = Lock::take(&place.place()).await;
    told_timeout(&mut ann, "late").await;
    let stopping = tokio::spawn(server.stop());
    sleep(Duration::from_millis(700)).await;
    assert!(!stopping.is_finished(), "it does not wait for the change");
    lock.release().await;
    stopping.await.unwrap().unwrap();
    let rows = rows(&place.place()).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    is_late(&rows[0], "late", "success", "done");
}

#[tokio::test]
async fn a_handler_that_panics_after_its_timeout_has_one_row() {
    let settings = [SHORT, QUICK];
    let server = TestServer::with_packages(&settings, misbehaving(&Gate::closed())).await;
    let mut ann = server.client("ann").await;
    let answer = ann.call(PANICS, json!({ "later": 500 })).await;
    assert_eq!(answer["data"]["code"], "timeout", "{answer}");
    let rows = server.audited(1).await;
    assert_eq!((&rows[0]["outcome"], &rows[0]["response_status"]), (&json!("error"), &json!(1)));
    let told = rows[0]["error_message"].as_str().unwrap();
    assert!(told.contains("`timeout`") && !told.contains("on purpose"), "{told}");
    let panics = r#"app_errors_total{error_type="panic",handler="PANICS"}"#;
    server.until_metric(panics, 1.0).await;
}

#[tokio::test]
async fn a_change_over_rest_that_outlives_its_request_says_so_in_its_row() {
    let url = database().await;
    let settings = [("DATABASE_URL", &*url), ("HTTP_REQUEST_TIMEOUT", "300ms"), QUICK];
    let server = TestServer::start(&settings).await;
    let mut lock = Lock::on(&url).await;
    let create = server.rest(Method::POST, "/authors").json(&json!({ "name": "late" }));
    refused(create.send().await.unwrap(), 503, "timeout").await;
    lock.release().await;
    let rows = server.audited(1).await;
    assert_eq!(rows[0]["response_status"], 201);
    is_late(&rows[0], "late", "success", "done");
}

/// A server that reaches Postgres through a network of the test's own.
async fn behind(url: &str, settings: &[(&str, &str)]) -> (TestServer, Proxy) {
    let (host, name) = url.rsplit_once('@').unwrap().1.split_once('/').unwrap();
    let proxy = Proxy::to(host.parse().unwrap()).await;
    let addr = proxy.url().replace("redis://", "");
    let url = format!("postgres://switchboard@{addr}/{name}");
    let all = [&[("DATABASE_URL", &*url), QUICK], settings].concat();
    (TestServer::start(&all).await, proxy)
}

/// Waits until a change waits in Postgres for the lock.
async fn until_sent(url: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let begun = Instant::now();
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut connection).await.unwrap() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(5), "nothing was sent");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn until_ready_is(server: &TestServer, status: u16) {
    let begun = Instant::now();
    loop {
        let ready = server.request(Method::GET, "/health/ready").send().await.unwrap();
        if ready.status() == status {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "/health/ready is {}", ready.status());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_change_goes_on_while_the_database_is_thought_to_be_down() {
    let url = database().await;
    let (server, network) = behind(&url, &[]).await;
    let (mut ann, mut bob) = (server.client("ann").await, server.client("bob").await);
    let mut lock = Lock::on(&url).await;
    let req_id = ann.request(CREATE, json!({ "name": "late" })).await;
    until_sent(&url).await;
    network.set(Network::Silent);
    until_ready_is(&server, 503).await;
    // What was not sent is refused, as is what is read.
    assert_eq!(bob.call(1, json!({})).await["data"]["code"], "unavailable");
    let other = bob.call(CREATE, json!({ "name": "other" })).await;
    assert_eq!(other["data"]["code"], "unavailable");
    lock.release().await;
    ann.silent_for(Duration::from_millis(50)).await;
    network.set(Network::Open);
    let answer = ann.receive().await;
    assert_eq!((&answer["req_id"], &answer["status_code"]), (&json!(req_id), &json!(0)));
    assert_eq!(bob.receive().await["data"]["name"], "late");
    let rows = server.audited(2).await;
    let outcomes = rows.iter().map(|row| {
        (row["request_data"]["name"].as_str().unwrap(), row["outcome"].as_str().unwrap())
    });
    let mut outcomes: Vec<_> = outcomes.collect();
    outcomes.sort_unstable();
    assert_eq!(outcomes, [("late", "success"), ("other", "error")]);
}

#[tokio::test]
async fn a_change_whose_connection_breaks_says_that_its_outcome_is_unknown() {
    let url = database().await;
    let (server, network) = behind(&url, &[]).await;
    let mut ann = server.client("ann").await;
    let mut lock = Lock::on(&url).await;
    let req_id = ann.request(CREATE, json!({ "name": "late" })).await;
    until_sent(&url).await;
    network.set(Network::Cut);
    let answer = ann.receive().await;
    assert_eq!(
        (&answer["req_id"], &answer["data"]["code"]),
        (&json!(req_id), &json!("unavailable"))
    );
    assert!(answer["data"]["msg"].as_str().unwrap().contains("unknown"), "{answer}");
    network.set(Network::Open);
    lock.release().await;
    let rows = server.audited(1).await;
    assert_eq!((&rows[0]["outcome"], &rows[0]["response_status"]), (&json!("error"), &json!(1)));
    assert!(rows[0]["error_message"].as_str().unwrap().contains("unknown"), "{}", rows[0]);
}
