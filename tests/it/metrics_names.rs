//! The names that dashboards and alerts use are there from the start, with 0 in closed label sets.
//!
//! Not in the table, since its label set is not closed: `audit_log_errors_total`.

use std::{
    collections::HashSet,
    io::Write,
    process::{Command, Stdio},
};

use crate::support::{
    TestServer,
    rest::{add_author, send_raw},
};

/// Name, type, and the values of its closed labels, each as it stands between the braces.
type Family = (&'static str, &'static str, &'static [&'static str]);

const NONE: &[&str] = &[""];
const OPERATIONS: &[&str] = &[
    "operation=\"select\"",
    "operation=\"insert\"",
    "operation=\"update\"",
    "operation=\"delete\"",
];
const SERVICES: &[&str] = &["service=\"keycloak\"", "service=\"redis\""];
const ROUTES: &[&str] = &[
    "endpoint=\"/authors\",method=\"GET\"",
    "endpoint=\"/authors\",method=\"POST\"",
    "endpoint=\"/authors/paginated\",method=\"GET\"",
    "endpoint=\"/authors/{id}\",method=\"GET\"",
    "endpoint=\"/authors/{id}\",method=\"PUT\"",
    "endpoint=\"/authors/{id}\",method=\"DELETE\"",
    "endpoint=\"/audit-logs\",method=\"GET\"",
    "endpoint=\"/audit-logs/{id}\",method=\"GET\"",
    "endpoint=\"/audit-logs/user/{user_id}\",method=\"GET\"",
    "endpoint=\"/admin/broadcast\",method=\"POST\"",
    "endpoint=\"unmatched\",method=\"GET\"",
];
const PACKAGES: &[&str] = &[
    "pkg_id=\"1\"",
    "pkg_id=\"2\"",
    "pkg_id=\"3\"",
    "pkg_id=\"4\"",
    "pkg_id=\"5\"",
    "pkg_id=\"100\"",
    "pkg_id=\"unknown\"",
];

