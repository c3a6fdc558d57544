//! What a logout token says (OpenID Connect Back-Channel Logout 1.0), once its signature is known to be
//! good. Other tokens of the same keys must not pass for one, nor one for another token.

use std::{
    slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    AuthError,
    claims::{Audience, seconds},
    clock::{Moment, since_1970},
    memory::Memory,
    revocations::{Logout, MAX_NAME},
};
use crate::config::AuthConfig;

const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";
/// Age of a token at most: a provider sends it at once.
const MAX_AGE: Duration = Duration::from_secs(300);
/// Names of tokens remembered at most. What is forgotten early could be replayed, to no effect: a
/// logout ends nothing that began after it.
const BOUND: usize = 100_000;

/// Members of the wrong type refuse the token. `iss`, `exp` and `nbf` are checked with the signature.
#[derive(Deserialize)]
pub(super) struct LogoutClaims {
    /// Read for its type alone: in a list, one that fits would do for the check.
    #[serde(rename = "iss")]
    _iss: String,
    #[serde(default)]
    aud: Audience,
    #[serde(deserialize_with = "seconds")]
    iat: u64,
    jti: Arc<str>,
    typ: Option<String>,
    sub: Option<Arc<str>>,
    sid: Option<Arc<str>>,
    events: Map<String, Value>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// A logout token that is good.
pub(crate) struct LogoutToken {
    /// What it ends.
    pub(crate) logout: Logout,
    /// The user's `sub`, where it says so.
    pub(crate) subject: Option<Arc<str>>,
    jti: Arc<str>,
}

/// Reads logout tokens of the server's clients, each once.
pub(super) struct LogoutReader {
    /// The clients whose sessions are ours.
    clients: Vec<String>,
    leeway: Duration,
    /// From the earliest moment at which a token can come to the latest.
    lifetime: Duration,
    seen: Mutex<Memory<()>>,
}

impl LogoutReader {
    pub(super) fn new(config: &AuthConfig) -> Self {
        Self {
            clients: [slice::from_ref(&config.client_id), &config.backchannel_clients].concat(),
            leeway: config.leeway,
            lifetime: MAX_AGE + 2 * config.leeway + Duration::from_secs(1),
            seen: Mutex::new(Memory::new(BOUND)),
        }
    }

    /// What a token whose header has this `typ` says.
    pub(super) fn logout(
        &self,
        header_typ: Option<&str>,
        claims: LogoutClaims,
    ) -> Result<LogoutToken, AuthError> {
        let is_logout = header_typ.is_none_or(|typ| {
            let known = ["jwt", "logout+jwt", "application/jwt", "application/logout+jwt"];
            known.contains(&&*typ.to_ascii_lowercase())
        })
            // Keycloak says in a claim what kind each of its tokens is.
            && claims.typ.as_ref().is_none_or(|typ| typ.eq_ignore_ascii_case("logout"))
            && claims.events.get(EVENT).is_some_and(Value::is_object)
            && !claims.more.contains_key("nonce");
        if !is_logout {
            return Err(AuthError::Invalid("this is not a logout token"));
        }
        if !self.clients.iter().any(|client| claims.aud.contains(client)) {
            return Err(AuthError::Invalid("the token is for another client"));
        }
        let now = since_1970();
        let issued = Duration::from_secs(claims.iat);
        if issued > now + self.leeway {
            return Err(AuthError::Invalid("the token is not valid yet"));
        }
        if now > issued.saturating_add(MAX_AGE + self.leeway) {
            return Err(AuthError::Expired);
        }
        // With both, the session alone: the user's other sessions go on.
        let subject = claims.sub.clone();
        let logout = match (claims.sid, claims.sub) {
            (Some(sid), sub) if !sid.is_empty() && sub.as_deref() != Some("") => {
                Logout::Session(sid)
            }
            (None, Some(subject)) if !subject.is_empty() => {
                Logout::Subject { subject, at: claims.iat }
            }
            _ => return Err(AuthError::Invalid("the token names neither a session nor a user")),
        };
        if logout.name().len() > MAX_NAME {
            return Err(AuthError::Invalid("the token's session or user has too long a name"));
        }
        let jti = claims.jti;
        if jti.is_empty() || jti.len() > MAX_NAME || !self.is_new(Arc::clone(&jti)) {
            return Err(AuthError::Invalid("the token was used before, or has no name"));
        }
        Ok(LogoutToken { logout, subject, jti })
    }

    /// Takes a token once more: its sender was told to try again.
    pub(super) fn take_again(&self, token: &LogoutToken) {
        self.seen().remove(&token.jti);
    }

    fn seen(&self) -> MutexGuard<'_, Memory<()>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last of the checks: a token that was refused has not been used.
    fn is_new(&self, jti: Arc<str>) -> bool {
        let now = Moment::now();
        let mut seen = self.seen();
        let new = seen.get(&jti, now).is_none();
        if new {
            seen.insert(jti, (), self.lifetime, now);
        }
        new
    }
}
