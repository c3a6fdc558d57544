//! Traces: what is exported, how spans hang together, what goes along to others, and what a collector
//! that is down costs.

use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use reqwest::{Client as Http, Method, RequestBuilder};
use serde_json::{Value, json};
use switchboard::handlers::Package;
use tempfile::TempDir;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::{
    oidc::trusting,
    support::{
        Client, Database, TestServer,
        collector::{Collector, Seen},
        handlers::Fails,
        issuer::Issuer,
        on_both,
        process::{Process, token},
        users::PASSWORD,
    },
};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

/// The `traceparent` of a caller who exports its part, or does not.
fn parent(sampled: bool) -> String {
    format!("00-{TRACE}-{SPAN}-0{}", u8::from(sampled))
}

fn traced(request: RequestBuilder) -> RequestBuilder {
    request.header("traceparent", parent(true))
}

async fn a_request_goes_on_with_the_trace_of_its_caller_and_its_statements_are_below_it(
    database: Database,
) {
    let collector = Collector::start().await;
    let server = database.server(&[(ENDPOINT, &collector.endpoint())]).await;
    let request = traced(server.rest(Method::PUT, "/authors/77?a=b"));
    let request = request.header("x-correlation-id", "it-7").json(&json!({ "name": "x" }));
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 404);
    assert!(answer.headers().keys().all(|name| !name.as_str().starts_with("trace")));

    let request = collector.named("PUT /authors/{id}").await;
    assert_eq!((&*request.trace_id, &*request.parent), (TRACE, SPAN));
    assert_eq!((request.kind, request.failed), (SpanKind::Server, false));
    for (name, value) in [
        ("http.request.method", "PUT"),
        ("http.route", "/authors/{id}"),
        ("http.response.status_code", "404"),
        ("url.path", "/authors/77"),
        ("url.scheme", "http"),
        ("switchboard.request_id", "it-7"),
        ("error.type", ""),
    ] {
        assert_eq!(request.attribute(name), value, "{name}");
    }
    assert!(request.attribute("user.id").parse::<Uuid>().is_ok());
    let statement = collector.below(&request, "UPDATE").await;
    assert!(statement.is_within(&request), "{statement:?} {request:?}");
    assert_eq!((statement.kind, statement.failed), (SpanKind::Client, false));
    let system = match database {
        Database::Sqlite => "sqlite",
        Database::Postgres => "postgresql",
    };
    assert_eq!(statement.attribute("db.system.name"), system);
    assert_eq!(statement.attribute("db.operation.name"), "UPDATE");
    assert!(statement.attribute("db.query.text").contains("$1"));

    for _ in 0..2 {
        server.rest(Method::POST, "/authors").json(&json!({ "name": "y" })).send().await.unwrap();
    }
    let taken = collector.span("that failed", |span| span.name == "INSERT" && span.failed).await;
    assert_eq!(taken.attribute("error.type"), "integrity_error");
    assert_ne!(taken.trace_id, TRACE);
}

on_both! {
    a_request_goes_on_with_the_trace_of_its_caller_and_its_statements_are_below_it,
}

