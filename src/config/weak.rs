//! What is weak in production. What would let strangers in is a fault; all else is a line at the start and one of
//! the doctor, or with `PRODUCTION_STRICT` a fault too.

use std::{fmt, net::IpAddr, time::Duration};

use percent_encoding::percent_decode_str;
use reqwest::Url;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::{AllowList, Config, DatabasePlace, Environment, PostgresUrl, Reader};

/// The longest `JWT_LEEWAY` that is no weakness: clocks that differ by more want mending.
const LEEWAY: Duration = Duration::from_secs(60);

const PAGES: &str = "set it to the origins of your pages, such as https://app.example.com";

/// A setting that works, and that production should not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weakness {
    /// The setting to change.
    pub setting: &'static str,
    /// What is weak.
    pub says: String,
    /// What to change.
    pub fix: String,
}

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.setting, self.says, self.fix)
    }
}

impl Reader<'_> {
    /// What `ENV=production` refuses.
    pub(super) fn check_production(&mut self, config: &Config) {
        if config.environment != Environment::Production {
            return;
        }
        if config.auth.provider.is_none() {
            self.faults.push(
                "ENV: production refuses the development token issuer, and no other is configured; \
                 allowed without KEYCLOAK_BASE_URL and KEYCLOAK_REALM, or OIDC_ISSUER: dev or staging"
                    .into(),
            );
        }
        if config.ws.allowed_origins == AllowList::All {
            self.faults.push(
                "ALLOWED_WS_ORIGINS: \"*\" is not allowed with ENV=production; \
                 allowed: a list of origins such as https://app.example.com"
                    .into(),
            );
        }
        if let Some(issuer) = config.auth.provider.as_ref().map(|provider| &provider.issuer)
            && plain_host(issuer).is_some_and(|host| !is_here(&host))
        {
            let is_set = (self.lookup)("OIDC_ISSUER").is_some_and(|text| !text.is_empty());
            let setting = if is_set { "OIDC_ISSUER" } else { "KEYCLOAK_BASE_URL" };
            self.faults.push(format!(
                "{setting}: the issuer {issuer:?} is not allowed with ENV=production, as its keys could be \
                 changed on their way; allowed: https, or http on this machine alone"
            ));
        }
        if config.http.trusted_proxies.iter().any(|network| network.is_wider_than_private()) {
            self.faults.push(
                "TRUSTED_PROXIES: a network of everybody is not allowed with ENV=production, as clients could \
                 choose their address; allowed: the addresses of your proxies, or networks as wide as 10.0.0.0/8"
                    .into(),
            );
        }
        if config.strict {
            let refused = |weakness: Weakness| {
                let Weakness { setting, says, fix } = weakness;
                format!("{setting}: {says}, which PRODUCTION_STRICT refuses; allowed: {fix}")
            };
            self.faults.extend(config.weaknesses().into_iter().map(refused));
        }
    }
}

impl Config {
    /// What is weak; nothing is with another `ENV` than production.
    pub fn weaknesses(&self) -> Vec<Weakness> {
        if self.environment != Environment::Production {
            return Vec::new();
        }
        [self.plaintext(), self.doors(), self.habits(), self.without_limit()].concat()
    }

