//! What stands in the audit trail, on each database.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use switchboard::handlers::roles;

use crate::support::{
    Client, Closed, Database, TestServer, audit,
    handlers::{Gate, PANICS, misbehaving},
    on_both,
    rest::add_author,
};

on_both!(
    a_change_over_websocket_is_a_row_with_all_that_is_known,
    a_change_over_rest_is_a_row_with_method_and_path,
    a_failed_change_is_an_error_with_what_the_client_was_told,
    a_missing_role_is_a_denial_on_both_transports,
    reads_are_rows_where_the_setting_says_so,
    secrets_never_reach_the_database,
    what_waits_is_written_on_shutdown,
    rows_that_are_too_old_are_deleted,
);

/// A short time for rows to wait.
const QUICK: (&str, &str) = ("AUDIT_BATCH_TIMEOUT", "100ms");

fn columns(row: &Value, names: &[&str]) -> Vec<Value> {
    names.iter().map(|name| row[*name].clone()).collect()
}

fn what(row: &Value) -> Value {
    columns(row, &["action_type", "resource", "outcome", "response_status"]).into()
}

async fn a_change_over_websocket_is_a_row_with_all_that_is_known(database: Database) {
    // With a short AUDIT_BATCH_TIMEOUT, a late row would go to the spool.
    let server = database.server(&[]).await;
    let headers = [("user-agent", "tests/1"), ("x-correlation-id", "of-the-upgrade")];
    let mut client = Client::try_open(server.addr, "/web", &headers).await.unwrap();
    client.authenticate(&server.token_with("ann", &[roles::CREATE_AUTHOR])).await;
    let before = jiff::Timestamp::now();
    let req_id = client.request(3, json!({ "name": "Ann" })).await;
    assert_eq!(client.receive().await["status_code"], 0);

    let rows = server.audited(1).await;
    let row = &rows[0];
    assert_eq!(what(row), json!(["WS:CREATE_AUTHOR", "CREATE_AUTHOR", "success", 0]));
    let user = row["user_id"].as_str().unwrap();
    let names = ["user_id", "username", "user_roles", "ip_address", "user_agent", "request_id"];
    let expected =
        json!([user, "ann", ["create-author"], "127.0.0.1", "tests/1", req_id.to_string()]);
    assert_eq!(Value::from(columns(row, &names)), expected);
    assert_eq!(row["request_data"], json!({ "name": "Ann" }));
    assert_eq!(row["error_message"], Value::Null);
    let took = row["duration_ms"].as_f64().unwrap();
    assert!(took > 0.0 && took < 10_000.0, "{took}");
    let at: jiff::Timestamp = row["timestamp"].as_str().unwrap().parse().unwrap();
    assert!(before <= at && at <= jiff::Timestamp::now(), "{at}");
    let id: uuid::Uuid = row["uid"].as_str().unwrap().parse().unwrap();
    assert_eq!(id.get_version_num(), 7);
    for series in [
        "audit_logs_total{outcome=\"success\"}",
        "audit_logs_written_total",
        "audit_batch_size_count",
        "audit_log_creation_duration_seconds_count",
    ] {
        server.until_metric(series, 1.0).await;
    }
    for series in ["audit_queue_size", "audit_logs_spooled_total", "audit_logs_dropped_total"] {
        assert_eq!(server.metric(series).await, 0.0, "{series}");
    }
}

async fn a_change_over_rest_is_a_row_with_method_and_path(database: Database) {
    let server = database.server(&[QUICK]).await;
    let id = add_author(&server, "Ann").await;
    let path = format!("/authors/{id}");
    let renamed = server
        .rest(Method::PUT, &path)
        .header("x-correlation-id", "from-the-client")
        .header("user-agent", "tests/2")
        .json(&json!({ "name": "Bea" }));
    assert_eq!(renamed.send().await.unwrap().status(), 200);
    assert_eq!(server.rest(Method::DELETE, &path).send().await.unwrap().status(), 204);
    let broadcast = server.rest(Method::POST, "/admin/broadcast");
    let broadcast = broadcast.json(&json!({ "pkg_id": 9, "data": { "a": 1 } }));
    assert_eq!(broadcast.send().await.unwrap().status(), 202);

    let rows = server.audited(4).await;
    let seen: Vec<_> = rows.iter().map(what).collect();
    assert_eq!(
        Value::from(seen),
        json!([
            ["POST", "/authors", "success", 201],
            ["PUT", path, "success", 200],
            ["DELETE", path, "success", 204],
            ["POST", "/admin/broadcast", "success", 202],
        ])
    );
    let names = ["username", "user_agent", "request_id", "request_data"];
    let expected = json!(["rest", "tests/2", "from-the-client", { "name": "Bea" }]);
    assert_eq!(Value::from(columns(&rows[1], &names)), expected);
    assert_eq!(rows[3]["request_data"], json!({ "pkg_id": 9, "data": { "a": 1 } }));
}

