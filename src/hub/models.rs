//! Models of the outbox and of the fan-out: whatever the order of the steps, nothing is left behind.

use std::{
    future::poll_fn,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use prometheus::IntCounter;
use shuttle::future::{block_on, spawn};
use tokio_tungstenite::tungstenite::Message;

use super::{Batch, Command, Hub, Outbox, Ready, Recipients, fanout::CHUNK};
use crate::{
    protocol::{CloseReason, Format, Push},
    sync::{explore, until_alone},
};

/// The outbox of a connection of a user.
pub(crate) fn outbox(subject: &str) -> Arc<Outbox> {
    Arc::new(Outbox::of(subject, 100))
}

fn push(number: usize) -> Push {
    Push::new(1, &number).unwrap()
}

fn frames(count: usize) -> Vec<Message> {
    (0..count).map(|number| push(number).frame(Format::Json)).collect()
}

/// Takes as a session does until it is told to close: the answers and the pushes.
async fn session(outbox: Arc<Outbox>) -> (Vec<Message>, Vec<Message>) {
    let (mut replies, mut pushes) = (Vec::new(), Vec::new());
    loop {
        let mut batch = Batch::default();
        match poll_fn(|cx| outbox.poll_take(cx, &mut batch)).await {
            Some(Command::Close(reason)) => {
                outbox.end(reason);
                return (replies, pushes);
            }
            Some(Command::Drain { .. }) => {}
            None => {
                assert!(!batch.is_empty(), "the session was woken for nothing");
                replies.extend(batch.replies.into_iter().map(|(frame, _)| frame));
                pushes.extend(batch.pushes);
            }
        }
    }
}

/// Every answer and push is taken, in its order, by a session that sleeps in between.
#[test]
fn an_outbox_loses_no_wake_up() {
    explore(3000, || {
        block_on(async {
            let outbox = outbox("ann");
            let taking = Arc::clone(&outbox);
            let taking = spawn(async move {
                let (mut replies, mut pushes) = (Vec::new(), Vec::new());
                while replies.len() < 3 || pushes.len() < 2 {
                    let mut batch = Batch::default();
                    poll_fn(|cx| taking.poll_take(cx, &mut batch)).await;
                    replies.extend(batch.replies.into_iter().map(|(frame, _)| frame));
                    pushes.extend(batch.pushes);
                }
                (replies, pushes)
            });
            let answering = Arc::clone(&outbox);
            let answering = spawn(async move {
                for frame in frames(3) {
                    answering.reply(frame, Ready { at: Instant::now(), trace: None });
                }
            });
            for number in 0..2 {
                outbox.push(&push(number)).unwrap();
            }
            answering.await.unwrap();
            assert_eq!(taking.await.unwrap(), (frames(3), frames(2)));
        });
    });
}

/// A close ends the session and whatever waits for the end of the connection, and a drain never replaces it.
#[test]
fn a_close_always_arrives() {
    explore(3000, || {
        block_on(async {
            let outbox = outbox("ann");
            let taking = spawn(session(Arc::clone(&outbox)));
            let reading = Arc::clone(&outbox);
            let reading = spawn(async move { reading.until_ended().await });
            let others = Arc::clone(&outbox);
            let others = spawn(async move {
                others.command(Command::Drain {
                    reconnect_after: Duration::ZERO,
                    stay: Duration::ZERO,
                });
                others.reply(Message::text("a"), Ready { at: Instant::now(), trace: None });
            });
            outbox.command(Command::Close(CloseReason::GoingAway));
            taking.await.unwrap();
            reading.await.unwrap();
            others.await.unwrap();
            assert_eq!(outbox.ended(), Some(CloseReason::GoingAway));
        });
    });
}

/// While a write holds up the data, a session still hears of a command.
#[test]
fn a_session_that_cannot_write_hears_of_a_command() {
    explore(3000, || {
        block_on(async {
            let outbox = outbox("ann");
            let waiting = Arc::clone(&outbox);
            let waiting = spawn(async move { poll_fn(|cx| waiting.poll_command(cx)).await });
            let answering = Arc::clone(&outbox);
            let answering = spawn(async move {
                answering.reply(Message::text("a"), Ready { at: Instant::now(), trace: None });
            });
            outbox.command(Command::Close(CloseReason::GoingAway));
            assert!(matches!(waiting.await.unwrap(), Command::Close(CloseReason::GoingAway)));
            answering.await.unwrap();
        });
    });
}

/// Two who push at the same time: what two connections have in the end.
async fn pushed(connections: usize) -> [Vec<Message>; 2] {
    let hub = Arc::new(Hub::new(IntCounter::new("dropped", "of a model").unwrap()));
    let outboxes: Vec<_> = (0..connections).map(|_| outbox("ann")).collect();
    outboxes.iter().for_each(|outbox| hub.insert(Arc::clone(outbox)));
    let pushers = [0, 10].map(|first| {
        let hub = Arc::clone(&hub);
        spawn(async move {
            for number in first..first + 2 {
                hub.push(push(number), Recipients::All { except: None });
            }
        })
    });
    for pusher in pushers {
        pusher.await.unwrap();
    }
    until_alone(&hub).await;
    [&outboxes[0], &outboxes[connections - 1]].map(|outbox| now(outbox).pushes.into())
}

/// The order of two pushes of each who pushes is theirs, and all connections have the same.
fn assert_ordered([one, other]: [Vec<Message>; 2]) {
    assert_eq!(one.len(), 4, "a push was left behind");
    assert_eq!(one, other, "two connections had another order");
    let place = |number| {
        let frame = push(number).frame(Format::Json);
        one.iter().position(|it| *it == frame).unwrap()
    };
    assert!(place(0) < place(1) && place(10) < place(11), "a push overtook another");
}

#[test]
fn a_fan_out_leaves_no_push_behind() {
    explore(5000, || block_on(async { assert_ordered(pushed(2).await) }));
}

#[test]
fn a_fan_out_in_chunks_keeps_the_order() {
    explore(100, || block_on(async { assert_ordered(pushed(CHUNK + 1).await) }));
}

/// What waits in an outbox now.
pub(crate) fn now(outbox: &Outbox) -> Batch {
    let mut batch = Batch::default();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match outbox.poll_take(&mut context, &mut batch) {
        Poll::Ready(None) | Poll::Pending => batch,
        Poll::Ready(Some(command)) => panic!("told to {command:?}"),
    }
}
