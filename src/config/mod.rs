//! The configuration: read once before any port is bound, then passed down.
//!
//! A pure function of a lookup ([`Config::read`]), so that tests need no environment. Flags win over
//! the environment, which wins over the TOML file, which wins over the defaults of [`SETTINGS`].

mod allow_list;
mod audit;
mod auth;
mod cluster;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod http;
mod network;
mod postgres;
mod setting;
mod settings;
mod sources;
mod store;
mod traces;
mod value;
mod weak;

use std::{
    ffi::{OsStr, OsString},
    fmt,
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

pub use allow_list::AllowList;
pub use audit::AuditConfig;
pub use auth::{AuthConfig, ClaimNames, ProviderConfig, TokenTypes};
pub use cluster::{ClusterConfig, RedisUrl};
pub(crate) use files::database_files;
pub use http::HttpConfig;
pub use network::Network;
pub(crate) use network::network_of;
pub use postgres::PostgresUrl;
pub use setting::Setting;
pub use settings::SETTINGS;
pub use sources::{Source, Sources};
pub use store::{DatabasePlace, StoreConfig};
pub use traces::TracesConfig;
use value::{Bytes, Positive, Value};
pub use value::{ConnectionPolicy, Environment, FailMode, LogFormat, Secret};
pub use weak::Weakness;

/// `DRAIN_DELAY` of a node that is not alone: two health checks of most balancers.
const BALANCER_NOTICES: Duration = Duration::from_secs(5);

/// `WS_MAX_PENDING` of a node for few connections.
const LEAST_PENDING: usize = 16;

/// The whole configuration, one struct for each module that is configured.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the server is run for.
    pub environment: Environment,
    /// `PRODUCTION_STRICT`.
    pub strict: bool,
    /// `PLAINTEXT_HOSTS`: hosts without TLS on whose way is nobody else.
    pub plaintext_hosts: AllowList,
    /// Sockets and shutdown.
    pub server: ServerConfig,
    /// WebSocket connections.
    pub ws: WsConfig,
    /// The work of handler actors.
    pub handlers: HandlerConfig,
    /// The REST API.
    pub http: HttpConfig,
    /// Who may come in.
    pub auth: AuthConfig,
    /// The database.
    pub store: StoreConfig,
    /// The audit trail.
    pub audit: AuditConfig,
    /// The other nodes.
    pub cluster: ClusterConfig,
    /// Log lines.
    pub log: LogConfig,
    /// Traces; none: there are none.
    pub traces: Option<TracesConfig>,
}

/// Sockets and shutdown.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// `LISTEN_ADDR`.
    pub listen_addr: SocketAddr,
    /// `OPS_ADDR`; none: operations are served on `listen_addr`.
    pub ops_addr: Option<SocketAddr>,
    /// `READY_AFTER`.
    pub ready_after: Duration,
    /// `DRAIN_DELAY`, or what it is where that is empty.
    pub drain_delay: Duration,
    /// `DRAIN_GRACE`.
    pub drain_grace: Duration,
    /// `DRAIN_SPREAD`.
    pub drain_spread: Duration,
    /// `DRAIN_TIMEOUT`.
    pub drain_timeout: Duration,
}

/// WebSocket connections.
#[derive(Debug, Clone)]
pub struct WsConfig {
    /// `ALLOWED_WS_ORIGINS`.
    pub allowed_origins: AllowList,
    /// `WS_AUTH_TIMEOUT`.
    pub auth_timeout: Duration,
    /// `WS_EXPIRY_WARNING`, before a token expires; 0: none.
    pub expiry_warning: Duration,
    /// `WS_QUERY_TOKEN`.
    pub query_token: bool,
    /// `WS_MAX_CONNECTIONS`.
    pub max_connections: usize,
    /// `WS_MAX_PENDING`, or a tenth of `max_connections`.
    pub max_pending: usize,
    /// `WS_MAX_PENDING_PER_ADDRESS`, or a quarter of `max_pending`.
    pub max_pending_per_address: usize,
    /// `WS_MAX_CONNECTIONS_PER_USER`; 0: no limit.
    pub max_connections_per_user: u32,
    /// `WS_CONNECTION_POLICY`.
    pub connection_policy: ConnectionPolicy,
    /// `WS_MESSAGE_RATE_LIMIT`, a minute; 0: no limit.
    pub message_rate_limit: u32,
    /// `WS_MAX_EXPULSIONS`, of a user within a minute; 0: no limit.
    pub expulsions_per_minute: u32,
    /// `WS_MAX_STRIKES`, within a minute; 0: never close.
    pub max_strikes: u32,
    /// `WS_MAX_IN_FLIGHT`.
    pub max_in_flight: usize,
    /// `WS_SEND_QUEUE`, in pushes.
    pub send_queue: usize,
    /// `WS_SEND_BYTES`, of answers.
    pub send_bytes: usize,
    /// `WS_MAX_MESSAGE_BYTES`.
    pub max_message_bytes: usize,
    /// `WS_WRITE_TIMEOUT`.
    pub write_timeout: Duration,
    /// `WS_PING_INTERVAL`.
    pub ping_interval: Duration,
    /// `WS_PONG_TIMEOUT`.
    pub pong_timeout: Duration,
}