/// Every family that is 0 at the start.
const AT_ZERO: &[Family] = &[
    (
        "http_requests_total",
        "counter",
        &[
            "endpoint=\"/authors\",method=\"GET\",status_code=\"200\"",
            "endpoint=\"/authors\",method=\"POST\",status_code=\"201\"",
            "endpoint=\"/authors/{id}\",method=\"DELETE\",status_code=\"204\"",
            "endpoint=\"/authors/{id}\",method=\"GET\",status_code=\"401\"",
            "endpoint=\"/authors/{id}\",method=\"PUT\",status_code=\"500\"",
            "endpoint=\"/auth/login\",method=\"POST\",status_code=\"401\"",
            "endpoint=\"/auth/logout\",method=\"POST\",status_code=\"204\"",
            "endpoint=\"/web\",method=\"GET\",status_code=\"101\"",
            "endpoint=\"unmatched\",method=\"GET\",status_code=\"404\"",
        ],
    ),
    ("http_request_duration_seconds", "histogram", ROUTES),
    ("http_requests_in_progress", "gauge", ROUTES),
    ("http_connections_refused_total", "counter", &["reason=\"capacity\"", "reason=\"address\""]),
    ("http_body_memory_bytes", "gauge", NONE),
    (
        "forwarded_headers_ignored_total",
        "counter",
        &["reason=\"unreadable\"", "reason=\"untrusted_peer\""],
    ),
    ("ws_connections_active", "gauge", NONE),
    ("ws_connections_pending", "gauge", NONE),
    (
        "ws_connections_total",
        "counter",
        &[
            "status=\"accepted\"",
            "status=\"rejected_auth\"",
            "status=\"rejected_auth_timeout\"",
            "status=\"rejected_limit\"",
            "status=\"rejected_origin\"",
            "status=\"rejected_capacity\"",
        ],
    ),
    (
        "ws_disconnections_total",
        "counter",
        &[
            "code=\"1000\"",
            "code=\"1001\"",
            "code=\"1003\"",
            "code=\"1007\"",
            "code=\"1008\"",
            "code=\"1009\"",
            "code=\"1011\"",
            "code=\"4001\"",
            "code=\"4002\"",
            "code=\"4003\"",
            "code=\"4005\"",
            "code=\"4006\"",
            "code=\"abnormal\"",
        ],
    ),
    ("ws_messages_received_total", "counter", NONE),
    ("ws_messages_sent_total", "counter", NONE),
    ("ws_message_processing_duration_seconds", "histogram", PACKAGES),
    (
        "ws_message_phase_duration_seconds",
        "histogram",
        &["phase=\"queue\"", "phase=\"handler\"", "phase=\"write\""],
    ),
    ("ws_requests_in_flight", "gauge", NONE),
    (
        "ws_late_changes_total",
        "counter",
        &["outcome=\"success\"", "outcome=\"error\"", "outcome=\"permission_denied\""],
    ),
    (
        "ws_responses_total",
        "counter",
        &[
            "pkg_id=\"1\",status_code=\"0\"",
            "pkg_id=\"3\",status_code=\"2\"",
            "pkg_id=\"100\",status_code=\"3\"",
            "pkg_id=\"unknown\",status_code=\"1\"",
        ],
    ),
    ("ws_send_queue_dropped_total", "counter", &["reason=\"slow_consumer\""]),
    ("ws_broadcast_errors_total", "counter", NONE),
    ("db_query_duration_seconds", "histogram", OPERATIONS),
    (
        "db_errors_total",
        "counter",
        &[
            "error_type=\"integrity_error\",operation=\"insert\"",
            "error_type=\"timeout\",operation=\"select\"",
            "error_type=\"connection_error\",operation=\"update\"",
            "error_type=\"other\",operation=\"delete\"",
        ],
    ),
    ("db_slow_queries_total", "counter", OPERATIONS),
    ("db_unreadable_rows_total", "counter", &["table=\"author\"", "table=\"user_actions\""]),
    (
        "db_share_active",
        "gauge",
        &[
            "share=\"reads\"",
            "share=\"changes\"",
            "share=\"audit_reads\"",
            "share=\"audit_changes\"",
        ],
    ),
    (
        "redis_operations_total",
        "counter",
        &[
            "operation=\"publish\",status=\"success\"",
            "operation=\"publish\",status=\"error\"",
            "operation=\"connect\",status=\"error\"",
            "operation=\"subscribe\",status=\"success\"",
            "operation=\"revoke\",status=\"error\"",
            "operation=\"revocations\",status=\"error\"",
            "operation=\"nodes\",status=\"success\"",
            "operation=\"failures\",status=\"error\"",
        ],
    ),
    (
        "redis_operation_duration_seconds",
        "histogram",
        &["operation=\"publish\"", "operation=\"nodes\""],
    ),
    ("redis_connected", "gauge", NONE),
    (
        "rate_limit_hits_total",
        "counter",
        &[
            "limit_type=\"http\"",
            "limit_type=\"websocket_connection\"",
            "limit_type=\"websocket_message\"",
            "limit_type=\"websocket_control\"",
        ],
    ),
    (
        "auth_attempts_total",
        "counter",
        &["status=\"success\"", "status=\"failed\"", "status=\"token_expired\""],
    ),
    (
        "token_validation_total",
        "counter",
        &["status=\"valid\"", "status=\"invalid\"", "status=\"expired\""],
    ),
    ("token_cache_hits_total", "counter", NONE),
    ("token_cache_misses_total", "counter", NONE),
    (
        "keycloak_auth_attempts_total",
        "counter",
        &[
            "method=\"password\",status=\"success\"",
            "method=\"password\",status=\"failure\"",
            "method=\"password\",status=\"error\"",
            "method=\"refresh\",status=\"success\"",
            "method=\"refresh\",status=\"failure\"",
            "method=\"refresh\",status=\"error\"",
        ],
    ),
    (
        "keycloak_operation_duration_seconds",
        "histogram",
        &[
            "operation=\"login\"",
            "operation=\"refresh\"",
            "operation=\"logout\"",
            "operation=\"jwks\"",
        ],
    ),
    ("jwks_refreshes_total", "counter", &["status=\"success\"", "status=\"error\""]),
    ("jwks_age_seconds", "gauge", NONE),
    ("jwks_max_age_seconds", "gauge", NONE),
    ("circuit_breaker_state", "gauge", SERVICES),
    ("circuit_breaker_state_changes_total", "counter", SERVICES),
    ("circuit_breaker_failures_total", "counter", SERVICES),
    ("audit_queue_size", "gauge", NONE),
    ("audit_queue_bytes", "gauge", NONE),
    ("audit_requests_refused_total", "counter", NONE),
    ("audit_unnumbered_rows", "gauge", NONE),
    (
        "audit_logs_total",
        "counter",
        &["outcome=\"success\"", "outcome=\"error\"", "outcome=\"permission_denied\""],
    ),
    ("audit_logs_written_total", "counter", NONE),
    ("audit_logs_spooled_total", "counter", NONE),
    ("audit_logs_dropped_total", "counter", NONE),
    ("audit_logs_aggregated_total", "counter", NONE),
    ("audit_logs_rejected_total", "counter", NONE),
    ("audit_batch_size", "histogram", NONE),
    ("audit_log_creation_duration_seconds", "histogram", NONE),
    (
        "actor_restarts_total",
        "counter",
        &[
            "actor=\"handler\"",
            "actor=\"registry\"",
            "actor=\"connection\"",
            "actor=\"audit\"",
            "actor=\"cluster\"",
        ],
    ),
    (
        "table_entries",
        "gauge",
        &[
            "table=\"connections\"",
            "table=\"users\"",
            "table=\"audit_sums\"",
            "table=\"message_limits\"",
            "table=\"failures\"",
            "table=\"tokens\"",
        ],
    ),
    (
        "app_errors_total",
        "counter",
        &[
            "error_type=\"panic\",handler=\"http\"",
            "error_type=\"internal_error\",handler=\"connection\"",
            "error_type=\"timeout\",handler=\"GET_AUTHORS\"",
        ],
    ),
];

