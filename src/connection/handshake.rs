//! From an upgraded socket to an [`Identity`]: the first message, or a token that came with the upgrade.
//!
//! Runs in the task of the upgrade, before anything is registered. A client that fails is told why in
//! an error frame and then closed.

use std::{net::IpAddr, sync::Arc};

use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{self, Message, error::CapacityError};

use super::{Shared, frames::Breach, socket::Socket};
use crate::{
    auth::{self, AuthError, Identity, Validator},
    limits::Limits,
    metrics::{AuthOutcome, ConnectionOutcome, Metrics},
    protocol::{self, ClientControl, CloseReason, Format, Incoming, ServerControl},
};

/// A refused client: what it is closed with, and the words of the error frame.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) reason: CloseReason,
    pub(crate) msg: String,
}

impl Refusal {
    pub(super) fn unauthorized(msg: &str) -> Self {
        Self { reason: CloseReason::Unauthorized, msg: msg.to_owned() }
    }

    /// Whether a token was looked at and is none that does.
    pub(crate) fn is_failure(&self) -> bool {
        matches!(self.reason, CloseReason::Unauthorized | CloseReason::TokenExpired)
    }

    /// The error frame ahead of the close frame, for the reasons that have one.
    pub(crate) fn frame(&self) -> Option<Message> {
        let code = self.reason.error_code()?;
        Some(ServerControl::Error { code, msg: &self.msg, retry_after_ms: None }.frame())
    }
}

impl From<AuthError> for Refusal {
    fn from(error: AuthError) -> Self {
        let reason = match error {
            AuthError::Expired => CloseReason::TokenExpired,
            AuthError::Invalid(_) => CloseReason::Unauthorized,
            AuthError::Unavailable => CloseReason::Unavailable,
            AuthError::TooMany(_) => CloseReason::TooManyFailures,
        };
        Self { reason, msg: error.to_string() }
    }
}

impl From<CloseReason> for Refusal {
    fn from(reason: CloseReason) -> Self {
        Self { reason, msg: reason.text().to_owned() }
    }
}

/// Waits for the auth frame and checks its token.
pub(crate) async fn first_message(
    socket: &mut Socket,
    format: Format,
    shared: &Shared,
    address: IpAddr,
) -> Result<Arc<Identity>, Refusal> {
    let result = match timeout(shared.config.auth_timeout, auth_frame(socket, format)).await {
        Ok(Ok(token)) => check(&shared.validator, &shared.limits, &token, address).await,
        Ok(Err(refusal)) => Err(refusal),
        Err(_) => Err(CloseReason::AuthTimeout.into()),
    };
    count(&shared.metrics, &result);
    result
}

/// Checks a token that came with the upgrade, before it is answered.
pub(crate) async fn presented(
    shared: &Shared,
    authorization: &str,
    address: IpAddr,
) -> Result<Arc<Identity>, Refusal> {
    let result = check(&shared.validator, &shared.limits, authorization, address).await;
    count(&shared.metrics, &result);
    result
}

/// Checks a token with its scheme, unless its address has failed too often.
pub(super) async fn check(
    validator: &Validator,
    limits: &Limits,
    authorization: &str,
    address: IpAddr,
) -> Result<Arc<Identity>, Refusal> {
    let Some(token) = auth::bearer(authorization) else {
        return Err(match limits.failures.refusal(address) {
            Some(wait) => AuthError::TooMany(wait).into(),
            None => Refusal::unauthorized("the token must have the form `Bearer <jwt>`"),
        });
    };
    let checked = validator.validate(token, |token| limits.refusal(address, token)).await;
    checked.map_err(Refusal::from)
}

/// Takes a refusal from the budget of the client's address.
pub(crate) fn charge(limits: &Limits, refusal: &Refusal, address: IpAddr) {
    match refusal.reason {
        CloseReason::Unauthorized => limits.failures.count(address),
        // A token that was good once is no guess.
        CloseReason::TokenExpired => drop(limits.refusals.count(address)),
        CloseReason::AuthTimeout => limits.count_silence(address),
        CloseReason::TooBig
        | CloseReason::TooManyStrikes
        | CloseReason::ProtocolError
        | CloseReason::NotUtf8
        | CloseReason::WrongKind => drop(limits.breaches.count(address)),
        _ => {}
    }
}

/// Counts what became of a token, whether it was to open a connection or to refresh one.
pub(super) fn count_attempt(metrics: &Metrics, result: &Result<Arc<Identity>, Refusal>) {
    metrics.auth.attempts.inc(match result.as_ref().map_err(|refusal| refusal.reason) {
        Ok(_) => AuthOutcome::Success,
        Err(CloseReason::TokenExpired) => AuthOutcome::Expired,
        Err(CloseReason::Unauthorized) => AuthOutcome::Failed,
        // Broken frames and silence are no attempt; a token that nobody could check did not fail.
        Err(_) => return,
    });
}

fn count(metrics: &Metrics, result: &Result<Arc<Identity>, Refusal>) {
    count_attempt(metrics, result);
    let Err(refusal) = result else { return };
    metrics.ws.connections.inc(match refusal.reason {
        // The client left of its own accord.
        CloseReason::Normal | CloseReason::Abnormal => return,
        CloseReason::AuthTimeout => ConnectionOutcome::RejectedAuthTimeout,
        CloseReason::TooManyFailures => ConnectionOutcome::RejectedLimit,
        _ => ConnectionOutcome::RejectedAuth,
    });
}

/// The token of the first frame that is neither a ping nor a pong.
async fn auth_frame(socket: &mut Socket, format: Format) -> Result<String, Refusal> {
    socket.get_mut().bound_first_message();
    loop {
        let frame = match socket.next().await {
            Some(Ok(Message::Pong(_))) => continue,
            // A client that does not read its pongs gets no further.
            Some(Ok(Message::Ping(_))) => match socket.flush().await {
                Ok(()) => continue,
                Err(error) => return Err(broken(&error).into()),
            },
            Some(Ok(Message::Close(_))) | None => return Err(CloseReason::Normal.into()),
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Err(broken(&error).into()),
        };
        let Message::Text(text) = frame else {
            return Err(Refusal::unauthorized("the first frame must be an auth frame"));
        };
        return match protocol::decode_text(format, &text) {
            Incoming::Control(ClientControl::Auth { token: Some(token) }) => Ok(token),
            Incoming::Control(ClientControl::Auth { token: None }) => {
                Err(Refusal::unauthorized("an auth frame must have a string `token`"))
            }
            _ => Err(Refusal::unauthorized("the first frame must be an auth frame")),
        };
    }
}

/// The reason to close with after an error of the WebSocket layer.
pub(super) fn broken(error: &tungstenite::Error) -> CloseReason {
    match error {
        tungstenite::Error::Capacity(CapacityError::MessageTooLong { .. }) => CloseReason::TooBig,
        tungstenite::Error::Utf8(_) => CloseReason::NotUtf8,
        tungstenite::Error::Protocol(
            tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
        ) => CloseReason::Abnormal,
        tungstenite::Error::Protocol(_) => CloseReason::ProtocolError,
        tungstenite::Error::Io(error) => {
            let breach = error.get_ref().and_then(|cause| cause.downcast_ref());
            breach.map_or(CloseReason::Abnormal, |Breach(reason)| *reason)
        }
        _ => CloseReason::Abnormal,
    }
}
