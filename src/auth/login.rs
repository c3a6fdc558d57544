//! Logins, refreshes and logouts, passed on to the identity provider. Whether a password is right is
//! for it alone to say; neither passwords nor tokens are kept or logged here.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::StatusCode;
use serde::{Deserialize, Serialize};

use super::{
    provider::{Answer, Provider, ProviderError},
    revocations::MAX_NAME,
    validator::Validator,
};
use crate::{
    metrics::{AuthMetrics, LoginCounters, LoginMethod, LoginOutcome, ProviderOperation},
    objects,
};

/// Asks the identity provider on behalf of users.
pub(crate) struct Logins {
    provider: Arc<Provider>,
    client_id: String,
    attempts: LoginCounters,
}

/// What a login brings: of the provider's answer, what clients are told.
#[derive(Serialize, Deserialize)]
pub(crate) struct Tokens {
    access_token: String,
    /// Seconds.
    expires_in: Option<u64>,
    refresh_token: Option<String>,
    /// Seconds; Keycloak's own addition.
    refresh_expires_in: Option<u64>,
    token_type: String,
}

impl Tokens {
    /// The access token.
    pub(crate) fn access(&self) -> &str {
        &self.access_token
    }
}

/// Whose session a refresh token is of.
pub(crate) struct SessionOf {
    pub(crate) sid: Arc<str>,
    pub(crate) subject: Option<Arc<str>>,
}

/// Why there are no tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LoginError {
    /// The provider does not take what the user gave.
    #[error("the identity provider refuses it")]
    Refused,
    /// The provider did not say. The cause is logged.
    #[error("the identity provider is not available")]
    Unavailable,
}

/// The `error` of a refusal, by RFC 6749.
#[derive(Deserialize)]
struct Refusal {
    error: String,
}

impl Logins {
    pub(crate) fn new(provider: Arc<Provider>, client_id: &str, metrics: &AuthMetrics) -> Self {
        Self { provider, client_id: client_id.to_owned(), attempts: metrics.logins.clone() }
    }

    /// Tokens for a password.
    pub(crate) async fn login(
        &self,
        username: &str,
        password: &str,
        correlation: &str,
    ) -> Result<Tokens, LoginError> {
        let form = [
            ("grant_type", "password"),
            ("client_id", &self.client_id),
            ("username", username),
            ("password", password),
        ];
        let answer = self.ask(ProviderOperation::Login, &form, correlation).await;
        self.granted(answer, LoginMethod::Password)
    }

    /// Fresh tokens for a refresh token.
    pub(crate) async fn refresh(
        &self,
        refresh_token: &str,
        correlation: &str,
    ) -> Result<Tokens, LoginError> {
        let form = [
            ("grant_type", "refresh_token"),
            ("client_id", &*self.client_id),
            ("refresh_token", refresh_token),
        ];
        let answer = self.ask(ProviderOperation::Refresh, &form, correlation).await;
        self.granted(answer, LoginMethod::Refresh)
    }

    /// Ends the session of a refresh token. Returns which it is, where that is proven: by the signature of
    /// the issuer, or by an access token of the same session. Keycloak signs refresh tokens with a secret of
    /// its own, and that a provider answers 204 does not say that it looked.
    pub(crate) async fn logout(
        &self,
        refresh_token: &str,
        access_token: Option<&str>,
        validator: &Validator,
        correlation: &str,
    ) -> Result<Option<SessionOf>, LoginError> {
        let form = [("client_id", &*self.client_id), ("refresh_token", refresh_token)];
        let answer = self.ask(ProviderOperation::Logout, &form, correlation).await?;
        // No other status: some providers answer 200 to anything, with a page for a browser.
        if answer.status != StatusCode::NO_CONTENT {
            return Err(refusal(&answer));
        }
        let Some(session) = self.claimed_session(refresh_token) else { return Ok(None) };
        if let Some(token) = access_token
            && let Some(bearer) = validator.bearer(token).await
            && bearer.session.as_ref() == Some(&session.sid)
        {
            return Ok(Some(session));
        }
        Ok(validator.has_signed(refresh_token).await.then_some(session))
    }

    /// The session that a refresh token names. Nothing is checked.
    fn claimed_session(&self, refresh_token: &str) -> Option<SessionOf> {
        #[derive(Deserialize)]
        struct Claims {
            iss: String,
            sid: Arc<str>,
            sub: Option<Arc<str>>,
        }
        let claims = refresh_token.split('.').nth(1)?;
        let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?;
        let claims: Claims = objects::read_bytes(&claims).ok()?;
        let fits = claims.iss == self.provider.issuer() && claims.sid.len() <= MAX_NAME;
        fits.then_some(SessionOf { sid: claims.sid, subject: claims.sub })
    }

    fn granted(
        &self,
        answer: Result<Answer, LoginError>,
        method: LoginMethod,
    ) -> Result<Tokens, LoginError> {
        let granted = answer.and_then(|answer| match answer.status {
            StatusCode::OK => objects::read_bytes(&answer.body).map_err(|_| {
                // Its text would be a part of the tokens.
                tracing::error!("the identity provider's answer to a login has no tokens");
                LoginError::Unavailable
            }),
            _ => Err(refusal(&answer)),
        });
        let outcome = match &granted {
            Ok(_) => LoginOutcome::Success,
            Err(LoginError::Refused) => LoginOutcome::Failure,
            Err(LoginError::Unavailable) => LoginOutcome::Error,
        };
        self.attempts.inc(outcome, method);
        granted
    }

    async fn ask(
        &self,
        operation: ProviderOperation,
        form: &[(&str, &str)],
        correlation: &str,
    ) -> Result<Answer, LoginError> {
        self.provider.post(operation, form, correlation).await.map_err(|error| {
            // That the breaker opened was said once.
            if !matches!(error, ProviderError::BreakerOpen) {
                tracing::warn!(%error, ?operation, "the identity provider cannot be asked");
            }
            LoginError::Unavailable
        })
    }
}

/// Whose fault a refusal is. Keycloak answers 400 and 401 to wrong passwords, to broken requests and
/// to clients that it does not know: its `error` tells them apart.
fn refusal(answer: &Answer) -> LoginError {
    let refusal: Option<Refusal> = objects::read_bytes(&answer.body).ok();
    let error = refusal.map(|refusal| refusal.error).unwrap_or_default();
    let of_the_user = matches!(&*error, "invalid_grant" | "invalid_request")
        && matches!(answer.status, StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED);
    if of_the_user {
        return LoginError::Refused;
    }
    // One of the standard's, or nothing: whatever else stands there is not ours to log.
    const OURS: [&str; 4] =
        ["invalid_client", "unauthorized_client", "unsupported_grant_type", "invalid_scope"];
    let error = OURS.into_iter().find(|known| *known == error);
    tracing::error!(
        status = answer.status.as_u16(),
        error,
        "the identity provider refuses this server, not the user: look at the client's settings"
    );
    LoginError::Unavailable
}