async fn a_failed_change_is_an_error_with_what_the_client_was_told(database: Database) {
    let server = database.server(&[QUICK]).await;
    add_author(&server, "Ann").await;
    let mut client = server.client("ann").await;
    assert_eq!(client.call(3, json!({ "name": "Ann" })).await["status_code"], 2);
    assert_eq!(client.call(5, json!({ "id": 4711 })).await["status_code"], 1);
    assert_eq!(client.call(3, json!({ "nam": "x" })).await["status_code"], 2);
    let again = server.rest(Method::POST, "/authors").json(&json!({ "name": "Ann" }));
    assert_eq!(again.send().await.unwrap().status(), 409);
    let broken = server.rest(Method::POST, "/authors").header("content-type", "application/json");
    assert_eq!(broken.body("{\"name\":").send().await.unwrap().status(), 422);

    let rows = server.audited(6).await;
    let seen: Vec<_> = rows[1..].iter().map(what).collect();
    assert_eq!(
        Value::from(seen),
        json!([
            ["WS:CREATE_AUTHOR", "CREATE_AUTHOR", "error", 2],
            ["WS:DELETE_AUTHOR", "DELETE_AUTHOR", "error", 1],
            ["WS:CREATE_AUTHOR", "CREATE_AUTHOR", "error", 2],
            ["POST", "/authors", "error", 409],
            ["POST", "/authors", "error", 422],
        ])
    );
    assert_eq!(rows[1]["error_message"], "This name is taken");
    assert_eq!(rows[2]["error_message"], "No author has the id 4711");
    assert_eq!(rows[4]["error_message"], "This name is taken");
    assert_eq!(rows[5]["request_data"], json!({ "_unreadable_bytes": 8 }));
    assert_eq!(server.metric("audit_logs_total{outcome=\"error\"}").await, 5.0);
}

async fn a_missing_role_is_a_denial_on_both_transports(database: Database) {
    let server = database.server(&[QUICK]).await;
    let mut client = server.client_with("ann", &[roles::GET_AUTHORS], "json").await;
    assert_eq!(client.call(3, json!({ "name": "Ann" })).await["status_code"], 3);
    let bare = server.token_with("bob", &[]);
    let read = server.request(Method::GET, "/authors").bearer_auth(&bare);
    assert_eq!(read.send().await.unwrap().status(), 403);
    // Neither needs a role, and nobody was kept from anything.
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    assert_eq!(client.call(1, json!({})).await["status_code"], 0);

    let rows = server.audited(2).await;
    let denied = "permission_denied";
    assert_eq!(what(&rows[0]), json!(["WS:CREATE_AUTHOR", "CREATE_AUTHOR", denied, 3]));
    assert_eq!(what(&rows[1]), json!(["GET", "/authors", denied, 403]));
    assert_eq!((&rows[0]["username"], &rows[1]["username"]), (&json!("ann"), &json!("bob")));
    assert_eq!(rows[0]["error_message"], "No permission for pkg_id 3");
    assert_eq!(server.metric("audit_logs_total{outcome=\"permission_denied\"}").await, 2.0);
}

