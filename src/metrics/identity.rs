//! Authentication: attempts, tokens, and the identity provider behind them.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::{Counters, Family, HTTP_BUCKETS, Histograms, Label, parts::label};

label!(
    /// What became of an authentication, over WebSocket and REST.
    AuthOutcome { Success = "success", Failed = "failed", Expired = "token_expired" }
);
label!(
    /// What the validator said of a token.
    TokenOutcome { Valid = "valid", Invalid = "invalid", Expired = "expired" }
);
label!(
    /// What became of a call.
    CallOutcome { Success = "success", Error = "error" }
);
label!(
    /// What the identity provider was asked for.
    ProviderOperation { Login = "login", Refresh = "refresh", Logout = "logout", Keys = "jwks" }
);
label!(
    /// What the identity provider said of a user.
    LoginOutcome { Success = "success", Failure = "failure", Error = "error" }
);
label!(
    /// How the user proved who it is.
    LoginMethod { Password = "password", Refresh = "refresh" }
);
label!(
    /// What stands behind a circuit breaker.
    Dependency { Keycloak = "keycloak", Redis = "redis" }
);

/// What became of logins and refreshes at the identity provider.
#[derive(Clone)]
pub(crate) struct LoginCounters(IntCounterVec);

impl LoginCounters {
    /// Counts one.
    pub(crate) fn inc(&self, outcome: LoginOutcome, method: LoginMethod) {
        self.0.with_label_values(&[outcome.label(), method.label()]).inc();
    }
}

/// The series of authentication.
#[derive(Clone)]
pub(crate) struct AuthMetrics {
    pub(crate) attempts: Counters<AuthOutcome>,
    pub(crate) validations: Counters<TokenOutcome>,
    pub(crate) cache_hits: IntCounter,
    pub(crate) cache_misses: IntCounter,
    pub(crate) keys_fetched: Counters<CallOutcome>,
    /// Set when Prometheus asks.
    pub(crate) keys_age: IntGauge,
    pub(crate) keys_max_age: IntGauge,
    pub(crate) logins: LoginCounters,
    /// Seconds of a call to the identity provider.
    pub(crate) provider_duration: Histograms<ProviderOperation>,
}

impl AuthMetrics {
    pub(super) fn new(family: &Family) -> Self {
        let logins = family.counter_vec(
            "keycloak_auth_attempts_total",
            "Logins and refreshes at Keycloak.",
            &["status", "method"],
        );
        for outcome in LoginOutcome::ALL {
            for method in LoginMethod::ALL {
                logins.with_label_values(&[outcome.label(), method.label()]);
            }
        }
        Self {
            attempts: family.counters(
                "auth_attempts_total",
                "Tokens presented over WebSocket and REST, and logins.",
                "status",
            ),
            validations: family.counters(
                "token_validation_total",
                "Tokens looked at by the validator.",
                "status",
            ),
            cache_hits: family.counter("token_cache_hits_total", "Tokens found in the cache."),
            cache_misses: family.counter("token_cache_misses_total", "Tokens validated anew."),
            keys_fetched: family.counters(
                "jwks_refreshes_total",
                "Fetches of the identity provider's keys.",
                "status",
            ),
            keys_age: family.gauge(
                "jwks_age_seconds",
                "Seconds since the identity provider's keys were fetched, or since the start; 0 without a provider.",
            ),
            keys_max_age: family.gauge(
                "jwks_max_age_seconds",
                "Age of the keys at which no token is accepted any more; 0 without a provider.",
            ),
            logins: LoginCounters(logins),
            provider_duration: family.histograms(
                "keycloak_operation_duration_seconds",
                "Seconds of a call to Keycloak.",
                HTTP_BUCKETS,
                "operation",
            ),
        }
    }
}

/// The series of all circuit breakers.
#[derive(Clone)]
pub(crate) struct BreakerMetrics {
    state: IntGaugeVec,
    changes: IntCounterVec,
    failures: IntCounterVec,
}

/// The series of one circuit breaker.
#[derive(Clone)]
pub(crate) struct BreakerSeries {
    /// 0 closed, 1 half-open, 2 open.
    pub(crate) state: IntGauge,
    pub(crate) changes: IntCounter,
    pub(crate) failures: IntCounter,
}

impl BreakerMetrics {
    pub(super) fn new(family: &Family) -> Self {
        let metrics = Self {
            state: family.gauge_vec(
                "circuit_breaker_state",
                "0 closed, 1 half-open, 2 open.",
                &["service"],
            ),
            changes: family.counter_vec(
                "circuit_breaker_state_changes_total",
                "State changes of a circuit breaker.",
                &["service"],
            ),
            failures: family.counter_vec(
                "circuit_breaker_failures_total",
                "Failures seen by a circuit breaker.",
                &["service"],
            ),
        };
        for dependency in Dependency::ALL {
            metrics.of(*dependency);
        }
        metrics
    }

    /// The series of the breaker in front of a dependency.
    pub(crate) fn of(&self, dependency: Dependency) -> BreakerSeries {
        let labels = [dependency.label()];
        BreakerSeries {
            state: self.state.with_label_values(&labels),
            changes: self.changes.with_label_values(&labels),
            failures: self.failures.with_label_values(&labels),
        }
    }
}
