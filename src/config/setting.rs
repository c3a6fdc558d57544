//! What a setting is: its names, and how a value of it is shown.

/// One setting: an environment variable, a flag of `serve` and a key of the TOML file.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable; the flag is `--name-with-dashes`, the key `name_in_lower_case`.
    pub name: &'static str,
    /// The value where nothing sets it, as one would write it.
    pub default: &'static str,
    /// What a value looks like.
    pub value: &'static str,
    /// What it does, and what its special values mean.
    pub help: &'static str,
}

impl Setting {
    /// The flag, without its dashes.
    pub fn flag(&self) -> String {
        self.name.to_lowercase().replace('_', "-")
    }

    /// The key in the TOML file.
    pub fn key(&self) -> String {
        self.name.to_lowercase()
    }

    /// The environment variable that names a file with the value, for values that may hold a secret.
    pub fn file_variable(&self) -> Option<String> {
        matches!(self.value, "SECRET" | "URL").then(|| format!("{}_FILE", self.name))
    }

    /// A value as it may be shown: no secret, and a URL without the passwords in its login and query.
    pub fn shown(&self, value: &str) -> String {
        if self.value == "SECRET" && !value.is_empty() {
            return "***".to_owned();
        }
        if self.value != "URL" {
            return value.to_owned();
        }
        let (scheme, rest) = value.split_at(value.find("://").map_or(0, |at| at + 3));
        // The last `@`: a password may hold others.
        let (login, place) = match rest.rsplit_once('@') {
            Some((login, place)) => {
                (format!("{}:***@", login.split(':').next().unwrap_or_default()), place)
            }
            None => (String::new(), rest),
        };
        let mut shown = format!("{scheme}{login}");
        for (i, part) in place.split(['?', '&']).enumerate() {
            shown.push_str(["", "?", "&"][i.min(2)]);
            match part.split_once('=') {
                Some((name, _)) if name.to_lowercase().contains("pass") => {
                    shown.push_str(name);
                    shown.push_str("=***");
                }
                _ => shown.push_str(part),
            }
        }
        shown
    }
}

/// A line of the table.
pub(super) const fn setting(
    name: &'static str,
    default: &'static str,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { name, default, value, help }
}
