//! The database, errors, and the families of parts that a server can run without.

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::{CallOutcome, Counters, Family, Histograms, Label, WS_BUCKETS};

/// An enum whose values are the values of a label.
macro_rules! label {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $name { $($variant),+ }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn label(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}
pub(super) use label;

label!(
    /// Which limit refused something.
    LimitType {
        Http = "http",
        Connection = "websocket_connection",
        Message = "websocket_message",
        Control = "websocket_control",
    }
);
label!(
    /// Which actor a supervisor started again.
    Actor {
        Connection = "connection",
        Handler = "handler",
        Registry = "registry",
        Audit = "audit",
        Cluster = "cluster",
    }
);
label!(
    /// A table in memory that grows with clients and has to get smaller with them.
    Table {
        Connections = "connections",
        Users = "users",
        Names = "names",
        MessageLimits = "message_limits",
        HttpLimits = "http_limits",
        Failures = "failures",
        Tokens = "tokens",
        Holders = "holders",
        AuditSums = "audit_sums",
    }
);
label!(
    /// The kind of a statement.
    DbOperation { Select = "select", Insert = "insert", Update = "update", Delete = "delete" }
);
label!(
    /// Whose connections a statement takes: those of packages, or those of the audit trail.
    DbShare {
        Reads = "reads",
        Changes = "changes",
        AuditReads = "audit_reads",
        AuditChanges = "audit_changes",
    }
);
label!(
    /// A table with rows that clients ask for.
    DbTable { Author = "author", UserActions = "user_actions" }
);
label!(
    /// Why a statement failed.
    DbErrorKind {
        Integrity = "integrity_error",
        Timeout = "timeout",
        Connection = "connection_error",
        Other = "other",
    }
);

/// What is alive in this process, set when Prometheus asks.
#[derive(Clone)]
pub(crate) struct RuntimeMetrics {
    pub(crate) tasks_alive: IntGauge,
    entries: IntGaugeVec,
}

impl RuntimeMetrics {
    pub(super) fn new(family: &Family) -> Self {
        let metrics = Self {
            tasks_alive: family.gauge(
                "runtime_tasks_alive",
                "Tasks: actors, sessions, HTTP connections, and what runs beside them.",
            ),
            entries: family.gauge_vec(
                "table_entries",
                "Entries of a table that grows with clients.",
                &["table"],
            ),
        };
        for table in Table::ALL {
            metrics.set_entries(*table, 0);
        }
        metrics
    }

    /// Sets what a table has.
    pub(crate) fn set_entries(&self, table: Table, entries: usize) {
        let entries = i64::try_from(entries).unwrap_or(i64::MAX);
        self.entries.with_label_values(&[table.label()]).set(entries);
    }
}

/// The series of the database.
#[derive(Clone)]
pub(crate) struct DbMetrics {
    pub(crate) query_duration: Histograms<DbOperation>,
    pub(crate) slow_queries: Counters<DbOperation>,
    pub(crate) unreadable: Counters<DbTable>,
    pub(crate) up: IntGauge,
    pub(crate) connections_active: IntGauge,
    pub(crate) connections_idle: IntGauge,
    pub(crate) connections_max: IntGauge,
    pub(crate) unnumbered_rows: IntGauge,
    share_active: IntGaugeVec,
    share_max: IntGaugeVec,
    errors: IntCounterVec,
}

impl DbMetrics {
    pub(super) fn new(family: &Family) -> Self {
        let errors = family.counter_vec(
            "db_errors_total",
            "Statements that failed.",
            &["operation", "error_type"],
        );
        for operation in DbOperation::ALL {
            for kind in DbErrorKind::ALL {
                errors.with_label_values(&[operation.label(), kind.label()]);
            }
        }
        Self {
            query_duration: family.histograms(
                "db_query_duration_seconds",
                "Seconds of a statement, with the wait for a connection.",
                WS_BUCKETS,
                "operation",
            ),
            slow_queries: family.counters(
                "db_slow_queries_total",
                "Statements over DB_SLOW_QUERY_MS.",
                "operation",
            ),
            unreadable: family.counters(
                "db_unreadable_rows_total",
                "Rows that were left out of an answer, since they cannot be read.",
                "table",
            ),
            up: family.gauge("db_up", "1 while the database answers and takes changes."),
            connections_active: family.gauge("db_connections_active", "Pool connections in use."),
            connections_idle: family.gauge("db_connections_idle", "Pool connections at rest."),
            connections_max: family.gauge("db_connections_max", "Pool connections allowed."),
            unnumbered_rows: family.gauge(
                "audit_unnumbered_rows",
                "Rows of the audit trail that wait for their integer id, at the upgrade of a long trail.",
            ),
            share_active: family.gauge_vec(
                "db_share_active",
                "Connections taken of a share, or reserved for a statement that is about to take one.",
                &["share"],
            ),
            share_max: family.gauge_vec("db_share_max", "Connections of a share.", &["share"]),
            errors,
        }
    }

    /// Sets what is taken of a share, and how large it is.
    pub(crate) fn set_share(&self, share: DbShare, active: i64, max: i64) {
        self.share_active.with_label_values(&[share.label()]).set(active);
        self.share_max.with_label_values(&[share.label()]).set(max);
    }

    /// Counts a failed statement.
    pub(crate) fn failed(&self, operation: DbOperation, kind: DbErrorKind) {
        self.errors.with_label_values(&[operation.label(), kind.label()]).inc();
    }
}

label!(
    /// What became of an audited action.
    AuditOutcome { Success = "success", Error = "error", PermissionDenied = "permission_denied" }
);
label!(
    /// What failed on the way of an audit row.
    AuditErrorKind {
        Database = "database",
        Spool = "spool",
        Refused = "refused",
        Damaged = "damaged",
    }
);

/// The series of the audit trail.
#[derive(Clone)]
pub(crate) struct AuditMetrics {
    pub(crate) actions: Counters<AuditOutcome>,
    pub(crate) aggregated: IntCounter,
    pub(crate) queue: IntGauge,
    pub(crate) queue_bytes: IntGauge,
    pub(crate) refused: IntCounter,
    pub(crate) spool: IntGauge,
    pub(crate) written: IntCounter,
    pub(crate) spooled: IntCounter,
    pub(crate) dropped: IntCounter,
    pub(crate) rejected: IntCounter,
    pub(crate) batch_size: Histogram,
    pub(crate) duration: Histogram,
    pub(crate) errors: Counters<AuditErrorKind>,
}

impl AuditMetrics {
    pub(super) fn new(family: &Family) -> Self {
        Self {
            actions: family.counters("audit_logs_total", "Audited actions.", "outcome"),
            aggregated: family.counter(
                "audit_logs_aggregated_total",
                "Audited actions that share a row with others of their kind.",
            ),
            queue: family.gauge("audit_queue_size", "Audit rows waiting in memory."),
            queue_bytes: family.gauge(
                "audit_queue_bytes",
                "Bytes of the audit queue that rows take, and requests that will have one.",
            ),
            refused: family.counter(
                "audit_requests_refused_total",
                "Requests refused because the audit queue had no room for their row.",
            ),
            spool: family.gauge("audit_spool_rows", "Audit rows waiting in the spool on disk."),
            written: family
                .counter("audit_logs_written_total", "Audit rows written to the database."),
            spooled: family.counter("audit_logs_spooled_total", "Audit rows written to the spool."),
            dropped: family
                .counter("audit_logs_dropped_total", "Audit rows lost: the spool was full."),
            rejected: family.counter(
                "audit_logs_rejected_total",
                "Audit rows that the database refused, set aside in rejected.jsonl.",
            ),
            batch_size: family.histogram(
                "audit_batch_size",
                "Rows in an audit batch.",
                &[1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0],
            ),
            duration: family.histogram(
                "audit_log_creation_duration_seconds",
                "Seconds to write an audit batch.",
                WS_BUCKETS,
            ),
            errors: family.counters(
                "audit_log_errors_total",
                "Failures on the way of audit rows.",
                "error_type",
            ),
        }
    }
}

/// Errors that are bugs or failed dependencies, by the handler they showed in.
#[derive(Clone)]
pub(crate) struct ErrorMetrics(IntCounterVec);

impl ErrorMetrics {
    const PANIC: &str = "panic";
    const INTERNAL: &str = "internal_error";

    pub(super) fn new(family: &Family, packages: &[(i32, &'static str)]) -> Self {
        let errors = family.counter_vec(
            "app_errors_total",
            "Errors that are bugs or failed dependencies.",
            &["error_type", "handler"],
        );
        for (_, handler) in packages {
            for kind in [Self::PANIC, Self::INTERNAL, "unavailable", "timeout"] {
                errors.with_label_values(&[kind, handler]);
            }
        }
        for handler in ["http", "connection"] {
            for kind in [Self::PANIC, Self::INTERNAL] {
                errors.with_label_values(&[kind, handler]);
            }
        }
        Self(errors)
    }

    /// Counts a panic in a handler, or in `http` or `connection`.
    pub(crate) fn panicked(&self, handler: &str) {
        self.count(Self::PANIC, handler);
    }

    /// Counts an error under its code.
    pub(crate) fn count(&self, code: &str, handler: &str) {
        self.0.with_label_values(&[code, handler]).inc();
    }
}

label!(
    /// What Redis was asked for: a connection, to join the channel, to send an event, to keep logouts,
    /// to tell of those that are kept, how many nodes there are, what limits allow, and of failed
    /// authentications; to enter connections with their leases, to take them off, to show their figures,
    /// to tell of them, to keep the node alive, and for the time.
    RedisOperation {
        Connect = "connect",
        Publish = "publish",
        Subscribe = "subscribe",
        Revoke = "revoke",
        Revocations = "revocations",
        Nodes = "nodes",
        HttpLimit = "http_limit",
        MessageLimit = "message_limit",
        Failures = "failures",
        Lease = "lease",
        Release = "release",
        Report = "report",
        Connections = "connections",
        Renew = "renew",
        Clock = "clock",
    }
);

impl RedisOperation {
    /// Whether a script of it may write.
    pub(crate) fn writes(self) -> bool {
        !matches!(self, Self::Connections | Self::Clock)
    }
}

/// The series of Redis, which stay at 0 without one.
#[derive(Clone)]
pub(crate) struct RedisMetrics {
    operations: IntCounterVec,
    duration: Histograms<RedisOperation>,
    pub(crate) connected: IntGauge,
}

impl RedisMetrics {
    pub(super) fn new(family: &Family) -> Self {
        let operations = family.counter_vec(
            "redis_operations_total",
            "Redis operations.",
            &["operation", "status"],
        );
        for operation in RedisOperation::ALL {
            for outcome in CallOutcome::ALL {
                operations.with_label_values(&[operation.label(), outcome.label()]);
            }
        }
        Self {
            operations,
            duration: family.histograms(
                "redis_operation_duration_seconds",
                "Seconds of a Redis operation.",
                WS_BUCKETS,
                "operation",
            ),
            connected: family.gauge("redis_connected", "1 while connected to Redis."),
        }
    }

    /// Counts an operation that took so many seconds.
    pub(crate) fn done(&self, operation: RedisOperation, outcome: CallOutcome, seconds: f64) {
        self.operations.with_label_values(&[operation.label(), outcome.label()]).inc();
        self.duration.of(operation).observe(seconds);
    }
}
