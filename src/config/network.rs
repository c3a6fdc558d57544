//! Networks of addresses: those that settings name, and the one that stands for a client.

use std::net::{IpAddr, Ipv6Addr};

use super::value::Value;

/// The network that limits by address count for one client: a whole /64 over IPv6, where every client has
/// 2⁶⁴ addresses to come from; over IPv4 the address itself.
pub(crate) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        v4 => v4,
    }
}

/// A network of addresses, `10.0.0.0/8`, or a single one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Whether `address` is inside.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (network, address, width) = match (self.address, address.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                (u128::from(a.to_bits()), u128::from(b.to_bits()), 32)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
            _ => return false,
        };
        let host_bits = width - u32::from(self.prefix);
        host_bits == 128 || (network ^ address) >> host_bits == 0
    }

    /// Whether it is wider than any private network, which are `10.0.0.0/8` and `fc00::/7`.
    pub(crate) fn is_wider_than_private(&self) -> bool {
        self.prefix < if self.address.is_ipv4() { 8 } else { 7 }
    }
}

impl Value for Network {
    const ALLOWED: &'static str =
        "addresses or networks such as 127.0.0.1 or 10.0.0.0/8, separated by commas";

    fn read(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/').unwrap_or((text, ""));
        let address = address.parse::<IpAddr>().ok()?.to_canonical();
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = if prefix.is_empty() { width } else { prefix.parse().ok()? };
        (prefix <= width).then_some(Self { address, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_one_network_over_all_of_its_ipv6_addresses() {
        let of = |address: &str| network_of(address.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), "10.0.0.1");
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }

    #[test]
    fn networks_contain_their_addresses() {
        let contains = |network: &str, address: &str| {
            Network::read(network).unwrap().contains(address.parse().unwrap())
        };
        assert!(contains("10.0.0.0/8", "10.255.0.1"));
        assert!(!contains("10.0.0.0/8", "11.0.0.1"));
        assert!(contains("127.0.0.1", "127.0.0.1"));
        assert!(contains("127.0.0.1", "::ffff:127.0.0.1"));
        assert!(!contains("127.0.0.1", "127.0.0.2"));
        assert!(contains("0.0.0.0/0", "8.8.8.8"));
        assert!(contains("::/0", "fe80::1"));
        assert!(contains("fe80::/10", "fe80::1"));
        assert_eq!(Network::read("10.0.0.0/33"), None);
        assert_eq!(Network::read("10.0.0"), None);
    }
}
