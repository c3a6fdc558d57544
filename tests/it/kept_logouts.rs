//! A logout that was answered is not forgotten: by a restart, nor with the node that answered it.

use std::time::{Duration, Instant};

use reqwest::{Method, Response};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::{
    backchannel::logout_token,
    support::{
        Database,
        issuer::Issuer,
        on_both,
        postgres::{Cluster, database as new_database},
        process::Process,
        programs::free_port,
        rest::refused,
        users::PASSWORD,
    },
};

/// A node that trusts the issuer.
fn node(data: &TempDir, issuer: &Issuer, more: &[(&str, &str)]) -> Process {
    let url = issuer.url();
    block_in_place(|| Process::start(data.path(), &[&[("OIDC_ISSUER", &*url)], more].concat()))
}

async fn log_out(node: &Process, token: &str) -> Response {
    let form =
        form_urlencoded::Serializer::new(String::new()).append_pair("logout_token", token).finish();
    let request = reqwest::Client::new()
        .post(format!("http://{}/auth/backchannel-logout", node.addr))
        .header("content-type", "application/x-www-form-urlencoded");
    request.body(form).send().await.unwrap()
}

async fn get(node: &Process, token: &str) -> Response {
    let url = format!("http://{}/authors", node.addr);
    reqwest::Client::new().request(Method::GET, url).bearer_auth(token).send().await.unwrap()
}

async fn until_status(node: &Process, token: &str, status: u16) {
    let since = Instant::now();
    loop {
        let seen = get(node, token).await.status();
        if seen == status {
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(15), "{seen}, and never {status}");
        // Few enough for the limit of requests.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

async fn a_logout_that_was_answered_outlives_the_process(database: Database) {
    let (issuer, place) = (Issuer::start().await, database.place().await);
    let url = issuer.url();
    let settings = [&place.settings()[..1], &[("OIDC_ISSUER", &*url)]].concat();
    let start = || Process::start(place.data.path(), &settings);
    let token = |sid: &str| issuer.token(json!({ "sid": sid }));
    let process = start();
    // By the provider, and by a client.
    let answer = log_out(&process, &logout_token(&issuer, &json!({ "sid": "s1" }))).await;
    assert_eq!(answer.status(), 200);
    let http = reqwest::Client::new();
    let post = |path: &str, body: &Value, access: &str| {
        let request = http.post(format!("http://{}{path}", process.addr)).bearer_auth(access);
        request.json(body).send()
    };
    let login = json!({ "username": "ann", "password": PASSWORD });
    let tokens: Value = post("/auth/login", &login, "").await.unwrap().json().await.unwrap();
    let access = tokens["access_token"].as_str().unwrap();
    assert_eq!(get(&process, access).await.status(), 200);
    let logout = json!({ "refresh_token": tokens["refresh_token"] });
    assert_eq!(post("/auth/logout", &logout, access).await.unwrap().status(), 204);
    process.signal("-KILL");
    process.end();

    let process = start();
    for gone in [&*token("s1"), access] {
        refused(get(&process, gone).await, 401, "unauthorized").await;
    }
    assert_eq!(get(&process, &token("s2")).await.status(), 200);
    // What is over goes, but for a day.
    place.execute("UPDATE revocations SET ends = ends - 200000").await;
    process.signal("-KILL");
    process.end();
    let process = start();
    assert_eq!(get(&process, &token("s1")).await.status(), 200);
    let since = Instant::now();
    while !place.execute("SELECT logout FROM revocations").await.is_empty() {
        assert!(since.elapsed() < Duration::from_secs(15), "what is over stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

on_both![a_logout_that_was_answered_outlives_the_process];

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_reaches_the_other_nodes_though_the_node_that_answered_it_died_before_redis_heard()
{
    let issuer = Issuer::start().await;
    let database = new_database().await;
    let redis = format!("redis://127.0.0.1:{}", free_port());
    let settings = [("DATABASE_URL", &*database), ("REDIS_URL", &*redis)];
    let data = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let [dies, lives] = data.each_ref().map(|data| node(data, &issuer, &settings));
    let token = issuer.token(json!({}));
    until_status(&lives, &token, 200).await;
    assert_eq!(log_out(&dies, &logout_token(&issuer, &json!({}))).await.status(), 200);
    dies.signal("-KILL");
    until_status(&lives, &token, 401).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_a_logout_is_in_force_answered_with_503_and_kept_later() {
    let (issuer, data) = (Issuer::start().await, TempDir::new().unwrap());
    let server = block_in_place(Cluster::start);
    let url = server.url("postgres");
    let settings = [("DATABASE_URL", &*url)];
    let process = node(&data, &issuer, &settings);
    let token = |sid: &str| issuer.token(json!({ "sid": sid }));
    assert_eq!(get(&process, &token("s1")).await.status(), 200);
    block_in_place(|| server.stop("immediate"));
    // The provider sends the first once more, and the second never.
    let again = logout_token(&issuer, &json!({ "sid": "s1" }));
    for sent in [&again, &logout_token(&issuer, &json!({ "sid": "s2" }))] {
        let answer = log_out(&process, sent).await;
        assert!(answer.headers().contains_key("retry-after"));
        refused(answer, 503, "unavailable").await;
    }
    for sid in ["s1", "s2"] {
        refused(get(&process, &token(sid)).await, 401, "unauthorized").await;
    }
    block_in_place(|| server.start_again());
    let since = Instant::now();
    while log_out(&process, &again).await.status() != 200 {
        assert!(since.elapsed() < Duration::from_secs(15), "it is never kept");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(log_out(&process, &again).await.status(), 400, "it is taken once");
    tokio::time::sleep(Duration::from_secs(3)).await;
    process.signal("-KILL");
    let process = node(&data, &issuer, &settings);
    for sid in ["s1", "s2"] {
        refused(get(&process, &token(sid)).await, 401, "unauthorized").await;
    }
}
