//! The table of settings: names, defaults, units and meaning, in the order of `--help`.

/// One setting: an environment variable, a flag of `serve` and a key of the TOML file.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable; the flag is `--name-with-dashes`, the key `name_in_lower_case`.
    pub name: &'static str,
    /// The value where nothing sets it, as one would write it.
    pub default: &'static str,
    /// What a value looks like.
    pub value: &'static str,
    /// What it does, and what its special values mean.
    pub help: &'static str,
}

impl Setting {
    /// The flag, without its dashes.
    pub fn flag(&self) -> String {
        self.name.to_lowercase().replace('_', "-")
    }

    /// The key in the TOML file.
    pub fn key(&self) -> String {
        self.name.to_lowercase()
    }

    /// The environment variable that names a file with the value, for values that may hold a secret.
    pub fn file_variable(&self) -> Option<String> {
        matches!(self.value, "SECRET" | "URL").then(|| format!("{}_FILE", self.name))
    }

    /// A value as it may be shown: no secret, and a URL without the passwords in its login and query.
    pub fn shown(&self, value: &str) -> String {
        if self.value == "SECRET" && !value.is_empty() {
            return "***".to_owned();
        }
        if self.value != "URL" {
            return value.to_owned();
        }
        let (scheme, rest) = value.split_at(value.find("://").map_or(0, |at| at + 3));
        // The last `@`: a password may hold others.
        let (login, place) = match rest.rsplit_once('@') {
            Some((login, place)) => {
                (format!("{}:***@", login.split(':').next().unwrap_or_default()), place)
            }
            None => (String::new(), rest),
        };
        let mut shown = format!("{scheme}{login}");
        for (i, part) in place.split(['?', '&']).enumerate() {
            shown.push_str(["", "?", "&"][i.min(2)]);
            match part.split_once('=') {
                Some((name, _)) if name.to_lowercase().contains("pass") => {
                    shown.push_str(name);
                    shown.push_str("=***");
                }
                _ => shown.push_str(part),
            }
        }
        shown
    }
}

const fn setting(
    name: &'static str,
    default: &'static str,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { name, default, value, help }
}

