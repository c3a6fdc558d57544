//! The development issuer: tokens without an identity provider, signed by a key of this machine.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use jsonwebtoken::{
    Algorithm, EncodingKey, Header,
    dangerous::insecure_decode,
    jwk::{Jwk, ThumbprintHash},
};
use serde_json::json;
use uuid::Uuid;

use crate::{files, machine};

/// The `iss` of development tokens.
pub(super) const ISSUER: &str = "switchboard-dev";
/// The `kid` of development tokens.
const KEY_ID: &str = "dev";
const ALGORITHM: Algorithm = Algorithm::ES256;
/// The claim that names the key itself: the `kid` of all development keys is the same.
const KEY_CLAIM: &str = "key";
/// Letters of its name: enough to tell keys apart, and each costs where a token is looked up.
const KEY_NAME: usize = 6;

/// Signs development tokens.
pub struct DevIssuer {
    key: EncodingKey,
    client_id: String,
    /// The name of the public key.
    name: String,
    is_new: bool,
}

impl DevIssuer {
    /// Reads the key, or makes it on first use, readable by its owner alone.
    pub fn open(key_file: &Path, client_id: &str) -> io::Result<Self> {
        let opened = match Self::read(key_file, client_id) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(key_file)
                .and_then(|is_new| Ok(Self { is_new, ..Self::read(key_file, client_id)? })),
            read => read,
        };
        opened.map_err(|error| {
            let (file, user) = (key_file.display(), machine::user());
            let fix = format!("let {user} read and write it, or set DEV_KEY_FILE to another file");
            io::Error::new(error.kind(), format!("{file}: {error}; {fix}"))
        })
    }

    /// Whether the key was made when it was opened.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Reads the key, and makes none.
    pub(crate) fn read(key_file: &Path, client_id: &str) -> io::Result<Self> {
        let pem = fs::read(key_file)?;
        let key = EncodingKey::from_ec_pem(&pem).map_err(|error| {
            io::Error::other(format!("this is no EC private key in PKCS#8 PEM form: {error}"))
        })?;
        let public = Jwk::from_encoding_key(&key, ALGORITHM).map_err(io::Error::other)?;
        let name = name_of(&public).map_err(io::Error::other)?;
        Ok(Self { key, client_id: client_id.to_owned(), name, is_new: false })
    }

    /// A token for a user. The subject is derived from the name, so that nodes agree on it.
    pub fn token(&self, username: &str, roles: &[&str], ttl: Duration) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = json!({
            "iss": ISSUER,
            "azp": self.client_id,
            "typ": "Bearer",
            "sub": Uuid::new_v5(&Uuid::NAMESPACE_DNS, username.as_bytes()),
            "jti": Uuid::new_v4().simple().to_string(),
            "preferred_username": username,
            "iat": now.as_secs(),
            "exp": (now + ttl).as_secs(),
            KEY_CLAIM: self.name,
            "resource_access": { self.client_id.as_str(): { "roles": roles } },
        });
        self.sign(&claims)
    }

    /// Signs any claims, for tests of what the validator refuses.
    pub fn sign(&self, claims: &serde_json::Value) -> String {
        let header = Header { kid: Some(KEY_ID.into()), ..Header::new(ALGORITHM) };
        jsonwebtoken::encode(&header, claims, &self.key).expect("claims are JSON and the key signs")
    }

    pub(super) fn public_key(&self) -> jsonwebtoken::errors::Result<Jwk> {
        let mut key = Jwk::from_encoding_key(&self.key, ALGORITHM)?;
        key.common.key_id = Some(KEY_ID.into());
        Ok(key)
    }
}

/// The beginning of the thumbprint, as RFC 7638 has it.
fn name_of(key: &Jwk) -> jsonwebtoken::errors::Result<String> {
    let mut name = key.thumbprint(ThumbprintHash::SHA256)?;
    name.truncate(KEY_NAME);
    Ok(name)
}

/// Whether a token, whose signature does not fit a key, says that it was signed with another development key.
pub(super) fn is_of_other_key(token: &str, key: &Jwk) -> bool {
    let Ok(token) = insecure_decode::<serde_json::Value>(token) else { return false };
    let ours = name_of(key).ok();
    let named = token.claims.get(KEY_CLAIM).and_then(serde_json::Value::as_str);
    named.is_some() && named != ours.as_deref()
}

/// Writes a new key beside its place and links it there: of two processes, one wins and both read it.
/// False: the other has.
fn create(key_file: &Path) -> io::Result<bool> {
    let folder = key_file.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        files::make_folder(folder)?;
    }
    let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())
        .map_err(|_| io::Error::other("the system has no randomness"))?;
    let pem = pem::encode(&pem::Pem::new("PRIVATE KEY", key.as_ref()));
    let draft = key_file.with_extension(format!("{}.tmp", Uuid::new_v4().simple()));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(pem.as_bytes())?;
    let linked = fs::hard_link(&draft, key_file);
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        linked => linked.map(|()| true),
    }
}
