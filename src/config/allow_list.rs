//! Lists of hosts and of origins that are let in: `ALLOWED_HOSTS`, `ALLOWED_WS_ORIGINS`, `CORS_ALLOWED_ORIGINS`,
//! `PLAINTEXT_HOSTS`. One function reads an entry of any of them.
//!
//! An entry that can never match is a fault that says what was meant: passed over, it would keep clients out, and
//! nobody would know why.

use std::net::Ipv6Addr;

use reqwest::Url;

use super::{Reader, value::Text};

/// Hosts or origins to compare with, or all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowList {
    /// `*`.
    All,
    /// These and no others, compared without regard to case.
    Only(Vec<Entry>),
}

/// An entry of an [`AllowList`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// `api.example.com`, `https://app.example.com`.
    Name(String),
    /// `*.example.com`, `https://*.example.com`: every host below one, and not that one itself.
    Below {
        /// What stands before the `*`.
        before: String,
        /// What stands after it.
        after: String,
    },
}

impl AllowList {
    /// Whether `name` is on the list.
    pub fn allows(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(entries) => entries.iter().any(|entry| entry.is(name)),
        }
    }
}

impl Entry {
    fn is(&self, name: &str) -> bool {
        let (before, after) = match self {
            Self::Name(known) => return known.eq_ignore_ascii_case(name),
            Self::Below { before, after } => (before, after),
        };
        let Some((start, rest)) = name.split_at_checked(before.len()) else { return false };
        let labels = rest.len().checked_sub(after.len());
        let Some((labels, end)) = labels.and_then(|at| rest.split_at_checked(at)) else {
            return false;
        };
        start.eq_ignore_ascii_case(before)
            && end.eq_ignore_ascii_case(after)
            && !labels.is_empty()
            // `https://evil.example:1/.example.com` is not below `example.com`.
            && labels.bytes().all(is_of_host)
    }
}

fn is_of_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)
}

/// What entries of a list are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    Origin,
}

impl Reader<'_> {
    pub(super) fn hosts(&mut self, name: &str) -> AllowList {
        self.allow_list(name, Kind::Host)
    }

    pub(super) fn origins(&mut self, name: &str) -> AllowList {
        self.allow_list(name, Kind::Origin)
    }

    fn allow_list(&mut self, name: &str, kind: Kind) -> AllowList {
        let Text(text) = self.get(name);
        let (mut all, mut only) = (false, Vec::new());
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            match read(entry, kind) {
                _ if entry == "*" => all = true,
                Ok(entry) => only.push(entry),
                Err(Fault { why, meant }) => {
                    self.faults
                        .push(format!("{name}: {entry:?} is not allowed, {why}; allowed: {meant}"));
                }
            }
        }
        if all { AllowList::All } else { AllowList::Only(only) }
    }
}

/// Why an entry can never match, and what was probably meant.
#[derive(Debug)]
struct Fault {
    why: &'static str,
    meant: String,
}

impl Fault {
    fn new(why: &'static str, meant: impl Into<String>) -> Self {
        Self { why, meant: meant.into() }
    }
}

/// Reads an entry. What has one meaning is taken for that: a slash at the end, a default port, capital letters.
fn read(text: &str, kind: Kind) -> Result<Entry, Fault> {
    let separates = |c: char| c == ';' || c == '|' || c.is_whitespace();
    if text.contains(separates) {
        let parts: Vec<_> = text.split(separates).filter(|part| !part.is_empty()).collect();
        return Err(Fault::new("entries are separated by commas", parts.join(",")));
    }
    let bare = text.trim_matches(['"', '\'', '`']);
    if bare != text {
        return Err(Fault::new("entries have no quotes", bare));
    }
    if kind == Kind::Origin && text.eq_ignore_ascii_case("null") {
        return Ok(Entry::Name("null".to_owned()));
    }
    let (scheme, place) = scheme(text, kind)?;
    let place = place.trim_end_matches('/');
    if let Some(end) = place.find(['/', '\\', '?', '#']) {
        let meant = format!("{scheme}{}", &place[..end]);
        return Err(Fault::new("it has no path", meant));
    }
    if let Some((_, place)) = place.rsplit_once('@') {
        return Err(Fault::new("it has no login", format!("{scheme}{place}")));
    }
    let (host, port) = split_port(place);
    let (below, host) = match host.strip_prefix("*.") {
        Some(host) => (true, known(host, &scheme)?),
        None => (false, known(&host, &scheme)?),
    };
    let port = checked(port, &scheme, &host, kind)?;
    Ok(match below {
        true => Entry::Below { before: scheme, after: format!(".{host}{port}") },
        false => Entry::Name(format!("{scheme}{host}{port}")),
    })
}

