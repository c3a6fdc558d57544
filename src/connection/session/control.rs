//! Control frames of a client, the budget that they and small fragments take from, and strikes.

use std::time::{Duration, Instant};

use super::{Flow, Session};
use crate::{
    metrics::LimitType,
    protocol::{ClientControl, CloseReason, ServerControl},
};

impl Session {
    /// Answers a control frame, a JSON ping or refresh included.
    pub(super) fn control(&mut self, control: ClientControl, now: Instant) -> Flow {
        if self.control_budget.take(now, 1) > 0 {
            let wait = self.control_budget.wait(now);
            return self.too_many("Too many control frames", wait, now);
        }
        let msg = match control {
            ClientControl::Ping => {
                self.control.push_back(ServerControl::Pong.frame());
                return Flow::Continue(());
            }
            ClientControl::Refresh { .. } if !self.control_budget.take_refresh(now) => {
                let wait = self.control_budget.wait_for_refresh(now);
                return self.too_many("Too many refreshes", wait, now);
            }
            ClientControl::Refresh { token } if !self.credential.is_checking() => {
                return self.refresh(token, now);
            }
            ClientControl::Refresh { .. } => "a refresh is under way already".to_owned(),
            ClientControl::Auth { .. } => "this connection is authenticated already".to_owned(),
            ClientControl::Unknown(kind) => {
                format!("unknown control type {kind:?}: auth, ping and refresh are allowed")
            }
        };
        self.error("invalid_message", &msg);
        self.strike(now)
    }

    /// Counts a ping of the WebSocket layer, which tungstenite answers by itself.
    pub(super) fn ping(&mut self, now: Instant) -> Flow {
        self.pong_due = true;
        let over = self.control_budget.take(now, 1);
        self.over_budget(over, now)
    }

    /// Counts a pong, asked for or not.
    pub(super) fn pong(&mut self, now: Instant) -> Flow {
        let over = self.control_budget.take_pong(now);
        self.over_budget(over, now)
    }

    /// Counts the small fragments that tungstenite took since the last time.
    pub(super) fn small_fragments(&mut self) -> Flow {
        let fragments = self.socket.get_mut().take_small_fragments();
        if fragments == 0 {
            return Flow::Continue(());
        }
        let now = Instant::now();
        let over = self.control_budget.take(now, fragments);
        self.over_budget(over, now)
    }

    /// Puts an error frame among the control answers.
    pub(super) fn error(&mut self, code: &'static str, msg: &str) {
        let error = ServerControl::Error { code, msg, retry_after_ms: None };
        self.control.push_back(error.frame());
    }

    /// Refuses a control frame that comes before there is room for it.
    fn too_many(&mut self, msg: &str, wait: Duration, now: Instant) -> Flow {
        // Rounded up: a frame that comes back a moment too early would be refused again.
        let retry_after_ms =
            u64::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u64::MAX).max(1);
        let code = "rate_limit_exceeded";
        let error = ServerControl::Error { code, msg, retry_after_ms: Some(retry_after_ms) };
        self.control.push_back(error.frame());
        self.over_budget(1, now)
    }

    /// Counts frames over the budget, each of which is a strike.
    fn over_budget(&mut self, frames: u32, now: Instant) -> Flow {
        if frames > 0 {
            self.shared.metrics.rate_limit_hits.inc_by(LimitType::Control, frames.into());
            return self.add_strikes(now, frames);
        }
        Flow::Continue(())
    }

    /// Counts a strike.
    pub(super) fn strike(&mut self, now: Instant) -> Flow {
        self.add_strikes(now, 1)
    }

    /// Where strikes close nothing they take from the budget of control frames, and reading pauses until
    /// there is room again: what a client can make the server do has a bound all the same.
    fn add_strikes(&mut self, now: Instant, count: u32) -> Flow {
        let limit = self.shared.config.max_strikes;
        if limit == 0 {
            self.rescheduled |= self.control_budget.owe(now, count);
            return Flow::Continue(());
        }
        for _ in 0..count.min(limit) {
            if self.strikes.add(now, limit as usize) {
                return Flow::Break(CloseReason::TooManyStrikes);
            }
        }
        Flow::Continue(())
    }
}
