//! What leaves a row in the audit trail beside requests: logins, refreshes, logouts, and what servers
//! and operators do themselves.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use switchboard::handlers::roles;

use crate::{
    backchannel::{log_out, logout_token, socket},
    oidc::trusting,
    support::{
        Client, Database, TestServer,
        audit::{own_rows, rows},
        database::Place,
        issuer::{Issuer, now},
        on_both,
        process::run,
    },
};

const QUICK: (&str, &str) = ("AUDIT_BATCH_TIMEOUT", "100ms");
const LOGINS: (&str, &str) = ("AUDIT_LOGINS", "true");

/// A token of the development issuer that belongs to a session; null: to none.
fn token(server: &TestServer, user: &str, sid: &Value, ttl: i64) -> String {
    let mut claims = json!({
        "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": format!("id-of-{user}"),
        "preferred_username": user, "iat": now(), "exp": now() + ttl, "sid": sid,
        "resource_access": { "switchboard": { "roles": roles::ALL } },
    });
    if sid.is_null() {
        claims.as_object_mut().unwrap().remove("sid");
    }
    server.issuer.sign(&claims)
}

async fn connect(server: &TestServer, token: &str) -> Client {
    let mut client = Client::open(server.addr, "/web").await;
    client.authenticate(token).await;
    client
}

fn what(row: &Value) -> Value {
    json!([row["action_type"], row["resource"], row["outcome"], row["username"]])
}