/// The scheme in small letters with its `://`, which origins have and hosts do not; and what follows it.
fn scheme(text: &str, kind: Kind) -> Result<(String, &str), Fault> {
    let (scheme, place) = text.split_once("://").unwrap_or(("", text));
    let scheme = scheme.to_ascii_lowercase();
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    match (kind, &*scheme) {
        (Kind::Host, "") => Ok((String::new(), place)),
        (Kind::Host, _) => {
            let host = place.split(['/', ':', '?']).next().unwrap_or_default();
            Err(Fault::new("a host has no scheme", host))
        }
        (Kind::Origin, "") => {
            Err(Fault::new("an origin begins with its scheme", format!("https://{place}")))
        }
        (Kind::Origin, "ws" | "wss") => {
            let meant = format!("http{}://{place}", &scheme[2..]);
            Err(Fault::new("an origin has the scheme of its page", meant))
        }
        (Kind::Origin, _) if scheme.bytes().all(is_known) => Ok((scheme + "://", place)),
        (Kind::Origin, _) => Err(Fault::new("this is no scheme", format!("https://{place}"))),
    }
}

/// A host and the port behind it; an address of IPv6 stands in brackets, where it may also be without.
fn split_port(place: &str) -> (String, Option<&str>) {
    if place.parse::<Ipv6Addr>().is_ok() {
        return (format!("[{place}]"), None);
    }
    match place.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host.to_owned(), Some(port)),
        _ => (place.to_owned(), None),
    }
}

/// A host as browsers write it.
fn known(host: &str, scheme: &str) -> Result<String, Fault> {
    if host.contains('*') {
        let meant = format!("* alone for all of them, or {scheme}*.example.com");
        return Err(Fault::new("a star stands for what is below a host", meant));
    }
    if let Some(host) = host.strip_prefix('.') {
        let meant = format!("{scheme}{host}, or {scheme}*.{host}, or both");
        return Err(Fault::new("it begins with a dot", meant));
    }
    if host.contains("..") {
        let meant = format!("{scheme}{}", host.replace("..", "."));
        return Err(Fault::new("it has nothing between two dots", meant));
    }
    let url = Url::parse(&format!("http://{host}/")).ok();
    let host = url.as_ref().and_then(Url::host_str);
    let host = host.filter(|host| host.starts_with('[') || host.bytes().all(is_of_host));
    host.map(ToOwned::to_owned)
        .ok_or_else(|| Fault::new("this is no host", format!("{scheme}app.example.com")))
}

