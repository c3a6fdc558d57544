//! Who a client is: tokens in, [`Identity`] out. WebSocket and REST go through the same [`Validator`]:
//! `cache` → `keys`, which come from the `dev` issuer or from a [`Provider`] → signature → `claims` →
//! `revocations`. [`Logins`] asks the provider for tokens.

mod cache;
mod claims;
mod clock;
mod dev;
mod jwks;
mod keys;
mod login;
mod logout_token;
mod memory;
mod provider;
mod revocations;
mod trust;
mod validator;

use std::{net::IpAddr, sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

pub(crate) use claims::{NOT_OF_ACCESS_TOKENS, is_of_access_tokens, token_type};
pub(crate) use clock::since_1970;
pub use dev::DevIssuer;
pub(crate) use keys::RefreshError;
pub(crate) use login::{LoginError, Logins, SessionOf, Tokens};
pub(crate) use logout_token::LogoutToken;
pub(crate) use provider::{Provider, ProviderError};
pub(crate) use revocations::{Logout, MAX_NAME};
pub(crate) use trust::{Discovery, Signature, Trust, is_allowed};
pub(crate) use validator::{AuthError, Validator};

use crate::{objects, traces::SpanContext};

/// A user, as a valid token describes it.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The token's `sub`: who the user is, to limits, pushes and administrators.
    pub subject: Arc<str>,
    /// The token's `iss`: a refresh must come from the same.
    pub issuer: Arc<str>,
    /// The token's `sid`: the login session that a logout ends, where the issuer names one.
    pub session: Option<Arc<str>>,
    /// The user's name, for people alone: some providers let users choose it.
    pub username: Arc<str>,
    /// The roles of this client.
    pub roles: Arc<[Box<str>]>,
    /// The token's `iat`, in seconds since 1970; 0 where it has none.
    pub issued_at: u64,
    /// The token's `exp`, in seconds since 1970.
    pub expires_at: u64,
}

impl Identity {
    /// Whether the user has every one of `roles`.
    pub fn has(&self, roles: &[impl AsRef<str>]) -> bool {
        roles.iter().all(|role| self.roles.iter().any(|known| **known == *role.as_ref()))
    }

    /// Time until the token expires, by the wall clock; zero if it has.
    pub fn expires_in(&self) -> Duration {
        Duration::from_secs(self.expires_at).saturating_sub(since_1970())
    }
}

/// Where a request or a connection comes from.
#[derive(Debug, Clone)]
pub struct Remote {
    /// The client's address, as far as trusted proxies tell it.
    pub address: IpAddr,
    /// What the client says it is.
    pub user_agent: Option<Box<str>>,
    /// The correlation id, which is the `request_id` of log lines and audit rows.
    pub correlation: Arc<str>,
    /// The span of the request, where there are traces. Boxed: every connection has one of these.
    pub(crate) trace: Option<Box<SpanContext>>,
}

/// Whether a token says of itself that it has expired. Nothing in it is checked: a token that lies is
/// refused all the same, for another reason.
pub(crate) fn claims_to_be_expired(token: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Expiry {
        exp: f64,
    }
    let claims = token.split('.').nth(1).and_then(|part| BASE64_URL_SAFE_NO_PAD.decode(part).ok());
    let expiry = claims.and_then(|claims| objects::read_bytes::<Expiry>(&claims).ok());
    expiry.is_some_and(|expiry| expiry.exp < since_1970().as_secs_f64())
}

/// The token of an `Authorization` value, whose scheme is `Bearer` in any case.
pub(crate) fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}
