//! A client that stays: it works over one connection after the other, as the `drain` of each tells it to.
//!
//! Told to come back after a while, it sends nothing more, and reads on until the server has closed.
//! Meanwhile, when the time is over, it works on over a new connection.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    sync::Barrier,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use super::{Client, Closed};

/// Between two times of asking.
const PACE: Duration = Duration::from_millis(25);
/// Requests without an answer at which no more are sent: a slow machine gets less to do.
const OPEN: usize = 6;
/// Every how many times an author is made.
const CHANGE: usize = 8;
/// Time for the last pushes to arrive, and then for those that arrive twice.
const LAST: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(300));

/// What all who work at the same time share.
pub(crate) struct Work {
    pub(crate) stop: AtomicBool,
    /// Requests that were answered as they should be.
    pub(crate) answered: AtomicUsize,
    /// Pushes that the server accepted.
    pub(crate) published: AtomicUsize,
    /// Where all wait for each other: before the first push, and after the last.
    pub(crate) together: Barrier,
}

/// A connection, and what came over it.
pub(crate) struct Visit {
    /// What the names of authors made here begin with.
    pub(crate) name: String,
    /// Authors made here, in their order.
    pub(crate) made: Vec<String>,
    /// Pushes in their order: the names of authors, and `b1`, `b2`, … for broadcasts.
    pub(crate) pushes: Vec<String>,
    client: Client,
    times: usize,
    /// Requests without an answer, with what it is to have as its data; null: anything.
    open: HashMap<Uuid, (i64, Value)>,
    work: Arc<Work>,
}

/// Works until it is told to stop, then waits for all pushes that it has to get; every connection it had.
pub(crate) async fn visit(
    addr: SocketAddr,
    token: String,
    name: String,
    work: Arc<Work>,
) -> Vec<Visit> {
    let mut before: Vec<JoinHandle<Visit>> = Vec::new();
    loop {
        let name = format!("{name}.{}-", before.len());
        let mut visit = Visit::begin(addr, &token, name, Arc::clone(&work)).await;
        if before.is_empty() {
            work.together.wait().await;
        }
        if let Some(reconnect_after) = visit.ask_until_drained().await {
            before.push(tokio::spawn(visit.read_to_the_end()));
            sleep(reconnect_after).await;
            continue;
        }
        let mut visits = Vec::new();
        for ended in before {
            visits.push(ended.await.unwrap());
        }
        work.together.wait().await;
        visits.push(visit);
        read_the_last(&mut visits, &work).await;
        return visits;
    }
}

/// Reads until every push has come that others caused.
async fn read_the_last(visits: &mut [Visit], work: &Work) {
    let mut own = HashSet::new();
    let mut others = HashSet::new();
    own.extend(visits.iter().flat_map(|visit| visit.made.iter().cloned()));
    let mut end = Instant::now() + LAST.0;
    let mut complete = false;
    loop {
        let pushes = visits.iter().flat_map(|visit| &visit.pushes);
        others.extend(pushes.filter(|push| !own.contains(*push)).cloned());
        if !complete && own.len() + others.len() >= work.published.load(Ordering::SeqCst) {
            complete = true;
            end = Instant::now() + LAST.1;
        }
        let current = visits.last_mut().unwrap();
        match timeout_at(end, current.client.next()).await {
            Ok(frame) => current.take(&frame.unwrap()),
            // What is missing is the test's to say.
            Err(_) => return,
        };
    }
}

impl Visit {
    async fn begin(addr: SocketAddr, token: &str, name: String, work: Arc<Work>) -> Self {
        let mut client = Client::open(addr, "/web").await;
        client.authenticate(token).await;
        let (made, pushes, open) = Default::default();
        Self { name, made, pushes, client, times: 0, open, work }
    }

    /// Asks at its pace. None: it was told to stop, and all is answered.
    async fn ask_until_drained(&mut self) -> Option<Duration> {
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = pace.tick() => match self.work.stop.load(Ordering::SeqCst) {
                    true if self.open.is_empty() => return None,
                    false if self.open.len() < OPEN => self.ask().await,
                    _ => {}
                },
                frame = self.client.next() => {
                    let frame = frame.expect("a drain comes before the end");
                    if let Some(reconnect_after) = self.take(&frame) {
                        return Some(reconnect_after);
                    }
                }
            }
        }
    }

    async fn read_to_the_end(mut self) -> Self {
        loop {
            match self.client.next().await {
                Ok(frame) => assert_eq!(self.take(&frame), None, "one drain is enough"),
                Err(closed) => {
                    assert_eq!(closed, Closed::Code(1001));
                    assert!(self.open.is_empty(), "no answer to {:?}", self.open);
                    return self;
                }
            }
        }
    }

    /// Sends a few requests at once.
    async fn ask(&mut self) {
        self.times += 1;
        let echo = json!({ "n": self.times });
        let mut requests = vec![(100, echo.clone(), echo), (1, json!({ "id": 1 }), Value::Null)];
        // One after the other, so that they have an order.
        if self.times.is_multiple_of(CHANGE) && self.open.values().all(|(pkg_id, _)| *pkg_id != 3) {
            let name = format!("{}{}", self.name, self.times);
            requests.push((3, json!({ "name": name }), Value::Null));
        }
        let mut frames = Vec::new();
        for (pkg_id, data, wanted) in requests {
            let req_id = Uuid::new_v4();
            self.open.insert(req_id, (pkg_id, wanted));
            let request = json!({ "pkg_id": pkg_id, "req_id": req_id, "data": data });
            frames.push(Message::text(request.to_string()));
        }
        self.client.send_together(frames).await;
    }

    /// Takes a frame; of a drain, the time after which to come back.
    fn take(&mut self, frame: &Message) -> Option<Duration> {
        let frame: Value = serde_json::from_str(frame.to_text().unwrap()).unwrap();
        if frame["type"] == "drain" {
            return Some(Duration::from_millis(frame["reconnect_after_ms"].as_u64().unwrap()));
        }
        let data = &frame["data"];
        let name = || data["name"].as_str().unwrap().to_owned();
        let req_id: Uuid = frame["req_id"].as_str().unwrap().parse().unwrap();
        if req_id.is_nil() {
            let broadcast = || format!("b{}", data["n"]);
            self.pushes.push(if frame["pkg_id"] == 150 { broadcast() } else { name() });
            return None;
        }
        let (pkg_id, wanted) = self.open.remove(&req_id).expect("one answer to each request");
        let as_wanted = wanted.is_null() || *data == wanted;
        assert!(frame["status_code"] == 0 && as_wanted, "{frame}");
        self.work.answered.fetch_add(1, Ordering::SeqCst);
        if pkg_id == 3 {
            self.made.push(name());
            self.work.published.fetch_add(1, Ordering::SeqCst);
        }
        None
    }
}
