//! Decides whether a token lets its bearer in. Where the keys come from is the only thing that differs
//! between the development issuer and an identity provider.

use std::{sync::Arc, time::Duration};

use jsonwebtoken::{Algorithm, Header, Validation, errors::ErrorKind};
use serde::de::{DeserializeOwned, IgnoredAny};
use uuid::Uuid;

use super::{
    DevIssuer, Identity, Provider,
    cache::{Entry, TokenCache, fingerprint},
    claims::{ClaimReader, Claims},
    clock::since_1970,
    dev,
    jwks::{Key, KeySet},
    keys::{Keys, RefreshError},
    logout_token::{LogoutClaims, LogoutReader, LogoutToken},
    revocations::{Logout, Revocations},
};
use crate::{
    config::AuthConfig,
    metrics::{AuthMetrics, TokenOutcome},
};

/// Signatures by a private key only: `none`, and HMAC with a public key as its secret, never.
pub(super) const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];
/// Bytes; a larger token is not looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// Why a token was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthError {
    /// It is not valid. The text never holds a part of it.
    #[error("{0}")]
    Invalid(&'static str),
    /// It was valid.
    #[error("the token is expired")]
    Expired,
    /// Nobody can say: there are no keys, and the identity provider does not give any.
    #[error("the identity provider is not available")]
    Unavailable,
    /// It was not looked at: its sender may try again after this time.
    #[error("too many failed authentications from this address")]
    TooMany(Duration),
}

/// Checks tokens of one issuer for one client.
pub(crate) struct Validator {
    keys: Keys,
    cache: Option<TokenCache>,
    claims: ClaimReader,
    logouts: LogoutReader,
    revocations: Revocations,
    issuer: Arc<str>,
    leeway: u64,
    metrics: AuthMetrics,
}

impl Validator {
    /// Trusts the tokens of a development issuer.
    pub(crate) fn trusting(
        issuer: &DevIssuer,
        config: &AuthConfig,
        metrics: AuthMetrics,
    ) -> jsonwebtoken::errors::Result<Self> {
        let key = Key::new(issuer.public_key()?).expect("the development key signs tokens");
        let keys = Keys::fixed(Some(KeySet::of(key)));
        Ok(Self::new(keys, dev::ISSUER.to_owned(), config, metrics))
    }

    /// Trusts the tokens of an identity provider, whose keys are fetched from now on. Needs a runtime.
    pub(crate) fn of(provider: &Arc<Provider>, config: &AuthConfig, metrics: AuthMetrics) -> Self {
        let fetched = metrics.keys_fetched.clone();
        let keys = Keys::of(Arc::clone(provider), config, fetched);
        Self::new(keys, provider.issuer().to_owned(), config, metrics)
    }

    pub(super) fn new(
        keys: Keys,
        issuer: String,
        config: &AuthConfig,
        metrics: AuthMetrics,
    ) -> Self {
        let of_development = (issuer == dev::ISSUER).then(|| config.for_development());
        let config = of_development.as_ref().unwrap_or(config);
        Self {
            keys,
            cache: TokenCache::new(config.cache_size),
            claims: ClaimReader::new(config),
            logouts: LogoutReader::new(config),
            revocations: Revocations::new(config.revocation_lifetime),
            issuer: issuer.into(),
            leeway: config.leeway.as_secs(),
            metrics,
        }
    }

    /// Tokens whose signatures were found good and are remembered.
    pub(crate) fn tokens_known(&self) -> usize {
        self.cache.as_ref().map_or(0, TokenCache::len)
    }

    /// Reads a token (without its scheme). Waits only where its key is not known. A token that is not
    /// remembered is examined only if `refusal`, asked just before, names no time to wait.
    pub(crate) async fn validate(
        &self,
        token: &str,
        refusal: impl FnOnce(&str) -> Option<Duration>,
    ) -> Result<Arc<Identity>, AuthError> {
        // After the cache, which knows nothing of it.
        let result = match self.remembered(token, refusal).await {
            Ok(identity) if self.is_revoked(&identity) => {
                Err(AuthError::Invalid("the session was logged out"))
            }
            result => result,
        };
        self.metrics.validations.inc(match &result {
            Ok(_) => TokenOutcome::Valid,
            Err(AuthError::Expired) => TokenOutcome::Expired,
            Err(AuthError::Invalid(_)) => TokenOutcome::Invalid,
            // Nothing was found out about the token.
            Err(AuthError::Unavailable | AuthError::TooMany(_)) => return result,
        });
        result
    }

