//! How two names of an issuer differ: most often it is the same one, seen from inside and outside of
//! containers.

use reqwest::Url;

/// What tells two names apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Difference {
    /// A slash at the end.
    Slash,
    /// Scheme, host or port; the path is the same.
    Place,
    /// The path on the same host: another realm.
    Path,
    /// Everything.
    All,
}

impl Difference {
    pub(super) fn between(one: &str, other: &str) -> Self {
        if one.trim_end_matches('/') == other.trim_end_matches('/') {
            return Self::Slash;
        }
        let (Ok(one), Ok(other)) = (Url::parse(one), Url::parse(other)) else { return Self::All };
        let path = |url: &Url| url.path().trim_end_matches('/').to_owned();
        match (path(&one) == path(&other), one.origin() == other.origin()) {
            (true, _) if !path(&one).is_empty() => Self::Place,
            (false, true) => Self::Path,
            _ => Self::All,
        }
    }
}

/// The settings under which an issuer is known by `name` and reached where it is reached now.
pub(super) fn settings_for(name: &str, address: &str) -> String {
    match address.split_once("/realms/") {
        Some((base, realm)) => format!(
            "set OIDC_ISSUER={name}, KEYCLOAK_BASE_URL={base} and KEYCLOAK_REALM={}",
            realm.trim_end_matches('/')
        ),
        None => format!("set OIDC_ISSUER={name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_by_place_path_slash_or_altogether() {
        let inside = "http://keycloak:8080/realms/app";
        for (other, difference) in [
            ("http://localhost:8080/realms/app", Difference::Place),
            ("https://keycloak:8080/realms/app", Difference::Place),
            ("http://keycloak:8080/realms/app/", Difference::Slash),
            ("http://keycloak:8080/realms/master", Difference::Path),
            ("https://sso.example/realms/other", Difference::All),
            ("switchboard-dev", Difference::All),
        ] {
            assert_eq!(Difference::between(inside, other), difference, "{other}");
        }
        let roots = ("https://a.example", "https://b.example");
        assert_eq!(Difference::between(roots.0, roots.1), Difference::All);
    }
}
