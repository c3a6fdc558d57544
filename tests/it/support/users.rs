//! The users of the tests' issuer: passwords, sessions and refresh tokens, with the answers of Keycloak.

use std::{
    collections::{HashMap, HashSet},
    sync::Mutex,
};

use jsonwebtoken::{DecodingKey, EncodingKey, Header, Validation};
use serde_json::{Value, json};
use uuid::Uuid;

use super::issuer::CLIENT;

/// The password of the user `ann`; `bob` has his own.
pub(crate) const PASSWORD: &str = "correct horse & b=ttery%20+ é";
const SECRET: &[u8] = b"the issuer's own";

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// `token` or `logout`.
    pub(crate) path: String,
    pub(crate) correlation: Option<String>,
    pub(crate) traceparent: Option<String>,
    pub(crate) form: HashMap<String, String>,
}

#[derive(Default)]
pub(crate) struct Users {
    /// The sessions that have not ended.
    sessions: Mutex<HashSet<String>>,
    asked: Mutex<Vec<Asked>>,
    /// What is answered whatever is asked.
    canned: Mutex<Option<(u16, String)>>,
}

impl Users {
    /// Everything that was asked.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Answers everything with this from now on.
    pub(crate) fn answer_with(&self, status: u16, body: &str) {
        *self.canned.lock().unwrap() = Some((status, body.to_owned()));
    }

    pub(super) fn answer(
        &self,
        issuer: &str,
        asked: Asked,
        sign: impl Fn(Value) -> String,
    ) -> (u16, String) {
        self.asked.lock().unwrap().push(asked.clone());
        if let Some((status, body)) = self.canned.lock().unwrap().clone() {
            return (status, body);
        }
        let field = |name: &str| asked.form.get(name).map_or("", String::as_str);
        if field("client_id") != CLIENT {
            return (401, json!({ "error": "invalid_client" }).to_string());
        }
        let refused = (400, json!({ "error": "invalid_grant", "error_description": "no" }));
        let (status, body) = match (&*asked.path, field("grant_type")) {
            ("token", "password") => {
                let known = [("ann", PASSWORD), ("bob", "bob")];
                match known.contains(&(field("username"), field("password"))) {
                    true => {
                        self.grant(issuer, &Uuid::new_v4().to_string(), field("username"), sign)
                    }
                    false => refused,
                }
            }
            ("token", "refresh_token") => match session(field("refresh_token")) {
                Some((sid, user)) if self.sessions.lock().unwrap().contains(&sid) => {
                    self.grant(issuer, &sid, &user, sign)
                }
                _ => refused,
            },
            // A session that has ended is none to complain about.
            ("logout", _) => match session(field("refresh_token")) {
                Some((sid, _)) => {
                    self.sessions.lock().unwrap().remove(&sid);
                    return (204, String::new());
                }
                None => refused,
            },
            _ => (400, json!({ "error": "unsupported_grant_type" })),
        };
        (status, body.to_string())
    }

    fn grant(
        &self,
        issuer: &str,
        sid: &str,
        user: &str,
        sign: impl Fn(Value) -> String,
    ) -> (u16, Value) {
        self.sessions.lock().unwrap().insert(sid.to_owned());
        let access =
            json!({ "sub": format!("id-of-{user}"), "preferred_username": user, "sid": sid });
        let body = json!({
            "access_token": sign(access),
            "expires_in": 600,
            "refresh_expires_in": 1800,
            "refresh_token": refresh_token(issuer, sid, user),
            "token_type": "Bearer",
            "not-before-policy": 0,
            "session_state": sid,
            "scope": "profile email",
        });
        (200, body)
    }
}

/// A refresh token, signed by a secret that nobody else has.
fn refresh_token(issuer: &str, sid: &str, user: &str) -> String {
    let claims = json!({
        "iss": issuer, "typ": "Refresh", "azp": CLIENT, "sid": sid, "user": user, "jti": Uuid::new_v4(),
        "sub": format!("id-of-{user}"),
    });
    jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(SECRET)).unwrap()
}

/// The session and the user of a refresh token, if it is one.
fn session(refresh_token: &str) -> Option<(String, String)> {
    let mut rules = Validation::default();
    rules.set_required_spec_claims::<&str>(&[]);
    let key = DecodingKey::from_secret(SECRET);
    let claims = jsonwebtoken::decode::<Value>(refresh_token, &key, &rules).ok()?.claims;
    let text = |name: &str| claims[name].as_str().map(ToOwned::to_owned);
    Some((text("sid")?, text("user")?))
}
