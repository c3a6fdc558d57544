//! Server processes that are one server: the built binary, on one Redis and one Postgres of the tests.
//!
//! Each node keeps its address, also when it is stopped or killed and started again.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use switchboard::{auth::DevIssuer, handlers::roles};
use tempfile::TempDir;
use tokio::task::block_in_place;

use super::{
    Client, Closed, postgres,
    process::{Process, Ran},
    programs::free_port,
    redis,
};

/// Time for a node to see what became of another.
const PATIENCE: Duration = Duration::from_secs(10);

/// Nodes by number, and what they share. Tests of one have a runtime of several threads.
pub(crate) struct Fleet {
    nodes: Vec<Node>,
    settings: Vec<(String, String)>,
    issuer: DevIssuer,
    http: reqwest::Client,
    _data: TempDir,
}

struct Node {
    addr: SocketAddr,
    data: PathBuf,
    /// None after its end.
    process: Option<Process>,
}

impl Fleet {
    /// Starts nodes at the same time, with more settings, and waits until they hear each other.
    pub(crate) async fn start(nodes: usize, more: &[(&str, &str)]) -> Self {
        let data = TempDir::new().unwrap();
        let key = data.path().join("key.pem");
        let ((redis, prefix), database) = (redis::shared(), postgres::database().await);
        let settings = [
            ("REDIS_URL", &*redis),
            ("REDIS_KEY_PREFIX", &prefix),
            ("DATABASE_URL", &database),
            ("DEV_KEY_FILE", key.to_str().unwrap()),
            ("RATE_LIMIT_PER_MINUTE", "1000000"),
        ];
        let settings = settings.iter().chain(more);
        let node = |i: usize| {
            let data = data.path().join(i.to_string());
            fs::create_dir(&data).unwrap();
            Node { addr: ([127, 0, 0, 1], free_port()).into(), data, process: None }
        };
        let mut fleet = Self {
            nodes: (0..nodes).map(node).collect(),
            settings: settings.map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            issuer: DevIssuer::open(&key, "switchboard").unwrap(),
            http: reqwest::Client::new(),
            _data: data,
        };
        let all: Vec<_> = (0..nodes).collect();
        fleet.start_again(&all).await;
        fleet
    }

    /// Starts nodes that have ended, each where it was, and waits until they take part.
    pub(crate) async fn start_again(&mut self, nodes: &[usize]) {
        let since = Instant::now();
        let settings = &self.settings;
        let spawn = |node: &Node| {
            let addr = node.addr.to_string();
            let settings = settings.iter().map(|(name, value)| (&**name, &**value));
            let settings: Vec<_> = settings.chain([("LISTEN_ADDR", &*addr)]).collect();
            Process::spawn(&node.data, &settings)
        };
        let children: Vec<_> = nodes.iter().map(|i| spawn(&self.nodes[*i])).collect();
        for (i, child) in nodes.iter().zip(children) {
            let process = block_in_place(|| Process::ready(child, since));
            self.nodes[*i].process = Some(process);
        }
        for i in nodes {
            self.until_metric(*i, "redis_connected", "1").await;
        }
    }

    /// Tells a node to stop, and waits for its end.
    pub(crate) fn stop(&mut self, node: usize) -> Ran {
        let process = self.nodes[node].process.take().expect("it runs");
        process.signal("-TERM");
        block_in_place(|| process.end())
    }

    /// Gives a node no time for a while.
    pub(crate) async fn hold_up(&self, node: usize, time: Duration) {
        let process = self.nodes[node].process.as_ref().expect("it runs");
        process.signal("-STOP");
        tokio::time::sleep(time).await;
        process.signal("-CONT");
    }

    /// Kills a node.
    pub(crate) fn kill(&mut self, node: usize) {
        let process = self.nodes[node].process.take().expect("it runs");
        process.signal("-KILL");
        block_in_place(|| process.end());
    }

    pub(crate) fn addr(&self, node: usize) -> SocketAddr {
        self.nodes[node].addr
    }

    /// A token with every role, which all nodes accept.
    pub(crate) fn token(&self, user: &str) -> String {
        self.issuer.token(user, &roles::ALL, Duration::from_secs(600))
    }

    /// An authenticated client of a node.
    pub(crate) async fn client(&self, node: usize, user: &str) -> Client {
        let mut client = Client::open(self.addr(node), "/web").await;
        client.authenticate(&self.token(user)).await;
        client
    }

    /// An authenticated client of a node, or how it was refused.
    pub(crate) async fn attempt(
        &self,
        node: usize,
        user: &str,
    ) -> Result<Client, (String, Closed)> {
        Client::attempt(self.addr(node), &self.token(user)).await
    }

    /// An authenticated client of a node, as soon as the node can say: on a busy machine Redis is late.
    pub(crate) async fn until_let_in(&self, node: usize, user: &str) -> Client {
        let since = Instant::now();
        loop {
            match self.attempt(node, user).await {
                Ok(client) => return client,
                Err(refused) => {
                    assert_eq!(refused.0, "unavailable");
                    assert!(since.elapsed() < PATIENCE, "{user} is not let in");
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The user has enough, as soon as a node can say.
    pub(crate) async fn is_one_too_many(&self, node: usize, user: &str) {
        let since = Instant::now();
        let refused = loop {
            let refused = self.attempt(node, user).await.err().expect("one too many was let in");
            if refused.0 != "unavailable" || since.elapsed() > PATIENCE {
                break refused;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(refused, ("connection_limit".into(), Closed::Code(1008)));
    }

    /// The connections of a user that a node lists, and those of all users without one.
    pub(crate) async fn listed(&self, node: usize, user: Option<&str>) -> Vec<Value> {
        let query = user.map(|user| format!("&user={user}")).unwrap_or_default();
        let path = format!("/admin/connections?per_page=100{query}");
        let answer = self.answer(node, Method::GET, &path, ("rest", None)).await;
        assert_eq!(answer.status(), 200);
        answer.json::<Value>().await.unwrap()["items"].as_array().unwrap().clone()
    }

    /// A REST request to a node, without a token.
    pub(crate) fn request(&self, node: usize, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("http://{}{path}", self.addr(node)))
    }

    /// A node's answer to a user's request with a body, as soon as it can say: see `until_let_in`.
    pub(crate) async fn answer(
        &self,
        node: usize,
        method: Method,
        path: &str,
        (user, body): (&str, Option<&Value>),
    ) -> Response {
        let since = Instant::now();
        loop {
            let request = self.request(node, method.clone(), path).bearer_auth(self.token(user));
            let request = if let Some(body) = body { request.json(body) } else { request };
            let answer = request.send().await.unwrap();
            if answer.status() != 503 || since.elapsed() > PATIENCE {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Broadcasts a number from a node; what the node says of it.
    pub(crate) async fn broadcast(&self, node: usize, n: u64) -> Value {
        let body = json!({ "pkg_id": 150, "data": { "n": n } });
        let answer =
            self.answer(node, Method::POST, "/admin/broadcast", ("rest", Some(&body))).await;
        assert_eq!(answer.status(), 202);
        answer.json().await.unwrap()
    }

    /// Waits until a series of a node has a value.
    pub(crate) async fn until_metric(&self, node: usize, series: &str, value: &str) {
        let since = Instant::now();
        while self.metric(node, series).await != value {
            assert!(since.elapsed() < PATIENCE, "node {node} never had {series} {value}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The value of a series of a node; empty where there is none.
    pub(crate) async fn metric(&self, node: usize, series: &str) -> String {
        let metrics = self.request(node, Method::GET, "/metrics").send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned);
        metrics.lines().find_map(value).unwrap_or_default()
    }
}