    /// What is reached without TLS beyond this machine, and is not in `PLAINTEXT_HOSTS`.
    fn plaintext(&self) -> Vec<Weakness> {
        let database = match &self.store.place {
            DatabasePlace::Postgres(url) => plain_postgres(url),
            DatabasePlace::Sqlite(_) => Vec::new(),
        };
        let redis = self.cluster.redis.as_ref().map(|url| plain_redis(url.expose()));
        let provider = self.auth.provider.as_ref();
        // An issuer without TLS is a fault.
        let provider = provider.filter(|provider| plain_host(&provider.issuer).is_none());
        let provider = provider.and_then(|provider| plain_host(&provider.address));
        let traces = self.traces.as_ref().and_then(|traces| plain_host(&traces.endpoint));
        let reached = [
            ("DATABASE_URL", database, "add sslmode=verify-full and sslrootcert=PATH"),
            ("REDIS_URL", redis.unwrap_or_default(), "begin it with rediss"),
            ("KEYCLOAK_BASE_URL", Vec::from_iter(provider), "begin it with https"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", Vec::from_iter(traces), "begin it with https"),
        ];
        let weak = reached.into_iter().filter_map(|(setting, hosts, fix)| {
            let far = |host: &String| !is_here(host) && !self.plaintext_hosts.allows(host);
            let host = hosts.into_iter().find(far)?;
            Some(Weakness {
                setting,
                says: format!("{host} is reached without TLS"),
                fix: format!(
                    "{fix}; or list {host} in PLAINTEXT_HOSTS, if nobody else is on the way to it"
                ),
            })
        });
        weak.collect()
    }

    /// Who is let in.
    fn doors(&self) -> Vec<Weakness> {
        let mut weak = Vec::new();
        let mut add = |setting, says: &str, fix: &str| {
            weak.push(Weakness { setting, says: says.to_owned(), fix: fix.to_owned() });
        };
        if self.http.allowed_hosts == AllowList::All {
            let fix = "set it to the hosts that clients know, such as api.example.com";
            add("ALLOWED_HOSTS", "every Host is served", fix);
        }
        let cors = &self.http.cors_allowed_origins;
        if *cors == AllowList::All {
            add("CORS_ALLOWED_ORIGINS", "every website may call the REST API", PAGES);
        }
        for (setting, list) in
            [("ALLOWED_WS_ORIGINS", &self.ws.allowed_origins), ("CORS_ALLOWED_ORIGINS", cors)]
        {
            if *list != AllowList::All && list.allows("null") {
                add(setting, "every website has the origin null in a sandboxed frame", PAGES);
            }
        }
        if self.server.ops_addr.is_none() && !self.server.listen_addr.ip().is_loopback() {
            let fix =
                "set it to an address that Prometheus and operators reach, and clients do not";
            add("OPS_ADDR", "/metrics, /health and /admin are on the port of clients", fix);
        }
        if self.ws.query_token {
            let fix = "set it to false once no client needs it";
            add("WS_QUERY_TOKEN", "tokens in URLs end in the access logs of proxies", fix);
        }
        weak
    }

    /// What is looked at less than it should be.
    fn habits(&self) -> Vec<Weakness> {
        let mut weak = Vec::new();
        if !self.audit.enabled {
            weak.push(Weakness {
                setting: "AUDIT_ENABLED",
                says: "there is no audit trail".to_owned(),
                fix: "set it to true".to_owned(),
            });
        }
        if self.auth.leeway > LEEWAY {
            let leeway = self.auth.leeway;
            weak.push(Weakness {
                setting: "JWT_LEEWAY",
                says: format!("tokens are taken for {leeway:?} after they expire"),
                fix: format!("set it to {LEEWAY:?} at most, and the clocks by NTP"),
            });
        }
        weak
    }

    /// Limits that are none.
    fn without_limit(&self) -> Vec<Weakness> {
        let (ws, http, auth) = (&self.ws, &self.http, &self.auth);
        let limits = [
            ("WS_MAX_CONNECTIONS_PER_USER", ws.max_connections_per_user),
            ("WS_MESSAGE_RATE_LIMIT", ws.message_rate_limit),
            ("WS_MAX_STRIKES", ws.max_strikes),
            ("WS_MAX_EXPULSIONS", ws.expulsions_per_minute),
            ("MAX_ROWS", self.handlers.max_rows),
            ("RATE_LIMIT_PER_MINUTE", http.rate_limit_per_minute),
            ("METRICS_RATE_LIMIT", http.scrapes_per_minute),
            ("AUTH_FAILURES_PER_MINUTE", auth.failures_per_minute),
            ("AUTH_REFUSALS_PER_MINUTE", auth.refusals_per_minute),
            ("BACKCHANNEL_FAILURES_PER_MINUTE", auth.backchannel_failures_per_minute),
            ("AUDIT_DENIALS_PER_USER", self.audit.denials_per_user.unwrap_or_default()),
            ("DB_STATEMENT_TIMEOUT", u32::from(!self.store.statement_timeout.is_zero())),
        ];
        let none = limits.into_iter().filter(|(_, limit)| *limit == 0);
        let weak = none.map(|(setting, _)| Weakness {
            setting,
            says: "0 is no limit".to_owned(),
            fix: "set it to more than 0, or to nothing: `switchboard --help` has the default"
                .to_owned(),
        });
        weak.collect()
    }
}

/// The host of a URL that is not https.
fn plain_host(url: &str) -> Option<String> {
    let url = Url::parse(url).ok().filter(|url| url.scheme() != "https")?;
    url.host_str().map(ToOwned::to_owned)
}

/// The servers of a URL of Postgres that are reached over the network, and not with TLS for sure.
fn plain_postgres(url: &PostgresUrl) -> Vec<String> {
    let servers = url.servers().filter_map(|server| server.parse::<PgConnectOptions>().ok());
    let plain = servers.filter(|server| {
        let mode = server.get_ssl_mode();
        server.get_socket().is_none()
            && matches!(mode, PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer)
    });
    plain.map(|server| server.get_host().to_owned()).collect()
}

/// The hosts of a URL of Redis that is not with TLS.
fn plain_redis(url: &str) -> Vec<String> {
    let (mut hosts, parameters) = parts(url);
    if url.starts_with("rediss") {
        return Vec::new();
    }
    let nodes = parameters.into_iter().filter(|(name, _)| name == "node");
    hosts.extend(nodes.map(|(_, node)| without_port(&node).to_owned()));
    hosts
}

/// The hosts of a URL, which may be many with commas between them, and its parameters.
fn parts(url: &str) -> (Vec<String>, Vec<(String, String)>) {
    let (_, rest) = url.split_once("://").unwrap_or(("", url));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let places = rest.split('/').next().unwrap_or_default();
    let places = places.rsplit('@').next().unwrap_or_default();
    let host = |place| percent_decode_str(without_port(place)).decode_utf8_lossy().into_owned();
    let hosts = places.split(',').map(host).collect();
    (hosts, form_urlencoded::parse(query.as_bytes()).into_owned().collect())
}

fn without_port(place: &str) -> &str {
    match place.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => place,
    }
}