    /// The bearer of an access token that came along with something else: nothing is counted.
    pub(crate) async fn bearer(&self, token: &str) -> Option<Arc<Identity>> {
        Some(self.check(token).await.ok()?.identity)
    }

    /// Whether a key of the issuer signed a token of whatever kind.
    pub(super) async fn has_signed(&self, token: &str) -> bool {
        let Ok((header, key)) = self.key_of(token).await else { return false };
        self.signed::<IgnoredAny>(token, &header, &key, &["iss"]).is_ok()
    }

    /// Whether tokens can be checked: there are keys, and they are not too old.
    pub(crate) fn has_keys(&self) -> bool {
        self.keys.are_usable()
    }

    /// The time since the keys were fetched; none where they never are.
    pub(crate) fn keys_age(&self) -> Option<Duration> {
        self.keys.age()
    }

    /// Fetches the keys now; returns their names.
    pub(crate) async fn refresh_keys(&self) -> Result<Vec<String>, RefreshError> {
        self.keys.refresh().await
    }

    /// The same, without waiting for it.
    pub(crate) fn ask_for_keys(&self) {
        self.keys.ask_now();
    }

    /// Reads a logout token, each once.
    pub(crate) async fn logout(&self, token: &str) -> Result<LogoutToken, AuthError> {
        if token.len() > MAX_TOKEN {
            return Err(AuthError::Invalid("the token is too large"));
        }
        let (header, key) = self.key_of(token).await?;
        let claims: LogoutClaims = self.signed(token, &header, &key, &["iss"])?;
        self.logouts.logout(header.typ.as_deref(), claims)
    }

    /// Takes a logout token once more: its sender was told to try again.
    pub(crate) fn take_again(&self, token: &LogoutToken) {
        self.logouts.take_again(token);
    }

    /// Refuses the tokens of what a logout ends from now on.
    pub(crate) fn revoke(&self, logout: &Logout) {
        self.revocations.add(logout, self.revocations.lifetime());
    }

    /// The same for a logout that another node heard of, whose time is partly over. False: this node
    /// knew of it.
    pub(crate) fn learn(&self, logout: &Logout, left: Duration) -> bool {
        let new = !left.is_zero() && !self.revocations.know(logout);
        // One that is known may be kept for longer elsewhere.
        self.revocations.add(logout, left);
        new
    }

    /// The logouts in force, each with its time.
    pub(crate) fn revoked(&self) -> Vec<(Logout, Duration)> {
        self.revocations.all()
    }

    /// The time for which a logout is in force.
    pub(crate) fn revocation_lifetime(&self) -> Duration {
        self.revocations.lifetime()
    }

    /// Whether the bearer of a token that was valid has been logged out since.
    pub(crate) fn is_revoked(&self, identity: &Identity) -> bool {
        self.revocations.cover(identity)
    }

    /// Whether an administrator has ended a connection of a user that was opened at a moment. Where only a
    /// name or a `sub` is known, `is_meant` says whether it is this user's alone.
    pub(crate) fn has_ended(
        &self,
        connection: Uuid,
        user: &Identity,
        since: u64,
        is_meant: impl Fn(&str) -> bool,
    ) -> bool {
        self.revocations.have_ended(&connection.to_string(), user, since, is_meant)
    }

