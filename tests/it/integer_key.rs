//! The audit trail's integer key: a trail of the previous release gets it while nodes of both releases read and
//! write it, ends of processes included, and no row is lost.

use std::{
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};
use tokio::{task::block_in_place, time::sleep};
use uuid::Uuid;

use crate::{
    doctor::{doctor, entry},
    histories::make_shared,
    support::{
        Database, TestServer, audit,
        database::Place,
        on_both,
        process::{Process, finish, run, switchboard, token},
        rest::{add_author, refused},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
/// Rows that are too many to be numbered at once.
const MANY: i64 = 30_000;
/// How the previous release writes: `$1` is an array of rows.
const OLD_POSTGRES: &str = "INSERT INTO user_actions (id, timestamp, user_id, username, user_roles, \
    action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms) SELECT id, timestamp, user_id, username, \
    user_roles, action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms \
    FROM json_populate_recordset(NULL::user_actions, $1::json) ON CONFLICT (id) DO NOTHING";
const OLD_SQLITE: &str = "INSERT OR IGNORE INTO user_actions (id, timestamp, user_id, username, \
    user_roles, action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)";

/// A database as the previous release made it.
pub(crate) async fn old(database: Database) -> Place {
    let place = database.place().await;
    make_shared(database, &place, 2).await;
    place
}

/// Adds rows, one a second back from now.
pub(crate) async fn fill(place: &Place, rows: i64) {
    place
        .execute(&format!(
            "INSERT INTO user_actions (id, timestamp, username, user_roles, action_type, resource, outcome)
             SELECT gen_random_uuid(), now() - i * interval '1 second', 'u' || i % 100, '[\"admin\"]',
                 'a' || i % 10, '/authors/' || i % 1000, 'success'
             FROM generate_series(1, {rows}) AS i; ANALYZE user_actions"
        ))
        .await;
}

fn row(uid: Uuid) -> Value {
    json!({ "id": uid, "timestamp": format!("{:.6}", jiff::Timestamp::now()), "user_id": null, "username": "old",
            "user_roles": [], "action_type": "POST", "resource": "/old", "outcome": "success",
            "request_data": { "n": 1 }, "duration_ms": 0.5 })
}

pub(crate) async fn number(place: &Place, sql: &str) -> i64 {
    place.execute(&format!("SELECT CAST(({sql}) AS TEXT)")).await[0].parse().unwrap()
}

/// Writes as a node of the previous release does, some rows again, until it is told to stop, and never waits a
/// second for a lock. Returns the rows, and the longest time that a statement took.
pub(crate) async fn write_as_before(url: &str, stop: &AtomicBool) -> (Vec<Uuid>, Duration) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    connection.execute("SET lock_timeout = '1s'").await.unwrap();
    let (mut written, mut longest) = (Vec::new(), Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let uid = Uuid::now_v7();
        written.push(uid);
        let again = written[written.len() / 2];
        let rows = json!([row(uid), row(again)]).to_string();
        let started = Instant::now();
        sqlx::query(OLD_POSTGRES).bind(rows).execute(&mut connection).await.unwrap();
        longest = longest.max(started.elapsed());
        sleep(Duration::from_millis(2)).await;
    }
    (written, longest)
}

/// Every row has an id of its own, and those of the previous release are there once.
pub(crate) async fn is_whole(place: &Place, rows: i64, written: &[Uuid]) {
    // But for the rows of servers and operators, of which each process leaves some.
    let of_clients = "FROM user_actions WHERE action_type NOT LIKE 'SERVER:%'";
    assert_eq!(number(place, &format!("SELECT count(DISTINCT id) {of_clients}")).await, rows);
    assert_eq!(number(place, &format!("SELECT count(DISTINCT uid) {of_clients}")).await, rows);
    let there = place.execute("SELECT uid::text FROM user_actions WHERE username = 'old'").await;
    let there: std::collections::HashSet<_> = there.into_iter().collect();
    assert_eq!(there.len(), written.len());
    assert!(written.iter().all(|uid| there.contains(&uid.to_string())));
}

/// What a schema consists of.
async fn schema(place: &Place) -> Vec<String> {
    let sql = match place.place() {
        switchboard::config::DatabasePlace::Sqlite(_) => {
            "SELECT name || coalesce(sql, '') FROM sqlite_schema WHERE tbl_name = 'user_actions' ORDER BY 1"
        }
        switchboard::config::DatabasePlace::Postgres(_) => {
            "SELECT attnum || attname || format_type(atttypid, atttypmod) || attnotnull || attidentity::text
                 || coalesce(pg_get_expr(adbin, adrelid), '')
             FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
             WHERE attrelid = 'user_actions'::regclass AND attnum > 0
             UNION ALL SELECT pg_get_indexdef(indexrelid) || indisvalid FROM pg_index
             WHERE indrelid = 'user_actions'::regclass
             UNION ALL SELECT conname || pg_get_constraintdef(oid) || convalidated FROM pg_constraint
             WHERE conrelid = 'user_actions'::regclass
             UNION ALL SELECT relname::text FROM pg_class WHERE relkind = 'S' ORDER BY 1"
        }
    };
    place.execute(sql).await
}

async fn a_fresh_trail_and_an_upgraded_one_have_one_schema(database: Database) {
    let (fresh, upgraded) = (database.place().await, old(database).await);
    upgraded.audit(&[json!({}), json!({})]).await;
    for place in [&fresh, &upgraded] {
        let ran = run(&["migrate"], &place.settings());
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
        assert!(ran.stdout.contains("server migration 2 was run"), "{ran:?}");
    }
    let schema_of_fresh = schema(&fresh).await;
    assert!(schema_of_fresh.len() > 7, "{schema_of_fresh:?}");
    assert_eq!(schema_of_fresh, schema(&upgraded).await);
}

async fn rows_of_the_previous_release_stay_and_get_an_id_in_their_order(database: Database) {
    let place = old(database).await;
    let rows: Vec<_> = (0..50)
        .map(|i| json!({ "request_id": i.to_string(), "request_data": { "n": i } }))
        .collect();
    place.audit(&rows).await;
    // A column that an operator added.
    place.execute("ALTER TABLE user_actions ADD COLUMN tenant TEXT DEFAULT 'x'").await;
    let server = place.server(&[]).await;
    add_author(&server, "Ann").await;
    let rows = server.audited(51).await;
    for (i, row) in rows[..50].iter().enumerate() {
        assert_eq!(row["id"], i + 1);
        assert_eq!(row["uid"], json!(Uuid::from_u128(i as u128)));
        assert_eq!(
            (&row["request_id"], &row["request_data"]),
            (&json!(i.to_string()), &json!({ "n": i }))
        );
    }
    assert_eq!((&rows[50]["id"], &rows[50]["resource"]), (&json!(53), &json!("/authors")));
    assert_eq!(number(&place, "SELECT count(*) FROM user_actions WHERE tenant = 'x'").await, 53);
    for key in ["53", rows[50]["uid"].as_str().unwrap()] {
        let answer = server.rest(Method::GET, &format!("/audit-logs/{key}")).send().await.unwrap();
        assert_eq!(answer.json::<Value>().await.unwrap()["resource"], "/authors");
    }
    server.stop().await.unwrap();
    if let Database::Sqlite = database {
        assert_eq!(place.execute("PRAGMA integrity_check").await, ["ok"]);
        // Rows move; their ids do not.
        place.execute("DELETE FROM user_actions WHERE id % 2 = 0; VACUUM").await;
        assert_eq!(
            number(&place, "SELECT max(id) FROM user_actions WHERE request_data LIKE '{\"n\"%'")
                .await,
            49
        );
        assert_eq!(place.execute("PRAGMA integrity_check").await, ["ok"]);
    }
}

async fn a_node_of_the_previous_release_is_not_told_that_its_rows_are_bad(database: Database) {
    let place = old(database).await;
    assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    let uid = Uuid::now_v7();
    match database {
        Database::Postgres => {
            let mut connection = PgConnection::connect(&place.url).await.unwrap();
            for _ in 0..2 {
                let rows = json!([row(uid)]).to_string();
                sqlx::query(OLD_POSTGRES).bind(rows).execute(&mut connection).await.unwrap();
            }
            is_whole(&place, 1, &[uid]).await;
        }
        // Nothing of the row is looked at, so the node takes it for an outage: its rows wait in its spool.
        Database::Sqlite => {
            let mut connection = SqliteConnection::connect(&place.url).await.unwrap();
            let refused =
                sqlx::query(OLD_SQLITE).bind(uid.to_string()).execute(&mut connection).await;
            let error = refused.unwrap_err();
            assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("1"), "{error}");
        }
    }
}

