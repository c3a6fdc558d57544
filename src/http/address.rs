//! Whose request it is, by address.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderName, header};

use crate::{
    config::HttpConfig,
    metrics::{ForwardedFault, HttpMetrics},
};

/// The address at the other end of the TCP connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Between two log lines about headers that do not count.
const COMPLAINT: Duration = Duration::from_secs(60);
/// Bytes of a header in such a line.
const SHOWN: usize = 128;

/// Why a forwarding header does not count, or only in part.
struct Ignored<'a> {
    fault: ForwardedFault,
    text: &'a [u8],
}

/// Finds out where requests come from, by what trusted proxies say.
#[derive(Default)]
pub(crate) struct Forwarding {
    complained: Mutex<Option<Instant>>,
}

impl Forwarding {
    /// The client's address. A header that does not count is counted, and logged once a minute.
    pub(super) fn client(
        &self,
        config: &HttpConfig,
        metrics: &HttpMetrics,
        headers: &HeaderMap,
        peer: IpAddr,
    ) -> IpAddr {
        let (client, ignored) = client_address(config, headers, peer);
        if let Some(Ignored { fault, text }) = ignored {
            metrics.forwarded_ignored.inc(fault);
            self.complain(fault, text, peer);
        }
        client
    }

    fn complain(&self, fault: ForwardedFault, text: &[u8], peer: IpAddr) {
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.is_some_and(|at| at.elapsed() < COMPLAINT) {
            return;
        }
        *complained = Some(Instant::now());
        let header = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]);
        match fault {
            ForwardedFault::Unreadable => tracing::warn!(
                %peer, %header, "a trusted proxy's forwarding header cannot be read: its clients count as one"
            ),
            ForwardedFault::UntrustedPeer => tracing::warn!(
                %peer, %header, "a forwarding header does not count: its sender is not in TRUSTED_PROXIES"
            ),
        }
    }
}

/// The last address in `X-Forwarded-For` that is not a trusted proxy's, counted from the right, where our
/// own proxies wrote. `Forwarded` counts where the other is absent.
fn client_address<'a>(
    config: &HttpConfig,
    headers: &'a HeaderMap,
    peer: IpAddr,
) -> (IpAddr, Option<Ignored<'a>>) {
    let forwarded = !headers.contains_key(X_FORWARDED_FOR);
    let name = if forwarded { header::FORWARDED } else { X_FORWARDED_FOR };
    let read = |hop| address(if forwarded { parameter(hop, b"for")? } else { hop });
    let mut client = peer;
    for line in headers.get_all(name).iter().rev() {
        // Bytes, not text: what a client wrote must not hide what our proxy added to the same line.
        let hops = if forwarded { split(line.as_bytes(), b',') } else { plain(line.as_bytes()) };
        for hop in hops.into_iter().rev() {
            let fault = match (config.trusts(client), read(hop)) {
                (true, Some(hop)) => {
                    client = hop.to_canonical();
                    continue;
                }
                (true, None) => ForwardedFault::Unreadable,
                // What stands left of the client is its own.
                (false, _) if client != peer => return (client, None),
                (false, _) => ForwardedFault::UntrustedPeer,
            };
            return (client, Some(Ignored { fault, text: line.as_bytes() }));
        }
    }
    (client, None)
}

/// Whether the client speaks TLS, as far as a trusted proxy says.
pub(super) fn is_secure(config: &HttpConfig, headers: &HeaderMap, peer: IpAddr) -> bool {
    if !config.trusts(peer) {
        return false;
    }
    if let Some(scheme) = headers.get(X_FORWARDED_PROTO) {
        return scheme.as_bytes().eq_ignore_ascii_case(b"https");
    }
    let last = headers.get_all(header::FORWARDED).iter().next_back();
    let last = last.and_then(|line| split(line.as_bytes(), b',').pop());
    let scheme = last.and_then(|element| parameter(element, b"proto"));
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"https"))
}

/// The parts of a list between its commas.
fn plain(line: &[u8]) -> Vec<&[u8]> {
    line.split(|byte| *byte == b',').collect()
}

/// The value of a parameter of an element of `Forwarded`, without its quotes.
fn parameter<'a>(element: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    split(element, b';').into_iter().find_map(|pair| {
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        let (known, value) = (pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii());
        let bare = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
        known.eq_ignore_ascii_case(name).then_some(bare.unwrap_or(value))
    })
}

/// The parts between separators that are not in quotes. Read from the right, where our own proxies wrote: a
/// quote that a client left open swallows nothing of theirs.
fn split(text: &[u8], separator: u8) -> Vec<&[u8]> {
    let mut quoted = false;
    let mut parts: Vec<_> = text
        .rsplit(|byte| {
            quoted ^= *byte == b'"';
            *byte == separator && !quoted
        })
        .collect();
    parts.reverse();
    parts
}