/// The port with its colon; empty where it is the default one.
fn checked(port: Option<&str>, scheme: &str, host: &str, kind: Kind) -> Result<String, Fault> {
    let port = port.filter(|port| !port.is_empty());
    let number = port.map(|port| port.parse::<u16>().ok().filter(|number| *number > 0));
    match (number, scheme) {
        (None, _) | (Some(Some(80)), "" | "http://") | (Some(Some(443)), "" | "https://") => {
            Ok(String::new())
        }
        (Some(_), _) if kind == Kind::Host => {
            Err(Fault::new("hosts are compared without their port", host))
        }
        (Some(Some(number)), _) => Ok(format!(":{number}")),
        (Some(None), _) => Err(Fault::new("this is no port", format!("{scheme}{host}:8443"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(kind: Kind, text: &str) -> Result<AllowList, String> {
        let name = if kind == Kind::Host { "ALLOWED_HOSTS" } else { "CORS_ALLOWED_ORIGINS" };
        crate::config::Config::read(|asked| (asked == name).then(|| text.to_owned()))
            .map(|config| match kind {
                Kind::Host => config.http.allowed_hosts,
                Kind::Origin => config.http.cors_allowed_origins,
            })
            .map_err(|faults| faults.to_string())
    }

    #[test]
    fn what_has_one_meaning_is_taken_for_that() {
        for (kind, entry, name) in [
            (Kind::Origin, "https://app.example.com/", "https://app.example.com"),
            (Kind::Origin, "https://app.example.com:443", "https://app.example.com"),
            (Kind::Origin, "HTTP://App.Example.com:80/", "http://app.example.com"),
            (Kind::Origin, "http://localhost:5173", "http://localhost:5173"),
            (Kind::Origin, "https://bücher.example", "https://xn--bcher-kva.example"),
            (Kind::Origin, "http://[::1]:3000", "http://[::1]:3000"),
            (Kind::Origin, "capacitor://localhost", "capacitor://localhost"),
            (Kind::Origin, "null", "null"),
            (Kind::Origin, "https://*.example.com", "https://a.b.example.com"),
            (Kind::Origin, "https://*.example.com:8443", "https://a.example.com:8443"),
            (Kind::Host, "api.example.com/", "api.example.com"),
            (Kind::Host, "api.example.com:443", "API.example.com"),
            (Kind::Host, "*.example.com", "api.example.com"),
            (Kind::Host, "::1", "[::1]"),
            (Kind::Host, "[::1]", "[::1]"),
            (Kind::Host, "127.0.0.1", "127.0.0.1"),
            (Kind::Host, "switchboard_1", "switchboard_1"),
        ] {
            let read = list(kind, entry);
            assert!(read.as_ref().is_ok_and(|list| list.allows(name)), "{entry}: {read:?}");
        }
    }

    #[test]
    fn below_a_host_is_neither_that_host_nor_what_looks_like_it() {
        let hosts = list(Kind::Host, "*.example.com").unwrap();
        for name in ["example.com", ".example.com", "evilexample.com", "a.example.com.evil", ""] {
            assert!(!hosts.allows(name), "{name}");
        }
        let origins = list(Kind::Origin, "https://*.example.com").unwrap();
        for name in [
            "https://example.com",
            "http://a.example.com",
            "https://a.example.com:8443",
            "https://evil.example/.example.com",
            "https://evil.example:1#.example.com",
            "a.example.com",
        ] {
            assert!(!origins.allows(name), "{name}");
        }
    }

    #[test]
    fn what_can_never_match_is_a_fault_that_says_what_is_meant() {
        for (kind, entry, why, meant) in [
            (Kind::Origin, "\"https://a.example\"", "no quotes", "https://a.example"),
            (
                Kind::Origin,
                "https://a.example;https://b.example",
                "commas",
                "https://a.example,https://b.example",
            ),
            (
                Kind::Origin,
                "https://a.example https://b.example",
                "commas",
                "https://a.example,https://b.example",
            ),
            (Kind::Origin, "https://a.example/chat", "no path", "https://a.example"),
            (Kind::Origin, "https://a.example?x", "no path", "https://a.example"),
            (Kind::Origin, "https://ann@a.example", "no login", "https://a.example"),
            (Kind::Origin, "a.example", "scheme", "https://a.example"),
            (Kind::Origin, "*.a.example", "scheme", "https://*.a.example"),
            (Kind::Origin, "wss://a.example", "scheme of its page", "https://a.example"),
            (Kind::Origin, "https://*", "star", "* alone"),
            (Kind::Origin, "https://a.*.example", "star", "https://*.example.com"),
            (Kind::Origin, "https://", "no host", "https://app.example.com"),
            (Kind::Origin, "https://%2A.example", "no host", "https://app.example.com"),
            (Kind::Origin, "https://a.example:http", "no port", "https://a.example:8443"),
            (Kind::Origin, "https://a..b", "between two dots", "https://a.b"),
            (Kind::Host, "'a.example'", "no quotes", "a.example"),
            (Kind::Host, "https://a.example/", "no scheme", "a.example"),
            (Kind::Host, "a.example/chat", "no path", "a.example"),
            (Kind::Host, "a.example:8000", "without their port", "a.example"),
            (Kind::Host, ".a.example", "dot", "a.example, or *.a.example"),
            (Kind::Host, "*a.example", "star", "*.example.com"),
            (Kind::Host, "a example", "commas", "a,example"),
        ] {
            let fault = list(kind, entry).unwrap_err();
            let (said, allowed) = fault.split_once("; allowed: ").unwrap();
            assert!(said.contains(&format!("{entry:?}")) && said.contains(why), "{fault}");
            assert!(allowed.starts_with(meant) || allowed.ends_with(meant), "{fault}");
        }
    }

    #[test]
    fn a_star_among_others_is_all_and_every_fault_is_told() {
        assert_eq!(list(Kind::Host, "a.example, *"), Ok(AllowList::All));
        assert_eq!(list(Kind::Origin, " , "), Ok(AllowList::Only(Vec::new())));
        assert_eq!(list(Kind::Host, "a/b,*,c/d").unwrap_err().lines().count(), 2);
    }
}
