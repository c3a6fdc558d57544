//! A fresh token for a running connection. Where it does not do, the old one stays in force.

use std::{sync::Arc, time::Instant};

use super::{Flow, Session, credential::Checked};
use crate::{
    audit::Event,
    connection::handshake::{self, Refusal},
    metrics::AuditOutcome,
    protocol::{CloseReason, ServerControl},
};

impl Session {
    /// Checks the token of a refresh. What it waits for holds up nothing: until its result is there,
    /// requests run with the old token.
    pub(super) fn refresh(&mut self, token: Option<String>, now: Instant) -> Flow {
        let Some(token) = token else {
            let refusal = Refusal::unauthorized("a refresh frame must have a string `token`");
            return self.refreshed(Err(refusal), now);
        };
        let shared = Arc::clone(&self.shared);
        let address = self.outbox.remote.address;
        let check = async move {
            let checked =
                handshake::check(&shared.validator, &shared.limits, &token, address).await;
            if let Err(refusal) = &checked {
                handshake::charge(&shared.limits, refusal, address);
            }
            checked
        };
        match self.credential.check(check) {
            Some(checked) => self.refreshed(checked, now),
            None => Flow::Continue(()),
        }
    }

    /// Puts a fresh token in force, or says why the old one stays.
    pub(super) fn refreshed(&mut self, checked: Checked, now: Instant) -> Flow {
        let foreign = matches!(&checked, Ok(identity) if !self.credential.is_of(identity));
        let checked = match checked {
            Ok(_) if foreign => {
                Err(Refusal::unauthorized("the token is of another user or issuer"))
            }
            // Let in by the leeway: it would end a connection whose old token may still be good.
            Ok(identity) if identity.expires_in().is_zero() => {
                Err(CloseReason::TokenExpired.into())
            }
            checked => checked,
        };
        handshake::count_attempt(&self.shared.metrics, &checked);
        let identity = match checked {
            Ok(identity) => identity,
            Err(refusal) => return self.refresh_refused(&refusal, foreign, now),
        };
        let (gained, lost) = self.shared.router.compare(self.credential.identity(), &identity);
        let expires_in = identity.expires_in().as_secs();
        self.outbox.set_identity(Arc::clone(&identity));
        // A logout that came while the token was checked did not find it here.
        if self.shared.validator.is_revoked(&identity) {
            return Flow::Break(CloseReason::SessionRevoked);
        }
        self.shared.audit.refreshed(&identity, &self.outbox.remote, self.outbox.id);
        self.credential.replace(identity);
        self.rescheduled = true;
        let answer = ServerControl::RefreshOk { expires_in, gained: &gained, lost: &lost };
        self.control.push_back(answer.frame());
        Flow::Continue(())
    }

    fn refresh_refused(&mut self, refusal: &Refusal, foreign: bool, now: Instant) -> Flow {
        let code = refusal.reason.error_code().unwrap_or("internal_error");
        tracing::info!(
            connection_id = %self.outbox.id, request_id = &*self.outbox.remote.correlation,
            user_id = &*self.credential.identity().subject, code, cause = refusal.msg,
            "refresh refused"
        );
        self.error(code, &refusal.msg);
        if refusal.is_failure() {
            let (id, remote) = (self.outbox.id.to_string(), &self.outbox.remote);
            self.shared.audit.record(Event {
                user: Some(Arc::clone(&self.credential.caller().identity)),
                error: Some(refusal.msg.clone().into()),
                ..Event::of_connection("REFRESH", id, AuditOutcome::Error, remote, refusal.reason)
            });
        }
        match refusal.reason {
            reason if foreign => Flow::Break(reason),
            // Guessing tokens must not be free.
            CloseReason::TooManyFailures => self.strike(now),
            _ if refusal.is_failure() => self.strike(now),
            _ => Flow::Continue(()),
        }
    }
}