    async fn remembered(
        &self,
        token: &str,
        refusal: impl FnOnce(&str) -> Option<Duration>,
    ) -> Result<Arc<Identity>, AuthError> {
        let may_examine = || refusal(token).map_or(Ok(()), |wait| Err(AuthError::TooMany(wait)));
        // What is too large is refused by the check, and not worth a fingerprint.
        let cache = self.cache.as_ref().filter(|_| token.len() <= MAX_TOKEN);
        let Some(cache) = cache else {
            may_examine()?;
            return Ok(self.check(token).await?.identity);
        };
        let name = fingerprint(token);
        if let Some(identity) = cache.get(&name, |entry| self.still_good(entry)) {
            self.metrics.cache_hits.inc();
            return Ok(identity);
        }
        may_examine()?;
        self.metrics.cache_misses.inc();
        let entry = self.check(token).await?;
        let identity = Arc::clone(&entry.identity);
        if self.still_good(&entry) {
            cache.insert(name, entry);
        }
        Ok(identity)
    }

    /// Never past `exp`, whatever the leeway, and only while its very key is in force.
    fn still_good(&self, entry: &Entry) -> bool {
        entry.identity.expires_at > since_1970().as_secs()
            && self.keys.known(entry.key.kid()).is_some_and(|key| Arc::ptr_eq(&key, &entry.key))
    }

    async fn check(&self, token: &str) -> Result<Entry, AuthError> {
        if token.len() > MAX_TOKEN {
            return Err(AuthError::Invalid("the token is too large"));
        }
        let (header, key) = self.key_of(token).await?;
        let claims: Claims = self.signed(token, &header, &key, &["exp", "iss", "sub"])?;
        let mut identity = self.claims.identity(header.typ.as_deref(), claims)?;
        // The same text, once for all tokens that are remembered.
        identity.issuer = Arc::clone(&self.issuer);
        self.revocations.expect(&identity);
        Ok(Entry { identity: Arc::new(identity), key })
    }

    async fn key_of(&self, token: &str) -> Result<(Header, Arc<Key>), AuthError> {
        let header = jsonwebtoken::decode_header(token)
            .map_err(|_| AuthError::Invalid("this is no signed JWT"))?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(AuthError::Invalid("the token's algorithm is not allowed"));
        }
        // RFC 7515: who does not know an extension that is critical must refuse the token.
        if header.crit.is_some() {
            return Err(AuthError::Invalid("the token has critical extensions"));
        }
        let kid = header.kid.as_deref().ok_or(AuthError::Invalid("the token names no key"))?;
        let key = self.keys.find(kid).await?;
        Ok((header, key))
    }

    fn signed<T: DeserializeOwned>(
        &self,
        token: &str,
        header: &Header,
        key: &Key,
        required: &[&str],
    ) -> Result<T, AuthError> {
        let decoding = key
            .decoding(header.alg)
            .ok_or(AuthError::Invalid("the token's algorithm is not its key's"))?;
        let mut rules = Validation::new(header.alg);
        rules.set_required_spec_claims(required);
        rules.set_issuer(&[&self.issuer]);
        rules.leeway = self.leeway;
        rules.validate_nbf = true;
        rules.validate_aud = false; // its readers do: in access tokens the client counts too
        let decoded = jsonwebtoken::decode(token, decoding, &rules);
        Ok(decoded.map_err(|error| self.refused(error, token, key))?.claims)
    }

    /// Tells the commonest mistake with development tokens from a token that was changed.
    fn refused(&self, error: jsonwebtoken::errors::Error, token: &str, key: &Key) -> AuthError {
        let by_other_key = matches!(error.kind(), ErrorKind::InvalidSignature)
            && *self.issuer == *dev::ISSUER
            && dev::is_of_other_key(token, key.public());
        match by_other_key {
            true => AuthError::Invalid(
                "the token was signed with another development key than this server's \
                 (DEV_KEY_FILE)",
            ),
            false => refused(error),
        }
    }
}

fn refused(error: jsonwebtoken::errors::Error) -> AuthError {
    AuthError::Invalid(match error.kind() {
        ErrorKind::ExpiredSignature => return AuthError::Expired,
        ErrorKind::InvalidSignature => "the signature does not fit",
        ErrorKind::InvalidIssuer => "the token is from another issuer",
        ErrorKind::ImmatureSignature => "the token is not valid yet",
        ErrorKind::MissingRequiredClaim(_) => "the token lacks one of exp, iss, sub",
        _ => "the token's claims are malformed",
    })
}