/// Whether a host is this machine: nobody else is on the way. A path is that of a socket.
fn is_here(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host.is_empty()
        || host.starts_with('/')
        || host == "localhost"
        || host.ends_with(".localhost")
        || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The settings that are weak in production with some settings, without those that are weak by default.
    fn weak(settings: &[(&str, &str)]) -> Vec<&'static str> {
        let production = [
            ("ENV", "production"),
            ("ALLOWED_WS_ORIGINS", "https://app.example"),
            ("ALLOWED_HOSTS", "api.example"),
            ("OIDC_ISSUER", "https://sso.example/realms/a"),
        ];
        let get = |name: &str| {
            let all = settings.iter().chain(&production);
            all.into_iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned())
        };
        let weak = Config::read(get).unwrap().weaknesses();
        weak.into_iter().map(|weakness| weakness.setting).collect()
    }

    #[test]
    fn databases_beyond_this_machine_want_tls() {
        assert!(weak(&[]).is_empty());
        for (url, is_weak) in [
            ("postgres://ann:hush@db.example/x", true),
            ("postgres://ann:hush@db.example:5432/x?sslmode=prefer", true),
            ("postgres://ann:hush@db.example/x?sslmode=disable", true),
            ("postgres://localhost/x?host=db.example", true),
            ("postgres://[fd00::1]:5432/x", true),
            ("postgres://ann:hush@db.example/x?sslmode=require", false),
            ("postgres://ann:hush@db.example/x?sslmode=verify-full", false),
            ("postgres://ann:hush%40db.example@127.0.0.1:5432/x", false),
            ("postgres://[::1]:5432/x", false),
            ("postgres://localhost/x", false),
            ("postgres:///x?host=/run/postgresql", false),
            ("postgres://%2Frun%2Fpostgresql/x", false),
        ] {
            let seen = weak(&[("DATABASE_URL", url)]);
            assert_eq!(!seen.is_empty(), is_weak, "{url}: {seen:?}");
            let accepted = [("DATABASE_URL", url), ("PLAINTEXT_HOSTS", "db.example, fd00::1")];
            assert!(weak(&accepted).is_empty(), "{url}");
        }
    }

    #[test]
    fn redis_and_the_provider_beyond_this_machine_want_tls() {
        for (name, url, is_weak) in [
            ("REDIS_URL", "redis://ann:hush@redis.example", true),
            ("REDIS_URL", "redis-cluster://127.0.0.1:7000?node=redis.example:7000", true),
            ("REDIS_URL", "rediss://redis.example", false),
            ("REDIS_URL", "redis://127.0.0.1:6379/1", false),
            ("KEYCLOAK_BASE_URL", "http://kc.example:8080", true),
            ("KEYCLOAK_BASE_URL", "https://kc.example", false),
            ("KEYCLOAK_BASE_URL", "http://localhost:8080", false),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.example:4318", true),
        ] {
            let seen = weak(&[(name, url)]);
            assert_eq!(seen, if is_weak { vec![name] } else { vec![] }, "{url}");
            assert!(weak(&[(name, url), ("PLAINTEXT_HOSTS", "*.example")]).is_empty(), "{url}");
        }
    }

    #[test]
    fn the_port_of_operators_and_the_origin_null_are_looked_at() {
        let public = ("LISTEN_ADDR", "0.0.0.0:8000");
        assert_eq!(weak(&[public]), ["OPS_ADDR"]);
        assert!(weak(&[public, ("OPS_ADDR", "10.0.0.1:9000")]).is_empty());
        for name in ["ALLOWED_WS_ORIGINS", "CORS_ALLOWED_ORIGINS"] {
            assert_eq!(weak(&[(name, "https://app.example,null")]), [name]);
        }
    }
}