async fn reads_are_rows_where_the_setting_says_so(database: Database) {
    let server = database.server(&[QUICK, ("AUDIT_READS", "true")]).await;
    let mut client = server.client("ann").await;
    assert_eq!(client.call(1, json!({ "name": "Ann" })).await["status_code"], 0);
    assert_eq!(client.call(100, json!({})).await["status_code"], 0);
    let read = server.rest(Method::GET, "/authors?search=a%20b&token=hush");
    assert_eq!(read.send().await.unwrap().status(), 200);
    assert_eq!(server.rest(Method::GET, "/authors/4711").send().await.unwrap().status(), 404);

    let rows = server.audited(3).await;
    assert_eq!(what(&rows[0]), json!(["WS:GET_AUTHORS", "GET_AUTHORS", "success", 0]));
    assert_eq!(what(&rows[1]), json!(["GET", "/authors", "success", 200]));
    assert_eq!(what(&rows[2]), json!(["GET", "/authors/4711", "error", 404]));
    assert_eq!(rows[0]["request_data"], json!({ "name": "Ann" }));
    assert_eq!(rows[1]["request_data"], json!({ "search": "a b", "token": "***" }));
}

async fn secrets_never_reach_the_database(database: Database) {
    let server = database.server(&[QUICK]).await;
    let mut client = server.client("ann").await;
    let data = json!({ "name": "Ann", "Password": "hush", "a": [{ "cardNumber": "4711" }] });
    assert_eq!(client.call(3, data).await["status_code"], 2);
    let nul = json!({ "name": "a\u{0}b" });
    assert_eq!(client.call(3, nul).await["status_code"], 2);
    let long = json!({ "name": "x".repeat(20_000) });
    assert_eq!(client.call(3, long).await["status_code"], 2);

    let rows = server.audited(3).await;
    // A member that the package does not know is there by name alone.
    let shown = json!({ "name": "Ann", "Password": "***", "a": "…" });
    assert_eq!(rows[0]["request_data"], shown);
    assert_eq!(rows[1]["request_data"], json!({ "name": "a\u{fffd}b" }));
    let long = format!("{}… (20000 bytes)", "x".repeat(1024));
    assert_eq!(rows[2]["request_data"], json!({ "name": long }));
    let all = Value::from(rows).to_string();
    assert!(!all.contains("hush") && !all.contains("4711"), "{all}");
}

async fn what_waits_is_written_on_shutdown(database: Database) {
    let folder = database.place().await;
    let server = folder.server(&[("AUDIT_BATCH_TIMEOUT", "1h")]).await;
    for i in 0..30 {
        add_author(&server, &format!("author {i}")).await;
    }
    assert_eq!(server.metric("audit_queue_size").await, 30.0);
    let place = server.database();
    assert_eq!(audit::rows(&place).await.len(), 0);
    server.stop().await.unwrap();
    assert_eq!(audit::rows(&place).await.len(), 30);
}

async fn rows_that_are_too_old_are_deleted(database: Database) {
    let place = database.place().await;
    place.server(&[]).await.stop().await.unwrap();
    let days_ago = |days: i64, count| {
        let at = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * days);
        let row = move |_| json!({ "uid": uuid::Uuid::new_v4(), "timestamp": format!("{at:.6}") });
        (0..count).map(row).collect::<Vec<_>>()
    };
    // More than go with one statement.
    place.audit(&days_ago(31, 1200)).await;
    place.audit(&days_ago(29, 10)).await;
    let server = place.server(&[]).await;
    server.audited(1210).await;
    server.stop().await.unwrap();
    let server = place.server(&[("AUDIT_LOG_RETENTION_DAYS", "30")]).await;
    let started = std::time::Instant::now();
    while audit::rows(&server.database()).await.len() > 10 {
        assert!(started.elapsed() < std::time::Duration::from_secs(10));
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    server.audited(10).await;
}

