//! The audit trail under floods: what anybody can cause at will is a few rows, and the rows of users come
//! first.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use switchboard::handlers::roles;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    oidc::trusting,
    support::{
        Client, Database, TestServer, audit, issuer::Issuer, on_both, postgres::database,
        rest::add_author,
    },
};

on_both!(a_login_name_that_no_index_holds_is_cut_and_so_is_a_user_and_a_path);

/// No interval ends within a test: the stop of the server ends it.
const LONG: (&str, &str) = ("AUDIT_SUMMARY_INTERVAL", "1h");
const QUICK: (&str, &str) = ("AUDIT_BATCH_TIMEOUT", "100ms");

fn what(row: &Value) -> Value {
    let names = ["action_type", "resource", "response_status", "ip_address"];
    let mut what: Vec<_> = names.iter().map(|name| row[*name].clone()).collect();
    what.push(row["request_data"]["times"].clone());
    what.into()
}

/// The rows that sum others up, in the order of their kinds.
fn sums(rows: &[Value]) -> Vec<Value> {
    let mut sums: Vec<_> =
        rows.iter().filter(|row| row["request_data"]["times"].is_u64()).map(what).collect();
    sums.sort_by_key(Value::to_string);
    sums
}

#[tokio::test]
async fn a_flood_of_strangers_is_one_row_for_each_kind_which_a_stop_writes() {
    let (issuer, place) = (Issuer::start().await, Database::Sqlite.place().await);
    let settings =
        [LONG, ("DATABASE_URL", &place.url), ("ALLOWED_WS_ORIGINS", "https://good.example")];
    let server = trusting(&issuer, &settings).await;
    let expired = format!("Bearer {}", issuer.token(json!({ "exp": 1 })));
    for i in 0..30 {
        let logout = server.request(Method::POST, "/auth/backchannel-logout");
        let logout = logout.header("content-type", "application/x-www-form-urlencoded");
        let logout = logout.body("logout_token=garbage").send().await.unwrap();
        assert_eq!(logout.status(), 400);
        let origin = [("origin", "https://bad.example")];
        assert!(Client::try_open(server.addr, "/web", &origin).await.is_err());
        let token = [("authorization", &*expired)];
        assert!(Client::try_open(server.addr, "/web", &token).await.is_err());
        let path = format!("/authors/{i}?x={i}");
        let read = server.request(Method::GET, &path).bearer_auth("bad.token.here");
        assert_eq!(read.send().await.unwrap().status(), 401);
        // No route has it, so it leaves no row.
        let method = Method::from_bytes(format!("MADEUP{i}").as_bytes()).unwrap();
        let made_up = server.request(method, &path).bearer_auth("bad.token.here").send();
        assert!(made_up.await.unwrap().status().is_client_error());
        let login = json!({ "username": format!("user{i}"), "password": "hush" });
        let login = server.request(Method::POST, "/auth/login").json(&login);
        assert_eq!(login.send().await.unwrap().status(), 401);
    }
    server.stop().await.unwrap();
    let rows = audit::rows(&place.place()).await;
    let here = "127.0.0.1";
    let mut expected = vec![
        json!(["GET", "/authors/{id}", 401, here, 30]),
        json!(["POST", "/auth/backchannel-logout", 400, here, 30]),
        json!(["POST", "/auth/login", 401, here, 30]),
        json!(["WS:AUTH", "/web", 4001, here, 30]),
        json!(["WS:CONNECT", "/web", 403, here, 30]),
    ];
    expected.sort_by_key(Value::to_string);
    assert_eq!((rows.len(), sums(&rows)), (expected.len(), expected));
    let login = rows.iter().find(|row| row["resource"] == "/auth/login").unwrap();
    let names = login["request_data"]["usernames"].as_array().unwrap();
    assert_eq!((&login["username"], names.len()), (&Value::Null, 10));
    let moment = |name: &str| login["request_data"][name].as_str().unwrap().to_owned();
    assert!(moment("first") < moment("last"), "{login}");
}

