//! What the audit trail has of a request's data: the parsed value, without what is secret or unknown.

use reqwest::{Method, Response};
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::{
    oidc::trusting,
    support::{
        Client, Database, TestServer, audit,
        issuer::Issuer,
        on_both,
        rest::{add_author, refused},
        users::PASSWORD,
    },
};

on_both!(
    the_id_of_what_was_changed_is_there_whatever_surrounds_it,
    what_is_long_is_cut_where_it_stands,
    what_a_package_or_a_route_does_not_know_is_there_by_name_alone,
);

const QUICK: (&str, &str) = ("AUDIT_BATCH_TIMEOUT", "100ms");
/// A password or a token: no row may have it.
const HUSH: &str = "hunter2-4711";
const JWT: &str =
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg";

/// Sends a request whose `data` is this text, and returns the answer.
async fn call(client: &mut Client, pkg_id: i64, data: &str) -> Value {
    let req_id = Uuid::new_v4();
    let text = format!(r#"{{"pkg_id":{pkg_id},"req_id":"{req_id}","data":{data}}}"#);
    client.send_frame(Message::text(text)).await;
    let answer = client.receive().await;
    assert_eq!(answer["req_id"], req_id.to_string(), "{answer}");
    answer
}

async fn post(server: &TestServer, path: &str, body: &str) -> Response {
    let request = server.rest(Method::POST, path).header("content-type", "application/json");
    request.body(body.to_owned()).send().await.unwrap()
}

async fn the_id_of_what_was_changed_is_there_whatever_surrounds_it(database: Database) {
    let server = database.server(&[QUICK, ("WS_BROADCAST_CHANGES", "false")]).await;
    for name in ["a", "b", "c", "d"] {
        add_author(&server, name).await;
    }
    let blanks = " ".repeat(17_000);
    let mut text = server.client("ann").await;
    assert_eq!(call(&mut text, 5, &format!("{{\"id\":1{blanks}}}")).await["status_code"], 0);
    let mut binary = server.client_with("ann", &roles::ALL, "protobuf").await;
    let answer = binary.call_protobuf(5, &format!("{{{blanks}\"id\" : 2}}")).await;
    assert_eq!(answer.status_code, 0);
    // Escaped, and refused as it stands there twice.
    assert_eq!(call(&mut text, 5, r#"{"\u0069d":3}"#).await["status_code"], 0);
    assert_eq!(call(&mut text, 5, r#"{"id":4,"id":5}"#).await["status_code"], 2);
    let data = format!("{{{blanks}\"pkg_id\":9,\"data\":{{\"a\":1e999,\"b\":\"\\ud800\"}}}}");
    assert_eq!(post(&server, "/admin/broadcast", &data).await.status(), 202);

    let rows = server.audited(9).await;
    let seen: Vec<_> = rows[4..].iter().map(|row| &row["request_data"]).collect();
    let unreadable = json!({ "_unreadable_bytes": 24 });
    assert_eq!(
        json!(seen),
        json!([
            { "id": 1 },
            { "id": 2 },
            { "id": 3 },
            { "id": 4, "id#2": 5 },
            { "pkg_id": 9, "data": unreadable },
        ])
    );
}

async fn what_is_long_is_cut_where_it_stands(database: Database) {
    let server = database.server(&[QUICK]).await;
    let mut client = server.client("ann").await;
    let name = "ü".repeat(255);
    assert_eq!(client.call(3, json!({ "name": name })).await["status_code"], 0);
    let long = json!({ "id": 1, "name": "y".repeat(9000) });
    assert_eq!(client.call(4, long).await["status_code"], 2);
    let mut many: Vec<_> = (0..100).map(|i| format!("\"m{i}\":\"{}\"", "x".repeat(300))).collect();
    many.push("\"id\":7".to_owned());
    assert_eq!(call(&mut client, 5, &format!("{{{}}}", many.join(","))).await["status_code"], 2);
    let items = json!({ "pkg_id": 9, "user": "nobody", "data": vec!["z".repeat(50); 1000] });
    assert_eq!(post(&server, "/admin/broadcast", &items.to_string()).await.status(), 202);

    let rows = server.audited(4).await;
    assert_eq!(rows[0]["request_data"], json!({ "name": name }));
    let cut = format!("{}… (9000 bytes)", "y".repeat(1024));
    assert_eq!(rows[1]["request_data"], json!({ "id": 1, "name": cut }));
    let shown = &rows[2]["request_data"];
    assert_eq!((&shown["id"], &shown["m0"], &shown["m99"]), (&json!(7), &json!("…"), &json!("…")));
    let shown = &rows[3]["request_data"];
    assert_eq!((&shown["pkg_id"], &shown["user"]), (&json!(9), &json!("nobody")));
    assert_eq!(
        (&shown["data"][0], &shown["data"][64]),
        (&json!("z".repeat(50)), &json!("… 936 more"))
    );
}

async fn what_a_package_or_a_route_does_not_know_is_there_by_name_alone(database: Database) {
    let server = database.server(&[QUICK, ("AUDIT_READS", "true")]).await;
    let mut client = server.client("ann").await;
    let unknown = json!({ "name": "Ann", "hint": HUSH, "deep": { "a": [HUSH] } });
    assert_eq!(client.call(3, unknown.clone()).await["status_code"], 2);
    let filters = json!({ "page": 1, "filters": { "name": "A", "hint": HUSH } });
    assert_eq!(client.call(2, filters).await["status_code"], 2);
    assert_eq!(post(&server, "/authors", &unknown.to_string()).await.status(), 422);
    let read = server.rest(Method::GET, &format!("/authors?search=a&q={HUSH}&pin=4711"));
    assert_eq!(read.send().await.unwrap().status(), 200);
    // One that is denied is no different.
    let mut bare = server.client_with("bob", &[], "json").await;
    assert_eq!(bare.call(3, unknown).await["status_code"], 3);
    let read = server.request(Method::GET, &format!("/authors?search=a&q={HUSH}"));
    let read = read.bearer_auth(server.token_with("bob", &[])).send().await.unwrap();
    assert_eq!(read.status(), 403);

    let rows = server.audited(6).await;
    let seen: Vec<_> = rows.iter().map(|row| &row["request_data"]).collect();
    let shown = json!({ "name": "Ann", "hint": "…", "deep": "…" });
    assert_eq!(
        json!(seen),
        json!([
            shown,
            { "page": 1, "filters": { "name": "A", "hint": "…" } },
            shown,
            { "search": "a", "q": "…", "pin": "***" },
            shown,
            { "search": "a", "q": "…" },
        ])
    );
}

#[tokio::test]
async fn an_array_is_no_object_at_any_door() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[QUICK, ("AUDIT_READS", "true")]).await;
    let token = issuer.token(json!({ "realm_access": { "roles": roles::ALL } }));
    let expected = "invalid type: sequence, expected an object";
    let author = {
        let new = server.request(Method::POST, "/authors").bearer_auth(&token);
        new.json(&json!({ "name": "Ann" })).send().await.unwrap().status()
    };
    assert_eq!(author, 201);
    for (method, route, body, path) in [
        (Method::POST, "/auth/login", json!(["ann", PASSWORD]), ""),
        (Method::POST, "/auth/refresh", json!([JWT]), ""),
        (Method::POST, "/auth/logout", json!([JWT]), ""),
        (Method::POST, "/authors", json!([HUSH]), ""),
        (Method::PUT, "/authors/1", json!([HUSH]), ""),
        (Method::POST, "/admin/broadcast", json!([3, { "a": HUSH }, null]), ""),
        (Method::POST, "/admin/broadcast", json!([3, {}, null, "name"]), ""),
    ] {
        let request = server.request(method, route).bearer_auth(&token).json(&body);
        let details = refused(request.send().await.unwrap(), 422, "invalid_data").await;
        assert_eq!(details["errors"], json!([{ "path": path, "msg": expected }]), "{route}");
    }

    let upgrade = async |format: &str| {
        let mut client = Client::open(server.addr, &format!("/web?format={format}")).await;
        client.authenticate(&token).await;
        client
    };
    let error = json!([{ "path": "filters", "msg": expected }]);
    let data = json!({ "filters": [1, HUSH] });
    let mut text = upgrade("json").await;
    let answer = text.call(2, data.clone()).await;
    assert_eq!((&answer["status_code"], &answer["data"]["details"]["errors"]), (&json!(2), &error));
    let mut binary = upgrade("protobuf").await;
    let answer = binary.call_protobuf(2, &data.to_string()).await;
    assert_eq!((answer.status_code, &answer.data()["details"]["errors"]), (2, &error));
    // Frames themselves, and control frames.
    for frame in [json!([2, Uuid::new_v4(), {}]), json!(["refresh", JWT])] {
        text.send(&frame).await;
        assert_eq!(text.receive().await["data"]["code"], "invalid_message", "{frame}");
    }
    let mut first = Client::open(server.addr, "/web").await;
    first.send(&json!(["auth", format!("Bearer {token}")])).await;
    assert_ne!(first.receive().await["type"], "auth_ok");

    // The first frame that was none is one too.
    let rows = server.audited(11).await;
    let all = Value::from(rows.clone()).to_string();
    for secret in [PASSWORD, HUSH, JWT, "eyJ"] {
        assert!(!all.contains(&format!("\"{secret}")), "{secret}: {all}");
    }
    let of =
        |resource: &str| rows.iter().filter(|row| row["resource"] == resource).collect::<Vec<_>>();
    assert_eq!(of("/admin/broadcast")[0]["request_data"], json!("…"));
    assert_eq!(of("GET_PAGINATED_AUTHORS")[1]["request_data"], json!({ "filters": "…" }));
}

#[tokio::test]
async fn of_a_login_only_the_name_is_in_the_trail_whatever_members_came() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[QUICK]).await;
    let send = async |path: &str, body: Value| {
        let answer = server.request(Method::POST, path).json(&body).send().await.unwrap();
        answer.status().as_u16()
    };
    let good = json!({ "username": "ann", "password": PASSWORD });
    assert_eq!(send(&format!("/auth/login?pass={HUSH}&x={HUSH}"), good).await, 200);
    for wrong in ["passwort", "pass", "Password", "pwd", "kennwort", "otp", "x"] {
        assert_eq!(send("/auth/login", json!({ "username": "ann", wrong: HUSH })).await, 422);
        assert_eq!(send("/auth/refresh", json!({ wrong: HUSH })).await, 422);
        assert_eq!(send("/auth/logout", json!({ wrong: HUSH, "refresh_token": JWT })).await, 422);
    }
    let form = server.request(Method::POST, "/auth/backchannel-logout");
    let form = form.header("content-type", "application/x-www-form-urlencoded");
    let form = form.body(format!("logout_token={HUSH}&x={HUSH}")).send().await.unwrap();
    assert_eq!(form.status(), 400);
    // All that failed is summed up.
    let rows = loop {
        let rows = audit::rows(&server.database()).await;
        let times = |row: &Value| row["request_data"]["times"].as_u64().unwrap_or(0);
        if rows.iter().map(times).sum::<u64>() == 22 {
            break rows;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let all = Value::from(rows.clone()).to_string();
    assert!(!all.contains(HUSH) && !all.contains(JWT) && !all.contains(PASSWORD), "{all}");
    let login = rows.iter().find(|row| row["outcome"] == "success").unwrap();
    assert_eq!(login["request_data"], json!({ "username": "ann" }));
}

#[tokio::test]
async fn secret_names_and_values_that_look_like_secrets_are_hidden_everywhere() {
    let server = TestServer::start(&[QUICK, ("AUDIT_READS", "true")]).await;
    let card = "4111 1111 1111 1111";
    let broadcast = async |data: Value| {
        let body = json!({ "pkg_id": 9, "data": data }).to_string();
        assert_eq!(post(&server, "/admin/broadcast", &body).await.status(), 202);
    };
    let names = ["pass", "Passwort", "OTP", "userPin", "set-cookie", "sessionId", "IBAN"];
    for name in names {
        broadcast(json!({ "a": [{ name: HUSH }], "b": json!({ name: HUSH }).to_string() })).await;
    }
    broadcast(json!({ "a": format!("it is {JWT}, and {card}."), "b": 4_111_111_111_111_111_i64 }))
        .await;
    let mut client = server.client("ann").await;
    client.call(3, json!({ "name": format!("Ann {JWT}") })).await;
    for path in [
        format!("/authors?search={JWT}&name=4111+1111+1111+1111"),
        format!("/audit-logs/user/{JWT}"),
        "/audit-logs/user/4111%201111%201111%201111".to_owned(),
    ] {
        assert_eq!(server.rest(Method::GET, &path).send().await.unwrap().status(), 200, "{path}");
    }
    let agent = format!("shop/1 {JWT} ({card})");
    let asked = server.rest(Method::GET, "/audit-logs/user/ann").header("User-Agent", agent);
    assert_eq!(asked.send().await.unwrap().status(), 200);

    let mut rows = server.audited(names.len() + 6).await;
    assert_eq!(rows.pop().unwrap()["user_agent"], "shop/1 *** (***)");
    for (row, name) in rows.iter().zip(names) {
        let hidden = json!({ name: "***" });
        let data = json!({ "a": [hidden], "b": hidden.to_string() });
        assert_eq!(row["request_data"], json!({ "pkg_id": 9, "data": data }));
    }
    let [values, author, search, users @ ..] = &rows[names.len()..] else { panic!("{rows:?}") };
    assert_eq!(values["request_data"]["data"], json!({ "a": "it is ***, and ***.", "b": "***" }));
    assert_eq!(author["request_data"], json!({ "name": "Ann ***" }));
    assert_eq!(search["request_data"], json!({ "search": "***", "name": "***" }));
    for user in users {
        assert_eq!(user["resource"], "/audit-logs/user/***");
    }
}
