//! The configuration: read once before any port is bound, then passed down.
//!
//! A pure function of a lookup ([`Config::read`]), so that tests need no environment. Flags win over
//! the environment, which wins over the TOML file, which wins over the defaults of [`SETTINGS`].

mod audit;
mod auth;
mod cluster;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod http;
mod network;
mod postgres;
mod setting;
mod settings;
mod store;
mod traces;
mod value;

use std::{collections::HashMap, fmt, io, net::SocketAddr, path::PathBuf, time::Duration};

pub use audit::AuditConfig;
pub use auth::{AuthConfig, ClaimNames, ProviderConfig};
pub use cluster::{ClusterConfig, RedisUrl};
pub use http::HttpConfig;
pub use network::Network;
pub(crate) use network::network_of;
pub use postgres::PostgresUrl;
pub use setting::Setting;
pub use settings::SETTINGS;
pub use store::{DatabasePlace, StoreConfig};
pub use traces::TracesConfig;
pub use value::{AllowList, ConnectionPolicy, Environment, FailMode, LogFormat, Secret};
use value::{Bytes, Positive, Value};

/// `DRAIN_DELAY` of a node that is not alone: two health checks of most balancers.
const BALANCER_NOTICES: Duration = Duration::from_secs(5);

/// `WS_MAX_PENDING` of a node for few connections.
const LEAST_PENDING: usize = 16;

/// The whole configuration, one struct for each module that is configured.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the server is run for.
    pub environment: Environment,
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
    lookup: &'a dyn Fn(&str) -> Option<String>,
    faults: Vec<String>,
}

impl Reader<'_> {
    /// A bad value is noted and stands in as its default until the faults are reported.
    fn get<T: Value>(&mut self, name: &str) -> T {
        let setting =
            SETTINGS.iter().find(|s| s.name == name).expect("every setting read is in the table");
        let text = (self.lookup)(name);
        let text = text.as_deref().map_or(setting.default, str::trim);
        T::read(text).unwrap_or_else(|| {
            let shown = setting.shown(text);
            self.faults.push(format!("{name}: {shown:?} is not allowed; allowed: {}", T::ALLOWED));
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
            server: ServerConfig {
                listen_addr: self.get("LISTEN_ADDR"),
                ops_addr: self.get("OPS_ADDR"),
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
            allowed_origins: self.get("ALLOWED_WS_ORIGINS"),
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

/// Where the value of a setting came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A flag of the command.
    Flag,
    /// The environment.
    Environment,
    /// The TOML file.
    File,
    /// Nothing set it.
    Default,
}

/// The texts of the settings from every source, with the order of precedence.
#[derive(Debug, Default)]
pub struct Sources {
    flags: HashMap<String, String>,
    environment: HashMap<String, String>,
    file: HashMap<String, String>,
    faults: Vec<String>,
}

impl Sources {
    /// Takes flags by setting name, the environment, and the path of a TOML file. `read` reads that file,
    /// and those that hold secrets: `DATABASE_URL_FILE` names one with the text of `DATABASE_URL`.
    pub fn new(
        flags: HashMap<String, String>,
        environment: impl Iterator<Item = (String, String)>,
        file: Option<&str>,
        read: impl Fn(&str) -> io::Result<String>,
    ) -> Self {
        let mut variables: HashMap<_, _> = environment.collect();
        let mut sources = Self { flags, ..Self::default() };
        for setting in SETTINGS {
            let text = variables.remove(setting.name);
            let held = setting.file_variable().and_then(|name| {
                let path = variables.remove(&name).filter(|path| !path.is_empty())?;
                Some((name, path))
            });
            let text = match held {
                Some((name, path)) => sources.read_secret(&name, &path, text, &read),
                None => text,
            };
            sources.environment.extend(text.map(|text| (setting.name.to_owned(), text)));
        }
        match file.map(|name| (name, read(name))) {
            Some((name, Ok(text))) => sources.read_file(name, &text),
            Some((name, Err(error))) => {
                sources.faults.push(format!("CONFIG_FILE: {name}: {error}"));
            }
            None => {}
        }
        sources
    }

    /// The text in the file that a variable names. An empty one is a secret that was never written: taken
    /// for no value, it would have the server run on a default.
    fn read_secret(
        &mut self,
        variable: &str,
        path: &str,
        direct: Option<String>,
        read: &impl Fn(&str) -> io::Result<String>,
    ) -> Option<String> {
        let fault = match read(path) {
            _ if direct.is_some_and(|text| !text.is_empty()) => {
                let setting = variable.trim_end_matches("_FILE");
                format!("{variable}: it is not allowed beside {setting}; allowed: one of the two")
            }
            Ok(text) if text.trim().is_empty() => format!("{variable}: {path} is empty"),
            Ok(text) => return Some(text.trim().to_owned()),
            Err(error) => format!("{variable}: {path}: {error}"),
        };
        self.faults.push(fault);
        None
    }

    /// The configuration, or the faults of the file and of all settings at once.
    pub fn config(&self) -> Result<Config, ConfigErrors> {
        let config = Config::read(|name| self.get(name).map(|(text, _)| text.to_owned()));
        if self.faults.is_empty() {
            return config;
        }
        let settings = config.err().map(|faults| faults.0).unwrap_or_default();
        Err(ConfigErrors([self.faults.clone(), settings].concat()))
    }

    /// The text of a setting and where it came from; none where only the default is left.
    pub fn get(&self, name: &str) -> Option<(&str, Source)> {
        [
            (&self.flags, Source::Flag),
            (&self.environment, Source::Environment),
            (&self.file, Source::File),
        ]
        .into_iter()
        .find_map(|(texts, source)| Some((texts.get(name)?.as_str(), source)))
    }

    fn read_file(&mut self, name: &str, text: &str) {
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(error) => return self.faults.push(format!("{name}: {error}")),
        };
        for (key, value) in table {
            let Some(setting) = SETTINGS.iter().find(|setting| setting.key() == key) else {
                self.faults.push(format!(
                    "{name}: {key:?} is not a setting; `switchboard config` lists them"
                ));
                continue;
            };
            match file_text(value) {
                Some(text) => drop(self.file.insert(setting.name.to_owned(), text)),
                None => self.faults.push(format!(
                    "{name}: {key} must be a string, a number, a boolean or a list of strings"
                )),
            }
        }
    }
}

fn file_text(value: toml::Value) -> Option<String> {
    Some(match value {
        toml::Value::String(text) => text,
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(value) => value.to_string(),
        toml::Value::Array(items) => {
            items.into_iter().map(file_text).collect::<Option<Vec<_>>>()?.join(",")
        }
        _ => return None,
    })
}