/// Every setting.
pub const SETTINGS: &[Setting] = &[
    setting(
        "LISTEN_ADDR",
        "127.0.0.1:8000",
        "ADDRESS",
        "Where clients connect: WebSocket and REST on one port",
    ),
    setting(
        "OPS_ADDR",
        "",
        "ADDRESS",
        "Serve /metrics, /health* and /admin/* here and only here; empty: on LISTEN_ADDR",
    ),
    setting(
        "ENV",
        "dev",
        "dev|staging|production",
        "production refuses the development issuer and `*` origins",
    ),
    setting(
        "DATA_DIR",
        "./data",
        "PATH",
        "Where the SQLite file, the development key and the audit trail's spool live",
    ),
    setting(
        "DATABASE_URL",
        "",
        "URL",
        "sqlite://PATH or postgres://USER:PASSWORD@HOST/NAME; empty: switchboard.db in DATA_DIR",
    ),
    setting(
        "DB_POOL_SIZE",
        "20",
        "COUNT",
        "Database connections at most, beside one that writes (SQLite) or watches (Postgres)",
    ),
    setting(
        "DB_CONNECT_TIMEOUT",
        "5s",
        "DURATION",
        "Time for a connection to Postgres: for a new one, and for a free one of the pool",
    ),
    setting(
        "DB_START_TIMEOUT",
        "30s",
        "DURATION",
        "At the start: time for Postgres to answer, all attempts together",
    ),
    setting(
        "DB_STATEMENT_TIMEOUT",
        "10s",
        "DURATION",
        "Time after which Postgres ends a statement; 0: never",
    ),
    setting(
        "DB_SLOW_QUERY_MS",
        "500",
        "MILLISECONDS",
        "Statements that take longer are logged, without their parameters; 0: none",
    ),
    setting(
        "DB_AUTO_MIGRATE",
        "true",
        "BOOL",
        "Bring the schema up to date at the start; false: refuse to start on an old one",
    ),
    setting(
        "AUDIT_ENABLED",
        "true",
        "BOOL",
        "Keep an audit trail: changes, denials, failed authentications, forced disconnects",
    ),
    setting("AUDIT_READS", "false", "BOOL", "Keep reads in the audit trail too"),
    setting(
        "AUDIT_QUEUE",
        "10000",
        "COUNT",
        "Audit rows that wait in memory; one more is written to the spool by whoever makes it",
    ),
    setting("AUDIT_BATCH_SIZE", "100", "COUNT", "Audit rows in one statement at most"),
    setting(
        "AUDIT_BATCH_TIMEOUT",
        "1s",
        "DURATION",
        "Time within which an audit row is in the database, or else in the spool on disk",
    ),
    setting(
        "AUDIT_SPOOL_LIMIT",
        "1GiB",
        "SIZE",
        "Audit rows kept in DATA_DIR/audit while the database is away; more are lost, and counted",
    ),
    setting(
        "AUDIT_SUMMARY_INTERVAL",
        "1m",
        "DURATION",
        "Time over which failures of unknown callers are summed up by address and kind; at most 51 audit rows",
    ),
    setting(
        "AUDIT_DENIALS_PER_USER",
        "60",
        "COUNT",
        "Denials of a user with an audit row each in AUDIT_SUMMARY_INTERVAL; more are summed up; 0: no limit",
    ),
    setting(
        "AUDIT_LOG_RETENTION_DAYS",
        "365",
        "DAYS",
        "Days after which audit rows are deleted; 0: never",
    ),
    setting(
        "REDIS_URL",
        "",
        "URL",
        "The Redis that makes this node one of many: redis://USER:PASSWORD@HOST/0; empty: alone",
    ),
    setting(
        "REDIS_KEY_PREFIX",
        "switchboard",
        "NAME",
        "What keys and channels in Redis begin with: the same on the nodes of one cluster",
    ),
    setting(
        "RATE_LIMIT_FAIL_MODE",
        "",
        "open|closed",
        "Limits while Redis does not answer: open: each node's own, closed: refuse; empty: closed, but open with ENV=dev",
    ),
    setting(
        "NODE_ID",
        "",
        "NAME",
        "What this node's id begins with, a part made at each start follows; empty: only that",
    ),
    setting(
        "LOG_LEVEL",
        "info",
        "FILTER",
        "error, warn, info, debug, trace, or a filter such as info,switchboard::http=debug",
    ),
    setting(
        "LOG_FORMAT",
        "auto",
        "auto|json|human",
        "auto: human on a terminal, else one JSON object a line",
    ),
    setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "URL",
        "Where traces go, by OTLP over HTTP, such as http://localhost:4318; empty: there are none",
    ),
    setting(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        "SECRET",
        "Headers for that: NAME=VALUE, percent-encoded, separated by commas",
    ),
    setting("OTEL_SERVICE_NAME", "switchboard", "NAME", "What traces call this server"),
    setting(
        "OTEL_TRACES_SAMPLER_ARG",
        "1.0",
        "RATIO",
        "The part of traces that is exported, from 0 to 1; a request with a traceparent keeps to that",
    ),
    setting(
        "DEV_KEY_FILE",
        "",
        "PATH",
        "Signing key of the development issuer, made on first use; empty: dev-key.pem in DATA_DIR",
    ),
    setting(
        "KEYCLOAK_BASE_URL",
        "",
        "URL",
        "Keycloak, as this server reaches it; with KEYCLOAK_REALM it is the issuer of tokens",
    ),
    setting("KEYCLOAK_REALM", "", "NAME", "The realm of Keycloak whose users come in"),
    setting(
        "KEYCLOAK_CLIENT_ID",
        "switchboard",
        "NAME",
        "The client that tokens must be for, and whose roles count",
    ),
    setting("KEYCLOAK_CLIENT_SECRET", "", "SECRET", "The client's secret; empty: a public client"),
    setting(
        "OIDC_ISSUER",
        "",
        "URL",
        "The iss of tokens: of any OpenID provider, or of Keycloak where KEYCLOAK_BASE_URL is not what clients see",
    ),
    setting(
        "OIDC_JWKS_LIFETIME",
        "1h",
        "DURATION",
        "Time after which the issuer's keys are fetched again",
    ),
    setting("OIDC_TIMEOUT", "5s", "DURATION", "Time for each call to the issuer"),
    setting("JWT_LEEWAY", "10s", "DURATION", "Clock skew allowed in a token's exp and nbf"),
    setting(
        "JWT_USERNAME_CLAIM",
        "preferred_username",
        "NAME",
        "The claim that names the user; sub where a token lacks it",
    ),
    setting(
        "JWT_ROLES_CLAIM",
        "resource_access.{client}.roles",
        "PATH",
        "The claim that lists the user's roles; {client} stands for KEYCLOAK_CLIENT_ID",
    ),
    setting("JWT_REALM_ROLES", "false", "BOOL", "Roles in realm_access.roles count too"),
    setting(
        "AUTH_FAILURES_PER_MINUTE",
        "30",
        "COUNT/MINUTE",
        "Bad tokens and passwords from one address before it is refused unseen; 0: no limit",
    ),
    setting(
        "AUTH_REFUSALS_PER_MINUTE",
        "60",
        "COUNT/MINUTE",
        "Expired tokens, foreign origins and broken upgrades from one address before it is told 429 unseen; 0: no limit",
    ),
    setting(
        "BACKCHANNEL_FAILURES_PER_MINUTE",
        "30",
        "COUNT/MINUTE",
        "Logout tokens of one address that are refused before the next is refused unseen; 0: no limit",
    ),
    setting(
        "REVOCATION_LIFETIME",
        "24h",
        "DURATION",
        "Time for which a logout is remembered: at least that of an access token",
    ),
    setting(
        "TOKEN_CACHE_SIZE",
        "10000",
        "COUNT",
        "Valid tokens remembered until they expire; 0: none",
    ),
    setting(
        "ALLOWED_WS_ORIGINS",
        "*",
        "LIST",
        "Origins that browsers may open WebSockets from; *: all",
    ),
    setting("WS_AUTH_TIMEOUT", "5s", "DURATION", "Time for the auth frame after the upgrade"),
    setting(
        "WS_EXPIRY_WARNING",
        "60s",
        "DURATION",
        "Time before a token expires at which its client is warned; 0: never",
    ),
    setting(
        "WS_QUERY_TOKEN",
        "false",
        "BOOL",
        "Accept ?token= and ?Authorization= on the upgrade; such tokens end in access logs of proxies",
    ),
    setting(
        "WS_MAX_CONNECTIONS",
        "10000",
        "COUNT",
        "Authenticated WebSocket connections of this node",
    ),
    setting(
        "WS_MAX_PENDING",
        "",
        "COUNT",
        "WebSockets that are still to authenticate, beside WS_MAX_CONNECTIONS; empty: a tenth of that, 16 at least",
    ),
    setting(
        "WS_MAX_PENDING_PER_ADDRESS",
        "",
        "COUNT",
        "The same from one address (over IPv6: one /64); empty: a quarter of WS_MAX_PENDING",
    ),
    setting("WS_MAX_CONNECTIONS_PER_USER", "5", "COUNT", "Connections of one user; 0: no limit"),
    setting(
        "WS_CONNECTION_POLICY",
        "reject_new",
        "reject_new|kick_oldest",
        "One connection of a user too many: reject_new refuses it, kick_oldest closes the user's oldest",
    ),
    setting(
        "WS_MESSAGE_RATE_LIMIT",
        "6000",
        "COUNT/MINUTE",
        "Messages of one user over all connections; 0: no limit. Each connection may send twice as many control frames",
    ),
    setting(
        "WS_MAX_STRIKES",
        "20",
        "COUNT",
        "Refused messages and control frames within a minute that close a connection; 0: never, reading pauses instead",
    ),
    setting(
        "WS_MAX_EXPULSIONS",
        "20",
        "COUNT/MINUTE",
        "Connections of a user closed for strikes or broken frames, before its next ones are refused; 0: no limit",
    ),
    setting(
        "WS_MAX_IN_FLIGHT",
        "16",
        "COUNT",
        "Requests of one connection at once; 1 keeps answers in order",
    ),
    setting(
        "WS_SEND_QUEUE",
        "256",
        "COUNT",
        "Pushes waiting for one connection before it is closed as slow",
    ),
    setting("WS_MAX_MESSAGE_BYTES", "64KiB", "SIZE", "Largest message from a client"),
    setting("WS_HANDLER_TIMEOUT", "10s", "DURATION", "Time from a request's arrival to its answer"),
    setting(
        "WS_HANDLER_CONCURRENCY",
        "64",
        "COUNT",
        "Requests of one package that wait (for a database, say) at once",
    ),
    setting(
        "WS_HANDLER_QUEUE",
        "1024",
        "COUNT",
        "Requests of one package waiting for their turn before `overloaded`",
    ),
    setting(
        "WS_WRITE_TIMEOUT",
        "10s",
        "DURATION",
        "Time without a byte written before a client is closed as slow",
    ),
    setting("WS_PING_INTERVAL", "25s", "DURATION", "Silence before a ping"),
    setting("WS_PONG_TIMEOUT", "10s", "DURATION", "Time for a sign of life after a ping"),
    setting(
        "WS_BROADCAST_CHANGES",
        "true",
        "BOOL",
        "Push every change of an author to all other connections",
    ),
    setting(
        "RATE_LIMIT_PER_MINUTE",
        "60",
        "COUNT/MINUTE",
        "REST requests of one user, or of one address without a user; 0: no limit",
    ),
    setting("RATE_LIMIT_BURST", "10", "COUNT", "REST requests allowed on top at once"),
    setting(
        "METRICS_RATE_LIMIT",
        "120",
        "COUNT/MINUTE",
        "Times that one address may ask for /metrics; 0: no limit",
    ),
    setting(
        "HTTP_MAX_CONNECTIONS",
        "2048",
        "COUNT",
        "HTTP connections of each listener, those not yet upgraded to a WebSocket included",
    ),
    setting(
        "HTTP_MAX_CONNECTIONS_PER_ADDRESS",
        "",
        "COUNT",
        "The same from one address (over IPv6: one /64); empty: a quarter of HTTP_MAX_CONNECTIONS",
    ),
    setting(
        "HTTP_KEEP_ALIVE",
        "75s",
        "DURATION",
        "Idle time before an HTTP connection is closed: longer than the load balancer's own",
    ),
    setting(
        "HTTP_REQUEST_TIMEOUT",
        "60s",
        "DURATION",
        "Time for a whole REST request, from its head to the end of its answer",
    ),
    setting(
        "HTTP_MAX_BODY_MEMORY",
        "",
        "SIZE",
        "Request bodies being read at once, all together; one address may have a quarter; empty: 64MiB, or four times MAX_REQUEST_BODY_SIZE if that is more",
    ),
    setting("MAX_REQUEST_BODY_SIZE", "1MiB", "SIZE", "Largest REST request body"),
    setting("ALLOWED_HOSTS", "*", "LIST", "Host headers accepted; *: all"),
    setting(
        "TRUSTED_PROXIES",
        "",
        "LIST",
        "Addresses or networks (10.0.0.0/8) whose X-Forwarded-* and Forwarded headers count",
    ),
    setting(
        "CORS_ALLOWED_ORIGINS",
        "",
        "LIST",
        "Origins that browsers may call the REST API from; *: all, empty: none",
    ),
    setting(
        "DRAIN_DELAY",
        "",
        "DURATION",
        "On shutdown: time for a balancer to notice that the node is not ready, before upgrades are refused; empty: 5s with REDIS_URL, else 0",
    ),
    setting(
        "DRAIN_GRACE",
        "1s",
        "DURATION",
        "On shutdown: requests sent before a client saw `drain` are still accepted for this long",
    ),
    setting(
        "DRAIN_SPREAD",
        "10s",
        "DURATION",
        "On shutdown: clients are told to reconnect after a random part of this",
    ),
    setting(
        "DRAIN_TIMEOUT",
        "30s",
        "DURATION",
        "On shutdown: time for open requests to be answered",
    ),
];
