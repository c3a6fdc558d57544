//! Two nodes behind a real Traefik, with the routes, limits and timeouts of `docker/traefik`.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use reqwest::{Client as Http, Method};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::support::{
    Client, Closed, TestServer, monitoring::unserved, programs::free_port, traefik::Traefik,
};

const ACCEPTED: &str = "ws_connections_total{status=\"accepted\"}";

/// Nodes that know each other's tokens, and trust what comes from 127.0.0.1.
struct Nodes {
    one: TestServer,
    two: TestServer,
    folder: TempDir,
}

impl Nodes {
    async fn start(more: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().unwrap();
        let key = folder.path().join("dev-key.pem");
        let settings =
            [&[("DEV_KEY_FILE", key.to_str().unwrap()), ("TRUSTED_PROXIES", "127.0.0.1")], more]
                .concat();
        let (one, two) = (TestServer::start(&settings).await, TestServer::start(&settings).await);
        Self { one, two, folder }
    }

    /// Traefik of the development stack in front of them, with some more changes.
    async fn traefik(&self, different: &[(&str, &str)]) -> Traefik {
        let (one, two) = (self.one.addr.to_string(), self.two.addr.to_string());
        let nodes = [("switchboard-1:8000", &*one), ("switchboard-2:8000", &two)];
        let different = [&nodes, different].concat();
        let start = || Traefik::start("development.yml", &["switchboard.yml"], &different, &[]);
        let traefik = block_in_place(start);
        traefik.until_served("sb.example", "/health/ready").await;
        traefik
    }

    async fn client(&self, traefik: &Traefik) -> Client {
        let mut client = Client::open(traefik.addr(), "/web").await;
        client.authenticate(&self.one.token("ann")).await;
        client
    }

    async fn accepted(&self) -> (f64, f64) {
        (self.one.metric(ACCEPTED).await, self.two.metric(ACCEPTED).await)
    }
}

