//! Decides whether a token lets its bearer in. Where the keys come from is the only thing that differs
//! between the development issuer and an identity provider.

use std::{collections::HashMap, sync::Arc};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, errors::ErrorKind};
use serde::Deserialize;

use super::{DevIssuer, Identity, dev};
use crate::{
    config::AuthConfig,
    metrics::{AuthMetrics, TokenOutcome},
};

/// Signatures by a private key only: `none`, and HMAC with a public key as its secret, never.
const ALGORITHMS: [Algorithm; 9] = [
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
}

/// Checks tokens of one issuer for one client.
pub(crate) struct Validator {
    keys: HashMap<String, (Algorithm, DecodingKey)>,
    issuer: &'static str,
    client_id: String,
    leeway: u64,
    metrics: AuthMetrics,
}

/// What is read of a token. Members of the wrong type refuse it.
#[derive(Deserialize)]
struct Claims {
    iss: Arc<str>,
    sub: String,
    sid: Option<Arc<str>>,
    exp: u64,
    typ: Option<String>,
    azp: Option<String>,
    #[serde(default)]
    aud: Audience,
    preferred_username: Option<String>,
    #[serde(default)]
    resource_access: HashMap<String, Access>,
}

#[derive(Deserialize, Default)]
#[serde(untagged)]
enum Audience {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Access {
    #[serde(default)]
    roles: Vec<Box<str>>,
}

impl Validator {
    /// Trusts the tokens of a development issuer.
    pub(crate) fn trusting(
        issuer: &DevIssuer,
        config: &AuthConfig,
        metrics: AuthMetrics,
    ) -> jsonwebtoken::errors::Result<Self> {
        Ok(Self {
            keys: HashMap::from([(dev::KEY_ID.into(), (dev::ALGORITHM, issuer.public_key()?))]),
            issuer: dev::ISSUER,
            client_id: config.client_id.clone(),
            leeway: config.leeway.as_secs(),
            metrics,
        })
    }

    /// Reads a token (without its scheme).
    pub(crate) async fn validate(&self, token: &str) -> Result<Identity, AuthError> {
        let result = self.check(token);
        self.metrics.validations.inc(match &result {
            Ok(_) => TokenOutcome::Valid,
            Err(AuthError::Expired) => TokenOutcome::Expired,
            Err(AuthError::Invalid(_)) => TokenOutcome::Invalid,
        });
        result
    }

    fn check(&self, token: &str) -> Result<Identity, AuthError> {
        if token.len() > MAX_TOKEN {
            return Err(AuthError::Invalid("the token is too large"));
        }
        let header = jsonwebtoken::decode_header(token)
            .map_err(|_| AuthError::Invalid("this is no signed JWT"))?;
        let kid = header.kid.ok_or(AuthError::Invalid("the token names no key"))?;
        let (algorithm, key) =
            self.keys.get(&kid).ok_or(AuthError::Invalid("the token's key is not known"))?;
        // The algorithm is the key's. A token cannot choose another.
        if header.alg != *algorithm || !ALGORITHMS.contains(algorithm) {
            return Err(AuthError::Invalid("the token's algorithm is not its key's"));
        }
        let mut rules = Validation::new(*algorithm);
        rules.set_required_spec_claims(&["exp", "iss", "sub"]);
        rules.set_issuer(&[self.issuer]);
        rules.leeway = self.leeway;
        rules.validate_nbf = true;
        rules.validate_aud = false; // below: `azp` counts too
        let claims = jsonwebtoken::decode::<Claims>(token, key, &rules).map_err(refused)?.claims;
        self.identity(claims)
    }

    fn identity(&self, claims: Claims) -> Result<Identity, AuthError> {
        if claims.typ.is_some_and(|typ| !typ.eq_ignore_ascii_case("bearer")) {
            return Err(AuthError::Invalid("this is not an access token"));
        }
        let for_us = match &claims.aud {
            Audience::None => false,
            Audience::One(client) => *client == self.client_id,
            Audience::Many(clients) => clients.contains(&self.client_id),
        };
        if !for_us && claims.azp.as_ref() != Some(&self.client_id) {
            return Err(AuthError::Invalid("the token is for another client"));
        }
        if claims.sub.is_empty() {
            return Err(AuthError::Invalid("the token has no subject"));
        }
        let mut access = claims.resource_access;
        Ok(Identity {
            username: claims
                .preferred_username
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| claims.sub.clone())
                .into(),
            subject: claims.sub.into(),
            roles: access.remove(&self.client_id).map(|access| access.roles).unwrap_or_default(),
            issuer: claims.iss,
            session: claims.sid,
            expires_at: claims.exp,
        })
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
