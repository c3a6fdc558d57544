//! Forwarding headers in any bytes: the client is the right-most hop that is no proxy of ours, and nothing that
//! a client wrote itself makes it another.

use std::sync::LazyLock;

use axum::http::HeaderValue;

use super::*;
use crate::config::Config;

/// 10.0.0.0/8 and fd00::/8 are ours.
static CONFIG: LazyLock<HttpConfig> = LazyLock::new(|| {
    let trusted =
        |name: &str| (name == "TRUSTED_PROXIES").then(|| "10.0.0.0/8, fd00::/8".to_owned());
    Config::read(trusted).expect("these are networks").http
});

/// The first byte says who is at the other end; then come lines, each a letter for the header and its value.
pub(crate) fn forwarding(input: &[u8]) {
    let Some((peer, lines)) = input.split_first() else { return };
    let peer: IpAddr = match peer % 3 {
        0 => [10, 0, 0, 1].into(),
        1 => [192, 0, 2, 1].into(),
        _ => [0xfd00, 0, 0, 0, 0, 0, 0, 1].into(),
    };
    let mut headers = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n') {
        let [kind, value @ ..] = line else { continue };
        let name = match kind {
            b'x' => X_FORWARDED_FOR,
            b'p' => X_FORWARDED_PROTO,
            _ => header::FORWARDED,
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    let (client, ignored) = client_address(&CONFIG, &headers, peer);
    let fault = ignored.map(|ignored| ignored.fault);
    assert_eq!((client, fault), model(&headers, peer));
    if !CONFIG.trusts(peer) {
        assert!(client == peer && !is_secure(&CONFIG, &headers, peer), "a stranger is believed");
    }
    assert!(client == peer || client == client.to_canonical());
    spelled(client);
    if !CONFIG.trusts(client) {
        nothing_before_it_counts(&headers, peer, (client, fault));
    }
}

/// All hops of all lines in one row, and from its right end those of ours.
fn model(headers: &HeaderMap, peer: IpAddr) -> (IpAddr, Option<ForwardedFault>) {
    let listed = headers.contains_key(X_FORWARDED_FOR);
    let name = if listed { X_FORWARDED_FOR } else { header::FORWARDED };
    let mut row: Vec<Option<IpAddr>> = Vec::new();
    for line in headers.get_all(name) {
        let line = line.as_bytes();
        row.extend(parts(line, b',', !listed).map(|hop| match listed {
            true => address(hop),
            false => parts(hop, b';', true).find_map(|pair| value(pair, b"for")).and_then(address),
        }));
    }
    let mut client = peer;
    while let Some(hop) = row.pop() {
        if !CONFIG.trusts(client) {
            return (client, (client == peer).then_some(ForwardedFault::UntrustedPeer));
        }
        match hop {
            Some(hop) => client = hop.to_canonical(),
            None => return (client, Some(ForwardedFault::Unreadable)),
        }
    }
    (client, None)
}

/// The parts of a text. A separator with an odd number of quotes to its right is within quotes.
fn parts(text: &[u8], separator: u8, quotes: bool) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    let separates = move |at: usize| {
        let right = text[at..].iter().filter(|byte| **byte == b'"').count();
        text[at] == separator && (!quotes || right % 2 == 0)
    };
    std::iter::from_fn(move || {
        let part = rest?;
        let start = text.len() - part.len();
        let end = (start..text.len()).find(|at| separates(*at));
        rest = end.map(|end| &text[end + 1..]);
        Some(&text[start..end.unwrap_or(text.len())])
    })
}

fn value<'a>(pair: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    let value = pair[equals + 1..].trim_ascii();
    let is_quoted = value.len() > 1 && value.starts_with(b"\"") && value.ends_with(b"\"");
    let bare = if is_quoted { &value[1..value.len() - 1] } else { value };
    pair[..equals].trim_ascii().eq_ignore_ascii_case(name).then_some(bare)
}

/// Every way to write an address is read as that address.
fn spelled(client: IpAddr) {
    let port = SocketAddr::new(client, 4444).to_string();
    let bare = format!(" {client}\t");
    let bracketed = format!("[{client}]");
    for text in [port, bare, bracketed] {
        assert_eq!(address(text.as_bytes()), Some(client), "{text}");
    }
}

/// What a client wrote stands left of what our proxies added: in a line before, or before a comma.
fn nothing_before_it_counts(
    headers: &HeaderMap,
    peer: IpAddr,
    found: (IpAddr, Option<ForwardedFault>),
) {
    let name =
        if headers.contains_key(X_FORWARDED_FOR) { X_FORWARDED_FOR } else { header::FORWARDED };
    let lines: Vec<_> = headers.get_all(&name).iter().collect();
    let Some(first) = lines.first() else { return };
    for forged in ["10.9.9.9", "for=10.9.9.9", "for=\"", "\"", "for=6.6.6.6;proto=https"] {
        let forged_line = HeaderValue::from_static(forged);
        let mut before = HeaderMap::new();
        for line in [&forged_line].into_iter().chain(lines.iter().copied()) {
            before.append(&name, line.clone());
        }
        assert_eq!(seen(&before, peer), found, "a line {forged} before");
        // An odd quote is one that our proxy did not close: then the comma may belong to it.
        let quotes = first.as_bytes().iter().filter(|byte| **byte == b'"').count();
        if name == header::FORWARDED && quotes % 2 == 1 {
            continue;
        }
        let joined = [forged.as_bytes(), b",", first.as_bytes()].concat();
        let joined = HeaderValue::from_bytes(&joined).expect("both are values");
        let mut before = HeaderMap::new();
        for line in [&joined].into_iter().chain(lines[1..].iter().copied()) {
            before.append(&name, line.clone());
        }
        assert_eq!(seen(&before, peer), found, "{forged} before");
    }
}

fn seen(headers: &HeaderMap, peer: IpAddr) -> (IpAddr, Option<ForwardedFault>) {
    let (client, ignored) = client_address(&CONFIG, headers, peer);
    (client, ignored.map(|ignored| ignored.fault))
}
