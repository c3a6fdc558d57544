//! How the text of a setting becomes a value. Every type says what it allows.

use std::{ffi::OsStr, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

/// A type that settings have.
pub(super) trait Value: Sized {
    /// What is allowed, to follow "allowed: ".
    const ALLOWED: &'static str;

    /// None where the text is not allowed.
    fn read(text: &str) -> Option<Self>;

    /// The same with blanks around it, and of what may not be UTF-8, as only paths may be.
    fn read_bytes(text: &OsStr) -> Option<Self> {
        Self::read(text.to_str()?.trim())
    }
}

impl Value for bool {
    const ALLOWED: &'static str = "true or false";

    fn read(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        }
    }
}

impl Value for u32 {
    const ALLOWED: &'static str = "a whole number from 0 to 4294967295";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

/// A count that cannot be 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Positive(pub(super) usize);

impl Value for Positive {
    const ALLOWED: &'static str = "a whole number from 1 to 1000000000";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok().filter(|n| (1..=1_000_000_000).contains(n)).map(Self)
    }
}

impl Value for Duration {
    const ALLOWED: &'static str =
        "a duration such as 500ms, 5s, 2m or 1h (a plain number is seconds), at most 365 days";

    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text);
        let number = f64::from_str(number).ok().filter(|n| n.is_finite() && *n >= 0.0)?;
        let seconds = match unit {
            "ms" => number / 1000.0,
            "" | "s" => number,
            "m" | "min" => number * 60.0,
            "h" => number * 3600.0,
            "d" => number * 86_400.0,
            _ => return None,
        };
        (seconds <= 365.0 * 86_400.0).then(|| Self::from_secs_f64(seconds))
    }
}

/// A size in bytes, from 1 to 1 GiB.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bytes(pub(super) usize);

impl Value for Bytes {
    const ALLOWED: &'static str = "a size from 1 to 1GiB such as 65536, 64KiB or 1MiB";

    fn read(text: &str) -> Option<Self> {
        usize::try_from(bytes(text, 1 << 30)?).ok().map(Self)
    }
}

/// A size in bytes on a disk, from 1 to 1 TiB.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskBytes(pub(super) u64);

impl Value for DiskBytes {
    const ALLOWED: &'static str = "a size from 1 to 1TiB such as 64MiB, 1GiB or 1TiB";

    fn read(text: &str) -> Option<Self> {
        bytes(text, 1 << 40).map(Self)
    }
}

/// A size of at most so many bytes.
fn bytes(text: &str, most: u64) -> Option<u64> {
    let (number, unit) = split_unit(text);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        _ => return None,
    };
    let bytes = u64::from_str(number).ok()?.checked_mul(factor)?;
    (1..=most).contains(&bytes).then_some(bytes)
}

/// The number and what follows it.
fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

impl Value for SocketAddr {
    const ALLOWED: &'static str = "an address and port such as 127.0.0.1:8000 or [::]:8000";

    fn read(text: &str) -> Option<Self> {
        text.replace("localhost:", "127.0.0.1:").parse().ok()
    }
}

impl Value for PathBuf {
    const ALLOWED: &'static str = "a path";

    fn read(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| text.into())
    }

    fn read_bytes(text: &OsStr) -> Option<Self> {
        text.to_str().map_or_else(|| Some(text.into()), |text| Self::read(text.trim()))
    }
}

impl Value for String {
    const ALLOWED: &'static str = "a text that is not empty";

    fn read(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| text.to_owned())
    }
}

/// Any text, which its setting's own rules look at.
pub(super) struct Text(pub(super) String);

impl Value for Text {
    const ALLOWED: &'static str = "a text";

    fn read(text: &str) -> Option<Self> {
        Some(Self(text.to_owned()))
    }
}

/// A text that is shown to nobody: `***` wherever a configuration is printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for whom it is meant.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Value for Secret {
    const ALLOWED: &'static str = String::ALLOWED;

    fn read(text: &str) -> Option<Self> {
        String::read(text).map(Self)
    }
}

/// An address on the web, as it was written: issuers are compared by their text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WebAddress(pub(super) String);

impl Value for WebAddress {
    const ALLOWED: &'static str =
        "an http or https URL without login, query and fragment, such as https://sso.example.com";

    fn read(text: &str) -> Option<Self> {
        let url = reqwest::Url::parse(text).ok()?;
        let plain = matches!(url.scheme(), "http" | "https")
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        plain.then(|| Self(text.to_owned()))
    }
}

/// An empty text is no value.
impl<T: Value> Value for Option<T> {
    const ALLOWED: &'static str = T::ALLOWED;

    fn read(text: &str) -> Option<Self> {
        if text.is_empty() { Some(None) } else { T::read(text).map(Some) }
    }

    fn read_bytes(text: &OsStr) -> Option<Self> {
        match text.to_str().map(str::trim) {
            Some("") => Some(None),
            _ => T::read_bytes(text).map(Some),
        }
    }
}

/// Separated by commas; an empty text is an empty list.
impl<T: Value> Value for Vec<T> {
    const ALLOWED: &'static str = T::ALLOWED;

    fn read(text: &str) -> Option<Self> {
        text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(T::read).collect()
    }
}

macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal),+ $(,)? } allowed $allowed:literal) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_meta])* $variant),+ }

        impl $name {
            /// The name in settings and labels.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl Value for $name {
            const ALLOWED: &'static str = $allowed;

            fn read(text: &str) -> Option<Self> {
                match text.to_ascii_lowercase().as_str() { $($text => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

choice!(
    /// What the server is run for.
    Environment {
        /// A developer's machine.
        Dev = "dev",
        /// Like production, with development tokens allowed.
        Staging = "staging",
        /// Only safe settings.
        Production = "production",
    } allowed "dev, staging or production"
);

choice!(
    /// What limits do that are shared over Redis, while it does not answer.
    FailMode {
        /// Each node limits by itself.
        Open = "open",
        /// What cannot be asked about is refused.
        Closed = "closed",
    } allowed "open or closed, or empty: open with ENV=dev, else closed"
);

choice!(
    /// What becomes of a user's connections where one is too many.
    ConnectionPolicy {
        /// The new one is refused.
        RejectNew = "reject_new",
        /// The oldest is closed.
        KickOldest = "kick_oldest",
    } allowed "reject_new or kick_oldest"
);

choice!(
    /// How log lines look.
    LogFormat {
        /// Human on a terminal, else JSON.
        Auto = "auto",
        /// One object a line.
        Json = "json",
        /// For eyes.
        Human = "human",
    } allowed "auto, json or human"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, millis) in
            [("5", 5000), ("500ms", 500), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(Duration::read(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "-1s", "5 years", "1e9h", "nan", "s"] {
            assert_eq!(Duration::read(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_have_units_and_an_end() {
        assert_eq!(Bytes::read("64KiB").map(|b| b.0), Some(65536));
        assert_eq!(Bytes::read("1MiB").map(|b| b.0), Some(1 << 20));
        for text in ["0", "2GiB", "64 parsecs", "", "-1"] {
            assert!(Bytes::read(text).is_none(), "{text}");
        }
    }
}
