//! What `switchboard doctor` asks of this module: what the provider says of itself, which keys are
//! trusted, and what the [`Validator`] says of a token, with the keys as they were fetched once.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, Validation, dangerous::insecure_decode};
use reqwest::{Response, StatusCode, header};
use serde_json::Value;

use super::{
    AuthError, DevIssuer, Identity, Provider, ProviderError, Validator,
    claims::{ClaimReader, Claims},
    dev,
    jwks::{Key, KeySet},
    keys::Keys,
    validator::ALGORITHMS,
};
use crate::{
    config::AuthConfig,
    metrics::{Dependency, Metrics},
};

/// What a provider says of itself.
pub(crate) struct Discovery {
    /// Where it was asked.
    pub(crate) url: String,
    /// Its `issuer`.
    pub(crate) issuer: String,
    /// Seconds that its clock is ahead of this machine's; none where it does not tell the time.
    pub(crate) ahead: Option<i64>,
}

impl Provider {
    /// The provider of a configuration, with metrics that nobody sees.
    pub(crate) fn unobserved(config: &AuthConfig) -> Option<reqwest::Result<Self>> {
        let provider = config.provider.as_ref()?;
        let metrics = Metrics::new(&[], "");
        let breaker = metrics.breakers.of(Dependency::Keycloak);
        Some(Self::new(provider, config.timeout, breaker, metrics.auth.provider_duration, None))
    }

    /// Reads its discovery document, whatever issuer it is of.
    pub(crate) async fn discover(&self) -> Result<Discovery, ProviderError> {
        let url = self.discovery_url();
        let asked = SystemTime::now();
        let answer =
            self.http().get(&url).header(header::ACCEPT, "application/json").send().await?;
        let ahead = ahead(&answer, asked);
        let status = answer.status();
        if status != StatusCode::OK {
            return Err(ProviderError::Status { url, status });
        }
        let text = answer.bytes().await?;
        let document = serde_json::from_slice::<Value>(&text).unwrap_or_default();
        match document["issuer"].as_str() {
            Some(issuer) => Ok(Discovery { issuer: issuer.to_owned(), url, ahead }),
            None => Err(ProviderError::Malformed(format!("{url} is no discovery document"))),
        }
    }
}

/// The seconds from the middle of the call, which is when the answer was made as far as one can tell.
fn ahead(answer: &Response, asked: SystemTime) -> Option<i64> {
    let seconds = |name| answer.headers().get(name)?.to_str().ok();
    let date = jiff::fmt::rfc2822::parse(seconds(header::DATE)?).ok()?.timestamp().as_second();
    // A cache on the way gives the answer's age along with its old date.
    let age = seconds(header::AGE).and_then(|age| age.parse::<i64>().ok()).unwrap_or(0);
    let now = asked + asked.elapsed().unwrap_or_default() / 2;
    let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    Some(date.saturating_add(age).saturating_sub(i64::try_from(now).ok()?))
}

/// Whether tokens may be signed by an algorithm of this name.
pub(crate) fn is_allowed(algorithm: &str) -> bool {
    algorithm.parse::<Algorithm>().is_ok_and(|algorithm| ALGORITHMS.contains(&algorithm))
}

/// Whether the signature of a token is that of a trusted key, whatever its claims say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signature {
    /// It is.
    Fits,
    /// It is not, or the content was changed.
    Differs,
    /// It is that of another development key.
    OtherDevKey,
    /// The key is for tokens of other algorithms.
    OtherAlgorithm,
    /// No such key is trusted.
    UnknownKey,
    /// There are no keys to check it with.
    Unchecked,
}

/// An issuer and its keys, as far as they are known.
pub(crate) struct Trust {
    issuer: String,
    keys: Option<KeySet>,
}

impl Trust {
    /// The development issuer; none where its key is not made yet.
    pub(crate) fn development(issuer: Option<&DevIssuer>) -> io::Result<Self> {
        let key = issuer.map(DevIssuer::public_key).transpose().map_err(io::Error::other)?;
        let keys = key.and_then(Key::new).map(KeySet::of);
        Ok(Self { issuer: dev::ISSUER.to_owned(), keys })
    }

    /// A provider whose keys nobody has.
    pub(crate) fn without_keys(provider: &Provider) -> Self {
        Self { issuer: provider.issuer().to_owned(), keys: None }
    }

    /// A provider with its keys, asked for once.
    pub(crate) async fn fetched(provider: &Provider) -> Result<Self, ProviderError> {
        let text = provider.keys().await?;
        let keys = KeySet::parse(&text, &KeySet::default()).map_err(ProviderError::Malformed)?;
        if keys.len() == 0 {
            return Err(ProviderError::NoKeys);
        }
        Ok(Self { keys: Some(keys), ..Self::without_keys(provider) })
    }

    /// The `iss` that tokens must bear.
    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The keys by name, with their algorithms.
    pub(crate) fn keys(&self) -> Vec<String> {
        let name = |key: &Key| {
            let algorithms: Vec<_> = key.algorithms().iter().map(|it| format!("{it:?}")).collect();
            format!("{} ({})", key.kid(), algorithms.join(", "))
        };
        let mut keys: Vec<_> = self.keys.iter().flat_map(KeySet::iter).map(name).collect();
        keys.sort();
        keys
    }

    /// What a server with these keys says of a token.
    pub(crate) async fn judge(
        &self,
        token: &str,
        config: &AuthConfig,
    ) -> Result<Identity, AuthError> {
        let keys = Keys::fixed(self.keys.clone());
        let metrics = Metrics::new(&[], "").auth;
        let validator = Validator::new(keys, self.issuer.clone(), config, metrics);
        validator.validate(token, |_| None).await.map(Arc::unwrap_or_clone)
    }

    /// Checks the signature alone, to explain a refusal.
    pub(crate) fn signature(&self, token: &str) -> Signature {
        let Some(keys) = &self.keys else { return Signature::Unchecked };
        let Ok(header) = jsonwebtoken::decode_header(token) else { return Signature::Differs };
        let key = keys.get(header.kid.as_deref().unwrap_or_default());
        let Some(key) = key else { return Signature::UnknownKey };
        let Some(decoding) = key.decoding(header.alg) else { return Signature::OtherAlgorithm };
        let mut rules = Validation::new(header.alg);
        rules.set_required_spec_claims::<&str>(&[]);
        rules.validate_exp = false;
        rules.validate_aud = false;
        match jsonwebtoken::decode::<Value>(token, decoding, &rules) {
            Ok(_) => Signature::Fits,
            Err(_) if self.issuer == dev::ISSUER && dev::is_of_other_key(token, key.public()) => {
                Signature::OtherDevKey
            }
            Err(_) => Signature::Differs,
        }
    }

    /// The bearer that the claims tell of, if they are such as [`Self::judge`] can read. The signature
    /// and the times are not looked at: not to be trusted.
    pub(crate) fn unverified(token: &str, config: &AuthConfig) -> Option<Identity> {
        let token = insecure_decode::<Claims>(token).ok()?;
        ClaimReader::new(config).identity(token.header.typ.as_deref(), token.claims).ok()
    }
}
