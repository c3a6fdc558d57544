//! What a token says, read without checking anything: to explain, never to trust.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use crate::auth::token_type;

/// The header and the claims.
pub(super) struct Content {
    pub(super) header: Map<String, Value>,
    pub(super) claims: Map<String, Value>,
}

/// Why a text is no JWT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FormFault {
    Spaces,
    Opaque,
    Encrypted,
    Parts,
    Header,
    Claims,
}

impl FormFault {
    pub(super) fn says(self) -> &'static str {
        match self {
            Self::Spaces => "it has spaces or line breaks inside",
            Self::Opaque => "it is no JWT, but one word without dots",
            Self::Encrypted => "it is encrypted (five parts): only its receiver can read it",
            Self::Parts => "it is no JWT: it does not have three parts",
            Self::Header => "it is no JWT: its first part is no header",
            Self::Claims => "it is no JWT: its second part is no claims",
        }
    }

    pub(super) fn fix(self) -> &'static str {
        match self {
            Self::Spaces => "pass it in one piece and in quotes; a terminal may have wrapped it",
            Self::Opaque => {
                "take the access_token of the answer; some providers give a JWT only to a client \
                 that asks for an audience"
            }
            Self::Encrypted => "switch the encryption of access tokens off for this client",
            Self::Parts | Self::Header | Self::Claims => {
                "copy the whole access_token: from the first letter to the last"
            }
        }
    }
}

impl Content {
    pub(super) fn of(token: &str) -> Result<Self, FormFault> {
        if token.chars().any(char::is_whitespace) {
            return Err(FormFault::Spaces);
        }
        let parts: Vec<_> = token.split('.').collect();
        let (header, claims) = match parts[..] {
            [_] => return Err(FormFault::Opaque),
            [header, claims, _] => (header, claims),
            [_, _, _, _, _] => return Err(FormFault::Encrypted),
            _ => return Err(FormFault::Parts),
        };
        Ok(Self {
            header: object(header).ok_or(FormFault::Header)?,
            claims: object(claims).ok_or(FormFault::Claims)?,
        })
    }

    /// A claim that is a text.
    pub(super) fn text(&self, claim: &str) -> Option<&str> {
        self.claims.get(claim)?.as_str()
    }

    /// A claim that is a time.
    pub(super) fn seconds(&self, claim: &str) -> Option<u64> {
        let seconds = self.claims.get(claim)?.as_f64()?;
        (0.0..=u64::MAX as f64).contains(&seconds).then_some(seconds as u64)
    }

    /// Whether a claim is there, also where its type is wrong.
    pub(super) fn has(&self, claim: &str) -> bool {
        self.claims.get(claim).is_some_and(|value| !value.is_null())
    }

    /// What it is, by its own word; none where the claim `typ` is no text.
    pub(super) fn kind(&self) -> Option<String> {
        let header = self.header.get("typ").and_then(Value::as_str);
        match self.claims.get("typ") {
            None | Some(Value::Null) => Some(token_type(None, header)),
            Some(typ) => Some(token_type(Some(typ.as_str()?), header)),
        }
    }

    /// The clients in `aud`.
    pub(super) fn audience(&self) -> Vec<&str> {
        match self.claims.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }
}

fn object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}