/// The work of handler actors.
#[derive(Debug, Clone)]
pub struct HandlerConfig {
    /// `WS_HANDLER_TIMEOUT`, from a request's arrival.
    pub timeout: Duration,
    /// `WS_HANDLER_CONCURRENCY`, for each package.
    pub concurrency: usize,
    /// `WS_HANDLER_QUEUE`, for each package.
    pub queue: usize,
    /// `WS_BROADCAST_CHANGES`.
    pub broadcast_changes: bool,
    /// `MAX_ROWS`, of a list without a page; 0: no limit.
    pub max_rows: u32,
}

/// Log lines.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// `LOG_LEVEL`.
    pub filter: String,
    /// `LOG_FORMAT`.
    pub format: LogFormat,
}

/// Reads a duration as settings have them; the error says what is allowed.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    Duration::read(text).ok_or(Duration::ALLOWED)
}

/// Everything that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors(Vec<String>);

impl ConfigErrors {
    /// A single fault.
    pub fn one(fault: impl Into<String>) -> Self {
        Self(vec![fault.into()])
    }

    /// Each fault: the setting, its value and what is allowed.
    pub fn faults(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl Config {
    /// Reads every setting through `lookup`, and reports every fault at once.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigErrors> {
        Self::read_bytes(|name| lookup(name).map(OsString::from))
    }

    /// The same of texts that may not be UTF-8, as only paths may be.
    pub(crate) fn read_bytes(
        lookup: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ConfigErrors> {
        let mut reader = Reader { lookup: &lookup, faults: Vec::new() };
        let config = reader.config();
        reader.check(&config);
        if reader.faults.is_empty() { Ok(config) } else { Err(ConfigErrors(reader.faults)) }
    }
}

impl Config {
    /// Sockets of clients at most. Those that are refused are told why, and may be as many as those that are
    /// still to authenticate.
    pub fn sockets(&self) -> usize {
        let listeners = 1 + usize::from(self.server.ops_addr.is_some());
        self.ws.max_connections + 2 * self.ws.max_pending + listeners * self.http.max_connections
    }
}

struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<OsString>,
    faults: Vec<String>,
}

impl Reader<'_> {
    /// A bad value is noted and stands in as its default until the faults are reported.
    fn get<T: Value>(&mut self, name: &str) -> T {
        let setting =
            SETTINGS.iter().find(|s| s.name == name).expect("every setting read is in the table");
        let text = (self.lookup)(name);
        let text = text.as_deref().unwrap_or(OsStr::new(setting.default));
        T::read_bytes(text).unwrap_or_else(|| {
            let shown = setting.shown(text.to_string_lossy().trim());
            let why = if text.to_str().is_some() { "is not allowed" } else { "is not UTF-8" };
            self.faults.push(format!("{name}: {shown:?} {why}; allowed: {}", T::ALLOWED));
            T::read(setting.default).expect("defaults are allowed")
        })
    }

    fn count(&mut self, name: &str) -> usize {
        self.get::<Positive>(name).0
    }

    fn config(&mut self) -> Config {
        let data_dir: PathBuf = self.get("DATA_DIR");
        let environment = self.get("ENV");
        let cluster = self.cluster(environment);
        let noticed = if cluster.redis.is_some() { BALANCER_NOTICES } else { Duration::ZERO };
        Config {
            environment,
            strict: self.get("PRODUCTION_STRICT"),
            plaintext_hosts: self.hosts("PLAINTEXT_HOSTS"),
            server: ServerConfig {
                listen_addr: self.get("LISTEN_ADDR"),
                ops_addr: self.get("OPS_ADDR"),
                ready_after: self.get("READY_AFTER"),
                drain_delay: self.get::<Option<_>>("DRAIN_DELAY").unwrap_or(noticed),
                drain_grace: self.get("DRAIN_GRACE"),
                drain_spread: self.get("DRAIN_SPREAD"),
                drain_timeout: self.get("DRAIN_TIMEOUT"),
            },
            ws: self.ws(),
            handlers: HandlerConfig {
                timeout: self.get("WS_HANDLER_TIMEOUT"),
                concurrency: self.count("WS_HANDLER_CONCURRENCY"),
                queue: self.count("WS_HANDLER_QUEUE"),
                broadcast_changes: self.get("WS_BROADCAST_CHANGES"),
                max_rows: self.get("MAX_ROWS"),
            },
            http: self.http(),
            auth: self.auth(&data_dir),
            store: self.store(&data_dir),
            audit: self.audit(&data_dir),
            cluster,
            log: LogConfig { filter: self.get("LOG_LEVEL"), format: self.get("LOG_FORMAT") },
            traces: self.traces(),
        }
    }

