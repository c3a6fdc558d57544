//! A load of writes over both transports, which remembers every answer.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::sleep};

use super::Client;

/// A change that was answered.
#[derive(Debug, Clone)]
pub(crate) struct Answered {
    /// Of the author that was to be made.
    pub(crate) name: String,
    /// It was made, or else an error was told.
    pub(crate) made: bool,
    pub(crate) at: Instant,
}

/// Writers that go on until they are told to stop, or until the server is gone.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Vec<Answered>>>,
}

impl Load {
    /// Starts writers, half of them over REST and half over WebSocket. Names begin with `prefix`.
    pub(crate) fn start(addr: SocketAddr, token: &str, prefix: &str, writers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |writer: usize| {
            let (stop, token) = (Arc::clone(&stop), token.to_owned());
            let prefix = format!("{prefix}{writer}-");
            match writer % 2 {
                0 => tokio::spawn(over_rest(addr, token, prefix, stop)),
                _ => tokio::spawn(over_websocket(addr, token, prefix, stop)),
            }
        };
        Self { writers: (0..writers).map(start).collect(), stop }
    }

    /// Stops it; every answer, in no order.
    pub(crate) async fn stop(self) -> Vec<Answered> {
        self.stop.store(true, Ordering::Relaxed);
        let mut answered = Vec::new();
        for writer in self.writers {
            answered.extend(writer.await.unwrap());
        }
        answered
    }
}

async fn over_rest(
    addr: SocketAddr,
    token: String,
    prefix: String,
    stop: Arc<AtomicBool>,
) -> Vec<Answered> {
    let http = reqwest::Client::new();
    let mut answered = Vec::new();
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("{prefix}{i}");
        let create = http.post(format!("http://{addr}/authors")).bearer_auth(&token);
        let Ok(answer) = create.json(&json!({ "name": name })).send().await else { break };
        let made = match answer.status().as_u16() {
            201 => true,
            503 => false,
            status => panic!("{name}: {status}"),
        };
        answered.push(Answered { name, made, at: Instant::now() });
        pause(made).await;
    }
    answered
}

async fn over_websocket(
    addr: SocketAddr,
    token: String,
    prefix: String,
    stop: Arc<AtomicBool>,
) -> Vec<Answered> {
    let mut client = Client::open(addr, "/web").await;
    client.authenticate(&token).await;
    let mut answered = Vec::new();
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("{prefix}{i}");
        let Some(answer) = client.try_call(3, json!({ "name": name })).await else { break };
        let made = answer["status_code"] == 0;
        assert!(made || answer["data"]["code"] == "unavailable", "{answer}");
        answered.push(Answered { name, made, at: Instant::now() });
        pause(made).await;
    }
    answered
}

async fn pause(made: bool) {
    sleep(Duration::from_millis(if made { 1 } else { 10 })).await;
}

/// Checks that each answer has one row, and that what was made is there once.
pub(crate) fn compare(answered: &[Answered], rows: &[Value], authors: &[String]) {
    let mut of_name = std::collections::HashMap::<_, Vec<_>>::new();
    for row in rows {
        let name = row["request_data"]["name"].as_str().unwrap_or_default();
        of_name.entry(name).or_default().push(row["outcome"].as_str().unwrap());
    }
    for Answered { name, made, .. } in answered {
        let expected = if *made { "success" } else { "error" };
        assert_eq!(of_name.get(&**name), Some(&vec![expected]), "{name}");
        let there = authors.iter().filter(|author| *author == name).count();
        assert!(there == 1 || (!made && there == 0), "{name} is there {there} times");
    }
    assert_eq!(rows.len(), answered.len());
}