on_both![
    a_fresh_trail_and_an_upgraded_one_have_one_schema,
    rows_of_the_previous_release_stay_and_get_an_id_in_their_order,
    a_node_of_the_previous_release_is_not_told_that_its_rows_are_bad,
];

async fn create_author(process: &Process, place: &Place, name: &str) -> u16 {
    let request = reqwest::Client::new().post(format!("http://{}/authors", process.addr));
    let token = block_in_place(|| token(place.data.path(), &["--user", "ann"]));
    request
        .bearer_auth(token)
        .json(&json!({ "name": name }))
        .send()
        .await
        .unwrap()
        .status()
        .as_u16()
}

/// The column in which rows are numbered.
const COLUMN: &str = "SELECT attname::text FROM pg_attribute
    WHERE attname = 'number' AND attrelid = 'user_actions'::regclass";
/// Three statements: one stops numbering at a point, one counts above 0 once it is there, one lets it go on.
type Hold = (&'static str, &'static str, &'static str);
/// After the first rows.
const FIRST_ROWS: Hold = (
    "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END';
     DO $$ BEGIN EXECUTE format(
        'CREATE TRIGGER hold BEFORE UPDATE ON user_actions FOR EACH ROW WHEN (NEW.timestamp > %L)
         EXECUTE FUNCTION hold()', now() - interval '25000 seconds'); END $$;
     SELECT pg_advisory_lock(1)",
    "SELECT count(*) / 3000 FROM user_actions
     WHERE number IS NOT NULL AND timestamp < now() - interval '1 hour'",
    "SELECT pg_advisory_unlock(1); DROP TRIGGER hold ON user_actions; DROP FUNCTION hold",
);
/// With an index half built: it waits for older snapshots.
const INDEX: Hold = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1",
    "SELECT count(*) FROM pg_class WHERE relname = 'user_actions_number'",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE datname = current_database() AND query LIKE 'CREATE UNIQUE INDEX%'; ROLLBACK",
);
/// Rows of a node of this release.
const ROWS: &str = "SELECT count(*) FROM user_actions WHERE resource = '/authors'";

#[tokio::test(flavor = "multi_thread")]
async fn a_long_trail_is_numbered_while_both_releases_write_and_processes_are_killed() {
    let place = old(Database::Postgres).await;
    fill(&place, MANY).await;
    let stop = AtomicBool::new(false);
    let settings = [("DATABASE_URL", &*place.url), ("AUDIT_BATCH_TIMEOUT", "100ms")];
    let upgrade = async {
        // Killed with a part of the rows numbered, and while an index is built.
        for (i, (hold, done, release)) in (0..).zip([FIRST_ROWS, INDEX]) {
            let mut holder = PgConnection::connect(&place.url).await.unwrap();
            holder.execute(hold).await.unwrap();
            let process = block_in_place(|| Process::start(place.data.path(), &settings));
            assert_eq!(create_author(&process, &place, &format!("Ann {i}")).await, 201);
            let since = Instant::now();
            // The column is not there at once.
            while place.execute(COLUMN).await.is_empty()
                || number(&place, done).await == 0
                || number(&place, ROWS).await <= i
            {
                assert!(since.elapsed() < PATIENCE);
                sleep(Duration::from_millis(3)).await;
            }
            process.signal("-KILL");
            assert_eq!(block_in_place(|| process.end()).code, None);
            holder.execute(release).await.unwrap();
            assert!(!place.is_numbered().await);
        }
        let ran = block_in_place(|| run(&["migrate"], &place.settings()));
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
        assert!(ran.stdout.contains("server migration 2 was run"), "{ran:?}");
        assert!(place.is_numbered().await);
        // And once more for a while.
        sleep(Duration::from_millis(200)).await;
        stop.store(true, Ordering::Relaxed);
    };
    let ((written, _), ()) = tokio::join!(write_as_before(&place.url, &stop), upgrade);
    assert_eq!(number(&place, ROWS).await, 2);
    is_whole(&place, MANY + 2 + i64::try_from(written.len()).unwrap(), &written).await;
    let fresh = Database::Postgres.place().await;
    block_in_place(|| run(&["migrate"], &fresh.settings()));
    assert_eq!(schema(&place).await, schema(&fresh).await);
}

/// A trail that another process has begun to number, and a server that may not go on with that.
async fn begun() -> (Place, TestServer) {
    let place = old(Database::Postgres).await;
    place.audit(&[json!({ "username": "before" })]).await;
    let mut other = PgConnection::connect(&place.url).await.unwrap();
    let begin =
        "ALTER TABLE user_actions ADD COLUMN number BIGINT; CREATE SEQUENCE user_actions_numbers";
    other.execute(begin).await.unwrap();
    // The lock of the one process that numbers. This server does all the rest.
    sqlx::query("SELECT pg_advisory_lock($1)")
        .bind(0x5357_424e_554d_4245_i64)
        .execute(&mut other)
        .await
        .unwrap();
    place.server(&[("AUDIT_ENABLED", "false")]).await.stop().await.unwrap();
    other.close().await.unwrap();
    let server = place.server(&[("DB_AUTO_MIGRATE", "false")]).await;
    (place, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_on_when_another_process_has_numbered_the_trail() {
    let (place, server) = begun().await;
    let page = async || {
        let answer = server.rest(Method::GET, "/audit-logs?per_page=1").send().await.unwrap();
        answer.json::<Value>().await.unwrap()["items"][0].clone()
    };
    add_author(&server, "Ann").await;
    server.until_metric("audit_logs_written_total", 1.0).await;
    let before = page().await;
    assert_eq!((&before["resource"], &before["id"]), (&json!("/authors"), &Value::Null));
    let uid = before["uid"].as_str().unwrap();
    let answer = server.rest(Method::GET, &format!("/audit-logs/{uid}")).send().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap(), before);
    refused(server.rest(Method::GET, "/audit-logs/1").send().await.unwrap(), 404, "not_found")
        .await;
    let ran = block_in_place(|| doctor(&[("DATABASE_URL", &place.url)], &[]));
    assert!(entry(&ran, "ok audit trail").contains("is being numbered: 3 rows are left"));
    let line = block_in_place(|| run(&["audit", "export"], &place.settings())).stdout;
    assert_eq!(line.lines().count(), 3, "{line}");

    let ran = block_in_place(|| run(&["migrate"], &place.settings()));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    add_author(&server, "Bea").await;
    server.until_metric("audit_logs_written_total", 2.0).await;
    assert_eq!(server.metric("audit_logs_spooled_total").await, 0.0);
    let after = page().await;
    // The trail began with a row of the previous release and the start of the server.
    assert_eq!(after["request_data"]["name"], "Bea");
    assert!(after["id"].as_i64() > Some(3), "{after}");
    let answer = server.rest(Method::GET, "/audit-logs/3").send().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap()["uid"], uid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_reads_on_when_another_process_has_numbered_the_trail() {
    let (place, server) = begun().await;
    let ran = block_in_place(|| run(&["migrate"], &place.settings()));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let answer = server.rest(Method::GET, "/audit-logs").send().await.unwrap();
    let page = answer.json::<Value>().await.unwrap();
    assert_eq!(page["items"].as_array().unwrap().last().unwrap()["id"], 1, "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_does_not_wait_for_a_table_that_others_use_nor_stop_who_writes() {
    let place = old(Database::Postgres).await;
    place.audit(&[json!({})]).await;
    // A dump, for example.
    let mut reader = PgConnection::connect(&place.url).await.unwrap();
    reader.execute("BEGIN; SELECT FROM user_actions").await.unwrap();
    let stop = AtomicBool::new(false);
    let serve = async {
        let started = Instant::now();
        let server = place.server(&[]).await;
        assert!(started.elapsed() < Duration::from_secs(5));
        add_author(&server, "Ann").await;
        server.until_metric("audit_logs_written_total", 1.0).await;
        sleep(Duration::from_secs(2)).await;
        assert!(!place.is_numbered().await);
        reader.execute("COMMIT").await.unwrap();
        let since = Instant::now();
        while !place.is_numbered().await {
            assert!(since.elapsed() < PATIENCE);
            sleep(Duration::from_millis(20)).await;
        }
        stop.store(true, Ordering::Relaxed);
        server
    };
    let ((written, _), server) = tokio::join!(write_as_before(&place.url, &stop), serve);
    is_whole(&place, 2 + i64::try_from(written.len()).unwrap(), &written).await;
    assert_eq!(server.metric("audit_unnumbered_rows").await, 0.0);
    assert_eq!(audit::rows(&place.place()).await.len(), 2 + written.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_start_while_migrate_alone_numbers_the_trail_whatever_limit_the_database_has() {
    let place = old(Database::Postgres).await;
    fill(&place, MANY).await;
    let mut reader = PgConnection::connect(&place.url).await.unwrap();
    // The user that migrates has a limit, which an index does not keep.
    let user = format!("limited_{}", Uuid::new_v4().simple());
    let role = format!(
        "CREATE ROLE {user} LOGIN SUPERUSER; ALTER ROLE {user} SET statement_timeout = '20ms'"
    );
    place.execute(&role).await;
    let url = place.url.replacen("switchboard@", &format!("{user}@"), 1);
    let mut migration =
        switchboard(&["migrate"], &[&place.settings()[..], &[("DATABASE_URL", &*url)]].concat());
    let migration = migration.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let since = Instant::now();
    while place.execute(COLUMN).await.is_empty() {
        assert!(since.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    // It is not done before this row is free, which would be the last one.
    let newest = "BEGIN; SELECT FROM user_actions ORDER BY timestamp DESC LIMIT 1 FOR UPDATE";
    reader.execute(newest).await.unwrap();
    while number(&place, "SELECT count(*) FROM user_actions WHERE number IS NULL").await > 1 {
        assert!(since.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    }
    let server = place.server(&[("DB_AUTO_MIGRATE", "false")]).await;
    add_author(&server, "Ann").await;
    reader.execute("ROLLBACK").await.unwrap();
    let ran = block_in_place(|| finish(migration));
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
    for migration in ["authors migration 2", "server migration 2"] {
        assert_eq!(ran.stdout.matches(&format!("{migration} was run")).count(), 1, "{ran:?}");
    }
    assert!(place.is_numbered().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_of_ones_own_is_no_number() {
    for rows in [1, MANY] {
        let place = old(Database::Postgres).await;
        fill(&place, rows).await;
        place.execute("ALTER TABLE user_actions ADD COLUMN number INTEGER DEFAULT 7").await;
        let ran = block_in_place(|| run(&["migrate"], &place.settings()));
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains("a column \"number\" of your own: rename it"), "{ran:?}");
        place.execute("ALTER TABLE user_actions RENAME COLUMN number TO mine").await;
        let ran = block_in_place(|| run(&["migrate"], &place.settings()));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(
            number(&place, "SELECT count(*) FROM user_actions WHERE mine = 7").await,
            rows + 1
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_in_the_background_leaves_its_row() {
    let place = old(Database::Postgres).await;
    fill(&place, MANY).await;
    let server = place.server(&[]).await;
    let since = Instant::now();
    loop {
        let rows = audit::own_rows(&place.place()).await;
        let migrated = |row: &Value| {
            let ran = row["request_data"]["migrations"].as_array();
            row["action_type"] == "SERVER:MIGRATE"
                && ran.is_some_and(|ran| ran.contains(&json!("server 2")))
        };
        if rows.iter().any(migrated) {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "{rows:#?}");
        sleep(Duration::from_millis(50)).await;
    }
    server.stop().await.unwrap();
}
