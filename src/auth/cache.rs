//! Tokens that were found valid, so that their signatures are checked once.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use quick_cache::sync::Cache;

use super::{Identity, jwks::Key};

/// The SHA-256 of a token: the tokens themselves are not kept.
type Fingerprint = [u8; SHA256_OUTPUT_LEN];

/// A bounded number of valid tokens.
pub(super) struct TokenCache(Cache<Fingerprint, Entry>);

/// What a token was found to say, and what that rests on.
#[derive(Clone)]
pub(super) struct Entry {
    /// Shared by all who come with this token.
    pub(super) identity: Arc<Identity>,
    pub(super) key: Arc<Key>,
}

impl TokenCache {
    /// None for a size of 0.
    pub(super) fn new(size: u32) -> Option<Self> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        (size > 0).then(|| Self(Cache::new(size)))
    }

    /// What is known of a token, if `good` still says so; what is not good any more is forgotten.
    pub(super) fn get(
        &self,
        token: &Fingerprint,
        good: impl FnOnce(&Entry) -> bool,
    ) -> Option<Arc<Identity>> {
        let entry = self.0.get(token)?;
        if good(&entry) {
            return Some(entry.identity);
        }
        self.0.remove(token);
        None
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn insert(&self, token: Fingerprint, entry: Entry) {
        self.0.insert(token, entry);
    }
}

/// The name of a token in the cache.
pub(super) fn fingerprint(token: &str) -> Fingerprint {
    let digest = digest(&SHA256, token.as_bytes());
    digest.as_ref().try_into().expect("a SHA-256 has its length")
}
