//! A key set as an issuer publishes it, reduced to the keys that may sign tokens.

use std::{collections::HashMap, sync::Arc};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse},
};
use serde::Deserialize;

/// What RSA keys without an `alg` may be used with.
const RSA: &[Algorithm] = &[
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];
/// Bits; shorter keys can be broken.
const MIN_RSA: usize = 2048;

/// A public key with the algorithms it may be used with.
pub(super) struct Key {
    jwk: Jwk,
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

impl Key {
    /// None where the key is not to sign tokens, or not with a private key of its own: `none`, and
    /// HMAC with a public key as its secret, cannot come of it.
    pub(super) fn new(jwk: Jwk) -> Option<Self> {
        let common = &jwk.common;
        let signs =
            common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature);
        let verifies = common
            .key_operations
            .as_ref()
            .is_none_or(|operations| operations.contains(&KeyOperations::Verify));
        if !signs || !verifies {
            return None;
        }
        let possible = match &jwk.algorithm {
            AlgorithmParameters::RSA(key) if bits(&key.n)? >= MIN_RSA => RSA,
            AlgorithmParameters::EllipticCurve(key) => match key.curve {
                EllipticCurve::P256 => &[Algorithm::ES256],
                EllipticCurve::P384 => &[Algorithm::ES384],
                _ => return None,
            },
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                &[Algorithm::EdDSA]
            }
            _ => return None,
        };
        let algorithms = match common.key_algorithm {
            None => possible.to_vec(),
            Some(named) => {
                let named = Algorithm::try_from(named).ok()?;
                possible.contains(&named).then(|| vec![named])?
            }
        };
        let decoding = DecodingKey::from_jwk(&jwk).ok()?;
        Some(Self { jwk, algorithms, decoding })
    }

    /// The key as it is published.
    pub(super) fn public(&self) -> &Jwk {
        &self.jwk
    }

    /// Its name in tokens.
    pub(super) fn kid(&self) -> &str {
        self.jwk.common.key_id.as_deref().unwrap_or_default()
    }

    /// The algorithms of its tokens.
    pub(super) fn algorithms(&self) -> &[Algorithm] {
        &self.algorithms
    }

    /// The key, for tokens of an algorithm that is its own: a token cannot choose another.
    pub(super) fn decoding(&self, algorithm: Algorithm) -> Option<&DecodingKey> {
        self.algorithms.contains(&algorithm).then_some(&self.decoding)
    }
}

/// The size of a number in base64url.
fn bits(number: &str) -> Option<usize> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(number).ok()?;
    let first = bytes.iter().position(|byte| *byte != 0)?;
    Some((bytes.len() - first) * 8 - bytes[first].leading_zeros() as usize)
}

/// Keys by their `kid`.
#[derive(Clone, Default)]
pub(super) struct KeySet(HashMap<String, Arc<Key>>);

impl KeySet {
    /// The set of one key.
    pub(super) fn of(key: Key) -> Self {
        Self(HashMap::from([(key.kid().to_owned(), Arc::new(key))]))
    }

    /// Reads a key set. Keys that `known` has already stay the same ones, so that what was cached under
    /// them stays good. A set may have no key that signs tokens.
    pub(super) fn parse(text: &[u8], known: &Self) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Document {
            // One by one: a key that cannot be read must not spoil the others.
            keys: Vec<serde_json::Value>,
        }
        let document: Document = crate::objects::read_bytes(text)
            .map_err(|error| format!("this is no key set: {error}"))?;
        let mut keys = HashMap::new();
        for key in document.keys {
            let Ok(jwk) = serde_json::from_value::<Jwk>(key) else { continue };
            let Some(kid) = jwk.common.key_id.clone() else { continue };
            let same = known.get(&kid).filter(|key| key.jwk == jwk);
            let Some(key) = same.or_else(|| Key::new(jwk).map(Arc::new)) else { continue };
            keys.insert(kid, key);
        }
        Ok(Self(keys))
    }

    pub(super) fn get(&self, kid: &str) -> Option<Arc<Key>> {
        self.0.get(kid).cloned()
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Key> {
        self.0.values().map(|key| &**key)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