#[tokio::test]
async fn failed_authentications_are_rows_wherever_a_token_comes_in() {
    let server = TestServer::start(&[QUICK]).await;
    let bad = "bad.token.here";
    let over_rest = server.request(Method::GET, "/authors").bearer_auth(bad).send();
    assert_eq!(over_rest.await.unwrap().status(), 401);
    let expired = server.request(Method::GET, "/authors").bearer_auth(server.expired_token("ann"));
    assert_eq!(expired.send().await.unwrap().status(), 401);
    // Nobody tried to authenticate.
    let bare = server.request(Method::GET, "/authors").send().await.unwrap();
    assert_eq!(bare.status(), 401);
    let upgrade = [("authorization", "Bearer bad.token.here")];
    assert!(Client::try_open(server.addr, "/web", &upgrade).await.is_err());
    let mut first = Client::open(server.addr, "/web").await;
    first.send(&json!({ "type": "auth", "token": format!("Bearer {bad}") })).await;
    assert_eq!(first.until_closed().await.1, Closed::Code(4001));
    let mut refreshing = server.client("ann").await;
    refreshing.send(&json!({ "type": "refresh", "token": format!("Bearer {bad}") })).await;
    assert_eq!(refreshing.receive().await["type"], "error");

    // Failures of one kind share a row, which is written when its interval ends.
    let counts = async || {
        let rows = audit::rows(&server.database()).await;
        let times = |row: &Value| row["request_data"]["times"].as_u64().unwrap_or(1);
        let of = |kind: &str| rows.iter().filter(|row| row["action_type"] == kind).map(times).sum();
        let counts: [u64; 3] = ["GET", "WS:AUTH", "WS:REFRESH"].map(of);
        (counts, rows)
    };
    let started = std::time::Instant::now();
    let mut rows = loop {
        let (counts, rows) = counts().await;
        if counts == [2, 2, 1] {
            break rows;
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(10), "{counts:?} {rows:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    for row in &rows {
        assert_eq!((&row["outcome"], &row["ip_address"]), (&json!("error"), &json!("127.0.0.1")));
        assert!(row["error_message"].as_str().is_some_and(|msg| !msg.is_empty()), "{row}");
        assert!(!row.to_string().contains(bad), "{row}");
    }
    rows.sort_by_key(|row| row["action_type"].to_string());
    let [.., auth, refresh] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!(what(auth), json!(["WS:AUTH", "/web", "error", 4001]));
    assert_eq!(refresh["username"], "ann");
}

#[tokio::test]
async fn a_change_whose_client_left_is_a_row_of_its_user_with_its_true_outcome() {
    let url = crate::support::postgres::database().await;
    let server = TestServer::start(&[QUICK, ("DATABASE_URL", &url)]).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE author IN EXCLUSIVE MODE").await.unwrap();
    let create = server.rest(Method::POST, "/authors").json(&json!({ "name": "ghost" }));
    let left = create.timeout(std::time::Duration::from_millis(300)).send().await;
    assert!(left.is_err_and(|error| error.is_timeout()));
    other.execute("COMMIT").await.unwrap();
    let rows = server.audited(1).await;
    assert_eq!(what(&rows[0]), json!(["POST", "/authors", "success", 201]));
    assert_eq!(rows[0]["username"], "rest");
}

#[tokio::test]
async fn a_query_hides_no_body_and_names_nobody() {
    let server = TestServer::start(&[QUICK]).await;
    let create = server.rest(Method::POST, "/authors?username=bob&x=1");
    let create = create.json(&json!({ "name": "Ann" })).send().await.unwrap();
    assert_eq!(create.status(), 201);
    let read = server.request(Method::GET, "/audit-logs?username=victim").bearer_auth("bad.x.y");
    assert_eq!(read.send().await.unwrap().status(), 401);
    let anonymous = server.request(Method::DELETE, "/authors/1?username=root");
    assert_eq!(anonymous.send().await.unwrap().status(), 401);

    let mut rows = server.audited(3).await;
    assert_eq!(rows[0]["request_data"], json!({ "name": "Ann" }));
    assert_eq!(rows[0]["username"], "rest");
    for row in &rows[1..] {
        assert_eq!(row["username"], Value::Null, "{row}");
    }
    rows.sort_by_key(|row| row["action_type"].to_string());
    assert_eq!(what(&rows[0]), json!(["DELETE", "/authors/{id}", "error", 401]));
}

#[tokio::test]
async fn a_handler_that_panics_has_its_row_and_so_has_an_administrator_apart() {
    let gate = Gate::closed();
    let settings = [QUICK, ("OPS_ADDR", "127.0.0.1:0")];
    let server = TestServer::with_packages(&settings, misbehaving(&gate)).await;
    let mut client = server.client("ann").await;
    assert_eq!(client.call(PANICS, json!({})).await["status_code"], 1);
    server.audited(1).await;
    let ops = format!("http://{}/admin/users/nobody/connections", server.ops_addr.unwrap());
    let end = reqwest::Client::new().delete(ops).bearer_auth(server.token("boss"));
    assert_eq!(end.send().await.unwrap().status(), 204);
    let rows = server.audited(2).await;
    assert_eq!((&rows[0]["outcome"], &rows[0]["response_status"]), (&json!("error"), &json!(1)));
    let path = "/admin/users/nobody/connections";
    assert_eq!(what(&rows[1]), json!(["DELETE", path, "success", 204]));
    assert_eq!(rows[1]["username"], "boss");
}

#[tokio::test]
async fn the_address_of_a_row_is_the_clients_behind_a_trusted_proxy() {
    let server = TestServer::start(&[QUICK, ("TRUSTED_PROXIES", "127.0.0.1")]).await;
    let create = server.rest(Method::POST, "/authors").header("x-forwarded-for", "192.0.2.7");
    create.json(&json!({ "name": "Ann" })).send().await.unwrap();
    let headers = [("x-forwarded-for", "192.0.2.8")];
    let mut client = Client::try_open(server.addr, "/web", &headers).await.unwrap();
    client.authenticate(&server.token("ann")).await;
    client.call(5, json!({ "id": 4711 })).await;
    let rows = server.audited(2).await;
    assert_eq!(rows[0]["ip_address"], "192.0.2.7");
    assert_eq!(rows[1]["ip_address"], "192.0.2.8");
}

#[tokio::test]
async fn forced_disconnects_are_rows_and_others_are_not() {
    let server = TestServer::start(&[QUICK, ("WS_MAX_STRIKES", "1")]).await;
    let mut revoked = Client::open(server.addr, "/web").await;
    let id = revoked.authenticate(&server.token("ann")).await["connection_id"].clone();
    let path = format!("/admin/connections/{}", id.as_str().unwrap());
    assert_eq!(server.rest(Method::DELETE, &path).send().await.unwrap().status(), 204);
    assert_eq!(revoked.until_closed().await.1, Closed::Code(4004));
    server.audited(2).await;
    let mut struck = server.client("bob").await;
    struck.send(&json!({ "pkg_id": "x" })).await;
    assert_eq!(struck.until_closed().await.1, Closed::Code(1008));
    server.audited(3).await;
    let leaving = server.client("cid").await;
    leaving.close().await;
    server.until_metric("ws_connections_active", 0.0).await;

    let rows = server.audited(3).await;
    let of = |name: &str| rows.iter().filter(|row| row["username"] == name).collect::<Vec<_>>();
    assert_eq!(what(of("rest")[0]), json!(["DELETE", path, "success", 204]));
    assert_eq!(what(of("ann")[0]), json!(["WS:DISCONNECT", id, "success", 4004]));
    assert_eq!(of("ann")[0]["error_message"], "session revoked");
    assert_eq!(of("bob")[0]["response_status"], 1008);
}

#[tokio::test]
async fn an_origin_that_may_not_connect_is_a_denial() {
    let server = TestServer::start(&[QUICK, ("ALLOWED_WS_ORIGINS", "https://good.example")]).await;
    let origin = [("origin", "https://bad.example")];
    assert!(Client::try_open(server.addr, "/web", &origin).await.is_err());
    let rows = server.audited(1).await;
    assert_eq!(what(&rows[0]), json!(["WS:CONNECT", "/web", "permission_denied", 403]));
}

#[tokio::test]
async fn what_a_limit_refuses_was_not_looked_at_and_is_no_row() {
    let settings = [QUICK, ("RATE_LIMIT_PER_MINUTE", "1"), ("RATE_LIMIT_BURST", "0")];
    let server = TestServer::start(&settings).await;
    add_author(&server, "Ann").await;
    let again = server.rest(Method::POST, "/authors").json(&json!({ "name": "Bea" }));
    assert_eq!(again.send().await.unwrap().status(), 429);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    server.audited(1).await;
}

#[tokio::test]
async fn without_the_trail_there_are_no_rows_and_no_spool() {
    let server = TestServer::start(&[("AUDIT_ENABLED", "false")]).await;
    add_author(&server, "Ann").await;
    assert_eq!(server.metric("audit_logs_total{outcome=\"success\"}").await, 0.0);
    assert!(!server.data().join("audit").exists());
    server.audited(0).await;
}
