//! HAProxy in front of three nodes, as `docker/haproxy.cfg` has it: found or installed, gone with the
//! test.

use std::{net::SocketAddr, path::Path};

use super::programs::{Serving, program};

const MISSING: &str = "the tests need HAProxy: install it (Debian and Ubuntu: apt-get install haproxy; \
     macOS: brew install haproxy) or put its haproxy into PATH";

/// Starts one, and waits until it listens.
pub(crate) fn balancer(nodes: [SocketAddr; 3]) -> Serving {
    // Debian has it where only administrators look.
    let haproxy = program(&["haproxy", "/usr/sbin/haproxy"], "haproxy", MISSING);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/haproxy.cfg");
    let (folder, addr) = Serving::prepare();
    let [bind, one, two, three] = [addr, nodes[0], nodes[1], nodes[2]].map(|addr| addr.to_string());
    let environment = [("BIND", &*bind), ("NODE1", &one), ("NODE2", &two), ("NODE3", &three)];
    let args = ["-db".to_owned(), "-f".to_owned(), file.display().to_string()];
    Serving::start(&haproxy, &args, &environment, (folder, addr))
}
