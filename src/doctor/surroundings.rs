//! The settings beyond their own rules, and what this machine gives: addresses and open files.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use reqwest::{Client, Response, StatusCode};

use super::Report;
use crate::{
    config::{AllowList, Config, DatabasePlace, Environment, ServerConfig, Weakness},
    machine,
};

/// Time for whoever holds an address to say who it is.
const WAIT: Duration = Duration::from_secs(2);

/// Settings that are allowed and rarely meant.
pub(super) fn settings(config: &Config, report: &mut Report) {
    report.ok(
        "configuration",
        format!("every setting is valid, ENV={}", config.environment.as_str()),
    );
    for weakness in config.weaknesses() {
        let Weakness { setting, says, fix } = weakness;
        report.warning("production", format!("{setting}: {says}"), fix);
    }
    if config.environment == Environment::Staging && config.ws.allowed_origins == AllowList::All {
        report.warning(
            "origins",
            "every website may open WebSockets, which ENV=production refuses",
            "set ALLOWED_WS_ORIGINS to the origins of your pages, such as https://app.example.com",
        );
    }
    if config.auth.provider.is_none() && !config.server.listen_addr.ip().is_loopback() {
        report.warning(
            "configuration",
            "tokens of the development issuer are trusted, and other machines can connect",
            "set KEYCLOAK_BASE_URL and KEYCLOAK_REALM, or OIDC_ISSUER; or listen on 127.0.0.1",
        );
    }
    if config.cluster.redis.is_some() && matches!(config.store.place, DatabasePlace::Sqlite(_)) {
        report.warning(
            "cluster",
            "REDIS_URL makes this node one of many, and its database is a file of its own",
            "set DATABASE_URL to a Postgres that all nodes share",
        );
    }
    let (ws, http) = (&config.ws, &config.http);
    for (all, most, each) in [
        ("WS_MAX_PENDING", ws.max_pending, ws.max_pending_per_address),
        ("HTTP_MAX_CONNECTIONS", http.max_connections, http.max_connections_per_address),
    ] {
        if each >= most {
            report.warning(
                "bounds",
                format!("one address may take all of {all}, which is {most}"),
                format!("set {all}_PER_ADDRESS to less, or to nothing: a quarter"),
            );
        }
    }
    // In production it is one of the weaknesses.
    if config.ws.query_token && config.environment != Environment::Production {
        report.warning(
            "configuration",
            "tokens in URLs are accepted: they end in the access logs of proxies",
            "set WS_QUERY_TOKEN=false once no client needs it",
        );
    }
}

/// Whether the addresses can be listened on.
pub(super) async fn addresses(config: &ServerConfig, report: &mut Report) {
    let mut bound = Vec::new();
    for (setting, address) in
        [("LISTEN_ADDR", Some(config.listen_addr)), ("OPS_ADDR", config.ops_addr)]
    {
        let Some(address) = address else { continue };
        let serves_probes = setting == "OPS_ADDR" || config.ops_addr.is_none();
        if setting == "OPS_ADDR" && address == config.listen_addr && address.port() != 0 {
            let fix = "set OPS_ADDR to another port, or to nothing";
            report.fault("address", "OPS_ADDR and LISTEN_ADDR are the same", fix);
            continue;
        }
        match TcpListener::bind(address) {
            Ok(listener) => {
                // Kept: the second address must be free beside the first.
                bound.push(listener);
                report.ok("address", format!("{setting}={address} is free"));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if is_switchboard(address).await {
                    let says = format!("{setting}={address} is served by a Switchboard that runs");
                    report.ok("address", says);
                    if serves_probes {
                        probes(address, report).await;
                    }
                    continue;
                }
                report.fault(
                    "address",
                    format!("{setting}={address} is taken by another program"),
                    format!("end that program, or set {setting} to another port"),
                );
            }
            Err(error) => report.fault(
                "address",
                format!("{setting}={address} cannot be listened on: {error}"),
                format!("set {setting} to an address of this machine and a port above 1023"),
            ),
        }
    }
}

/// Whether a balancer and Prometheus, which ask by address, are answered by the server that runs.
async fn probes(address: SocketAddr, report: &mut Report) {
    let address = machine::local(address);
    for (path, prober) in [("/health/ready", "a load balancer"), ("/metrics", "Prometheus")] {
        let url = format!("http://{address}{path}");
        match ask(&url).await.map(|answer| answer.status()) {
            Ok(StatusCode::OK) => report.ok("probe", format!("{url} says 200 OK")),
            Ok(StatusCode::SERVICE_UNAVAILABLE) => report.warning(
                "probe",
                format!("{url} says 503: the server that runs is not ready"),
                "wait if it starts or drains; else GET /health says which dependency is missing",
            ),
            Ok(status) => report.fault(
                "probe",
                format!("{url} says {status}: {prober} that asks by address is refused"),
                "update that server: an old one refuses probes by address under ALLOWED_HOSTS; \
                 or remove what filters requests in front of it",
            ),
            Err(error) => report.fault(
                "probe",
                format!("{url} does not answer: {}", error.without_url()),
                "see the log of the server that runs, and restart it if it hangs",
            ),
        }
    }
}

async fn ask(url: &str) -> reqwest::Result<Response> {
    let client = Client::builder().timeout(WAIT).no_proxy().tls_certs_only([]).build()?;
    client.get(url).send().await
}

/// Whether a Switchboard answers at an address.
async fn is_switchboard(address: SocketAddr) -> bool {
    let answer = ask(&format!("http://{}/health/live", machine::local(address))).await;
    // Every answer has both, also where the path or the host is not allowed.
    answer.is_ok_and(|answer| {
        let headers = answer.headers();
        headers.contains_key("x-correlation-id") && headers.contains_key("permissions-policy")
    })
}

/// Whether other users can use files of this server, and its start cannot change that.
pub(super) fn rights(config: &Config, report: &mut Report) {
    let left = crate::files::left_open(config.folder(), &config.files());
    if left.is_empty() {
        return;
    }
    let left: Vec<_> = left.iter().map(|path| path.display().to_string()).collect();
    let files = left.join(" ");
    report.warning(
        "rights",
        format!("other users can use {files}, which the start cannot change"),
        format!("as their owner, run `chmod go= {files}`, or give DATA_DIR a folder of its own"),
    );
}

/// Whether as many files may be open as connections are allowed.
pub(super) fn files(config: &Config, report: &mut Report) {
    let needed = machine::files_needed(config.sockets());
    match machine::raise_file_limit() {
        Some(limit) if limit < needed => report.warning(
            "files",
            format!("{limit} files may be open, and {needed} are needed for WS_MAX_CONNECTIONS, WS_MAX_PENDING and HTTP_MAX_CONNECTIONS"),
            format!(
                "raise the limit (ulimit -n, LimitNOFILE=, --ulimit nofile=) to {needed}, \
                 or lower WS_MAX_CONNECTIONS"
            ),
        ),
        Some(limit) => report.ok("files", format!("{limit} may be open, {needed} are needed")),
        None => report.ok("files", "any number may be open"),
    }
}
