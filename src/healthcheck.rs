//! `switchboard healthcheck`: is the server of this configuration ready? It is for the image of a
//! container, which has no shell and no other program to ask with. `main` prints what comes of it.

use std::time::Duration;

use reqwest::{Client, StatusCode};

use crate::{config::Config, machine};

/// A server that takes longer is of no use to a balancer either.
const WAIT: Duration = Duration::from_secs(2);

/// Why the server is not ready.
#[derive(Debug, thiserror::Error)]
pub enum Unready {
    /// It is starting or draining, or what it needs is away.
    #[error("not ready: {url} says {status}")]
    Refused {
        /// What was asked.
        url: String,
        /// What it answered.
        status: StatusCode,
    },
    /// Nobody answers in time.
    #[error("not ready: {url} does not answer")]
    Silent {
        /// What was asked.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
}

/// Asks `/health/ready` where the server serves it; returns what was asked.
pub async fn ready(config: &Config) -> Result<String, Unready> {
    let server = &config.server;
    let address = machine::local(server.ops_addr.unwrap_or(server.listen_addr));
    let url = format!("http://{address}/health/ready");
    let asked = async {
        let client = Client::builder().timeout(WAIT).no_proxy().tls_certs_only([]).build()?;
        // By address, as a balancer asks: a Host header of ours would hide that others are refused.
        client.get(&url).send().await
    };
    match asked.await.map(|answer| answer.status()) {
        Ok(StatusCode::OK) => Ok(url),
        Ok(status) => Err(Unready::Refused { url, status }),
        Err(source) => Err(Unready::Silent { url, source: source.without_url() }),
    }
}
