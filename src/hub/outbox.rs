//! What waits to be written to one connection: replies, pushes, and the command that ends or drains it.
//!
//! Responders, the hub and the connection's actor put in; the session alone takes out. The queues
//! allocate when they are first used: a tokio channel would cost an idle connection over a KiB a lane.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, PoisonError, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::{
    auth::{Identity, Remote},
    protocol::{CloseReason, Format, Push},
    sync::{AtomicU64, AtomicUsize, Mutex, MutexGuard},
    traces::MessageSpan,
};

/// The way out of one connection.
pub(crate) struct Outbox {
    /// The connection's id.
    pub(crate) id: Uuid,
    /// Whose token was in force at first.
    first: Arc<Identity>,
    /// The format of data frames.
    pub(crate) format: Format,
    /// Where the upgrade came from.
    pub(crate) remote: Arc<Remote>,
    /// When it was made: milliseconds since 1970, by the clock that the nodes share.
    pub(crate) since: u64,
    push_limit: usize,
    in_flight: AtomicUsize,
    received: AtomicU64,
    state: Mutex<State>,
}

struct State {
    batch: Batch,
    command: Option<Command>,
    session: Option<Waker>,
    ended: Option<CloseReason>,
    /// Told of the end, where a read waits for something.
    watched: Option<Arc<Notify>>,
    identity: Arc<Identity>,
}

/// What a session is told beside its data.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Command {
    /// End the connection.
    Close(CloseReason),
    /// Tell the client to come back later, finish what is open, end with 1001.
    Drain {
        /// What the client is told.
        reconnect_after: Duration,
        /// How long the connection lasts at least.
        stay: Duration,
    },
}

/// What is to be known of an answer once it is written.
pub(crate) struct Ready {
    /// When it was ready.
    pub(crate) at: Instant,
    /// Where there are traces.
    pub(crate) trace: Option<Box<MessageSpan>>,
}

/// What a session takes out at once.
#[derive(Default)]
pub(crate) struct Batch {
    /// Answers. Bounded by the requests in flight, and by `WS_SEND_BYTES` beside those.
    pub(crate) replies: VecDeque<(Message, Ready)>,
    /// Pushes in the order they were accepted. Bounded by `WS_SEND_QUEUE`; all connections share their bytes.
    pub(crate) pushes: VecDeque<Message>,
}

impl Batch {
    /// Bytes of the answers. Counted when they are asked for, so that a message pays nothing for it.
    pub(crate) fn reply_bytes(&self) -> usize {
        self.replies.iter().map(|(frame, _)| frame.len()).sum()
    }

    /// Whether there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.replies.is_empty() && self.pushes.is_empty()
    }
}

/// What a connection has done, and what waits for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Messages received.
    pub(crate) messages: u64,
    /// Answers that wait to be written.
    pub(crate) replies: usize,
    /// Pushes that wait to be written.
    pub(crate) pushes: usize,
}

/// A push found no room: its connection is being closed as slow.
#[derive(Debug)]
pub(crate) struct Overflow;

impl Outbox {
    /// An empty outbox that holds `push_limit` pushes at most.
    pub(crate) fn new(
        id: Uuid,
        identity: Arc<Identity>,
        format: Format,
        push_limit: usize,
        remote: Arc<Remote>,
        since: u64,
    ) -> Self {
        Self {
            id,
            first: Arc::clone(&identity),
            format,
            remote,
            since,
            push_limit,
            in_flight: AtomicUsize::new(0),
            received: AtomicU64::new(0),
            state: Mutex::new(State {
                batch: Batch::default(),
                command: None,
                session: None,
                ended: None,
                watched: None,
                identity,
            }),
        }
    }

    /// The user's `sub`, under which the hub lists the connection. A refresh does not change it.
    pub(crate) fn subject(&self) -> &Arc<str> {
        &self.first.subject
    }

    /// The user's name as it was at first.
    pub(crate) fn username(&self) -> &Arc<str> {
        &self.first.username
    }

    /// Puts an answer in. One that comes after the end of the connection has nowhere to go.
    pub(crate) fn reply(&self, frame: Message, ready: Ready) {
        let mut state = self.state();
        if state.ended.is_none() {
            state.batch.replies.push_back((frame, ready));
            wake(state);
        }
    }

    /// Puts a push in, if the token in force has the roles to see it; a full lane closes the connection.
    pub(crate) fn push(&self, push: &Push) -> Result<(), Overflow> {
        let mut state = self.state();
        if state.ended.is_some() || !state.identity.has(push.roles()) {
            return Ok(());
        }
        if state.batch.pushes.len() >= self.push_limit {
            if !matches!(state.command, Some(Command::Close(_))) {
                state.command = Some(Command::Close(CloseReason::SlowConsumer));
            }
            wake(state);
            return Err(Overflow);
        }
        state.batch.pushes.push_back(push.frame(self.format));
        wake(state);
        Ok(())
    }

    /// Tells the session something; a close is never replaced by a drain.
    pub(crate) fn command(&self, command: Command) {
        let mut state = self.state();
        if !matches!(state.command, Some(Command::Close(_))) {
            state.command = Some(command);
            wake(state);
        }
    }

    /// Requests taken from the client and not answered yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Written by the session, for the gauge.
    pub(crate) fn set_in_flight(&self, requests: usize) {
        self.in_flight.store(requests, Ordering::Relaxed);
    }

