//! Whose request it is, by address.

use std::net::IpAddr;

use axum::http::{Extensions, HeaderMap};

use crate::config::Network;

/// The address at the other end of the TCP connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// The client's address: the last one in `X-Forwarded-For` that is not a trusted proxy's, counted from
/// the right, where our own proxies wrote.
pub(crate) fn client_address(
    proxies: &[Network],
    headers: &HeaderMap,
    extensions: &Extensions,
) -> IpAddr {
    let trusted = |address: IpAddr| proxies.iter().any(|network| network.contains(address));
    let peer = extensions.get::<Peer>().expect("the accept loop sets the peer").0;
    // Bytes, not text: what a client wrote must not hide what our proxy added to the same line.
    let hops: Vec<_> = headers
        .get_all("x-forwarded-for")
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(|hop| std::str::from_utf8(hop).ok()?.trim().parse::<IpAddr>().ok())
        .collect();
    let mut client = peer;
    for hop in hops.into_iter().rev() {
        let (true, Some(hop)) = (trusted(client), hop) else { break };
        client = hop.to_canonical();
    }
    client
}
