use std::{future::poll_fn, sync::atomic::AtomicUsize};

use prometheus::IntCounter;
use tokio_tungstenite::tungstenite::Message;

use super::*;
use crate::{hub::Batch, protocol::Format};

const CONNECTIONS: usize = 10 * CHUNK;

fn hub(connections: usize) -> (Arc<Hub>, Vec<Arc<Outbox>>) {
    let hub = Arc::new(Hub::new(IntCounter::new("dropped", "of a test").unwrap()));
    let outboxes = (0..connections).map(|_| Arc::new(Outbox::of("ann", 1000)));
    let outboxes: Vec<_> = outboxes.collect();
    outboxes.iter().for_each(|outbox| hub.insert(Arc::clone(outbox)));
    (hub, outboxes)
}

fn push(number: usize) -> Push {
    Push::new(1, &number).unwrap()
}

/// The next pushes of a connection.
async fn taken(outbox: &Outbox, count: usize) -> Vec<Message> {
    let mut pushes = Vec::new();
    while pushes.len() < count {
        let mut batch = Batch::default();
        poll_fn(|cx| outbox.poll_take(cx, &mut batch)).await;
        pushes.extend(batch.pushes);
    }
    pushes
}

#[tokio::test]
async fn others_have_their_turn_while_a_push_goes_out() {
    let (hub, outboxes) = hub(CONNECTIONS);
    let turns = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&turns);
    let other = tokio::spawn(async move {
        loop {
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            yield_now().await;
        }
    });
    hub.push(push(1), Recipients::All { except: None });
    for outbox in &outboxes {
        taken(outbox, 1).await;
    }
    other.abort();
    let turns = turns.load(std::sync::atomic::Ordering::SeqCst);
    assert!(turns >= CONNECTIONS / CHUNK - 1, "{turns} turns");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_connection_has_the_pushes_in_the_order_in_which_they_were_accepted() {
    let (hub, outboxes) = hub(CONNECTIONS);
    let pushes: Vec<_> = (0..4 * WAITING).map(push).collect();
    for (i, push) in pushes.iter().enumerate() {
        let to = match i % 2 {
            0 => Recipients::All { except: None },
            _ => Recipients::User("ann".into()),
        };
        hub.push(push.clone(), to);
    }
    let expected: Vec<_> = pushes.iter().map(|push| push.frame(Format::Json)).collect();
    for outbox in &outboxes {
        assert_eq!(taken(outbox, expected.len()).await, expected);
    }
    assert_eq!(hub.fanout.waiting().bytes, 0);
}

/// A panic elsewhere ends the runtime while pushes wait.
#[test]
fn nobody_goes_on_when_a_panic_ends_the_runtime() {
    let server = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (hub, _outboxes) = hub(CONNECTIONS);
            (0..3).for_each(|i| hub.push(push(i), Recipients::All { except: None }));
            yield_now().await;
            panic!("of the test");
        });
    });
    let ended = server.join().unwrap_err();
    assert_eq!(ended.downcast_ref(), Some(&"of the test"));
}

#[tokio::test]
async fn a_change_waits_to_begin_while_too_many_pushes_are_on_their_way() {
    let (hub, _outboxes) = hub(CONNECTIONS);
    for i in 0..WAITING {
        hub.room().await;
        hub.push(push(i), Recipients::All { except: None });
    }
    let mut one_more = Box::pin(hub.room());
    assert!(futures_util::poll!(&mut one_more).is_pending());
    one_more.await;
}

#[tokio::test]
async fn pushes_of_other_nodes_are_dropped_beyond_a_bound_of_bytes() {
    let (hub, outboxes) = hub(1);
    let large = Push::new(1, &"x".repeat(MOST_BYTES / 4)).unwrap();
    let offered = || hub.offer(large.clone(), Recipients::All { except: None });
    assert_eq!([offered(), offered(), offered()], [true, true, false]);
    taken(&outboxes[0], 2).await;
    hub.room().await;
    yield_now().await;
    assert!(offered());
}

#[tokio::test]
async fn a_push_goes_to_whom_it_is_for() {
    let (hub, outboxes) = hub(2);
    hub.push(push(1), Recipients::User("bob".into()));
    hub.push(push(2), Recipients::All { except: Some(outboxes[0].id) });
    hub.push(push(3), Recipients::All { except: None });
    let frame = |number| push(number).frame(Format::Json);
    assert_eq!(taken(&outboxes[0], 1).await, [frame(3)]);
    assert_eq!(taken(&outboxes[1], 2).await, [frame(2), frame(3)]);
}