#[tokio::test]
async fn many_addresses_have_fifty_rows_and_one_more_and_a_network_of_ipv6_is_one_address() {
    let place = Database::Sqlite.place().await;
    let server = place.server(&[LONG, ("TRUSTED_PROXIES", "127.0.0.1")]).await;
    let read_as = async |address: String| {
        let read = server.request(Method::GET, "/authors").bearer_auth("bad.token.here");
        let read = read.header("x-forwarded-for", address).send().await.unwrap();
        assert_eq!(read.status(), 401);
    };
    for i in 1..=80 {
        read_as(format!("2001:db8:1:2:3:4:5:{i:x}")).await;
        read_as(format!("198.51.100.{i}")).await;
    }
    assert_eq!(server.metric("audit_logs_total{outcome=\"error\"}").await, 160.0);
    server.stop().await.unwrap();
    let rows = audit::rows(&place.place()).await;
    assert_eq!(rows.len(), 51);
    let sums = sums(&rows);
    assert!(sums.contains(&json!(["GET", "/authors", 401, "2001:db8:1:2::/64", 80])), "{sums:?}");
    assert!(sums.contains(&json!(["GET", "/authors", 401, "198.51.100.49", 1])), "{sums:?}");
    assert!(sums.contains(&json!(["other", "unknown callers", null, null, 31])), "{sums:?}");
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

#[tokio::test]
async fn ten_thousand_denials_of_a_user_are_sixty_rows_and_one_more() {
    let place = Database::Sqlite.place().await;
    let server = place.server(&[LONG, ("WS_MESSAGE_RATE_LIMIT", "0")]).await;
    let mut client = server.client_with("ann", &[roles::CREATE_AUTHOR], "json").await;
    deny(&mut client, 10_000).await;
    // Another user has rows of its own, and a change has one whatever its user was kept from.
    let mut other = server.client_with("bob", &[], "json").await;
    deny(&mut other, 50).await;
    assert_eq!(client.call(3, json!({ "name": "Ann" })).await["status_code"], 0);
    server.stop().await.unwrap();
    let rows = audit::rows(&place.place()).await;
    assert_eq!(rows.len(), 60 + 1 + 50 + 1);
    let expected = json!(["WS:DELETE_AUTHOR", "DELETE_AUTHOR", 3, "127.0.0.1", 9940]);
    assert_eq!(sums(&rows), [expected]);
    let sum = rows.iter().find(|row| row["request_data"]["times"].is_u64()).unwrap();
    assert_eq!((&sum["username"], &sum["outcome"]), (&json!("ann"), &json!("permission_denied")));
}

#[tokio::test]
async fn sums_are_written_when_their_interval_ends() {
    let server = TestServer::start(&[QUICK]).await;
    for _ in 0..2 {
        let rows = audit::rows(&server.database()).await.len();
        let read = server.request(Method::GET, "/authors").bearer_auth("bad.token.here");
        assert_eq!(read.send().await.unwrap().status(), 401);
        let rows = server.audited(rows + 1).await;
        assert_eq!(
            sums(&rows[rows.len() - 1..]),
            [json!(["GET", "/authors", 401, "127.0.0.1", 1])]
        );
    }
    server.until_metric("table_entries{table=\"audit_sums\"}", 0.0).await;
    assert_eq!(server.metric("audit_logs_aggregated_total").await, 2.0);
}

#[tokio::test]
async fn rows_of_strangers_leave_a_part_of_queue_and_spool_to_users() {
    let url = database().await;
    let small = [
        QUICK,
        ("DATABASE_URL", &*url),
        ("AUDIT_QUEUE", "8"),
        ("AUDIT_BATCH_SIZE", "4"),
        ("AUDIT_SPOOL_LIMIT", "8KiB"),
        ("TRUSTED_PROXIES", "127.0.0.1"),
    ];
    let server = TestServer::start(&small).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
    let mut strangers = 0;
    while server.metric("audit_logs_dropped_total").await < 20.0 {
        strangers += 1;
        let read = server.request(Method::GET, "/authors").bearer_auth("bad.token.here");
        let from = format!("198.51.{}.{}", strangers / 250, strangers % 250);
        read.header("x-forwarded-for", from).send().await.unwrap();
    }
    for i in 0..6 {
        add_author(&server, &format!("author {i}")).await;
    }
    other.execute("ROLLBACK").await.unwrap();
    server.until_metric("audit_spool_rows", 0.0).await;
    server.until_metric("audit_queue_size", 0.0).await;
    let rows = audit::rows(&server.database()).await;
    let made = rows.iter().filter(|row| row["response_status"] == 201).count();
    assert_eq!(made, 6, "rows of a user were lost for rows of strangers");
}

async fn a_login_name_that_no_index_holds_is_cut_and_so_is_a_user_and_a_path(database: Database) {
    let issuer = Issuer::start().await;
    let place = database.place().await;
    let server = trusting(&issuer, &[QUICK, ("DATABASE_URL", &place.url)]).await;
    // Letters that do not repeat: Postgres would squeeze them.
    let long: String = (0..1100).filter_map(|i| char::from_u32(0x1_0000 + i * 37)).collect();
    assert_eq!(long.len(), 4400);
    let login = json!({ "username": long, "password": "hush" });
    let login = server.request(Method::POST, "/auth/login").json(&login).send().await.unwrap();
    assert_eq!(login.status(), 401);
    let token = issuer.token(json!({ "sub": long, "preferred_username": long }));
    let path: String = (0..2000).map(|i| format!("{:x}", i * 7919)).collect();
    let remove = server.request(Method::DELETE, &format!("/authors/{path}"));
    let status = remove.bearer_auth(&token).send().await.unwrap().status();
    assert!(status.is_client_error(), "{status}");

    let mut rows = server.audited(2).await;
    rows.sort_by_key(|row| row["resource"].to_string());
    let cut: String = long.chars().take(128).collect();
    assert_eq!(rows[0]["resource"], "/auth/login");
    assert_eq!(rows[0]["username"], cut);
    assert_eq!((&rows[1]["user_id"], &rows[1]["username"]), (&json!(cut), &json!(cut)));
    assert_eq!(rows[1]["resource"], format!("/authors/{path}")[..512]);
    for series in ["audit_logs_spooled_total", "audit_log_errors_total{error_type=\"refused\"}"] {
        assert_eq!(server.metric(series).await, 0.0, "{series}");
    }
    assert!(!server.data().join("audit/rejected.jsonl").exists());
}

#[tokio::test]
async fn a_row_that_the_database_refuses_drags_no_other_through_the_disk() {
    let url = database().await;
    let server = TestServer::start(&[("AUDIT_BATCH_TIMEOUT", "4s"), ("DATABASE_URL", &url)]).await;
    poison(&url).await;
    for i in 0..30 {
        let name = if i == 17 { "poison".to_owned() } else { format!("author {i}") };
        add_author(&server, &name).await;
    }
    assert_eq!(server.audited(29).await.len(), 29);
    server.until_metric("audit_queue_size", 0.0).await;
    assert_eq!(server.metric("audit_logs_spooled_total").await, 0.0);
    assert_eq!(server.metric("audit_logs_rejected_total").await, 1.0);
    let kept = std::fs::read_to_string(server.data().join("audit/rejected.jsonl")).unwrap();
    assert!(kept.lines().count() == 1 && kept.contains("poison"), "{kept}");
}

#[tokio::test]
async fn the_file_of_rejected_rows_has_a_bound_and_what_is_beyond_it_is_counted() {
    let url = database().await;
    // A sixteenth: two rows or three.
    let settings = [QUICK, ("DATABASE_URL", &*url), ("AUDIT_SPOOL_LIMIT", "32KiB")];
    let server = TestServer::start(&settings).await;
    poison(&url).await;
    for i in 0..20 {
        add_author(&server, &format!("poison {i}")).await;
    }
    add_author(&server, "good").await;
    let rows = server.audited(1).await;
    assert_eq!(rows[0]["request_data"]["name"], "good");
    server.until_metric("audit_spool_rows", 0.0).await;
    let kept = std::fs::read_to_string(server.data().join("audit/rejected.jsonl")).unwrap();
    assert!(kept.len() <= 2048, "{} bytes", kept.len());
    let lines = kept.lines().count();
    assert!((1..20).contains(&lines), "{kept}");
    assert_eq!(server.metric("audit_logs_rejected_total").await, 20.0);
    assert_eq!(server.metric("audit_logs_dropped_total").await, (20 - lines) as f64);
}

/// Has the database refuse rows of some authors.
async fn poison(url: &str) {
    let mut other = PgConnection::connect(url).await.unwrap();
    let check =
        "ALTER TABLE user_actions ADD CHECK (NOT starts_with(request_data ->> 'name', 'poison'))";
    other.execute(check).await.unwrap();
}