/// An address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]:80`.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    let plain = text.parse().ok();
    plain.or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip())).or_else(bracketed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const PROXY: &str = "10.0.0.1";

    fn config() -> HttpConfig {
        let trusted = |name: &str| (name == "TRUSTED_PROXIES").then(|| "10.0.0.0/8".to_owned());
        Config::read(trusted).unwrap().http
    }

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), value.parse().unwrap())
        };
        list.iter().map(pair).collect()
    }

    /// The client, and what is said of the header.
    fn client(peer: &str, list: &[(&'static str, &str)]) -> (String, Option<ForwardedFault>) {
        let headers = headers(list);
        let (client, ignored) = client_address(&config(), &headers, peer.parse().unwrap());
        (client.to_string(), ignored.map(|ignored| ignored.fault))
    }

    #[test]
    fn a_hop_may_have_a_port() {
        for (hop, expected) in [
            ("203.0.113.5", "203.0.113.5"),
            ("203.0.113.5:4444", "203.0.113.5"),
            ("2001:db8::5", "2001:db8::5"),
            ("[2001:db8::5]", "2001:db8::5"),
            ("[2001:db8::5]:4444", "2001:db8::5"),
            ("::ffff:203.0.113.5", "203.0.113.5"),
            ("6.6.6.6, 203.0.113.5:1 , 10.0.0.2:80", "203.0.113.5"),
        ] {
            let seen = client(PROXY, &[("x-forwarded-for", hop)]);
            assert_eq!(seen, (expected.to_owned(), None), "{hop}");
        }
    }

    #[test]
    fn forwarded_is_read_where_the_other_header_is_absent() {
        for (value, expected) in [
            ("for=203.0.113.5", "203.0.113.5"),
            ("For=\"203.0.113.5:4444\";proto=https", "203.0.113.5"),
            ("proto=http; for=\"[2001:db8::5]:80\"; by=10.0.0.1", "2001:db8::5"),
            ("for=6.6.6.6, for=\"[2001:db8::5]\", for=10.0.0.2", "2001:db8::5"),
            ("for=\"6.6.6.6, 9.9.9.9\", for=203.0.113.5", "203.0.113.5"),
        ] {
            assert_eq!(
                client(PROXY, &[("forwarded", value)]),
                (expected.to_owned(), None),
                "{value}"
            );
        }
        let both = [("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "203.0.113.5")];
        assert_eq!(client(PROXY, &both), ("203.0.113.5".to_owned(), None));
    }

    #[test]
    fn what_cannot_be_read_and_what_an_untrusted_peer_says_is_told() {
        for (name, value) in [
            ("x-forwarded-for", "unknown"),
            ("x-forwarded-for", "203.0.113.5:99999"),
            ("x-forwarded-for", ""),
            ("forwarded", "for=_hidden"),
            ("forwarded", "proto=https"),
        ] {
            let expected = (PROXY.to_owned(), Some(ForwardedFault::Unreadable));
            assert_eq!(client(PROXY, &[(name, value)]), expected, "{value}");
        }
        for name in ["x-forwarded-for", "forwarded"] {
            let expected = ("192.0.2.1".to_owned(), Some(ForwardedFault::UntrustedPeer));
            assert_eq!(client("192.0.2.1", &[(name, "for=203.0.113.5")]), expected);
        }
        // A quote that the client left open hides nothing that the proxy wrote behind it.
        let open = [
            ("x-forwarded-for", "\", 203.0.113.5"),
            ("x-forwarded-for", "\"a, 203.0.113.5"),
            ("forwarded", "for=\"x, for=203.0.113.5"),
            ("forwarded", "for=\"x, for=\"203.0.113.5:1\";proto=http"),
        ];
        for (name, value) in open {
            let seen = client(PROXY, &[(name, value)]);
            assert_eq!(seen, ("203.0.113.5".to_owned(), None), "{value}");
        }
        // What the client wrote itself is nobody's fault.
        let chain = client(PROXY, &[("x-forwarded-for", "garbage, 203.0.113.5")]);
        assert_eq!(chain, ("203.0.113.5".to_owned(), None));
    }

    #[test]
    fn the_scheme_comes_from_a_trusted_proxy_in_either_header() {
        let peer = PROXY.parse().unwrap();
        for (name, value, secure) in [
            ("x-forwarded-proto", "HTTPS", true),
            ("x-forwarded-proto", "http", false),
            ("forwarded", "for=1.1.1.1;proto=https", true),
            ("forwarded", "proto=https, for=1.1.1.1;proto=http", false),
        ] {
            assert_eq!(is_secure(&config(), &headers(&[(name, value)]), peer), secure, "{value}");
        }
        let untrusted = "192.0.2.1".parse().unwrap();
        assert!(!is_secure(&config(), &headers(&[("x-forwarded-proto", "https")]), untrusted));
    }
}
