//! The cluster: where its Redis is, what its keys begin with, and what limits do without it.

use std::fmt;

use super::{
    Reader, SETTINGS,
    value::{Environment, FailMode, Secret},
};

/// The cluster.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// `REDIS_URL`; none: this node is alone.
    pub redis: Option<RedisUrl>,
    /// `REDIS_KEY_PREFIX`, the same on every node.
    pub prefix: String,
    /// `NODE_ID`, with which this node's id begins.
    pub node: Option<String>,
    /// `RATE_LIMIT_FAIL_MODE`.
    pub fail_mode: FailMode,
}

/// The URL of a Redis. It is shown without its password.
#[derive(Debug, Clone)]
pub struct RedisUrl {
    url: Secret,
    shown: String,
}

impl RedisUrl {
    /// The URL itself, for the driver.
    pub fn expose(&self) -> &str {
        self.url.expose()
    }
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// What the driver knows, which takes any scheme for `redis`.
const SCHEMES: &[&str] =
    &["redis", "rediss", "redis-sentinel", "rediss-sentinel", "redis-cluster", "rediss-cluster"];

/// The parameters of a URL that the driver knows; it passes over any other.
const PARAMETERS: &[&str] =
    &["node", "sentinelServiceName", "sentinelUsername", "sentinelPassword"];

const ALLOWED: &str = "redis://USER:PASSWORD@HOST:PORT/DATABASE, redis-sentinel://HOST:PORT?sentinelServiceName=NAME, redis-cluster://HOST:PORT, each with &node=HOST:PORT for more hosts; rediss… is with TLS";

impl Reader<'_> {
    pub(super) fn cluster(&mut self, environment: Environment) -> ClusterConfig {
        let fail_mode: Option<FailMode> = self.get("RATE_LIMIT_FAIL_MODE");
        ClusterConfig {
            redis: self.redis(),
            prefix: self.prefix(),
            node: self.get("NODE_ID"),
            fail_mode: fail_mode.unwrap_or(match environment {
                Environment::Dev => FailMode::Open,
                Environment::Staging | Environment::Production => FailMode::Closed,
            }),
        }
    }

    /// Braces are the keys' own: what is in the first pair decides the slot of a Redis Cluster, and the keys
    /// of one script have to be in one.
    fn prefix(&mut self) -> String {
        let prefix: String = self.get("REDIS_KEY_PREFIX");
        if prefix.contains(['{', '}']) {
            self.faults.push(format!(
                "REDIS_KEY_PREFIX: {prefix:?} is not allowed; allowed: text without {{ and }}"
            ));
        }
        prefix
    }

    fn redis(&mut self) -> Option<RedisUrl> {
        let url: Option<Secret> = self.get("REDIS_URL");
        let url = url?;
        let redis = read(&url);
        if redis.is_none() {
            // The URL may hold a password: only its scheme is shown.
            let scheme = url.expose().split(':').next().unwrap_or_default();
            self.faults.push(format!(
                "REDIS_URL: this URL of scheme {scheme:?} is not allowed; allowed: {ALLOWED}"
            ));
        }
        redis
    }
}

fn read(url: &Secret) -> Option<RedisUrl> {
    let text = url.expose();
    let parsed = reqwest::Url::parse(text).ok()?;
    let allowed = SCHEMES.contains(&parsed.scheme())
        && parsed.query_pairs().all(|(name, _)| PARAMETERS.contains(&&*name))
        && fred::types::config::Config::from_url(text).is_ok();
    let setting = SETTINGS.iter().find(|setting| setting.name == "REDIS_URL")?;
    allowed.then(|| RedisUrl { url: url.clone(), shown: setting.shown(text) })
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, FailMode};

    fn redis(url: &str) -> Result<String, String> {
        Config::read(|name| (name == "REDIS_URL").then(|| url.to_owned()))
            .map(|config| format!("{:?}", config.cluster.redis))
            .map_err(|faults| faults.to_string())
    }

    #[test]
    fn the_urls_of_the_driver_are_taken_and_shown_without_their_password() {
        for url in [
            "redis://redis.example",
            "redis://ann:hush-hush@redis.example:6380/2",
            "rediss://:hush-hush@redis.example",
            "redis-sentinel://ann:hush-hush@a.example:26379/1?sentinelServiceName=main&node=b.example:26379",
            "redis-sentinel://a.example?sentinelServiceName=main&sentinelUsername=eve&sentinelPassword=hush-hush",
            "redis-cluster://ann:hush-hush@a.example:7000?node=b.example:7000",
            "rediss-cluster://a.example:7000",
        ] {
            let shown = redis(url).unwrap();
            assert!(shown.contains(".example") && !shown.contains("hush-hush"), "{shown}");
        }
        assert_eq!(redis("").unwrap(), "None");
    }

    #[test]
    fn what_the_driver_would_not_understand_is_a_fault_that_tells_no_password() {
        for url in [
            "redis.example:6379",
            "http://ann:hush-hush@redis.example",
            "redis://",
            "redis://ann:hush-hush@redis.example/zero",
            "redis://ann:hush-hush@redis.example:port",
            "redis-sentinel://ann:hush-hush@a.example",
            "redis://redis.example?password=hush-hush",
        ] {
            let fault = redis(url).unwrap_err();
            assert!(fault.contains("REDIS_URL") && !fault.contains("hush-hush"), "{fault}");
        }
    }

    #[test]
    fn braces_in_the_prefix_would_tear_the_keys_of_a_script_apart() {
        let prefix = |text: &str| {
            let config = Config::read(|name| (name == "REDIS_KEY_PREFIX").then(|| text.to_owned()));
            config.map(|config| config.cluster.prefix).map_err(|faults| faults.to_string())
        };
        assert_eq!(prefix("blue:1"), Ok("blue:1".to_owned()));
        for text in ["{blue}", "blue{", "}blue"] {
            let fault = prefix(text).unwrap_err();
            assert!(fault.contains("REDIS_KEY_PREFIX") && fault.contains(text), "{fault}");
        }
    }

    #[test]
    fn limits_are_refused_without_redis_but_for_developers_and_those_who_say_otherwise() {
        let read = |environment: &str, mode: &str| {
            let config = Config::read(|name| match name {
                "ENV" => Some(environment.to_owned()),
                "RATE_LIMIT_FAIL_MODE" => Some(mode.to_owned()),
                "OIDC_ISSUER" | "ALLOWED_WS_ORIGINS" => Some("https://sso.example".to_owned()),
                _ => None,
            });
            config.map(|config| config.cluster.fail_mode).map_err(|faults| faults.to_string())
        };
        for (environment, default) in [
            ("dev", FailMode::Open),
            ("staging", FailMode::Closed),
            ("production", FailMode::Closed),
        ] {
            assert_eq!(read(environment, ""), Ok(default), "{environment}");
            assert_eq!(read(environment, "open"), Ok(FailMode::Open), "{environment}");
            assert_eq!(read(environment, "closed"), Ok(FailMode::Closed), "{environment}");
        }
        let fault = read("dev", "ajar").unwrap_err();
        assert!(fault.contains("RATE_LIMIT_FAIL_MODE") && fault.contains("ajar"), "{fault}");
    }
}
