//! A write that waits for its client: how long, and whether the client takes what waits fast enough.
//!
//! Boxed, and made when a write first waits: an idle connection must not keep the room for its timer.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::time::{Sleep, sleep_until};

use super::{Flow, Session};
use crate::{connection::pace::Pace, protocol::CloseReason};

/// Lasts until nothing waits any more, over many writes where the outbox is never empty.
pub(super) struct Stall {
    pace: Pace,
    /// When the write that is under way began to wait.
    waits: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl Stall {
    fn new(written: u64) -> Self {
        let now = Instant::now();
        let timer = Box::pin(sleep_until(now.into()));
        Self { pace: Pace::new(now, written), waits: None, timer }
    }

    /// Ready when it is time to look at the client's pace, or at `end`. A write that does not wait never comes here.
    pub(super) fn poll(
        stall: &mut Option<Box<Self>>,
        cx: &mut Context<'_>,
        written: u64,
        patience: Duration,
        end: Instant,
    ) -> Poll<()> {
        let stall = stall.get_or_insert_with(|| Box::new(Self::new(written)));
        stall.waits.get_or_insert_with(Instant::now);
        let deadline = (stall.pace.since + patience).min(end).into();
        if stall.timer.deadline() != deadline {
            stall.timer.as_mut().reset(deadline);
        }
        stall.timer.as_mut().poll(cx)
    }
}

impl Session {
    /// Ends a connection whose time is over, or whose client is too slow.
    pub(super) fn stalled(&mut self) -> Flow {
        self.credential.look();
        let (now, written) = (Instant::now(), self.socket.get_ref().written());
        if now >= self.latest_end() {
            return Flow::Break(self.end_reason());
        }
        match &mut self.stall {
            Some(stall) if stall.pace.is_slow(now, written) => {
                Flow::Break(CloseReason::SlowConsumer)
            }
            Some(stall) => {
                stall.pace = Pace::new(now, written);
                Flow::Continue(())
            }
            None => Flow::Continue(()),
        }
    }

    /// Gives a message that has begun to arrive the time back in which a write waited and nothing was read.
    pub(super) fn unstalled(&mut self) {
        let waits = self.stall.as_mut().and_then(|stall| stall.waits.take());
        if let (Some(begun), Some(waits)) = (&mut self.begun, waits) {
            *begun += waits.elapsed();
        }
    }
}