    /// Counts a message. The session's alone to call, so that it need not be one atomic step.
    pub(crate) fn count_received(&self) {
        self.received.store(self.received.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// How it is now.
    pub(crate) fn figures(&self) -> Figures {
        let messages = self.received.load(Ordering::Relaxed);
        let Batch { replies, pushes } = &self.state().batch;
        Figures { messages, replies: replies.len(), pushes: pushes.len() }
    }

    /// Notes whose token is in force, which a refresh changes.
    pub(crate) fn set_identity(&self, identity: Arc<Identity>) {
        self.state().identity = identity;
    }

    /// Whose token is in force.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.state().identity)
    }

    /// Closes the outbox for good. The first reason stands.
    pub(crate) fn end(&self, reason: CloseReason) {
        let mut state = self.state();
        state.ended.get_or_insert(reason);
        state.batch = Batch::default();
        if let Some(watched) = state.watched.take() {
            watched.notify_waiters();
        }
    }

    /// Waits for the end.
    pub(crate) async fn until_ended(&self) {
        let told = {
            let mut state = self.state();
            if state.ended.is_some() {
                return;
            }
            // Made under the lock: it hears of an end that comes before it is polled.
            Arc::clone(state.watched.get_or_insert_default()).notified_owned()
        };
        told.await;
    }

    /// Why the connection ended; none while it lives, or if its task broke.
    pub(crate) fn ended(&self) -> Option<CloseReason> {
        self.state().ended
    }

    /// Waits for a command, or for data, which is swapped with the empty `batch`.
    pub(crate) fn poll_take(
        &self,
        context: &mut Context<'_>,
        batch: &mut Batch,
    ) -> Poll<Option<Command>> {
        let mut state = self.state();
        if let Some(command) = state.command.take() {
            return Poll::Ready(Some(command));
        }
        if !state.batch.is_empty() {
            mem::swap(&mut state.batch, batch);
            return Poll::Ready(None);
        }
        state.park(context);
        Poll::Pending
    }

    /// Waits for a command alone, while a write holds up the data.
    pub(crate) fn poll_command(&self, context: &mut Context<'_>) -> Poll<Command> {
        let mut state = self.state();
        match state.command.take() {
            Some(command) => Poll::Ready(command),
            None => {
                state.park(context);
                Poll::Pending
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves queues of whole messages.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn park(&mut self, context: &Context<'_>) {
        match &mut self.session {
            Some(waker) => waker.clone_from(context.waker()),
            empty => *empty = Some(context.waker().clone()),
        }
    }
}

/// Wakes the session after the lock is released, so that it does not run into it.
fn wake(mut state: MutexGuard<'_, State>) {
    let session = state.session.take();
    drop(state);
    if let Some(session) = session {
        session.wake();
    }
}

#[cfg(test)]
impl Outbox {
    /// An outbox of a user without roles, for tests.
    pub(super) fn of(subject: &str, push_limit: usize) -> Self {
        let identity = Identity {
            subject: subject.into(),
            issuer: "issuer".into(),
            session: None,
            username: subject.into(),
            roles: [].into(),
            issued_at: 0,
            expires_at: u64::MAX,
        };
        let remote = Remote {
            address: [127, 0, 0, 1].into(),
            user_agent: None,
            correlation: "c".into(),
            trace: None,
        };
        let (identity, remote) = (Arc::new(identity), Arc::new(remote));
        Self::new(Uuid::new_v4(), identity, Format::Json, push_limit, remote, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Waker};

    use super::*;

    fn outbox(push_limit: usize) -> Outbox {
        Outbox::of("ann", push_limit)
    }

    fn ready() -> Ready {
        Ready { at: Instant::now(), trace: None }
    }

    #[tokio::test]
    async fn replies_and_pushes_have_lanes_of_their_own() {
        let outbox = outbox(1);
        let push = Push::new(3, &1).unwrap();
        outbox.push(&push).unwrap();
        for _ in 0..100 {
            outbox.reply(Message::text("a"), ready());
        }
        let mut batch = Batch::default();
        assert!(poll_fn(|cx| outbox.poll_take(cx, &mut batch)).await.is_none());
        assert_eq!((batch.replies.len(), batch.pushes.len()), (100, 1));
        assert_eq!(batch.reply_bytes(), 100);
    }

    #[tokio::test]
    async fn a_full_push_lane_closes_as_slow_consumer() {
        let outbox = outbox(2);
        let push = Push::new(3, &1).unwrap();
        outbox.push(&push).unwrap();
        outbox.push(&push).unwrap();
        assert!(outbox.push(&push).is_err());
        outbox.command(Command::Drain { reconnect_after: Duration::ZERO, stay: Duration::ZERO });
        let command = poll_fn(|cx| outbox.poll_command(cx)).await;
        assert!(matches!(command, Command::Close(CloseReason::SlowConsumer)));
    }

    #[test]
    fn nothing_enters_after_the_end() {
        let outbox = outbox(2);
        outbox.end(CloseReason::Normal);
        outbox.end(CloseReason::InternalError);
        outbox.reply(Message::text("late"), ready());
        let mut batch = Batch::default();
        assert!(outbox.poll_take(&mut Context::from_waker(Waker::noop()), &mut batch).is_pending());
        assert_eq!(outbox.ended(), Some(CloseReason::Normal));
    }
}
