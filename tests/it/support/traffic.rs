//! A small mixed load: what clients do, rightly and wrongly, over REST and WebSocket.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::try_join_all;
use reqwest::{Client as Http, Method};
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{Client, issuer::CLIENT, issuer::Issuer, users::PASSWORD};

/// A password that is wrong, and a token that is none.
pub(crate) const WRONG: [&str; 2] = ["not-anns-password-8231", "no-token-of-anybody-4471"];

const BREAK: Duration = Duration::from_millis(200);

/// What clients hold, each of them a secret.
#[derive(Clone)]
pub(crate) struct Tokens {
    /// May do everything.
    pub(crate) ann: String,
    /// May do nothing.
    pub(crate) bob: String,
    /// Does too much.
    pub(crate) greedy: String,
}

impl Tokens {
    pub(crate) fn new(issuer: &Issuer) -> Self {
        let token = |name: &str, more: Value| {
            let mut claims =
                json!({ "sub": format!("id-of-{name}"), "preferred_username": name, "sid": name });
            claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            issuer.token(claims)
        };
        Self {
            ann: token("ann", json!({})),
            bob: token("bob", json!({ "resource_access": { CLIENT: { "roles": [] } } })),
            greedy: token("greedy", json!({})),
        }
    }

    pub(crate) fn all(&self) -> [&str; 3] {
        [&self.ann, &self.bob, &self.greedy]
    }
}

/// The load, until it is stopped.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub(crate) fn start(addr: SocketAddr, tokens: &Tokens, database: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = || Arc::clone(&stop);
        let clients = vec![
            tokio::spawn(over_rest(addr, tokens.clone(), until())),
            tokio::spawn(over_websocket(addr, tokens.clone(), until())),
            tokio::spawn(slowly(database.to_owned(), until())),
        ];
        Self { stop, clients }
    }

    /// Adds clients that guess and that ask for too much.
    pub(crate) fn add_abuse(&mut self, addr: SocketAddr, tokens: &Tokens) {
        let until = || Arc::clone(&self.stop);
        self.clients.push(tokio::spawn(guessing(addr, until())));
        self.clients.push(tokio::spawn(greedily(addr, tokens.greedy.clone(), until())));
    }

    pub(crate) async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

async fn over_rest(addr: SocketAddr, tokens: Tokens, stop: Arc<AtomicBool>) {
    let http = Http::new();
    let ask = |method: Method, path: &str, token: &str, body: Value| {
        let request = http.request(method, format!("http://{addr}{path}")).json(&body);
        let request = if token.is_empty() { request } else { request.bearer_auth(token) };
        async move { request.send().await.unwrap().status().as_u16() }
    };
    let (ann, bob) = (&*tokens.ann, &*tokens.bob);
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let author = || json!({ "name": format!("traffic {i}") });
        ask(Method::POST, "/authors", ann, author()).await;
        ask(Method::POST, "/authors", ann, author()).await;
        ask(Method::POST, "/authors", ann, json!({ "nom": 1 })).await;
        ask(Method::GET, "/authors", ann, Value::Null).await;
        ask(Method::GET, "/authors/987654", ann, Value::Null).await;
        ask(Method::PUT, "/authors/1", ann, json!({ "name": format!("renamed {i}") })).await;
        ask(Method::DELETE, "/authors/987654", ann, Value::Null).await;
        ask(Method::DELETE, "/authors/1", bob, Value::Null).await;
        ask(Method::GET, "/audit-logs", bob, Value::Null).await;
        ask(Method::GET, "/nothing", ann, Value::Null).await;
        ask(Method::GET, "/authors", "", Value::Null).await;
        ask(Method::GET, "/authors", WRONG[1], Value::Null).await;
        let push = json!({ "pkg_id": 150, "data": {}, "user": "nobody" });
        ask(Method::POST, "/admin/broadcast", ann, push).await;
        for password in [PASSWORD, WRONG[0]] {
            let login = json!({ "username": "ann", "password": password });
            ask(Method::POST, "/auth/login", "", login).await;
        }
        sleep(BREAK).await;
    }
}

async fn over_websocket(addr: SocketAddr, tokens: Tokens, stop: Arc<AtomicBool>) {
    let open = async |token: &str| {
        let mut client = Client::open(addr, "/web").await;
        client.authenticate(token).await;
        client
    };
    let (mut ann, mut bob) = (open(&tokens.ann).await, open(&tokens.bob).await);
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        for (pkg_id, data) in [
            (1, json!({})),
            (2, json!({ "page": 1 })),
            (3, json!({ "name": format!("traffic over WebSocket {i}") })),
            (3, json!({ "nom": 1 })),
            (4, json!({ "id": 987_654, "name": "x" })),
            (5, json!({ "id": 987_654 })),
            (100, json!({ "x": i })),
            (999, json!({})),
        ] {
            ann.call(pkg_id, data).await;
        }
        bob.call(5, json!({ "id": 1 })).await;
        bob.send(&json!({ "type": "refresh", "token": format!("Bearer {}", WRONG[1]) })).await;
        bob.receive().await;
        let mut stranger = Client::open(addr, "/web").await;
        stranger.send(&json!({ "type": "auth", "token": format!("Bearer {}", WRONG[1]) })).await;
        stranger.until_closed().await;
        // One more than are allowed: `ann` has one.
        let second = open(&tokens.ann).await;
        let mut third = Client::open(addr, "/web").await;
        third.send(&json!({ "type": "auth", "token": format!("Bearer {}", tokens.ann) })).await;
        third.until_closed().await;
        second.close().await;
        sleep(BREAK).await;
    }
}

/// Makes statements wait for a third of a second, now and then.
async fn slowly(database: String, stop: Arc<AtomicBool>) {
    let mut connection = PgConnection::connect(&database).await.unwrap();
    while !stop.load(Ordering::Relaxed) {
        let hold = "BEGIN; LOCK TABLE user_actions, author; SELECT pg_sleep(0.3); COMMIT";
        // The table may be away.
        if connection.execute(hold).await.is_err() {
            connection.execute("ROLLBACK").await.unwrap();
        }
        sleep(Duration::from_secs(2)).await;
    }
}

/// Tries passwords, about thirty a second.
async fn guessing(addr: SocketAddr, stop: Arc<AtomicBool>) {
    let http = Http::new();
    while !stop.load(Ordering::Relaxed) {
        let request = http.get(format!("http://{addr}/authors")).bearer_auth(WRONG[1]);
        request.send().await.unwrap();
        sleep(Duration::from_millis(30)).await;
    }
}

/// Sends more messages and requests than the limits let through, and does not care what is answered.
async fn greedily(addr: SocketAddr, token: String, stop: Arc<AtomicBool>) {
    let http = Http::new();
    while !stop.load(Ordering::Relaxed) {
        // Anew: without strikes a connection that is refused too often is read more slowly.
        let mut client = Client::open(addr, "/web").await;
        client.authenticate(&token).await;
        for _ in 0..100 {
            let message = json!({ "pkg_id": 100, "req_id": Uuid::new_v4(), "data": {} });
            client.send(&message).await;
        }
        // At once: one after the other they stay under the limit where others use the machine.
        let requests =
            (0..100).map(|_| http.get(format!("http://{addr}/authors")).bearer_auth(&token).send());
        try_join_all(requests).await.unwrap();
        while let Ok(answer) = timeout(Duration::from_millis(100), client.next()).await {
            answer.expect("the limit refuses messages, not the connection");
        }
        client.close().await;
    }
}
