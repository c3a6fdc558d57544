//! What a token says, once its signature is known to be good: whether it is meant for this server, and
//! who its bearer is.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Map, Value};

use super::{AuthError, Identity};
use crate::config::{AuthConfig, ClaimNames, TokenTypes};

/// What is read of a token. Members of the wrong type refuse it.
#[derive(Deserialize)]
pub(super) struct Claims {
    iss: Arc<str>,
    sub: String,
    sid: Option<Arc<str>>,
    #[serde(default, deserialize_with = "seconds")]
    iat: u64,
    #[serde(deserialize_with = "seconds")]
    exp: u64,
    typ: Option<String>,
    #[serde(default)]
    aud: Audience,
    /// The claims whose names are settings are among these.
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// A moment in a token (NumericDate of RFC 7519): seconds since 1970. Their fraction is cut off, so that
/// a token never lives longer than it says.
pub(super) fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    match (0.0..=u64::MAX as f64).contains(&seconds) {
        true => Ok(seconds as u64),
        false => Err(D::Error::custom("this is no moment since 1970")),
    }
}

/// Claims of ID tokens (OpenID Connect) and of logout tokens, which access tokens do not have.
pub(crate) const NOT_OF_ACCESS_TOKENS: [&str; 5] =
    ["nonce", "at_hash", "c_hash", "s_hash", "events"];

/// What a token is: Keycloak says so in a claim, RFC 9068 in the header. Others say `JWT` or nothing.
pub(crate) fn token_type(claim: Option<&str>, header: Option<&str>) -> String {
    TokenTypes::name(claim.or(header).unwrap_or("jwt"))
}

/// Whether only access tokens are of a type.
pub(crate) fn is_of_access_tokens(typ: &str) -> bool {
    matches!(typ, "bearer" | "at+jwt")
}

#[derive(Deserialize, Default)]
#[serde(untagged)]
pub(super) enum Audience {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

impl Audience {
    pub(super) fn contains(&self, client_id: &str) -> bool {
        match self {
            Self::None => false,
            Self::One(client) => client == client_id,
            Self::Many(clients) => clients.iter().any(|client| client == client_id),
        }
    }
}

/// Reads claims for one client.
pub(super) struct ClaimReader {
    client_id: String,
    audience: Vec<String>,
    types: TokenTypes,
    names: ClaimNames,
    /// Those of the token before: most users have the same, and share them.
    roles: Mutex<Arc<[Box<str>]>>,
}

const MALFORMED: AuthError = AuthError::Invalid("the token's claims are malformed");

impl ClaimReader {
    pub(super) fn new(config: &AuthConfig) -> Self {
        Self {
            client_id: config.client_id.clone(),
            audience: config.audience.clone(),
            types: config.types.clone(),
            names: config.claims.clone(),
            roles: Mutex::default(),
        }
    }

    /// The bearer of a token whose header has this `typ`.
    pub(super) fn identity(
        &self,
        header_typ: Option<&str>,
        claims: Claims,
    ) -> Result<Identity, AuthError> {
        let client = text(&claims.more, &self.names.client)?;
        if !self.is_access_token(header_typ, &claims, client) {
            return Err(AuthError::Invalid("this is not an access token"));
        }
        let for_us = match &*self.audience {
            [] => claims.aud.contains(&self.client_id) || client == Some(&*self.client_id),
            audience => audience.iter().any(|name| claims.aud.contains(name)),
        };
        if !for_us {
            return Err(AuthError::Invalid(match self.audience.is_empty() {
                true => "the token is for another client",
                false => "the token is for another audience",
            }));
        }
        if claims.sub.is_empty() {
            return Err(AuthError::Invalid("the token has no subject"));
        }
        let username = text(&claims.more, &self.names.username)?.unwrap_or_default();
        let same = username.is_empty() || username == claims.sub;
        let subject = Arc::from(claims.sub);
        Ok(Identity {
            username: if same { Arc::clone(&subject) } else { username.into() },
            roles: self.shared(self.roles(&claims.more)?),
            subject,
            issuer: claims.iss,
            session: claims.sid,
            issued_at: claims.iat,
            expires_at: claims.exp,
        })
    }

    /// ID and refresh tokens have the same signature, and go to other places.
    fn is_access_token(
        &self,
        header_typ: Option<&str>,
        claims: &Claims,
        client: Option<&str>,
    ) -> bool {
        let typ = token_type(claims.typ.as_deref(), header_typ);
        if !self.types.allow(&typ) {
            return false;
        }
        // A type that ID tokens have too says nothing: the claims have to.
        is_of_access_tokens(&typ) || {
            let more = &claims.more;
            let is_other = NOT_OF_ACCESS_TOKENS.iter().any(|claim| more.contains_key(*claim))
                || more.get("token_use").is_some_and(|usage| usage != "access");
            let is_issued = client.is_some() || more.get("jti").is_some_and(Value::is_string);
            is_issued && !is_other
        }
    }

    fn shared(&self, roles: Vec<Box<str>>) -> Arc<[Box<str>]> {
        let mut last = self.roles.lock().unwrap_or_else(PoisonError::into_inner);
        if **last != *roles {
            *last = roles.into();
        }
        Arc::clone(&last)
    }