    /// A count that cannot be 0, and what it is where nothing sets it.
    fn count_or(&mut self, name: &str, default: usize) -> usize {
        self.get::<Option<Positive>>(name).map_or(default, |count| count.0)
    }

    fn ws(&mut self) -> WsConfig {
        let max_connections = self.count("WS_MAX_CONNECTIONS");
        let max_pending =
            self.count_or("WS_MAX_PENDING", (max_connections / 10).max(LEAST_PENDING));
        WsConfig {
            allowed_origins: self.origins("ALLOWED_WS_ORIGINS"),
            auth_timeout: self.get("WS_AUTH_TIMEOUT"),
            expiry_warning: self.get("WS_EXPIRY_WARNING"),
            query_token: self.get("WS_QUERY_TOKEN"),
            max_connections,
            max_pending,
            max_pending_per_address: self
                .count_or("WS_MAX_PENDING_PER_ADDRESS", max_pending.div_ceil(4)),
            max_connections_per_user: self.get("WS_MAX_CONNECTIONS_PER_USER"),
            connection_policy: self.get("WS_CONNECTION_POLICY"),
            message_rate_limit: self.get("WS_MESSAGE_RATE_LIMIT"),
            expulsions_per_minute: self.get("WS_MAX_EXPULSIONS"),
            max_strikes: self.get("WS_MAX_STRIKES"),
            max_in_flight: self.count("WS_MAX_IN_FLIGHT"),
            send_queue: self.count("WS_SEND_QUEUE"),
            send_bytes: self.get::<Bytes>("WS_SEND_BYTES").0,
            max_message_bytes: self.get::<Bytes>("WS_MAX_MESSAGE_BYTES").0,
            write_timeout: self.get("WS_WRITE_TIMEOUT"),
            ping_interval: self.get("WS_PING_INTERVAL"),
            pong_timeout: self.get("WS_PONG_TIMEOUT"),
        }
    }

    /// What only shows when settings are seen together.
    fn check(&mut self, config: &Config) {
        let filter = &config.log.filter;
        if let Some(fault) = filter_fault(filter) {
            self.faults.push(format!(
                "LOG_LEVEL: {filter:?} is not allowed ({fault}); allowed: error, warn, info, debug, trace, off, or a filter such as info,switchboard::http=debug"
            ));
        }
        for (name, time) in [
            ("WS_AUTH_TIMEOUT", config.ws.auth_timeout),
            ("WS_WRITE_TIMEOUT", config.ws.write_timeout),
            ("WS_PING_INTERVAL", config.ws.ping_interval),
            ("WS_PONG_TIMEOUT", config.ws.pong_timeout),
            ("WS_HANDLER_TIMEOUT", config.handlers.timeout),
            ("DB_CONNECT_TIMEOUT", config.store.connect_timeout),
            ("HTTP_KEEP_ALIVE", config.http.keep_alive),
            ("HTTP_REQUEST_TIMEOUT", config.http.request_timeout),
            ("OIDC_TIMEOUT", config.auth.timeout),
            ("OIDC_JWKS_LIFETIME", config.auth.keys_lifetime),
        ] {
            if time.is_zero() {
                self.faults.push(format!("{name}: 0 is not allowed; allowed: more than 0"));
            }
        }
        let (grace, limit) = (config.server.drain_grace, config.server.drain_timeout);
        if grace > limit {
            self.faults.push(format!(
                "DRAIN_GRACE: {grace:?} is not allowed; allowed: at most DRAIN_TIMEOUT, which is {limit:?}"
            ));
        }
        self.check_production(config);
    }
}

/// What is wrong with a filter of log lines, if anything.
fn filter_fault(filter: &str) -> Option<String> {
    use tracing_subscriber::filter::{LevelFilter, targets::Targets};
    // `Targets` takes a lone word such as `warning` for a target, and would silence all others.
    let mut words = filter.split(',').map(str::trim).filter(|part| !part.contains('='));
    match words.find(|word| word.is_empty() || word.parse::<LevelFilter>().is_err()) {
        Some(word) => Some(format!("{word:?} is not a level")),
        None => filter.parse::<Targets>().err().map(|error| error.to_string()),
    }
}
