//! A rolling restart of three processes behind a balancer, while clients work as on any other day.
//!
//! What it comes to: every request is answered as it should be, every upgrade is accepted, and every
//! client gets every push. A client has one connection or, after a `drain`, for a while two, and never
//! none. A push is lost if it came over none of them. Over each connection, pushes that one node
//! accepted from one publisher come without a gap, once and in their order.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use reqwest::{Client as Http, Method};
use serde_json::{Value, json};
use tokio::{
    sync::Barrier,
    task::{JoinSet, block_in_place},
    time::{MissedTickBehavior, interval, sleep},
};

use crate::support::{
    balancer::balancer,
    fleet::Fleet,
    visitor::{Visit, Work, visit},
};

const VISITORS: usize = 18;
const CALLERS: usize = 4;
/// Requests at least, over both transports.
const REQUESTS: usize = 20_000;
/// Between two requests of a caller.
const PACE: Duration = Duration::from_millis(20);

const SETTINGS: &[(&str, &str)] = &[
    // The balancer looks every second, twice.
    ("DRAIN_DELAY", "3s"),
    ("DRAIN_SPREAD", "2s"),
    // Time for a new connection, on the slowest of machines.
    ("DRAIN_GRACE", "3s"),
    ("WS_MESSAGE_RATE_LIMIT", "0"),
    ("LOG_LEVEL", "info,switchboard::http=warn"),
];

/// What a publisher published, in its order, by the node that accepted it.
type Published = Vec<(String, String)>;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rolling_restart_under_load_fails_no_request_and_loses_no_push() {
    let mut fleet = Fleet::start(3, SETTINGS).await;
    let nodes = [fleet.addr(0), fleet.addr(1), fleet.addr(2)];
    let balancer = block_in_place(|| balancer(nodes));
    let work = Arc::new(Work {
        stop: AtomicBool::new(false),
        answered: AtomicUsize::new(0),
        published: AtomicUsize::new(0),
        together: Barrier::new(VISITORS + CALLERS),
    });
    let (mut visitors, mut callers) = (JoinSet::new(), JoinSet::new());
    for name in (0..VISITORS).map(|i| format!("v{i}")) {
        let token = fleet.token(&name);
        visitors.spawn(visit(balancer.addr, token, name, Arc::clone(&work)));
    }
    for name in (0..CALLERS).map(|i| format!("c{i}")) {
        let token = fleet.token(&name);
        callers.spawn(call(balancer.addr, token, name, Arc::clone(&work)));
    }
    sleep(Duration::from_secs(1)).await;
    let restarts = async {
        // One round, and on a slow machine more, so that all requests come while nodes are restarted.
        for round in 1.. {
            for node in 0..3 {
                let ran = fleet.stop(node);
                assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{}", ran.stdout);
                fleet.start_again(&[node]).await;
            }
            let answered = work.answered.load(Ordering::SeqCst);
            println!("{answered} requests during {round} rolling restarts");
            if answered >= REQUESTS {
                break;
            }
            assert!(round < 20, "only {answered} requests");
        }
        work.stop.store(true, Ordering::SeqCst);
    };
    // Nobody ends before; who breaks ends the test.
    let visits = async { visitors.join_all().await };
    let published = async { callers.join_all().await.concat() };
    let ((), visits, mut published) = tokio::join!(restarts, visits, published);
    let connections = visits.iter().map(Vec::len).sum::<usize>();
    assert!(connections >= 2 * VISITORS, "only {connections} connections: who was drained?");
    for visit in visits.iter().flatten() {
        published.extend(visit.made.iter().map(|name| (visit.name.clone(), name.clone())));
    }
    compare(&visits, &published);
}

/// Asks over REST until it is told to stop; what it published.
async fn call(addr: SocketAddr, token: String, name: String, work: Arc<Work>) -> Published {
    let http = Http::new();
    let (mut published, mut pace) = (Published::new(), interval(PACE));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    work.together.wait().await;
    for n in 1.. {
        pace.tick().await;
        if work.stop.load(Ordering::SeqCst) {
            break;
        }
        let author = format!("{name}-{n}");
        let (method, path, status, body) = match n % 10 {
            0 => (Method::POST, "/authors", 201, json!({ "name": author })),
            5 if name == "c0" => {
                let body = json!({ "pkg_id": 150, "data": { "n": n } });
                (Method::POST, "/admin/broadcast", 202, body)
            }
            _ => (Method::GET, "/authors/paginated?per_page=1", 200, Value::Null),
        };
        let request = http.request(method, format!("http://{addr}{path}")).bearer_auth(&token);
        let request = if body.is_null() { request } else { request.json(&body) };
        let answer = request.send().await.unwrap_or_else(|error| panic!("{path}: {error:?}"));
        assert_eq!(answer.status(), status, "{path}: {answer:?}");
        let node = answer.headers()["x-node"].to_str().unwrap().to_owned();
        answer.bytes().await.unwrap();
        work.answered.fetch_add(1, Ordering::SeqCst);
        if status != 200 {
            let push = if status == 202 { format!("b{n}") } else { author };
            published.push((format!("{name} on {node}"), push));
            work.published.fetch_add(1, Ordering::SeqCst);
        }
    }
    work.together.wait().await;
    published
}

/// Looks for pushes that are lost, doubled or out of their order.
fn compare(visits: &[Vec<Visit>], published: &[(String, String)]) {
    let mut counts = HashMap::new();
    let mut places = HashMap::new();
    for (publisher, push) in published {
        let count = counts.entry(publisher).or_insert(0);
        *count += 1;
        places.insert(push, (publisher, *count));
    }
    assert_eq!(places.len(), published.len(), "every push has a name of its own");
    for of_one in visits {
        for visit in of_one {
            let mut last = HashMap::new();
            for push in &visit.pushes {
                let (publisher, place) = places.get(push).expect("somebody published it");
                let before = last.insert(publisher, *place);
                let follows = before.is_none_or(|before| before + 1 == *place);
                assert!(
                    follows,
                    "{}: {push} is {place} of {publisher}, after {before:?}",
                    visit.name
                );
            }
        }
        let seen: HashSet<_> =
            of_one.iter().flat_map(|visit| visit.pushes.iter().chain(&visit.made)).collect();
        let lost: Vec<_> = published.iter().filter(|(_, push)| !seen.contains(push)).collect();
        assert!(lost.is_empty(), "{} lost {lost:?}", of_one[0].name);
    }
}