    fn roles(&self, claims: &Map<String, Value>) -> Result<Vec<Box<str>>, AuthError> {
        let names = &self.names.roles;
        // Some providers want a URL for the name of a claim, which has dots of its own.
        let mut roles = match claims.contains_key(names) {
            true => list(claims, [&**names])?,
            false => {
                let path = names.split('.').map(|name| name.replace("{client}", &self.client_id));
                list(claims, path)?
            }
        };
        if self.names.realm_roles {
            roles.extend(list(claims, ["realm_access", "roles"])?);
        }
        Ok(roles)
    }
}

/// A claim that is a text, where it is there.
fn text<'a>(claims: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, AuthError> {
    match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(text) => text.as_str().map(Some).ok_or(MALFORMED),
    }
}

/// The texts at the end of a path; none where the path leads nowhere. Zitadel has names of members there.
fn list(
    claims: &Map<String, Value>,
    path: impl IntoIterator<Item = impl AsRef<str>>,
) -> Result<Vec<Box<str>>, AuthError> {
    let mut path = path.into_iter();
    let mut at = path.next().and_then(|name| claims.get(name.as_ref()));
    for name in path {
        let Some(value) = at else { break };
        at = value.as_object().ok_or(MALFORMED)?.get(name.as_ref());
    }
    match at {
        None => Ok(Vec::new()),
        Some(Value::Object(roles)) => Ok(roles.keys().map(|role| Box::from(&**role)).collect()),
        Some(Value::Array(roles)) => {
            roles.iter().map(|role| role.as_str().map(Box::from).ok_or(MALFORMED)).collect()
        }
        Some(_) => Err(MALFORMED),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Config;

    fn reader(client_id: &str, roles: &str, realm_roles: bool) -> ClaimReader {
        let mut config = Config::read(|_| None).unwrap().auth;
        config.client_id = client_id.into();
        config.claims = ClaimNames {
            client: "azp".into(),
            username: "upn".into(),
            roles: roles.into(),
            realm_roles,
        };
        ClaimReader::new(&config)
    }

    fn identity(reader: &ClaimReader, more: Value) -> Result<Identity, AuthError> {
        let mut claims = json!({
            "iss": "i", "sub": "s", "exp": 1, "typ": "Bearer", "azp": reader.client_id,
        });
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        reader.identity(None, serde_json::from_value(claims).unwrap())
    }

    #[test]
    fn users_of_the_same_roles_share_them() {
        let reader = reader("a", "roles", false);
        let roles = |roles: &[&str]| identity(&reader, json!({ "roles": roles })).unwrap().roles;
        let (first, second, third) = (roles(&["r", "s"]), roles(&["r", "s"]), roles(&["r"]));
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!((first.join(" "), third.join(" ")), ("r s".to_owned(), "r".to_owned()));
    }

    #[test]
    fn roles_are_read_from_the_path_of_the_setting() {
        let keycloak = "resource_access.{client}.roles";
        for (client, path, realm, claims, roles) in [
            ("a", keycloak, false, json!({ "resource_access": { "a": { "roles": ["r"] } } }), "r"),
            (
                "a.b",
                keycloak,
                false,
                json!({ "resource_access": { "a.b": { "roles": ["r"] } } }),
                "r",
            ),
            ("a", keycloak, false, json!({ "resource_access": { "b": { "roles": ["r"] } } }), ""),
            ("a", keycloak, false, json!({ "resource_access": {} }), ""),
            ("a", keycloak, false, json!({}), ""),
            ("a", keycloak, false, json!({ "realm_access": { "roles": ["r"] } }), ""),
            ("a", keycloak, true, json!({ "realm_access": { "roles": ["r"] } }), "r"),
            (
                "a",
                keycloak,
                true,
                json!({ "resource_access": { "a": { "roles": ["r"] } }, "realm_access": { "roles": ["s"] } }),
                "r s",
            ),
            ("a", "groups", false, json!({ "groups": ["r", "s"] }), "r s"),
            (
                "a",
                "groups",
                false,
                json!({ "groups": { "r": { "o": "a.example" }, "s": {} } }),
                "r s",
            ),
            (
                "a",
                "https://x.example/roles",
                false,
                json!({ "https://x.example/roles": ["r"] }),
                "r",
            ),
        ] {
            let found = identity(&reader(client, path, realm), claims.clone()).unwrap();
            assert_eq!(found.roles.join(" "), roles, "{claims}");
        }
    }

    #[test]
    fn roles_and_names_of_the_wrong_type_refuse_the_token() {
        let reader = reader("a", "resource_access.{client}.roles", true);
        for claims in [
            json!({ "resource_access": 5 }),
            json!({ "resource_access": { "a": [] } }),
            json!({ "resource_access": { "a": { "roles": "r" } } }),
            json!({ "resource_access": { "a": { "roles": ["r", 5] } } }),
            json!({ "realm_access": { "roles": null } }),
            json!({ "upn": 5 }),
        ] {
            assert_eq!(identity(&reader, claims.clone()).unwrap_err(), MALFORMED, "{claims}");
        }
    }

    #[test]
    fn the_username_is_the_claim_of_the_setting_or_else_the_subject() {
        let reader = reader("a", "roles", false);
        for (claims, name) in [
            (json!({ "upn": "ann", "preferred_username": "bea" }), "ann"),
            (json!({ "preferred_username": "bea" }), "s"),
            (json!({ "upn": "" }), "s"),
            (json!({ "upn": null }), "s"),
        ] {
            assert_eq!(&*identity(&reader, claims).unwrap().username, name);
        }
    }
}
