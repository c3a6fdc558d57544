//! The data path of a connection, in one task that owns the unsplit socket.
//!
//! Read every frame that has arrived → decode → limit → dispatch; take what the outbox holds → feed
//! all → one flush. Reading stops while `WS_MAX_IN_FLIGHT` requests are open, and while answers of more than
//! `WS_SEND_BYTES` wait. Commands get through while a write waits.

mod control;
mod control_budget;
mod credential;
mod deadlines;
mod feed;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod refresh;
mod stall;
mod strikes;

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    mem,
    ops::ControlFlow,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio::{
    task::coop,
    time::{Sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    Admission, Shared, StopOnDrop,
    handshake::broken,
    socket::{self, Socket},
};
use crate::{
    hub::{Batch, Command, Outbox, Ready},
    limits::{MessageBudget, Refused},
    metrics::LimitType,
    protocol::{
        self, CloseReason, ErrorBody, Incoming, Malformed, ReplyHead, Request, ServerControl,
        Status,
    },
    router::{Departure, Responder},
    traces,
};
use control_budget::ControlBudget;
use credential::Credential;
use feed::feed;
use stall::Stall;
use strikes::Strikes;

/// Control answers that wait for a write before reading stops.
const MAX_CONTROL: usize = 16;
/// Takes from a busy outbox before the socket and the timer get their turn.
const MAX_TAKES: u32 = 8;
/// Time for open requests to be answered when the client's own fault ends the connection.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

pub(super) struct Session {
    socket: Socket,
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    credential: Credential,
    budget: Arc<MessageBudget>,
    control_budget: ControlBudget,
    batch: Batch,
    /// Frames of this task itself: control answers.
    control: VecDeque<Message>,
    /// Set by a ping: tungstenite has queued a pong, which must not wait for other data, and a client
    /// that does not read its pongs must not be read from.
    pong_due: bool,
    /// Whether the timer knows this task's waker, which stays the same: it need not be polled again
    /// before it fires.
    timer_set: bool,
    /// Takes from the outbox since the socket was last looked at.
    takes: u32,
    in_flight: usize,
    /// The answers that are fed and not flushed yet.
    fed: Vec<Ready>,
    strikes: Strikes,
    /// Set where a deadline may have come nearer: the timer has to be set anew.
    rescheduled: bool,
    last_seen: Instant,
    /// When the message began that has arrived in part.
    begun: Option<Instant>,
    /// Since when that message is not read on, for a reason of the server's.
    held: Option<Instant>,
    /// Set by a write that has to wait, until nothing waits any more.
    stall: Option<Box<Stall>>,
    /// Set while a ping is out.
    pinged: Option<Instant>,
    /// Set when a drain was announced.
    drain: Option<Drain>,
}

/// The last part of a connection's life.
struct Drain {
    /// From then on it ends as soon as it is quiet.
    quiet: Instant,
    /// Then it ends.
    end: Instant,
}

/// The connection is to end.
type Flow = ControlFlow<CloseReason>;

impl Session {
    pub(super) fn new(admission: Admission, shared: Arc<Shared>) -> Self {
        let Admission { socket, identity, outbox, budget, .. } = admission;
        let now = Instant::now();
        let control_budget = ControlBudget::new(now, shared.config.message_rate_limit);
        Self {
            socket,
            shared,
            credential: Credential::new(identity, outbox.id, Arc::clone(&outbox.remote)),
            outbox,
            budget,
            control_budget,
            batch: Batch::default(),
            control: VecDeque::new(),
            pong_due: false,
            timer_set: false,
            takes: 0,
            in_flight: 0,
            fed: Vec::new(),
            strikes: Strikes::default(),
            rescheduled: false,
            last_seen: now,
            begun: None,
            held: None,
            stall: None,
            pinged: None,
            drain: None,
        }
    }

    /// Serves the connection until it ends, and ends it.
    pub(super) async fn run(mut self: Box<Self>, stop: StopOnDrop) {
        let hello = ServerControl::AuthOk {
            connection_id: self.outbox.id,
            user: &self.credential.identity().username,
            expires_in: self.credential.identity().expires_in().as_secs(),
        };
        self.control.push_back(hello.frame());
        let ControlFlow::Break(reason) = self.serve().await else { return };
        // Boxed: the state of an ending must not weigh on every idle connection.
        Box::pin(self.end(reason)).await;
        drop(stop);
    }

    async fn serve(&mut self) -> Flow {
        self.write().await?;
        let timer = sleep_until(self.next_deadline().into());
        tokio::pin!(timer);
        loop {
            poll_fn(|cx| self.poll_event(cx, timer.as_mut())).await?;
            if !self.batch.is_empty() || !self.control.is_empty() || self.pong_due {
                self.write().await?;
                // A drain may have come while the write waited, or a shorter life with a fresh token.
                if mem::take(&mut self.rescheduled) {
                    self.set(timer.as_mut());
                }
            }
            if self.drained() && self.in_flight == 0 {
                match poll_fn(|cx| Poll::Ready(self.poll_read(cx))).await {
                    Poll::Ready(flow) => flow?,
                    Poll::Pending if self.in_flight == 0 => {
                        return Flow::Break(CloseReason::GoingAway);
                    }
                    Poll::Pending => {}
                }
            }
        }
    }

    /// Waits until there is something to write, or until the connection is to end. What arrives
    /// meanwhile is dispatched here, with the task's own waker and without a poll too many.
    fn poll_event(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<Flow> {
        let taken = match self.outbox.poll_take(cx, &mut self.batch) {
            Poll::Ready(None) => {
                self.taken();
                self.takes += 1;
                if self.takes < MAX_TAKES {
                    return Poll::Ready(Flow::Continue(()));
                }
                true
            }
            Poll::Ready(Some(command)) => return Poll::Ready(self.command(command)),
            Poll::Pending => {
                self.stall = None;
                false
            }
        };
        self.takes = 0;
        let read = self.poll_read(cx);
        if matches!(read, Poll::Ready(Flow::Break(_))) {
            return read;
        }
        // After reading, which may have begun the check.
        if let Poll::Ready(checked) = self.credential.poll_checked(cx) {
            return Poll::Ready(self.refreshed(checked, Instant::now()));
        }
        // Reading may have begun a pause, or a message.
        let arrival = self.arrival();
        let sooner = arrival.is_some_and(|end| end < timer.deadline().into_std());
        if mem::take(&mut self.rescheduled) || sooner {
            self.set(timer.as_mut());
        }
        // Also where there is something to write: a client that never pauses must not outlive its token.
        if self.is_due(cx, timer.as_mut()) {
            let flow = self.tick();
            self.set(timer);
            return Poll::Ready(flow);
        }
        if taken { Poll::Ready(Flow::Continue(())) } else { read }
    }

    /// Whether the timer has fired.
    fn is_due(&mut self, cx: &mut Context<'_>, timer: Pin<&mut Sleep>) -> bool {
        if self.timer_set && !timer.is_elapsed() {
            return false;
        }
        // A task whose turn is over registers nothing: it comes back in its next one.
        if !coop::has_budget_remaining() {
            cx.waker().wake_by_ref();
            return false;
        }
        let due = timer.poll(cx).is_ready();
        self.timer_set = !due;
        due
    }

    fn set(&mut self, timer: Pin<&mut Sleep>) {
        timer.reset(self.next_deadline().into());
        self.timer_set = false;
    }

    fn command(&mut self, command: Command) -> Flow {
        match command {
            Command::Close(reason) => Flow::Break(reason),
            Command::Drain { reconnect_after, stay } => {
                let reconnect_after_ms = reconnect_after.as_millis().try_into().unwrap_or(u64::MAX);
                self.control.push_back(ServerControl::Drain { reconnect_after_ms }.frame());
                let now = Instant::now();
                self.drain =
                    Some(Drain { quiet: now + stay, end: now + self.shared.drain_timeout });
                self.rescheduled = true;
                Flow::Continue(())
            }
        }
    }

    /// Whether the connection is to end as soon as it is quiet.
    fn drained(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| Instant::now() >= drain.quiet)
    }

    /// Takes every frame that has arrived, while there is room for its request; room in the budget of messages
    /// too, until a drain ends connections that are quiet: from then on nothing that has arrived may be left.
    /// Ready: the connection ends, or there is a control answer to write.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Flow> {
        let mut arrived = None;
        let mut departure = Departure::default();
        let mut flow = Flow::Continue(());
        let full = self.is_full();
        // Whether reading stopped because nothing more has arrived.
        let mut waits = false;
        while flow.is_continue()
            && self.in_flight < self.shared.config.max_in_flight
            && self.control.len() < MAX_CONTROL
            && !self.pong_due
            && !self.control_budget.is_paused()
            && !full
            && (self.drained() || self.budget.poll_ready(cx).is_ready())
        {
            let Poll::Ready(frame) = socket::poll_next(&mut self.socket, cx) else {
                waits = true;
                break;
            };
            let now = *arrived.get_or_insert_with(Instant::now);
            flow = match frame {
                Some(Ok(frame)) => self.frame(frame, now, &mut departure),
                Some(Err(error)) => match self.small_fragments() {
                    Flow::Continue(()) => Flow::Break(broken(&error)),
                    over => over,
                },
                None => Flow::Break(CloseReason::Normal),
            };
        }
        if flow.is_continue() && self.socket.get_ref().has_small_fragments() {
            flow = self.small_fragments();
        }
        // A part of a message is a sign of life too.
        if self.socket.get_mut().take_heard() {
            let now = *arrived.get_or_insert_with(Instant::now);
            self.arriving(now);
        }
        if self.begun.is_some() {
            self.hold(!waits);
        }
        if let Some(now) = arrived {
            self.last_seen = now;
            self.pinged = None;
            self.outbox.set_in_flight(self.in_flight);
        }
        let to_write = !self.control.is_empty() || self.pong_due;
        if flow.is_break() || to_write { Poll::Ready(flow) } else { Poll::Pending }
    }

    /// Whether so many bytes of answers wait that no more requests are read. What the outbox holds beside
    /// these belongs to requests in flight.
    fn is_full(&self) -> bool {
        !self.batch.replies.is_empty() && self.batch.reply_bytes() > self.shared.config.send_bytes
    }

    fn frame(&mut self, frame: Message, now: Instant, departure: &mut Departure) -> Flow {
        let format = self.outbox.format;
        let incoming = match &frame {
            Message::Text(text) => protocol::decode_text(format, text),
            Message::Binary(bytes) => protocol::decode_binary(format, bytes),
            Message::Close(_) => return Flow::Break(CloseReason::Normal),
            Message::Ping(_) => return self.ping(now),
            Message::Pong(_) => return self.pong(now),
            // Never read.
            Message::Frame(_) => return Flow::Continue(()),
        };
        match incoming {
            Incoming::Request(request) => self.request(request, now, departure),
            Incoming::Malformed(malformed) => self.malformed(malformed, now),
            Incoming::Control(control) => self.control(control, now),
            Incoming::WrongKind => Flow::Break(CloseReason::WrongKind),
        }
    }

    fn request(&mut self, request: Request, now: Instant, departure: &mut Departure) -> Flow {
        let responder = self.responder(request.pkg_id, request.req_id, now);
        if let Err(refused) = self.budget.take() {
            responder.refuse(Status::Error, refused.error());
            if !matches!(refused, Refused::TooMany(_)) {
                return Flow::Continue(());
            }
            self.shared.metrics.rate_limit_hits.inc(LimitType::Message);
            return self.strike(now);
        }
        match self.shared.router.dispatch(request, self.credential.caller(), responder, departure) {
            Ok(()) => Flow::Continue(()),
            Err(reason) => Flow::Break(reason),
        }
    }

    fn malformed(&mut self, malformed: Malformed, now: Instant) -> Flow {
        let Malformed { pkg_id, req_id, msg } = malformed;
        let responder = self.responder(pkg_id, req_id, now);
        responder.refuse(Status::InvalidData, ErrorBody::new("invalid_message", msg));
        self.strike(now)
    }

    /// Opens a request. What it answers comes back through the outbox, which closes it in `write`.
    fn responder(&mut self, pkg_id: i32, req_id: uuid::Uuid, now: Instant) -> Responder {
        let ws = &self.shared.metrics.ws;
        ws.received.inc();
        self.outbox.count_received();
        self.in_flight += 1;
        let head = ReplyHead { format: self.outbox.format, pkg_id, req_id };
        let trace = self.shared.traces.as_ref().and_then(|traces| {
            traces.message(&traces::Message {
                received: now,
                pkg_id,
                req_id,
                connection_id: self.outbox.id,
                user_id: &self.credential.identity().subject,
                upgrade: self.outbox.remote.trace.as_deref(),
            })
        });
        Responder::new(head, now, ws.package(pkg_id), Arc::clone(&self.outbox), trace)
    }

    /// Counts what was taken out of the outbox: it is answered, though not yet written.
    fn taken(&mut self) {
        let answers = self.batch.replies.len();
        self.shared.metrics.ws.sent.inc_by((answers + self.batch.pushes.len()) as u64);
        self.in_flight -= answers;
        self.outbox.set_in_flight(self.in_flight);
    }

    /// Writes what is there with one flush. A command gets through while the client does not read.
    async fn write(&mut self) -> Flow {
        self.pong_due = false;
        loop {
            let written = self.socket.get_ref().written();
            let end = self.latest_end();
            tokio::select! {
                biased;
                done = feed(&mut self.socket, &mut self.control, &mut self.batch, &mut self.fed) => match done {
                    Ok(()) => break,
                    Err(_) => return Flow::Break(CloseReason::Abnormal),
                },
                command = poll_fn(|cx| self.outbox.poll_command(cx)) => self.command(command)?,
                () = poll_fn(|cx| {
                    let patience = self.shared.config.write_timeout;
                    Stall::poll(&mut self.stall, cx, written, patience, end)
                }) => self.stalled()?,
            }
        }
        self.unstalled();
        // The room of the greeting, or of a ping, would be kept by every connection that idles.
        self.control.shrink_to_fit();
        if !self.fed.is_empty() {
            let flushed = Instant::now();
            for Ready { at, trace } in self.fed.drain(..) {
                self.shared.metrics.ws.phase_write.observe((flushed - at).as_secs_f64());
                if let Some(trace) = trace {
                    trace.written(at, flushed);
                }
            }
        }
        Flow::Continue(())
    }

    /// Ends the connection. What was asked before is answered first, where the client can still hear.
    async fn end(mut self: Box<Self>, reason: CloseReason) {
        match reason {
            CloseReason::Normal
            | CloseReason::Abnormal
            | CloseReason::SlowConsumer
            | CloseReason::InternalError => {}
            _ => drop(timeout(LAST_ANSWERS, self.last_answers()).await),
        }
        self.outbox.end(reason);
        socket::close(self.socket, reason, None).await;
    }

    /// Writes all that was accepted before: the answers to open requests, and pushes that are there.
    async fn last_answers(&mut self) -> Flow {
        self.write().await?;
        loop {
            let take = poll_fn(|cx| self.outbox.poll_take(cx, &mut self.batch));
            let taken = if self.in_flight > 0 { Some(take.await) } else { take.now_or_never() };
            match taken {
                Some(None) => {
                    self.taken();
                    self.write().await?;
                }
                // The connection is ending already.
                Some(Some(_)) => {}
                None => return Flow::Continue(()),
            }
        }
    }
}
