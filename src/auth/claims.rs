//! What a token says, once its signature is known to be good: whether it is meant for this server, and
//! who its bearer is.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{AuthError, Identity};
use crate::config::{AuthConfig, ClaimNames};

/// What is read of a token. Members of the wrong type refuse it.
#[derive(Deserialize)]
pub(super) struct Claims {
    iss: Arc<str>,
    sub: String,
    sid: Option<Arc<str>>,
    #[serde(default)]
    iat: u64,
    exp: u64,
    typ: Option<String>,
    azp: Option<String>,
    #[serde(default)]
    aud: Audience,
    /// The claims whose names are settings are among these.
    #[serde(flatten)]
    more: Map<String, Value>,
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
    names: ClaimNames,
    /// Those of the token before: most users have the same, and share them.
    roles: Mutex<Arc<[Box<str>]>>,
}

const MALFORMED: AuthError = AuthError::Invalid("the token's claims are malformed");

impl ClaimReader {
    pub(super) fn new(config: &AuthConfig) -> Self {
        Self {
            client_id: config.client_id.clone(),
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
        // ID and refresh tokens have the same signature and go to other places: Keycloak tells them
        // apart by the claim, RFC 9068 by the header.
        let is_access = match &claims.typ {
            Some(typ) => typ.eq_ignore_ascii_case("bearer"),
            None => header_typ.is_some_and(|typ| {
                typ.eq_ignore_ascii_case("at+jwt") || typ.eq_ignore_ascii_case("application/at+jwt")
            }),
        };
        if !is_access {
            return Err(AuthError::Invalid("this is not an access token"));
        }
        let for_us = claims.aud.contains(&self.client_id);
        if !for_us && claims.azp.as_ref() != Some(&self.client_id) {
            return Err(AuthError::Invalid("the token is for another client"));
        }
        if claims.sub.is_empty() {
            return Err(AuthError::Invalid("the token has no subject"));
        }
        let username = match claims.more.get(&self.names.username) {
            None | Some(Value::Null) => "",
            Some(name) => name.as_str().ok_or(MALFORMED)?,
        };
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

/// The texts at the end of a path; none where the path leads nowhere.
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
    let Some(roles) = at else { return Ok(Vec::new()) };
    let roles = roles.as_array().ok_or(MALFORMED)?;
    roles.iter().map(|role| role.as_str().map(Box::from).ok_or(MALFORMED)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reader(client_id: &str, roles: &str, realm_roles: bool) -> ClaimReader {
        let names = ClaimNames { username: "upn".into(), roles: roles.into(), realm_roles };
        ClaimReader { client_id: client_id.into(), names, roles: Mutex::default() }
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
