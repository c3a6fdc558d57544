//! A server and its clients, as tests use them.

pub(crate) mod address;
pub(crate) mod audit;
pub(crate) mod balancer;
mod client;
pub(crate) mod collector;
pub(crate) mod database;
pub(crate) mod faketime;
pub(crate) mod fleet;
pub(crate) mod handlers;
pub(crate) mod issuer;
pub(crate) mod keycloak;
pub(crate) mod load;
pub(crate) mod monitoring;
pub(crate) mod postgres;
pub(crate) mod process;
pub(crate) mod programs;
pub(crate) mod redis;
pub(crate) mod rest;
mod runtime;
pub(crate) mod traefik;
pub(crate) mod traffic;
pub(crate) mod users;
pub(crate) mod visitor;
pub(crate) mod wire;

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use reqwest::{Method, RequestBuilder};
use serde_json::json;
use switchboard::{
    auth::DevIssuer,
    config::{Config, DatabasePlace},
    handlers::{Package, packages, roles},
    server::{self, Listeners, ServeError},
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

#[allow(unused_imports)]
pub(crate) use client::{Client, Closed};
pub(crate) use database::{Database, on_both};
pub(crate) use runtime::on_both_runtimes;

/// A server of this process, on a free port and with a data directory of its own.
pub(crate) struct TestServer {
    pub(crate) addr: SocketAddr,
    pub(crate) ops_addr: Option<SocketAddr>,
    pub(crate) issuer: DevIssuer,
    http: reqwest::Client,
    shutdown: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), ServeError>>,
    database: DatabasePlace,
    data: TempDir,
}

impl TestServer {
    /// Starts a server with settings by name; limits that tests run into by accident are lifted.
    pub(crate) async fn start(settings: &[(&str, &str)]) -> Self {
        Self::with_packages(settings, Vec::new()).await
    }

    /// Starts a server that has more packages than the built-in ones.
    pub(crate) async fn with_packages(settings: &[(&str, &str)], more: Vec<Package>) -> Self {
        Self::on(None, settings, more).await
    }

    /// Starts a server, on a listener of the test's own if there is one.
    pub(crate) async fn on(
        listener: Option<TcpListener>,
        settings: &[(&str, &str)],
        more: Vec<Package>,
    ) -> Self {
        let data = TempDir::new().unwrap();
        let mut all: HashMap<&str, &str> = HashMap::from([
            ("LISTEN_ADDR", "127.0.0.1:0"),
            ("RATE_LIMIT_PER_MINUTE", "100000"),
            ("WS_MAX_CONNECTIONS_PER_USER", "100"),
            ("AUTH_FAILURES_PER_MINUTE", "0"),
            ("METRICS_RATE_LIMIT", "0"),
            ("AUDIT_LOG_RETENTION_DAYS", "0"),
            ("AUDIT_SUMMARY_INTERVAL", "100ms"),
            ("AUDIT_LOGINS", "false"),
            ("DRAIN_DELAY", "0"),
            ("DRAIN_GRACE", "100ms"),
            ("DATA_DIR", data.path().to_str().unwrap()),
        ]);
        all.extend(settings.iter().copied());
        let config = Config::read(|name| all.get(name).map(|text| (*text).to_owned())).unwrap();
        let listeners = match listener {
            Some(clients) => Listeners { clients, ops: None },
            None => Listeners::bind(&config.server).await.unwrap(),
        };
        let addr = listeners.clients.local_addr().unwrap();
        let ops_addr = listeners.ops.as_ref().map(|ops| ops.local_addr().unwrap());
        let issuer = DevIssuer::open(&config.auth.dev_key_file, &config.auth.client_id).unwrap();
        let database = config.store.place.clone();
        let (shutdown, ended) = oneshot::channel::<()>();
        let packages = [packages(), more].concat();
        let running = tokio::spawn(server::run(config, packages, listeners, async {
            drop(ended.await);
        }));
        let server = Self {
            addr,
            ops_addr,
            issuer,
            http: reqwest::Client::new(),
            shutdown: Some(shutdown),
            running,
            database,
            data,
        };
        server.until_ready().await;
        server
    }

    /// Waits until it serves, if need be without the keys of its issuer.
    async fn until_ready(&self) {
        let ops = self.ops_addr.unwrap_or(self.addr);
        for _ in 0..200 {
            if let Ok(ready) = self.http.get(format!("http://{ops}/health/ready")).send().await
                && (ready.status() == 200 || ready.text().await.unwrap().contains("no keys"))
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the server did not become ready");
    }

    /// A token with every role.
    pub(crate) fn token(&self, user: &str) -> String {
        self.token_with(user, &roles::ALL)
    }

    /// A token with some roles.
    pub(crate) fn token_with(&self, user: &str, roles: &[&str]) -> String {
        self.issuer.token(user, roles, Duration::from_secs(600))
    }

    /// A token that expired an hour ago.
    pub(crate) fn expired_token(&self, user: &str) -> String {
        let past = jiff::Timestamp::now().as_second() - 3600;
        self.issuer.sign(&json!({
            "iss": "switchboard-dev", "azp": "switchboard", "typ": "Bearer", "sub": user, "exp": past,
        }))
    }

    /// An authenticated JSON client with every role.
    pub(crate) async fn client(&self, user: &str) -> Client {
        self.client_with(user, &roles::ALL, "json").await
    }

    /// An authenticated client.
    pub(crate) async fn client_with(&self, user: &str, roles: &[&str], format: &str) -> Client {
        let mut client = Client::open(self.addr, &format!("/web?format={format}")).await;
        client.authenticate(&self.token_with(user, roles)).await;
        client
    }

    /// A REST request without a token.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("http://{}{path}", self.addr))
    }

    /// A REST request of a user with every role.
    pub(crate) fn rest(&self, method: Method, path: &str) -> RequestBuilder {
        self.request(method, path).bearer_auth(self.token("rest"))
    }

    /// The value of a series as Prometheus would scrape it: `name` or `name{label="…"}`.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let text = self.metrics().await;
        let line = text
            .lines()
            .find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
        let line = line.unwrap_or_else(|| panic!("no series {series}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Everything that `/metrics` says.
    pub(crate) async fn metrics(&self) -> String {
        let ops = self.ops_addr.unwrap_or(self.addr);
        let answer = self.http.get(format!("http://{ops}/metrics")).send().await.unwrap();
        answer.text().await.unwrap()
    }

    /// Waits until a series has a value; fails after five seconds.
    pub(crate) async fn until_metric(&self, series: &str, value: f64) {
        let mut seen = f64::NAN;
        for _ in 0..250 {
            seen = self.metric(series).await;
            if (seen - value).abs() < f64::EPSILON {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{series} is {seen}, not {value}");
    }

    /// Tells the server to shut down, without waiting.
    pub(crate) fn begin_shutdown(&mut self) {
        drop(self.shutdown.take());
    }

    /// Shuts the server down and returns what `run` said.
    pub(crate) async fn stop(mut self) -> Result<(), ServeError> {
        self.begin_shutdown();
        self.running.await.unwrap()
    }
}
