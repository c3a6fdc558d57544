//! When a session has something to do by the clock: signs of life, messages that take too long to arrive, the
//! ends of its token, of a pause and of a drain.

use std::time::Instant;

use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::{Flow, Session};
use crate::protocol::{CloseReason, ServerControl};

/// Write timeouts in which a message that has begun to arrive has to be there.
const ARRIVAL: u32 = 3;

impl Session {
    /// Notes when the message began that has arrived in part.
    pub(super) fn arriving(&mut self, now: Instant) {
        self.begun = match self.socket.get_mut().arriving() {
            Some(false) => self.begun.or(Some(now)),
            Some(true) => {
                self.held = None;
                Some(now)
            }
            None => None,
        };
    }

    /// Notes whether the message that has arrived in part is read on. The time in which it is not does not count.
    pub(super) fn hold(&mut self, held: bool) {
        match (held, self.held) {
            (true, None) => self.held = Some(Instant::now()),
            (false, Some(since)) => {
                self.begun = self.begun.map(|begun| begun + since.elapsed());
                self.held = None;
            }
            (true, Some(_)) | (false, None) => {}
        }
    }

    /// When the message has to be there that has arrived in part.
    pub(super) fn arrival(&self) -> Option<Instant> {
        // The time of a message does not run while the server does not read.
        let begun = self.begun.filter(|_| self.held.is_none());
        begun.map(|begun| begun + self.shared.config.write_timeout * ARRIVAL)
    }

    /// Looks at what is due: expiry and its warning, the end of a drain or of a pause, a message that does not
    /// arrive, a ping, its pong.
    pub(super) fn tick(&mut self) -> Flow {
        self.credential.look();
        let now = Instant::now();
        let config = &self.shared.config;
        if now >= self.latest_end() {
            return Flow::Break(self.end_reason());
        }
        // While reading is held up a pong cannot be seen, nor the rest of a message: the client is not to blame.
        if self.in_flight >= config.max_in_flight
            || self.control_budget.is_paused()
            || self.is_full()
        {
            self.last_seen = now;
            self.pinged = None;
            self.control_budget.resume(now);
        }
        if self.arrival().is_some_and(|end| now >= end) {
            return Flow::Break(CloseReason::PongTimeout);
        }
        match self.pinged {
            Some(pinged) if now - pinged >= config.pong_timeout => {
                return Flow::Break(CloseReason::PongTimeout);
            }
            None if now - self.last_seen >= config.ping_interval => {
                self.control.push_back(Message::Ping(Bytes::new()));
                self.control_budget.ping();
                self.pinged = Some(now);
            }
            _ => {}
        }
        if let Some(left) = self.credential.warn(now, config.expiry_warning) {
            let warning = ServerControl::AuthExpiring { expires_in: left.as_secs() };
            self.control.push_back(warning.frame());
        }
        Flow::Continue(())
    }

    /// Not moved by every message: a tick that comes early looks again.
    pub(super) fn next_deadline(&self) -> Instant {
        let config = &self.shared.config;
        let life = match self.pinged {
            Some(pinged) => pinged + config.pong_timeout,
            None => self.last_seen + config.ping_interval,
        };
        let token = self.credential.next_deadline(config.expiry_warning);
        let drain = self.drain.as_ref();
        let drain =
            drain.map(|drain| if self.drained() { drain.end } else { drain.quiet.min(drain.end) });
        let resumes = self.control_budget.resumes();
        let others = [drain, resumes, self.arrival()];
        others.into_iter().flatten().fold(life.min(token), Instant::min)
    }

    /// When the connection ends at the latest, whatever it is doing.
    pub(super) fn latest_end(&self) -> Instant {
        let expires = self.credential.expires();
        self.drain.as_ref().map_or(expires, |drain| expires.min(drain.end))
    }

    /// Why it ends then.
    pub(super) fn end_reason(&self) -> CloseReason {
        let expired = Instant::now() >= self.credential.expires();
        if expired { CloseReason::SessionExpired } else { CloseReason::GoingAway }
    }
}