/// Waits until there are so many rows of servers and operators.
async fn until_own(place: &Place, expected: usize) -> Vec<Value> {
    let started = Instant::now();
    loop {
        let rows = own_rows(&place.place()).await;
        if rows.len() >= expected || started.elapsed() > Duration::from_secs(10) {
            assert_eq!(rows.len(), expected, "{rows:#?}");
            return rows;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn a_login_over_websocket_is_a_row_for_each_session_and_not_for_each_socket(
    database: Database,
) {
    let place = database.place().await;
    let first = place.server(&[QUICK, LOGINS]).await;
    let second = place.server(&[QUICK, LOGINS]).await;
    let one = json!("s1");
    for ttl in [500, 600] {
        drop(connect(&first, &token(&first, "ann", &one, ttl)).await);
    }
    // On another node, with another token and in the upgrade.
    let header = format!("Bearer {}", token(&second, "ann", &one, 700));
    drop(Client::try_open(second.addr, "/web", &[("authorization", &header)]).await.unwrap());
    drop(connect(&second, &token(&second, "ann", &json!("s2"), 600)).await);
    let nameless = token(&first, "bob", &Value::Null, 600);
    for _ in 0..2 {
        drop(connect(&first, &nameless).await);
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    // A node that was started again does not know the session, and the database does.
    let third = place.server(&[QUICK, LOGINS]).await;
    drop(connect(&third, &token(&third, "ann", &one, 800)).await);
    third.stop().await.unwrap();

    let mut rows = rows(&place.place()).await;
    rows.sort_by_key(|row| (row["username"].to_string(), row["request_data"]["sid"].to_string()));
    let seen: Vec<_> =
        rows.iter().map(|row| json!([row["username"], row["request_data"]["sid"]])).collect();
    assert_eq!(json!(seen), json!([["ann", "s1"], ["ann", "s2"], ["bob", null]]));
    let row = &rows[0];
    assert_eq!(what(row), json!(["WS:AUTH", "/web", "success", "ann"]));
    assert_eq!((&row["user_id"], &row["response_status"]), (&json!("id-of-ann"), &json!(0)));
    assert_eq!((&row["ip_address"], &row["error_message"]), (&json!("127.0.0.1"), &Value::Null));
    assert!(row["request_data"]["connection"].as_str().is_some_and(|id| id.len() == 36), "{row}");
}

async fn logins_leave_no_row_where_the_setting_says_so(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUICK, ("AUDIT_LOGINS", "false")]).await;
    let mut client = connect(&server, &token(&server, "ann", &json!("s1"), 500)).await;
    let fresh = token(&server, "ann", &json!("s1"), 600);
    client.send(&json!({ "type": "refresh", "token": format!("Bearer {fresh}") })).await;
    assert_eq!(client.receive().await["type"], "refresh_ok");
    server.stop().await.unwrap();
    assert_eq!(rows(&place.place()).await, Vec::<Value>::new());
}

async fn a_refresh_over_websocket_is_a_row_for_each_fresh_token(database: Database) {
    let place = database.place().await;
    let server = place.server(&[QUICK, LOGINS]).await;
    let sid = json!("s1");
    let mut client = connect(&server, &token(&server, "ann", &sid, 500)).await;
    let fresh = [600, 600, 700].map(|ttl| token(&server, "ann", &sid, ttl));
    for token in &fresh {
        client.send(&json!({ "type": "refresh", "token": format!("Bearer {token}") })).await;
        assert_eq!(client.receive().await["type"], "refresh_ok");
    }
    server.stop().await.unwrap();
    let mut rows = rows(&place.place()).await;
    let refreshes: Vec<_> = rows.extract_if(.., |row| row["action_type"] == "WS:REFRESH").collect();
    assert_eq!((rows.len(), refreshes.len()), (1, 2), "{rows:?} {refreshes:?}");
    let connection = &rows[0]["request_data"]["connection"];
    for row in &refreshes {
        let expected = json!(["WS:REFRESH", connection, "success", "ann"]);
        assert_eq!((what(row), &row["request_data"]["sid"]), (expected, &sid));
    }
}

async fn a_server_says_that_it_migrates_starts_and_stops(database: Database) {
    let place = database.place().await;
    for _ in 0..2 {
        let server = place.server(&[("NODE_ID", "blue")]).await;
        server.stop().await.unwrap();
    }
    let rows = own_rows(&place.place()).await;
    let actions: Vec<_> = rows.iter().map(|row| row["action_type"].as_str().unwrap()).collect();
    let [start, stop] = ["SERVER:START", "SERVER:STOP"];
    assert_eq!(actions, ["SERVER:MIGRATE", start, stop, start, stop]);
    for row in &rows {
        assert_eq!(row["outcome"], "success");
        for column in ["user_id", "username", "ip_address", "user_agent", "request_id"] {
            assert_eq!(row[column], Value::Null, "{column} of {row}");
        }
        assert!(row["resource"].as_str().unwrap().starts_with("blue-"), "{row}");
    }
    // A node is another one after each start.
    assert_eq!(rows[1]["resource"], rows[2]["resource"]);
    assert_ne!(rows[1]["resource"], rows[3]["resource"]);
    assert!(rows[0]["request_data"]["migrations"].as_array().is_some_and(|all| !all.is_empty()));
    assert_eq!(rows[1]["request_data"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(rows[2]["request_data"]["cause"], "told to");
    assert!(rows[2]["request_data"]["uptime_s"].is_u64(), "{}", rows[2]);
}

async fn a_retention_run_that_deleted_something_leaves_a_row(database: Database) {
    let place = database.place().await;
    assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    let at = |days: i64| {
        let at = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * days);
        json!({ "id": uuid::Uuid::new_v4(), "timestamp": format!("{at:.6}") })
    };
    place.audit(&[at(40), at(35), at(20)]).await;
    let settings = [QUICK, ("AUDIT_LOG_RETENTION_DAYS", "30")];
    let server = place.server(&settings).await;
    // That of the command, and of the start.
    let rows = until_own(&place, 3).await;
    let row = rows.iter().find(|row| row["action_type"] == "AUDIT:RETENTION").unwrap();
    assert_eq!((&row["request_data"]["rows"], &row["user_id"]), (&json!(2), &Value::Null));
    let before: jiff::Timestamp = row["request_data"]["before"].as_str().unwrap().parse().unwrap();
    assert!(before < jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * 29));
    server.stop().await.unwrap();
    // One that finds nothing to delete leaves none.
    place.server(&settings).await.stop().await.unwrap();
    let rows = own_rows(&place.place()).await;
    let runs = rows.iter().filter(|row| row["action_type"] == "AUDIT:RETENTION").count();
    assert_eq!(runs, 1, "{rows:?}");
}

/// Has the database refuse rows of an action.
async fn refuse(database: Database, place: &Place, action: &str) {
    let sql = match database {
        Database::Postgres => {
            format!("ALTER TABLE user_actions ADD CHECK (action_type <> '{action}') NOT VALID")
        }
        Database::Sqlite => format!(
            "CREATE TRIGGER refused BEFORE INSERT ON user_actions WHEN NEW.action_type = '{action}'
             BEGIN SELECT RAISE(ABORT, 'refused'); END"
        ),
    };
    place.execute(&sql).await;
}

async fn an_export_leaves_a_row_of_its_operator_or_does_not_happen(database: Database) {
    let place = database.place().await;
    assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    place.audit(&[json!({})]).await;
    let export = |more: &[&str]| {
        let args = [&["audit", "export", "--until", "2026-11-22"], more].concat();
        run(&args, &place.settings())
    };
    assert_eq!(export(&["--format", "csv"]).code, Some(0));
    let rows = own_rows(&place.place()).await;
    let row = rows.iter().find(|row| row["action_type"] == "AUDIT:EXPORT").unwrap();
    assert_eq!((&row["outcome"], &row["user_id"]), (&json!("success"), &Value::Null));
    assert!(row["username"].as_str().is_some_and(|name| !name.is_empty()), "{row}");
    assert_eq!(row["request_data"]["format"], "csv");
    assert_eq!(row["request_data"]["until"], "2026-11-23T00:00:00.000000Z");

    refuse(database, &place, "AUDIT:EXPORT").await;
    let file = place.data.path().join("trail");
    let ran = export(&["--output", file.to_str().unwrap()]);
    assert_eq!((ran.code, &*ran.stdout), (Some(1), ""), "{ran:?}");
    assert!(ran.stderr.contains("nothing was exported"), "{ran:?}");
    assert!(!file.exists());
}

async fn a_migration_by_hand_leaves_a_row_of_its_operator(database: Database) {
    let place = database.place().await;
    for _ in 0..2 {
        assert_eq!(run(&["migrate"], &place.settings()).code, Some(0));
    }
    let rows = own_rows(&place.place()).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(rows[0]["action_type"], "SERVER:MIGRATE");
    assert!(rows[0]["username"].as_str().is_some_and(|name| !name.is_empty()), "{rows:?}");
}

on_both![
    a_login_over_websocket_is_a_row_for_each_session_and_not_for_each_socket,
    logins_leave_no_row_where_the_setting_says_so,
    a_refresh_over_websocket_is_a_row_for_each_fresh_token,
    a_server_says_that_it_migrates_starts_and_stops,
    a_retention_run_that_deleted_something_leaves_a_row,
    an_export_leaves_a_row_of_its_operator_or_does_not_happen,
    a_migration_by_hand_leaves_a_row_of_its_operator,
];

#[tokio::test]
async fn rows_of_a_back_channel_logout_name_the_user_and_the_session() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[QUICK]).await;
    let of = |sid: &str| {
        issuer.token(json!({ "sub": "id-of-ann", "preferred_username": "ann", "sid": sid }))
    };
    let mut open = socket(&server, &of("s1")).await;
    // The token may name the session alone: its connection says whose it is. Or the session is not here.
    log_out(&server, &logout_token(&issuer, &json!({ "sub": null, "sid": "s1" }))).await;
    open.until_closed().await;
    log_out(&server, &logout_token(&issuer, &json!({ "sub": "id-of-bob", "sid": "s2" }))).await;
    log_out(&server, &logout_token(&issuer, &json!({ "sub": "id-of-eve", "sid": null }))).await;

    let mut rows = server.audited(4).await;
    rows.sort_by_key(|row| (row["action_type"].to_string(), row["user_id"].to_string()));
    let seen: Vec<_> = rows
        .iter()
        .map(|row| {
            json!([row["action_type"], row["user_id"], row["username"], row["request_data"]["sid"]])
        })
        .collect();
    assert_eq!(
        json!(seen),
        json!([
            ["POST", "id-of-ann", "ann", "s1"],
            ["POST", "id-of-bob", "id-of-bob", "s2"],
            ["POST", "id-of-eve", "id-of-eve", null],
            ["WS:DISCONNECT", "id-of-ann", "ann", "s1"],
        ])
    );
}
