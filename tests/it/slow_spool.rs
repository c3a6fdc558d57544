//! A disk that is slow to take audit rows: requests that must be recorded wait for it and are then refused,
//! and nothing else notices.
//!
//! The spool waits for the lock of `rejected.jsonl`, which the test holds, as it would for a disk: with its own
//! lock held, in the middle of a write.

use std::{
    fs::{File, create_dir_all},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use switchboard::config::Config;
use tempfile::TempDir;
use tokio::{
    task::block_in_place,
    time::{sleep, timeout},
};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    Client, Closed,
    audit::rows,
    postgres::database,
    process::{Process, token},
};

const CREATE: i64 = 3;
/// In which whatever needs no audit row is answered.
const PROMPT: Duration = Duration::from_millis(700);

/// A server of its own process, whose audit rows are taken by nobody for a while.
struct Slow {
    url: String,
    process: Process,
    token: String,
    http: reqwest::Client,
    /// What keeps the spool waiting, and the database from taking rows.
    held: Option<(File, PgConnection)>,
    _data: TempDir,
}

impl Slow {
    async fn start(settings: &[(&str, &str)]) -> Self {
        let (url, data) = (database().await, TempDir::new().unwrap());
        let all = [
            &[
                ("DATABASE_URL", &*url),
                ("AUDIT_BATCH_TIMEOUT", "800ms"),
                ("RATE_LIMIT_PER_MINUTE", "0"),
                ("WS_MAX_CONNECTIONS_PER_USER", "100"),
                ("WS_BROADCAST_CHANGES", "false"),
            ],
            settings,
        ];
        let process = block_in_place(|| Process::start(data.path(), &all.concat()));
        let token = block_in_place(|| token(data.path(), &["--user", "ann"]));
        let folder = data.path().join("audit");
        create_dir_all(&folder).unwrap();
        let held = File::create(folder.join("rejected.jsonl")).unwrap();
        held.lock().unwrap();
        let mut other = PgConnection::connect(&url).await.unwrap();
        let check = "ALTER TABLE user_actions ADD CHECK (request_data ->> 'name' <> 'poison')";
        other.execute(check).await.unwrap();
        let http = reqwest::Client::new();
        let mut slow = Self { url, process, token, http, held: None, _data: data };
        let mut client = slow.client().await;
        assert_eq!(client.call(CREATE, json!({ "name": "poison" })).await["status_code"], 0);
        // Its row is refused by the database, and the spool begins to set it aside.
        slow.until_refused().await;
        other.execute("BEGIN; LOCK TABLE user_actions").await.unwrap();
        slow.held = Some((held, other));
        slow
    }

    async fn let_go(&mut self) {
        let (file, mut other) = self.held.take().unwrap();
        drop(file);
        other.execute("ROLLBACK").await.unwrap();
    }

    async fn until_refused(&self) {
        let series = "audit_log_errors_total{error_type=\"refused\"}";
        let begun = Instant::now();
        while self.metric(series).await < 1.0 {
            assert!(begun.elapsed() < Duration::from_secs(5), "no row was refused");
            sleep(Duration::from_millis(20)).await;
        }
        sleep(Duration::from_millis(100)).await;
    }

    async fn client(&self) -> Client {
        let mut client = Client::open(self.process.addr, "/web").await;
        client.authenticate(&self.token).await;
        client
    }

    async fn metrics(&self) -> String {
        let metrics = self.http.get(format!("http://{}/metrics", self.process.addr)).send();
        timeout(PROMPT, metrics).await.expect("/metrics waits").unwrap().text().await.unwrap()
    }