#[tokio::test]
async fn a_message_has_a_trace_of_its_own_with_its_phases_that_names_its_upgrade() {
    let collector = Collector::start().await;
    let server = TestServer::start(&[(ENDPOINT, &collector.endpoint())]).await;
    let mut client =
        Client::try_open(server.addr, "/web", &[("traceparent", &parent(true))]).await.unwrap();
    let hello = client.authenticate(&server.token("ann")).await;
    let req_id = client.request(1, json!({})).await;
    assert_eq!(client.receive().await["status_code"], 0);

    let upgrade = collector.named("GET /web").await;
    assert_eq!((&*upgrade.trace_id, &*upgrade.parent), (TRACE, SPAN));
    assert_eq!(upgrade.attribute("http.response.status_code"), "101");
    let message = collector.named("GET_AUTHORS").await;
    assert_eq!((&*message.parent, message.kind), ("", SpanKind::Server));
    assert_eq!(message.links, [(upgrade.trace_id.clone(), upgrade.id.clone())]);
    assert_ne!(message.trace_id, upgrade.trace_id);
    for (name, value) in [
        ("rpc.method", "GET_AUTHORS"),
        ("network.protocol.name", "websocket"),
        ("switchboard.pkg_id", "1"),
        ("switchboard.request_id", &*req_id.to_string()),
        ("switchboard.connection_id", hello["connection_id"].as_str().unwrap()),
        ("switchboard.status", "0"),
        ("error.type", ""),
    ] {
        assert_eq!(message.attribute(name), value, "{name}");
    }
    assert!(message.attribute("user.id").parse::<Uuid>().is_ok());
    let queue = collector.below(&message, "queue").await;
    let handler = collector.below(&message, "handler").await;
    let write = collector.below(&message, "write").await;
    assert!([&queue, &handler, &write].iter().all(|phase| phase.is_within(&message)));
    assert_eq!((queue.nanos.0, write.nanos.1), message.nanos);
    assert_eq!((queue.nanos.1, handler.nanos.1), (handler.nanos.0, write.nanos.0));
    let statement = collector.below(&handler, "SELECT").await;
    assert!(handler.nanos.0 <= statement.nanos.1 && statement.nanos.0 <= handler.nanos.1);
}

#[tokio::test]
async fn a_message_that_fails_says_why_in_its_span() {
    let collector = Collector::start().await;
    let more = vec![Package::new(900, "FAILS", &[], Fails)];
    let settings = [(ENDPOINT, &*collector.endpoint()), ("WS_HANDLER_TIMEOUT", "1s")];
    let server = TestServer::with_packages(&settings, more).await;
    let mut client = server.client_with("ann", &[], "json").await;
    for (pkg_id, name, status, error, ours) in [
        (77, "message", 1, "unknown_pkg", false),
        (1, "message", 3, "permission_denied", false),
        (900, "FAILS", 1, "internal_error", true),
    ] {
        let answer = client.call(pkg_id, json!({})).await;
        let is = |span: &Seen| span.attribute("switchboard.pkg_id") == pkg_id.to_string();
        let message = collector.span(name, is).await;
        assert_eq!((&*message.name, message.failed), (name, ours), "{message:?}");
        assert_eq!(answer["status_code"], status);
        assert_eq!(message.attribute("switchboard.status"), status.to_string());
        assert_eq!(message.attribute("error.type"), error);
        collector.below(&message, "write").await;
    }
    assert_eq!(collector.spans().iter().filter(|span| span.name == "handler").count(), 1);
}

#[tokio::test]
async fn a_call_to_the_identity_provider_carries_the_trace() {
    let (collector, issuer) = (Collector::start().await, Issuer::start().await);
    let server = trusting(&issuer, &[(ENDPOINT, &collector.endpoint())]).await;
    let login = json!({ "username": "ann", "password": PASSWORD });
    for sampled in [true, false] {
        let request = server.request(Method::POST, "/auth/login").json(&login);
        let answer = request.header("traceparent", parent(sampled)).send().await.unwrap();
        assert_eq!(answer.status(), 200);
    }
    let request = collector.named("POST /auth/login").await;
    assert_eq!(request.trace_id, TRACE);
    let call = collector.below(&request, "POST").await;
    assert_eq!((call.kind, call.failed), (SpanKind::Client, false));
    assert!(call.attribute("url.full").ends_with("/token"));
    assert_eq!(call.attribute("server.address"), "127.0.0.1");
    assert_eq!(call.attribute("server.port"), issuer.addr.port().to_string());
    assert_eq!(call.attribute("http.response.status_code"), "200");
    let asked = issuer.users().asked();
    assert_eq!(asked[0].traceparent, Some(format!("00-{TRACE}-{}-01", call.id)));
    // Who does not export its part is told of by nobody.
    let told = asked[1].traceparent.clone().unwrap();
    assert!(told.starts_with(&format!("00-{TRACE}-")) && told.ends_with("-00"), "{told}");
    server.stop().await.unwrap();
    let logins = |span: &&Seen| span.attribute("http.route") == "/auth/login";
    assert_eq!(collector.spans().iter().filter(logins).count(), 1);
}

