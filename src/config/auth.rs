//! Who may come in: the issuer of tokens, what is read of them, and how often one may fail.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Reader,
    value::{Secret, Value, WebAddress},
};

/// Who may come in.
#[derive(Debug, Clone)]
pub struct AuthConfig {
    /// The issuer of tokens; none: the development issuer.
    pub provider: Option<ProviderConfig>,
    /// `OIDC_JWKS_LIFETIME`.
    pub keys_lifetime: Duration,
    /// `OIDC_JWKS_MAX_AGE`; if not set, four lifetimes.
    pub keys_max_age: Duration,
    /// `OIDC_TIMEOUT`, of each call.
    pub timeout: Duration,
    /// `KEYCLOAK_CLIENT_ID`.
    pub client_id: String,
    /// `JWT_LEEWAY`.
    pub leeway: Duration,
    /// `JWT_AUDIENCE`, of which a token's `aud` has to name one; empty: the client, by `aud` or by its claim.
    pub audience: Vec<String>,
    /// `JWT_TYPES`.
    pub types: TokenTypes,
    /// `BACKCHANNEL_CLIENTS`, whose logout tokens count beside those of the client.
    pub backchannel_clients: Vec<String>,
    /// What is read of a token.
    pub claims: ClaimNames,
    /// `AUTH_FAILURES_PER_MINUTE`, of one address; 0: no limit.
    pub failures_per_minute: u32,
    /// `AUTH_REFUSALS_PER_MINUTE`, of one address; 0: no limit.
    pub refusals_per_minute: u32,
    /// `BACKCHANNEL_FAILURES_PER_MINUTE`, of one address; 0: no limit.
    pub backchannel_failures_per_minute: u32,
    /// `REVOCATION_LIFETIME`.
    pub revocation_lifetime: Duration,
    /// `TOKEN_CACHE_SIZE`, in tokens; 0: no cache.
    pub cache_size: u32,
    /// `DEV_KEY_FILE`.
    pub dev_key_file: PathBuf,
}

/// An identity provider.
#[derive(Debug, Clone)]
pub struct ProviderConfig {
    /// The `iss` of its tokens.
    pub issuer: String,
    /// The issuer as this server reaches it, without a slash at its end: discovery starts there.
    pub address: String,
    /// `KEYCLOAK_CLIENT_SECRET`; none: a public client.
    pub client_secret: Option<Secret>,
}

/// The types of access tokens, in lower case and without `application/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTypes(Vec<String>);

impl TokenTypes {
    /// Whether access tokens may be of a type.
    pub fn allow(&self, typ: &str) -> bool {
        let typ = Self::name(typ);
        self.0.contains(&typ)
    }

    /// The name of a type as it is compared: case and `application/` count for nothing (RFC 7515).
    pub fn name(typ: &str) -> String {
        let typ = typ.to_ascii_lowercase();
        typ.strip_prefix("application/").map_or(typ.clone(), ToOwned::to_owned)
    }
}

impl Value for TokenTypes {
    const ALLOWED: &'static str = "types of access tokens with commas between them, such as \
        Bearer,at+jwt or JWT; no ID, Refresh, Offline, Logout and DPoP, which let nobody in";

    fn read(text: &str) -> Option<Self> {
        const OTHERS: [&str; 6] = ["id", "refresh", "offline", "logout", "logout+jwt", "dpop"];
        let types = Vec::<String>::read(text)?;
        let types: Vec<_> = types.iter().map(|typ| Self::name(typ)).collect();
        let good = |typ: &String| !typ.contains(char::is_whitespace) && !OTHERS.contains(&&**typ);
        (!types.is_empty() && types.iter().all(good)).then_some(Self(types))
    }
}

/// Where a token says who its bearer is.
#[derive(Debug, Clone)]
pub struct ClaimNames {
    /// `JWT_CLIENT_CLAIM`: the client that a token was issued to.
    pub client: String,
    /// `JWT_USERNAME_CLAIM`; without it in a token, the name is the subject.
    pub username: String,
    /// `JWT_ROLES_CLAIM`: names of nested claims, with dots between them and the client for `{client}`.
    pub roles: String,
    /// `JWT_REALM_ROLES`: `realm_access.roles` count too.
    pub realm_roles: bool,
}

impl AuthConfig {
    /// The same for the development issuer, whose tokens are always alike: what is set of tokens
    /// describes the provider's.
    pub(crate) fn for_development(&self) -> Self {
        let mut config = self.clone();
        config.audience.clear();
        config.types = TokenTypes(vec!["bearer".to_owned()]);
        "azp".clone_into(&mut config.claims.client);
        config
    }
}

