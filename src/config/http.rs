//! The REST API, and what HTTP connections may hold.

use std::{net::IpAddr, time::Duration};

use super::{AllowList, Network, Reader, value::Bytes};

/// `HTTP_MAX_BODY_MEMORY` where nothing sets it, in bytes.
const BODY_MEMORY: usize = 64 << 20;

/// The REST API.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// `HTTP_MAX_CONNECTIONS`, of each listener.
    pub max_connections: usize,
    /// `HTTP_MAX_CONNECTIONS_PER_ADDRESS`, or a quarter of `max_connections`.
    pub max_connections_per_address: usize,
    /// `HTTP_MAX_BODY_MEMORY`, in bytes, or 64 MiB.
    pub max_body_memory: usize,
    /// `HTTP_KEEP_ALIVE`.
    pub keep_alive: Duration,
    /// `HTTP_REQUEST_TIMEOUT`.
    pub request_timeout: Duration,
    /// `METRICS_RATE_LIMIT`, a minute of one address; 0: no limit.
    pub scrapes_per_minute: u32,
    /// `RATE_LIMIT_PER_MINUTE`; 0: no limit.
    pub rate_limit_per_minute: u32,
    /// `RATE_LIMIT_BURST`, on top.
    pub rate_limit_burst: u32,
    /// `MAX_REQUEST_BODY_SIZE`, in bytes.
    pub max_body_bytes: usize,
    /// `ALLOWED_HOSTS`.
    pub allowed_hosts: AllowList,
    /// `TRUSTED_PROXIES`.
    pub trusted_proxies: Vec<Network>,
    /// `CORS_ALLOWED_ORIGINS`.
    pub cors_allowed_origins: AllowList,
}

impl HttpConfig {
    /// Whether an address is a proxy of ours.
    pub(crate) fn trusts(&self, address: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(address))
    }

    /// The address that bounds by address count: none for a proxy of ours, behind which there is a crowd.
    pub(crate) fn counted(&self, address: IpAddr) -> Option<IpAddr> {
        (!self.trusts(address)).then_some(address)
    }
}

impl Reader<'_> {
    pub(super) fn http(&mut self) -> HttpConfig {
        let max_connections = self.count("HTTP_MAX_CONNECTIONS");
        let max_body_bytes = self.get::<Bytes>("MAX_REQUEST_BODY_SIZE").0;
        // One address may have a quarter, and a body of the allowed size must fit into that.
        let least = max_body_bytes.saturating_mul(4);
        let max_body_memory = self.get::<Option<Bytes>>("HTTP_MAX_BODY_MEMORY");
        let max_body_memory = max_body_memory.map_or(BODY_MEMORY.max(least), |bytes| bytes.0);
        if max_body_memory < least {
            self.faults.push(format!(
                "HTTP_MAX_BODY_MEMORY: {max_body_memory} bytes are not allowed; allowed: at least {least}, \
                 four times MAX_REQUEST_BODY_SIZE"
            ));
        }
        HttpConfig {
            max_connections,
            max_connections_per_address: self
                .count_or("HTTP_MAX_CONNECTIONS_PER_ADDRESS", max_connections.div_ceil(4)),
            max_body_memory,
            keep_alive: self.get("HTTP_KEEP_ALIVE"),
            request_timeout: self.get("HTTP_REQUEST_TIMEOUT"),
            scrapes_per_minute: self.get("METRICS_RATE_LIMIT"),
            rate_limit_per_minute: self.get("RATE_LIMIT_PER_MINUTE"),
            rate_limit_burst: self.get("RATE_LIMIT_BURST"),
            max_body_bytes,
            allowed_hosts: self.hosts("ALLOWED_HOSTS"),
            trusted_proxies: self.get("TRUSTED_PROXIES"),
            cors_allowed_origins: self.origins("CORS_ALLOWED_ORIGINS"),
        }
    }
}