/// Families with a value of their own at the start.
const NOT_ZERO: &[(&str, &str)] = &[
    ("http_connections_active", "gauge"),
    ("app_info", "gauge"),
    ("db_connections_active", "gauge"),
    ("db_connections_idle", "gauge"),
    ("db_connections_max", "gauge"),
    ("db_up", "gauge"),
    ("db_share_max", "gauge"),
    // Of the process: other servers of this test binary write no log.
    ("log_lines_dropped_total", "counter"),
    ("process_cpu_seconds_total", "counter"),
    ("process_resident_memory_bytes", "gauge"),
    ("process_virtual_memory_bytes", "gauge"),
    ("process_open_fds", "gauge"),
    ("process_max_fds", "gauge"),
    ("process_start_time_seconds", "gauge"),
    ("process_threads", "gauge"),
];

#[tokio::test]
async fn every_metric_is_there_from_the_start() {
    let server = TestServer::start(&[]).await;
    // The row that says that it started is in the database already, and whoever wrote it gives back its place.
    server.until_metric("db_share_active{share=\"audit_changes\"}", 0.0).await;
    // Logouts were read, and those that are over may be deleted.
    let mut text = server.metrics().await;
    for operation in ["insert", "select", "delete"] {
        let count = format!("db_query_duration_seconds_count{{operation=\"{operation}\"}}");
        text = text.replace(&format!("{count} 1\n"), &format!("{count} 0\n"));
    }
    let lines: HashSet<&str> = text.lines().collect();
    let mut missing = Vec::new();
    for (name, kind, series) in AT_ZERO {
        let suffix = if *kind == "histogram" { "_count" } else { "" };
        let wanted = series.iter().map(|labels| match *labels {
            "" => format!("{name}{suffix} 0"),
            labels => format!("{name}{suffix}{{{labels}}} 0"),
        });
        missing.extend(
            [format!("# TYPE {name} {kind}")]
                .into_iter()
                .chain(wanted)
                .filter(|line| !lines.contains(line.as_str())),
        );
    }
    for (name, kind) in NOT_ZERO {
        let typed = format!("# TYPE {name} {kind}");
        let valued = lines
            .iter()
            .any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        missing.extend((!lines.contains(typed.as_str()) || !valued).then_some(typed));
    }
    assert!(missing.is_empty(), "missing:\n{}", missing.join("\n"));
    assert_eq!(server.metric("db_connections_max").await, 24.0);
    let info = lines.iter().find(|line| line.starts_with("app_info{")).unwrap();
    for label in ["environment=\"dev\"", "rust_version=\"1.", "version=\"0.1.0\"", "} 1"] {
        assert!(info.contains(label), "{info}");
    }
}

#[tokio::test]
async fn buckets_hold_the_bounds_that_dashboards_ask_for() {
    let server = TestServer::start(&[]).await;
    let text = server.metrics().await;
    let bounds = |name: &str, labels: &str| -> Vec<String> {
        let start = format!("{name}_bucket{{{labels},le=\"");
        let bounds = text.lines().filter_map(|line| line.strip_prefix(&*start)?.split('"').next());
        bounds.map(ToOwned::to_owned).collect()
    };
    let http = bounds("http_request_duration_seconds", ROUTES[0]);
    assert_eq!((&*http[0], &*http[http.len() - 2]), ("0.005", "10"));
    assert!(["0.1", "0.4"].iter().all(|bound| http.iter().any(|known| known == bound)));
    for (name, labels) in [
        ("ws_message_processing_duration_seconds", "pkg_id=\"1\""),
        ("ws_message_phase_duration_seconds", "phase=\"write\""),
    ] {
        let ws = bounds(name, labels);
        assert_eq!((&*ws[0], &*ws[ws.len() - 2]), ("0.0001", "5"), "{name}");
    }
}

#[tokio::test]
async fn the_text_is_what_prometheus_reads() {
    let server = TestServer::start(&[]).await;
    add_author(&server, "Ann").await;
    let head = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = send_raw(server.addr, head).await.unwrap();
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = server.metrics().await;
    let mut seen = HashSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(seen.insert(series), "twice: {series}");
        assert!(value.parse::<f64>().is_ok_and(|value| value >= 0.0), "{line}");
    }
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        println!("promtool is not installed: its check is skipped");
        return;
    };
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let checked = promtool.wait_with_output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}