async fn metrics(traefik: &Traefik) -> String {
    let url = format!("http://{}/metrics", traefik.metrics);
    Http::new().get(url).send().await.unwrap().text().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_and_requests_reach_both_nodes_and_metrics_nobody() {
    let nodes = Nodes::start(&[]).await;
    let traefik = nodes.traefik(&[]).await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(nodes.client(&traefik).await);
    }
    for client in &mut clients {
        assert_eq!(client.call(100, json!({ "text": "here" })).await["status_code"], 0);
    }
    let (one, two) = nodes.accepted().await;
    assert!(one >= 5.0 && two >= 5.0, "{one} and {two} of 20 are not shared out");

    let http = Http::new();
    let url = |path: &str| format!("http://{}{path}", traefik.addr());
    let add = http.post(url("/authors")).bearer_auth(nodes.one.token("ann"));
    let added = add.json(&json!({ "name": "Ann" })).send().await.unwrap();
    assert_eq!(added.status(), 201);
    assert_eq!(http.get(url("/metrics")).send().await.unwrap().status(), 404);

    let metrics = metrics(&traefik).await;
    let series = "traefik_service_requests_total{code=\"201\",method=\"POST\",protocol=\"http\",service=\"switchboard@file\"} 1";
    assert!(metrics.lines().any(|line| line == series), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_address_and_its_correlation_id_arrive_and_nobody_can_pretend() {
    let nodes = Nodes::start(&[]).await;
    let traefik = nodes.traefik(&[]).await;
    // An address that is neither Traefik's nor the nodes'.
    let http = Http::builder().local_address("127.0.0.2".parse().ok()).build().unwrap();
    let url = format!("http://{}/authors", traefik.addr());
    let request = http.post(url).bearer_auth(nodes.one.token("ann"));
    let request = request.header("x-correlation-id", "from-the-client");
    let request = request.header("x-forwarded-proto", "https");
    let request = request.header("x-forwarded-for", "203.0.113.9").json(&json!({ "name": "Ann" }));
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 201);
    assert_eq!(answer.headers()["x-correlation-id"], "from-the-client");
    assert!(!answer.headers().contains_key("strict-transport-security"), "it is plain HTTP");

    let on_one = nodes.one.metric("audit_logs_total{outcome=\"success\"}").await > 0.0;
    let here = if on_one { &nodes.one } else { &nodes.two };
    let row = &here.audited(1).await[0];
    assert_eq!(row["ip_address"], "127.0.0.2", "{row}");
    assert_eq!(row["request_id"], "from-the-client", "{row}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_outlives_the_timeouts_of_requests() {
    let nodes = Nodes::start(&[]).await;
    let short = [
        ("readTimeout: 30s", "readTimeout: 1s"),
        ("writeTimeout: 60s", "writeTimeout: 1s"),
        ("idleTimeout: 90s", "idleTimeout: 1s"),
        ("responseHeaderTimeout: 30s", "responseHeaderTimeout: 1s"),
        ("idleConnTimeout: 60s", "idleConnTimeout: 1s"),
    ];
    let traefik = nodes.traefik(&short).await;
    let mut client = nodes.client(&traefik).await;
    client.silent_for(Duration::from_secs(3)).await;
    assert_eq!(client.call(100, json!({ "text": "still here" })).await["status_code"], 0);
    client.close().await;
}

/// Asks for authors through Traefik, each time on a new connection, until told to stop; returns how often,
/// and what was not answered with 200.
async fn keep_asking(url: String, token: String, stop: Arc<AtomicBool>) -> (usize, Vec<String>) {
    let http = Http::builder().pool_max_idle_per_host(0).build().unwrap();
    let (mut asked, mut failed) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        asked += 1;
        match http.get(&url).bearer_auth(&token).send().await {
            Ok(answer) if answer.status() == 200 => {}
            Ok(answer) => failed.push(answer.status().to_string()),
            Err(error) => failed.push(format!("{error:?}")),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (asked, failed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_drains_gets_nothing_new_and_no_request_is_lost() {
    let mut nodes = Nodes::start(&[("DRAIN_GRACE", "5s"), ("DRAIN_SPREAD", "0s")]).await;
    let traefik = nodes.traefik(&[]).await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(nodes.client(&traefik).await);
    }
    let (on_one, on_two) = nodes.accepted().await;
    assert!(on_one > 0.0 && on_two > 0.0, "{on_one} and {on_two}");
    let stop = Arc::new(AtomicBool::new(false));
    let url = format!("http://{}/authors", traefik.addr());
    let asking = tokio::spawn(keep_asking(url, nodes.one.token("bea"), Arc::clone(&stop)));

    nodes.one.begin_shutdown();
    // Traefik asks every second.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let mut later = Vec::new();
    for _ in 0..6 {
        later.push(nodes.client(&traefik).await);
    }
    let (still_on_one, now_on_two) = nodes.accepted().await;
    assert_eq!(still_on_one.to_bits(), on_one.to_bits(), "a node that drains got a client");
    assert_eq!(now_on_two - on_two, 6.0);

    let mut drained = 0.0;
    for mut client in clients {
        client.request(100, json!({ "text": "still here?" })).await;
        let first = client.receive().await;
        if first["type"] == "drain" {
            drained += 1.0;
            let (_, end) = client.until_closed().await;
            assert_eq!(end, Closed::Code(1001));
        }
    }
    assert_eq!(drained, on_one, "each client of the node was told through Traefik");
    let Nodes { one, two, .. } = nodes;
    one.stop().await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    // All that its dashboard asks for, but the certificate, which has to be of an authority.
    let missing = unserved("Traefik", &["traefik_"], &metrics(&traefik).await);
    assert_eq!(missing, ["traefik_tls_certs_not_after"]);
    let (asked, failed) = asking.await.unwrap();
    assert!(asked > 100, "{asked}");
    assert!(failed.is_empty(), "{} of {asked} failed: {failed:?}", failed.len());
    drop((later, two));
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_have_a_port_of_their_own_and_are_reached_on_nodes_that_are_not_ready() {
    let (folder, port) = (TempDir::new().unwrap(), free_port());
    let key = folder.path().join("dev-key.pem");
    let mut nodes = Vec::new();
    for address in ["127.0.0.1", "127.0.0.2"] {
        let (clients, ops) = (format!("{address}:0"), format!("{address}:{port}"));
        let settings = [
            ("DEV_KEY_FILE", key.to_str().unwrap()),
            ("LISTEN_ADDR", &clients),
            ("OPS_ADDR", &ops),
            ("DRAIN_DELAY", "60s"),
        ];
        nodes.push(TestServer::start(&settings).await);
    }
    let clients = nodes.iter().map(|node| node.addr.to_string()).collect::<Vec<_>>();
    let ops = nodes.iter().map(|node| node.ops_addr.unwrap().to_string()).collect::<Vec<_>>();
    let check = format!("port: {port}");
    let different = [
        ("switchboard-1:8000", &*clients[0]),
        ("switchboard-2:8000", &clients[1]),
        ("switchboard-1:8001", &ops[0]),
        ("switchboard-2:8001", &ops[1]),
        ("port: 8001", &check),
    ];
    let start = || Traefik::start("development.yml", &["switchboard.yml"], &different, &[]);
    let traefik = block_in_place(start);
    traefik.until_served("sb.example", "/health/ready").await;
    let (http, token) = (Http::new(), nodes[0].token("ann"));
    let get = async |path: &str| {
        let request = http.get(format!("http://{}{path}", traefik.addr())).bearer_auth(&token);
        request.send().await.unwrap().status().as_u16()
    };

    nodes[0].begin_shutdown();
    // Traefik asks at their port every second.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let served = "http_requests_total{endpoint=\"/authors\",method=\"GET\",status_code=\"200\"}";
    for _ in 0..10 {
        assert_eq!(get("/authors").await, 200);
        assert_eq!(get("/admin/connections").await, 200);
    }
    assert_eq!(get("/health/live").await, 200);
    assert_eq!(get("/metrics").await, 404);
    assert_eq!(nodes[1].metric(served).await, 10.0, "a node that is not ready got a request");
    let admin = served.replace("/authors", "/admin/connections");
    assert!(nodes[0].metric(&admin).await > 0.0, "operators reach a node that is not ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_costs_nobody_a_request_before_it_is_missed() {
    let nodes = Nodes::start(&[("DRAIN_GRACE", "0s")]).await;
    let traefik = nodes.traefik(&[]).await;
    let http = Http::builder().pool_max_idle_per_host(0).build().unwrap();
    let url = format!("http://{}/authors", traefik.addr());
    let Nodes { one, two, folder } = nodes;
    one.stop().await.unwrap();
    for i in 0..50 {
        let request = http.post(&url).bearer_auth(two.token("bea"));
        let answer = request.json(&json!({ "name": format!("Bea {i}") })).send().await.unwrap();
        assert_eq!(answer.status(), 201);
    }
    drop((two, folder));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_production_clients_speak_tls_and_are_led_there() {
    let nodes = Nodes::start(&[]).await;
    let (one, two) = (nodes.one.addr.to_string(), nodes.two.addr.to_string());
    let plain: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    // No certificate is asked for on behalf of a test: it has Traefik's own.
    let authority =
        format!("{}/acme.json\n      caServer: http://127.0.0.1:9/", nodes.folder.path().display());
    let different = [
        ("switchboard-1:8000", &*one),
        ("switchboard-2:8000", &two),
        (":80\"", &format!("{plain}\"")),
        ("/acme/acme.json", &authority),
    ];
    let environment = [("DOMAIN", "sb.example")];
    let start = || Traefik::start("production.yml", &["switchboard.yml"], &different, &environment);
    let traefik = block_in_place(start);
    let http = Http::builder()
        .redirect(reqwest::redirect::Policy::none())
        .tls_danger_accept_invalid_certs(true)
        .resolve("sb.example", traefik.addr())
        .build()
        .unwrap();

    let url = format!("https://sb.example:{}/health/ready", traefik.addr().port());
    let mut answer = None;
    for _ in 0..250 {
        answer = http.get(&url).send().await.ok().filter(|answer| answer.status() == 200);
        if answer.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let answer = answer.expect("it is served");
    assert!(answer.headers().contains_key("strict-transport-security"), "the nodes know of TLS");

    let request = http.get(format!("http://{plain}/authors")).header("host", "sb.example");
    let led = request.send().await.unwrap();
    assert_eq!(led.status(), 301);
    let target = led.headers()["location"].to_str().unwrap();
    assert!(target.starts_with("https://sb.example") && target.ends_with("/authors"), "{target}");
}

/// Basic authentication of `ops` with the password `open sesame`.
const OPERATOR: &str = "ops:{SHA}W8r/fyL/UzygmbNAjq2HbA67qac=\n";

#[tokio::test(flavor = "multi_thread")]
async fn in_production_each_host_has_its_own_way_and_those_of_operators_are_guarded() {
    let nodes = Nodes::start(&[]).await;
    let (one, two) = (nodes.one.addr.to_string(), nodes.two.addr.to_string());
    let operators = nodes.folder.path().join("operators");
    fs::write(&operators, OPERATOR).unwrap();
    // Node one stands in for all that operators open: it answers /health/live, which is all that is asked.
    let different = [
        ("switchboard-1:8000", &*one),
        ("switchboard-2:8000", &two),
        ("grafana:3000", &one),
        ("keycloak:8080", &one),
        ("prometheus:9090", &one),
        ("alertmanager:9093", &one),
        ("/run/secrets/operators", operators.to_str().unwrap()),
    ];
    let routes = ["switchboard.yml", "operators.yml"];
    let environment = [("DOMAIN", "sb.example"), ("OPERATORS_FROM", "127.0.0.2/32,10.0.0.0/8")];
    let start = || Traefik::start("development.yml", &routes, &different, &environment);
    let traefik = block_in_place(start);
    traefik.until_served("sb.example", "/health/live").await;

    let from = |address: &str| Http::builder().local_address(address.parse().ok()).build().unwrap();
    let (anybody, operator) = (from("127.0.0.1"), from("127.0.0.2"));
    let get = |http: &Http, host: &str, path: &str| {
        let url = format!("http://{}{path}", traefik.addr());
        http.request(Method::GET, url).header("host", host)
    };
    for (host, path, status) in [
        ("other.example", "/health/live", 404),
        ("grafana.sb.example", "/health/live", 200),
        ("sso.sb.example", "/health/live", 200),
        ("sso.sb.example", "/admin/", 403),
        ("sso.sb.example", "/realms/master/", 403),
        ("prometheus.sb.example", "/health/live", 401),
        ("alertmanager.sb.example", "/health/live", 401),
        ("traefik.sb.example", "/dashboard/", 401),
    ] {
        let answer = get(&anybody, host, path).send().await.unwrap();
        assert_eq!(answer.status(), status, "{host}{path}");
    }
    for host in ["prometheus.sb.example", "alertmanager.sb.example"] {
        let request = get(&anybody, host, "/health/live");
        let answer = request.basic_auth("ops", Some("open sesame")).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{host}");
        let request = get(&anybody, host, "/health/live");
        let answer = request.basic_auth("ops", Some("sesame")).send().await.unwrap();
        assert_eq!(answer.status(), 401, "{host}");
    }
    let request = get(&anybody, "traefik.sb.example", "/dashboard/");
    let answer = request.basic_auth("ops", Some("open sesame")).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer = get(&operator, "sso.sb.example", "/admin/").send().await.unwrap();
    assert_eq!(answer.status(), 404, "it comes through, and a Switchboard has no such page");
}
