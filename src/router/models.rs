//! Models of the places: a job that waits for its turn always begins, and every job is answered once.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Instant,
};

use serde_json::Value;
use shuttle::{
    future::{block_on, spawn},
    rand::{Rng, thread_rng},
};
use tempfile::TempDir;
use tokio::runtime;
use tokio_util::task::TaskTracker;

use super::*;
use crate::{
    audit::Audit,
    auth::{DevIssuer, Validator},
    cluster::{Cluster, ClusterParts},
    config::Config,
    handlers::{Answer, Handler, HandlerError},
    hub::{
        Hub, Outbox,
        models::{now, outbox},
    },
    limits::Limits,
    protocol::{CloseReason, Format, ReplyHead},
    store::Store,
    sync::{explore, until_alone, yield_now},
};

const LANES: usize = 2;

/// Waits for a while, and notes how many do so at once.
#[derive(Clone, Default)]
struct Reads {
    waiting: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl Handler for Reads {
    type Input = Value;
    type Output = Value;
    const INPUT: &'static str = "";
    const OUTPUT: &'static str = "";
    const EFFECT: Effect = Effect::Read;

    async fn handle(
        &self,
        _: &Context,
        _: &Caller,
        _: Value,
    ) -> Result<Answer<Value>, HandlerError> {
        let _waits = Waits::new(self);
        for _ in 0..thread_rng().gen_range(1..30) {
            yield_now().await;
        }
        Ok(Value::Null.into())
    }
}

/// One that waits, until it is through or cancelled.
struct Waits<'a>(&'a Reads);

impl<'a> Waits<'a> {
    fn new(reads: &'a Reads) -> Self {
        let waiting = reads.waiting.fetch_add(1, SeqCst) + 1;
        reads.most.fetch_max(waiting, SeqCst);
        Self(reads)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

/// What all runs of a model share, as it is slow to make and no part of it.
struct World {
    context: Arc<Context>,
    metrics: Arc<Metrics>,
    config: HandlerConfig,
    runtime: runtime::Runtime,
    _data: TempDir,
}

fn world() -> World {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let data = TempDir::new().unwrap();
    let settings = HashMap::from([("DATA_DIR", data.path().to_str().unwrap())]);
    let config = Config::read(|name| settings.get(name).map(|text| (*text).to_owned())).unwrap();
    let metrics = Arc::new(Metrics::new(&[(1, "READS")], "development"));
    let store = runtime.block_on(Store::open(&config.store, metrics.db.clone(), None)).unwrap();
    let store = Arc::new(store);
    let issuer = DevIssuer::open(&config.auth.dev_key_file, &config.auth.client_id).unwrap();
    let validator = Validator::trusting(&issuer, &config.auth, metrics.auth.clone()).unwrap();
    let hub = Arc::new(Hub::new(metrics.ws.dropped_slow_consumer.clone()));
    let parts = ClusterParts {
        redis: None,
        limits: Arc::new(Limits::new(&config, None)),
        store: Arc::clone(&store),
        hub: Arc::clone(&hub),
        validator: Arc::new(validator),
        viewers: Vec::new().into_iter().collect(),
        broadcast_errors: metrics.ws.broadcast_errors.clone(),
    };
    let cluster = Cluster::new(&config, parts);
    let context = Arc::new(Context {
        store,
        audit: Arc::new(Audit::open(&config.audit, metrics.audit.clone()).unwrap()),
        changes: TaskTracker::new(),
        hub,
        cluster: Arc::new(cluster),
        broadcast_changes: false,
        max_rows: 0,
    });
    World { context, metrics, config: config.handlers, runtime, _data: data }
}

impl World {
    fn work(&self, places: usize) -> (Arc<Work>, Reads) {
        let reads = Reads::default();
        let work = Work {
            package: Package::new(1, "READS", &[], reads.clone()),
            context: Arc::clone(&self.context),
            config: self.config.clone(),
            metrics: Arc::clone(&self.metrics),
            places: Places::new(places),
        };
        (Arc::new(work), reads)
    }

    /// A batch of requests of one connection.
    fn jobs(&self, outbox: &Arc<Outbox>, count: usize) -> Jobs {
        (0..count).map(|_| self.job(outbox)).collect()
    }

    fn job(&self, outbox: &Arc<Outbox>) -> Job {
        let head = ReplyHead { pkg_id: 1, req_id: Uuid::nil(), format: Format::Json };
        let metrics = self.metrics.ws.package(1);
        Job {
            data: None,
            caller: Arc::new(Caller {
                identity: outbox.identity(),
                connection: Some(outbox.id),
                remote: Arc::clone(&outbox.remote),
            }),
            responder: Responder::new(head, Instant::now(), metrics, Arc::clone(outbox), None),
            queued: Arc::new(()),
        }
    }
}

/// Runs a model in a runtime that stands still: no deadline of a handler comes.
fn explore_in(model: fn(&World)) {
    let world = Arc::new(world());
    let entered = Arc::clone(&world);
    let _entered = entered.runtime.enter();
    explore(1000, move || model(&world));
}

/// What an actor does with the batches that arrive.
fn actor(work: &Arc<Work>, batches: Vec<Jobs>) -> shuttle::future::JoinHandle<()> {
    let work = Arc::clone(work);
    spawn(async move {
        for jobs in batches {
            if let Some(rest) = work.arrive(jobs) {
                work.arrive_in_turn(rest).await;
            }
            yield_now().await;
        }
    })
}

/// How many requests were answered, all of them well.
fn answered(outbox: &Outbox) -> usize {
    let replies = now(outbox).replies;
    for (frame, _) in &replies {
        let text = frame.to_text().unwrap();
        assert!(text.contains(r#""status_code":0"#), "{text}");
    }
    replies.len()
}

#[test]
fn a_job_that_waits_for_a_place_always_begins_and_is_answered_once() {
    explore_in(|world| {
        block_on(async {
            let (work, reads) = world.work(4);
            let [ann, second, bob] = [outbox("ann"), outbox("ann"), outbox("bob")];
            let lanes = [
                actor(&work, vec![world.jobs(&ann, 1), world.jobs(&ann, 6)]),
                actor(&work, vec![world.jobs(&second, 2), world.jobs(&bob, 3)]),
            ];
            for lane in lanes {
                lane.await.unwrap();
            }
            until_alone(&work).await;
            assert_eq!([&ann, &second, &bob].map(|outbox| answered(outbox)), [7, 2, 3]);
            let most = reads.most.load(SeqCst);
            // Each actor may let one begin before another has taken its place.
            assert!(most < 4 + LANES, "{most} waited at once");
            assert!(work.places.are_free(), "a place was lost");
        });
    });
}

#[test]
fn a_connection_that_ends_gives_its_places_and_turns_to_others() {
    explore_in(|world| {
        block_on(async {
            // With one alone, the turn of a request that is abandoned may be the last to be passed on.
            let (work, reads) = world.work(1);
            let [ann, bob] = [outbox("ann"), outbox("bob")];
            let lanes =
                [actor(&work, vec![world.jobs(&ann, 8)]), actor(&work, vec![world.jobs(&bob, 3)])];
            yield_now().await;
            ann.end(CloseReason::Normal);
            for lane in lanes {
                lane.await.unwrap();
            }
            until_alone(&work).await;
            assert_eq!(answered(&bob), 3);
            assert_eq!(reads.waiting.load(SeqCst), 0);
            assert!(work.places.are_free(), "a place was lost");
        });
    });
}