#[tokio::test]
async fn without_an_endpoint_nothing_goes_along() {
    let issuer = Issuer::start().await;
    let server = trusting(&issuer, &[]).await;
    let request = traced(server.request(Method::POST, "/auth/login"));
    let login = json!({ "username": "ann", "password": PASSWORD });
    let answer = request.json(&login).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.headers().keys().all(|name| !name.as_str().starts_with("trace")));
    assert_eq!(issuer.users().asked()[0].traceparent, None);
}

#[tokio::test]
async fn only_the_part_that_was_asked_for_is_exported_under_the_name_that_was_given() {
    let collector = Collector::start().await;
    let settings = [
        (ENDPOINT, &*collector.endpoint()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20hush"),
        ("OTEL_SERVICE_NAME", "north"),
        ("OTEL_TRACES_SAMPLER_ARG", "0"),
    ];
    let server = TestServer::start(&settings).await;
    let mut client = server.client("ann").await;
    client.call(1, json!({})).await;
    server.rest(Method::GET, "/authors").send().await.unwrap();
    traced(server.request(Method::GET, "/health")).send().await.unwrap();
    traced(server.request(Method::GET, "/nothing")).send().await.unwrap();
    // Whatever waits is exported before it ends.
    server.stop().await.unwrap();
    let names: Vec<_> = collector.spans().into_iter().map(|span| span.name).collect();
    assert_eq!(names, ["GET"], "the caller's own trace alone, and probes in none");
    assert_eq!(collector.told(), (Some("Bearer hush".into()), "north".into()));
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_name_the_trace_that_they_belong_to() {
    let (collector, data) = (Collector::start().await, TempDir::new().unwrap());
    let bearer = token(data.path(), &["--user", "ann"]);
    let level = "info,switchboard::store=debug";
    let endpoint = collector.endpoint();
    let process = Process::start(data.path(), &[(ENDPOINT, &endpoint), ("LOG_LEVEL", level)]);
    let url = format!("http://{}/authors", process.addr);
    let request = traced(Http::new().get(url).bearer_auth(&bearer));
    assert_eq!(request.send().await.unwrap().status(), 200);
    let mut client = Client::open(process.addr, "/web").await;
    client.authenticate(&bearer).await;
    client.call(1, json!({})).await;
    process.signal("-TERM");
    let lines = lines(&process.end().stdout);
    let of = |id: &str| -> Vec<_> {
        let lines = lines.iter().filter(|line| line["trace_id"] == id);
        lines.map(|line| line["message"].as_str().unwrap()).collect()
    };
    assert_eq!(of(TRACE), ["query", "request"]);
    let message = collector.named("GET_AUTHORS").await;
    assert_eq!(of(&message.trace_id), ["query"]);
    let ready = lines.iter().find(|line| line["message"] == "ready").unwrap();
    assert_eq!(ready.get("trace_id"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_down_costs_one_warning_and_no_request() {
    let data = TempDir::new().unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let bearer = token(data.path(), &["--user", "ann"]);
    let settings = [(ENDPOINT, &*endpoint), ("RATE_LIMIT_PER_MINUTE", "0")];
    let process = Process::start(data.path(), &settings);
    let mut client = Client::open(process.addr, "/web").await;
    client.authenticate(&bearer).await;
    let (http, url) = (Http::new(), format!("http://{}/authors", process.addr));
    // Batches of several seconds.
    for _ in 0..30 {
        let begun = Instant::now();
        assert_eq!(http.get(&url).bearer_auth(&bearer).send().await.unwrap().status(), 200);
        assert_eq!(client.call(100, json!({ "a": 1 })).await["status_code"], 0);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let begun = Instant::now();
    process.signal("-TERM");
    let ran = process.end();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
    let lines = lines(&ran.stdout);
    let warnings: Vec<_> = lines.iter().filter(|line| line["level"] == "WARN").collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0]["collector"], endpoint);
    assert!(warnings[0]["error"].as_str().unwrap().contains("refused"), "{warnings:?}");
}