impl Reader<'_> {
    pub(super) fn auth(&mut self, data_dir: &Path) -> AuthConfig {
        let (keys_lifetime, keys_max_age) = self.keys_ages();
        AuthConfig {
            provider: self.provider(),
            keys_lifetime,
            keys_max_age,
            timeout: self.get("OIDC_TIMEOUT"),
            client_id: self.get("KEYCLOAK_CLIENT_ID"),
            leeway: self.get("JWT_LEEWAY"),
            audience: self.get("JWT_AUDIENCE"),
            types: self.get("JWT_TYPES"),
            backchannel_clients: self.get("BACKCHANNEL_CLIENTS"),
            claims: ClaimNames {
                client: self.get("JWT_CLIENT_CLAIM"),
                username: self.get("JWT_USERNAME_CLAIM"),
                roles: self.get("JWT_ROLES_CLAIM"),
                realm_roles: self.get("JWT_REALM_ROLES"),
            },
            failures_per_minute: self.get("AUTH_FAILURES_PER_MINUTE"),
            refusals_per_minute: self.get("AUTH_REFUSALS_PER_MINUTE"),
            backchannel_failures_per_minute: self.get("BACKCHANNEL_FAILURES_PER_MINUTE"),
            revocation_lifetime: self.revocation_lifetime(),
            cache_size: self.get("TOKEN_CACHE_SIZE"),
            dev_key_file: self
                .get::<Option<PathBuf>>("DEV_KEY_FILE")
                .unwrap_or_else(|| data_dir.join("dev-key.pem")),
        }
    }

    fn revocation_lifetime(&mut self) -> Duration {
        let lifetime: Duration = self.get("REVOCATION_LIFETIME");
        if lifetime < Duration::from_secs(1) {
            self.faults.push(format!(
                "REVOCATION_LIFETIME: {lifetime:?} is not allowed; allowed: at least 1s, and the lifetime of access tokens"
            ));
        }
        lifetime
    }

    /// After how long keys are fetched again, and after how long they are not used any more.
    fn keys_ages(&mut self) -> (Duration, Duration) {
        let lifetime: Duration = self.get("OIDC_JWKS_LIFETIME");
        let max_age: Option<Duration> = self.get("OIDC_JWKS_MAX_AGE");
        let max_age = max_age.unwrap_or_else(|| lifetime.saturating_mul(4));
        // Keys age from when they are asked for, and a fetch takes its time.
        if max_age < lifetime.saturating_mul(2) {
            self.faults.push(format!(
                "OIDC_JWKS_MAX_AGE: {max_age:?} is not allowed; allowed: at least twice OIDC_JWKS_LIFETIME, which is {lifetime:?}"
            ));
        }
        (lifetime, max_age)
    }

    /// Keycloak by its base and realm, or any provider by its issuer. With both, tokens bear the
    /// issuer that clients see, and the server reaches Keycloak by its base: names differ inside and
    /// outside of containers.
    fn provider(&mut self) -> Option<ProviderConfig> {
        let base: Option<WebAddress> = self.get("KEYCLOAK_BASE_URL");
        let realm: Option<String> = self.get("KEYCLOAK_REALM");
        let issuer: Option<WebAddress> = self.get("OIDC_ISSUER");
        let client_secret = self.get("KEYCLOAK_CLIENT_SECRET");
        let base = base.map(|WebAddress(base)| base.trim_end_matches('/').to_owned());
        let issuer = issuer.map(|WebAddress(issuer)| issuer);
        let (issuer, address) = match (base, realm, issuer) {
            (Some(base), Some(realm), issuer) => {
                let address = format!("{base}/realms/{realm}");
                (issuer.unwrap_or_else(|| address.clone()), address)
            }
            (Some(base), None, Some(issuer)) => {
                let realm = issuer.find("/realms/").map_or("", |at| &issuer[at..]);
                let address = format!("{base}{}", realm.trim_end_matches('/'));
                (issuer, address)
            }
            (None, _, Some(issuer)) => {
                let address = issuer.trim_end_matches('/').to_owned();
                (issuer, address)
            }
            (Some(_), None, None) => {
                self.faults.push(
                    "KEYCLOAK_REALM: an empty text is not allowed with KEYCLOAK_BASE_URL; \
                     allowed: the name of a realm, or no KEYCLOAK_BASE_URL"
                        .into(),
                );
                return None;
            }
            (None, Some(_), None) => {
                self.faults.push(
                    "KEYCLOAK_BASE_URL: an empty text is not allowed with KEYCLOAK_REALM; \
                     allowed: the URL of Keycloak, or no KEYCLOAK_REALM"
                        .into(),
                );
                return None;
            }
            (None, None, None) => return None,
        };
        Some(ProviderConfig { issuer, address, client_secret })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    fn read(settings: &[(&str, &str)]) -> Result<Config, String> {
        Config::read(|name| {
            settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
        .map_err(|faults| faults.to_string())
    }

    const BASE: &str = "KEYCLOAK_BASE_URL";
    const REALM: &str = "KEYCLOAK_REALM";
    const ISSUER: &str = "OIDC_ISSUER";

    #[test]
    fn the_issuer_and_where_it_is_reached_follow_from_what_is_set() {
        for (settings, issuer, address) in [
            (
                &[(BASE, "http://kc:8080"), (REALM, "a")][..],
                "http://kc:8080/realms/a",
                "http://kc:8080/realms/a",
            ),
            (&[(BASE, "http://kc/"), (REALM, "a")], "http://kc/realms/a", "http://kc/realms/a"),
            (&[(ISSUER, "https://sso.example/")], "https://sso.example/", "https://sso.example"),
            (
                &[(ISSUER, "https://sso.example/realms/a"), (BASE, "http://kc"), (REALM, "a")],
                "https://sso.example/realms/a",
                "http://kc/realms/a",
            ),
            (
                &[(ISSUER, "https://sso.example/auth/realms/a"), (BASE, "http://kc/auth")],
                "https://sso.example/auth/realms/a",
                "http://kc/auth/realms/a",
            ),
        ] {
            let provider = read(settings).unwrap().auth.provider.unwrap();
            assert_eq!((&*provider.issuer, &*provider.address), (issuer, address));
        }
        assert!(read(&[]).unwrap().auth.provider.is_none());
    }

    #[test]
    fn half_a_keycloak_is_a_fault_that_names_both_settings() {
        for half in [(BASE, "http://kc:8080"), (REALM, "a")] {
            let fault = read(&[half]).unwrap_err();
            assert!(fault.contains(BASE) && fault.contains(REALM), "{fault}");
        }
    }

    #[test]
    fn an_issuer_is_a_plain_web_address() {
        for text in ["sso.example", "ftp://sso.example", "https://sso.example?a", "https://"] {
            assert!(read(&[(ISSUER, text)]).is_err_and(|fault| fault.contains(ISSUER)), "{text}");
        }
        let fault = read(&[(ISSUER, "https://ann:hush-hush@sso.example")]).unwrap_err();
        assert!(!fault.contains("hush-hush"), "{fault}");
    }

    #[test]
    fn types_of_tokens_are_those_of_access_tokens() {
        for (text, allowed, refused) in [
            ("", "Bearer", "JWT"),
            ("Bearer,at+jwt", "application/AT+JWT", "jwt"),
            (" JWT ", "application/jwt", "at+jwt"),
        ] {
            let settings = [("JWT_TYPES", text)];
            let types = read(&settings[..usize::from(!text.is_empty())]).unwrap().auth.types;
            assert!(types.allow(allowed) && !types.allow(refused), "{text}");
        }
        for text in [",", "ID", "Bearer,refresh", "Offline", "application/logout+jwt", "at jwt"] {
            let fault = read(&[("JWT_TYPES", text)]).unwrap_err();
            assert!(fault.contains("JWT_TYPES") && fault.contains("at+jwt"), "{text}: {fault}");
        }
    }

    #[test]
    fn keys_are_used_for_four_lifetimes_or_as_long_as_is_set_but_not_less_than_two() {
        let (lifetime, max_age) = ("OIDC_JWKS_LIFETIME", "OIDC_JWKS_MAX_AGE");
        for (settings, seconds) in [
            (&[][..], 4 * 3600),
            (&[(lifetime, "5m")], 4 * 300),
            (&[(lifetime, "5m"), (max_age, "1h")], 3600),
            (&[(max_age, "2h")], 7200),
        ] {
            assert_eq!(
                read(settings).unwrap().auth.keys_max_age.as_secs(),
                seconds,
                "{settings:?}"
            );
        }
        let fault = read(&[(max_age, "119m")]).unwrap_err();
        assert!(fault.contains(max_age) && fault.contains(lifetime), "{fault}");
    }

    #[test]
    fn a_secret_is_not_shown() {
        let config =
            read(&[(ISSUER, "https://a.example"), ("KEYCLOAK_CLIENT_SECRET", "hush-hush")]);
        let config = config.unwrap();
        assert!(!format!("{config:?}").contains("hush-hush"));
        let secret = config.auth.provider.unwrap().client_secret.unwrap();
        assert_eq!(secret.expose(), "hush-hush");
    }
}