    async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no series {name}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }

    async fn until_queued(&self, rows: f64) {
        let begun = Instant::now();
        while self.metric("audit_queue_size").await < rows {
            assert!(begun.elapsed() < Duration::from_secs(5), "the queue does not fill");
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn post(&self, path: &str, body: Value) -> (u16, bool) {
        let post = self.http.post(format!("http://{}{path}", self.process.addr));
        let answer = post.bearer_auth(&self.token).json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.headers().contains_key("retry-after"))
    }

    /// The rows, once there are so many.
    async fn rows(&self, count: usize) -> Vec<Value> {
        let config = Config::read(|name| (name == "DATABASE_URL").then(|| self.url.clone()));
        let place = config.unwrap().store.place;
        let begun = Instant::now();
        loop {
            let rows = rows(&place).await;
            if rows.len() >= count || begun.elapsed() > Duration::from_secs(10) {
                assert_eq!(rows.len(), count, "{rows:#?}");
                return rows;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn with_a_slow_spool_changes_wait_and_are_refused_and_all_else_goes_on() {
    let mut slow = Slow::start(&[("AUDIT_QUEUE", "20")]).await;
    let (mut reader, mut fool) = (slow.client().await, slow.client().await);
    let mut writers = join_all((0..3).map(|_| slow.client())).await;
    // More than there is room for, over both transports.
    let begun = Instant::now();
    for (i, writer) in writers.iter_mut().enumerate() {
        for n in 0..10 {
            writer.request(CREATE, json!({ "name": format!("{i}-{n}") })).await;
        }
    }
    let over_rest =
        join_all((0..5).map(|n| slow.post("/authors", json!({ "name": n.to_string() }))));
    let beside = async {
        slow.until_queued(18.0).await;
        for _ in 0..5 {
            let begun = Instant::now();
            reader.send(&json!({ "type": "ping" })).await;
            reader.request(1, json!({})).await;
            for _ in 0..2 {
                timeout(PROMPT, reader.receive()).await.expect("a reader waits");
            }
            assert!(slow.metric("audit_queue_size").await >= 18.0);
            assert!(begun.elapsed() < 2 * PROMPT, "{:?}", begun.elapsed());
        }
        // The registry records the end of this one, and lets another in.
        fool.send_frame(Message::binary(vec![1])).await;
        let (_, closed) = timeout(2 * PROMPT, fool.until_closed()).await.expect("an end waits");
        assert_eq!(closed, Closed::Code(1003));
        timeout(PROMPT, slow.client()).await.expect("the registry waits");
    };
    let (over_rest, ()) = tokio::join!(over_rest, beside);
    let mut made = 1;
    for (status, retry_after) in over_rest {
        assert!(status == 201 || (status == 503 && retry_after), "{status}");
        made += usize::from(status == 201);
    }
    for writer in &mut writers {
        for _ in 0..10 {
            let answer = writer.receive().await;
            if answer["status_code"] != 0 {
                assert_eq!(answer["data"]["code"], "overloaded", "{answer}");
                assert!(answer["data"]["details"]["retry_after_ms"].is_number(), "{answer}");
            }
            made += usize::from(answer["status_code"] == 0);
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // Seven eighths of the queue, one of which is the row that is set aside.
    assert_eq!(made, 18);
    assert!(slow.metric("audit_requests_refused_total").await >= 18.0);
    let mut other = PgConnection::connect(&slow.url).await.unwrap();
    let authors = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM author");
    let authors = authors.fetch_one(&mut other).await.unwrap() as usize;
    assert_eq!(authors, made, "what is refused is not begun");
    slow.let_go().await;
    // All but the one that is set aside, and the end of the fool's connection.
    slow.rows(made).await;
    assert_eq!(slow.metric("audit_logs_dropped_total").await, 0.0);
    let (status, _) = slow.post("/authors", json!({ "name": "again" })).await;
    assert_eq!(status, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_queue_is_bounded_in_bytes() {
    let mut slow = Slow::start(&[("AUDIT_QUEUE_BYTES", "256KiB")]).await;
    let large = json!({ "pkg_id": 7, "data": "x".repeat(4_000) });
    let posts = join_all((0..60).map(|_| slow.post("/admin/broadcast", large.clone()))).await;
    let taken = posts.iter().filter(|(status, _)| *status == 202).count();
    assert!((36..48).contains(&taken), "{taken} of 4 KB each in seven eighths of 256 KiB");
    assert!(posts.iter().all(|post| *post == (202, false) || *post == (503, true)), "{posts:?}");
    assert!(slow.metric("audit_queue_bytes").await <= 262_144.0);
    slow.let_go().await;
    slow.rows(taken).await;
    assert_eq!(slow.metric("audit_logs_dropped_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_request_that_ends_while_it_waits_for_room_has_no_row() {
    let mut slow = Slow::start(&[("AUDIT_QUEUE", "20"), ("HTTP_REQUEST_TIMEOUT", "500ms")]).await;
    let posts = (0..30).map(|n| slow.post("/authors", json!({ "name": n.to_string() })));
    let posts = join_all(posts).await;
    let made = posts.iter().filter(|(status, _)| *status == 201).count();
    assert!(made < posts.len(), "{posts:?}");
    slow.let_go().await;
    // With the one that is set aside.
    let rows = slow.rows(made).await;
    assert!(rows.iter().all(|row| row["response_status"] == 201), "{rows:#?}");
}
