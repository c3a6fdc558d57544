"""Switchboard: an overview whose numbers lead to the rows below it, and from there to the log lines.

The names of the metrics are those of src/metrics, which tests/it/metrics_names.rs pins.
"""

from panels import choice, dashboard, graph, label, link, stat

UID = "switchboard-metrics"

VARIABLES = [
    choice("instance", 'label_values(ws_connections_active{job="switchboard"}, instance)'),
    choice("endpoint", 'label_values(http_requests_total{job="switchboard"}, endpoint)'),
    choice("pkg_id", 'label_values(ws_responses_total{job="switchboard"}, pkg_id)', "package"),
]

# --- where a series leads ---

LOGS = "/d/application-logs?var-service=switchboard"
REQUESTS = link("Requests of this endpoint", f"{LOGS}&var-endpoint={label('endpoint')}")
SLOW = link("Slow requests of this endpoint", f"{LOGS}&var-slower=100&var-endpoint={label('endpoint')}")
ANY_SLOW = link("Slow requests and messages", f"{LOGS}&var-slower=100")
WARNINGS = link("Errors and warnings", f"{LOGS}&var-level=ERROR&var-level=WARN")
DENIED = link("What the audit trail has", "/d/audit-logs?var-outcome=permission_denied")
AUDITED = link("What the audit trail has", f"/d/audit-logs?var-outcome={label('outcome')}")


def logged(text):
    """Log lines that hold a text."""
    return link("Log lines", f"{LOGS}&var-search={text.replace(' ', '%20')}")


# --- thresholds: those of the targets ---

def up_to(warning, critical):
    return ((None, "green"), (warning, "orange"), (critical, "red"))


def good_from(*values):
    return ((None, "red"), *zip(values, ("orange", "green")[-len(values):]))


def p(quantile, histogram, by="", of="OURS"):
    """A quantile of a histogram."""
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({quantile}, sum by ({groups}) (rate({histogram}_bucket{{{of}}}[RATE])))"


ERRORS = (
    'sum(rate(http_requests_total{CLIENTS, status_code=~"5.."}[RATE]))'
    " / sum(rate(http_requests_total{CLIENTS}[RATE]))"
)

# Buckets are cumulative: the answers within 0.1 s are in both, so half of both has them once and the others half.
APDEX = (
    '(sum(rate(http_request_duration_seconds_bucket{CLIENTS, le="0.1"}[RATE]))'
    ' + sum(rate(http_request_duration_seconds_bucket{CLIENTS, le="0.4"}[RATE]))) / 2'
    " / sum(rate(http_request_duration_seconds_count{CLIENTS}[RATE]))"
)

CHOSEN = 'OURS, endpoint=~"$endpoint"'
PACKAGE = 'OURS, pkg_id=~"$pkg_id"'

OVERVIEW = [
    stat("Nodes up", "none", 'sum(up{job="switchboard"})', good_from(1), detail="Running since"),
    stat("Availability", "percentunit", 'avg(avg_over_time(up{job="switchboard"}[$__range]))', good_from(0.99, 0.999),
         about="The part of the time shown in which nodes answered. Target: 99.9 %.", detail="Running since"),
    stat("Errors", "percentunit", ERRORS, up_to(0.01, 0.05), links=[WARNINGS], detail="Errors by endpoint",
         about="Answers with 5xx among all. Target: below 1 %; HighErrorRate from 1 % on, critical from 5 % on."),
    stat("Response time, p99", "s", p(0.99, "http_request_duration_seconds", of="CLIENTS"), up_to(0.5, 1),
         links=[ANY_SLOW], detail="Response time by endpoint, p99",
         about="Target: below 500 ms; SlowResponseTime from 500 ms on, critical from 1 s on."),
    stat("Apdex", "none", APDEX, good_from(0.7, 0.94), links=[ANY_SLOW], detail="Response time",
         about="1 where all answers come within 100 ms; those within 400 ms count half."),
    stat("Requests", "reqps", "sum(rate(http_requests_total{CLIENTS}[RATE]))", detail="Requests by endpoint"),
    stat("Connections", "none", "sum(ws_connections_active{OURS})", up_to(5000, 10000), detail="Connections",
         about="WebSocket. Target: below 5,000 a node."),
    stat("Messages in", "cps", "sum(rate(ws_messages_received_total{OURS}[RATE]))", detail="Messages"),
    stat("Database pool", "percentunit", "max(db_share_active{OURS} / db_share_max{OURS})",
         up_to(0.8, 0.95), about="Connections in use of the fullest share on the fullest node. Target: below 80 %.", detail="Pool"),
    stat("Redis", "none", "min(redis_connected{OURS})", good_from(1), words={0: "not connected", 1: "connected"},
         about="Not connected is as it should be for a node without REDIS_URL.", detail="Operations"),
    stat("Circuit breakers", "none", "max(circuit_breaker_state{OURS})", up_to(1, 2),
         words={0: "closed", 1: "half-open", 2: "open"}, links=[logged("circuit breaker")],
         detail="Circuit breakers"),
    stat("Version", "none", "app_info{OURS}", legend="{{version}}, {{environment}}", detail="Running since"),
]

HTTP = [
    graph("Requests by endpoint", "reqps",
          ('sum by (method, endpoint) (rate(http_requests_total{OURS, endpoint=~"$endpoint"}[RATE]))',
           "{{method}} {{endpoint}}"), links=[REQUESTS]),
    graph("Requests by status", "reqps",
          ('sum by (status_code) (rate(http_requests_total{OURS, endpoint=~"$endpoint"}[RATE]))', "{{status_code}}"),
          links=[link("Requests with this status", f"{LOGS}&var-status={label('status_code')}")]),
    graph("Errors by endpoint", "percentunit",
          ('sum by (endpoint) (rate(http_requests_total{OURS, endpoint=~"$endpoint", status_code=~"5.."}[RATE]))'
           ' / sum by (endpoint) (rate(http_requests_total{OURS, endpoint=~"$endpoint"}[RATE]))', "{{endpoint}}"),
          links=[link("Failed requests of this endpoint",
                      f"{LOGS}&var-status=5..&var-endpoint={label('endpoint')}")], limit=0.05),
    graph("Response time", "s",
          *[(p(q, "http_request_duration_seconds", of=CHOSEN), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)],
          links=[ANY_SLOW], limit=1),
    graph("Response time by endpoint, p99", "s",
          (p(0.99, "http_request_duration_seconds", "method, endpoint", CHOSEN),
           "{{method}} {{endpoint}}"), links=[SLOW], limit=1),
    graph("Response time by endpoint, mean", "s",
          ('sum by (endpoint) (rate(http_request_duration_seconds_sum{OURS, endpoint=~"$endpoint"}[RATE]))'
           ' / sum by (endpoint) (rate(http_request_duration_seconds_count{OURS, endpoint=~"$endpoint"}[RATE]))',
           "{{endpoint}}"), links=[SLOW]),
    graph("Requests in progress", "none",
          ('sum by (method, endpoint) (http_requests_in_progress{OURS, endpoint=~"$endpoint"})',
           "{{method}} {{endpoint}}")),
    graph("Refused by a limit", "cps",
          ("sum by (limit_type) (rate(rate_limit_hits_total{OURS}[RATE]))", "{{limit_type}}"),
          links=[link("Requests over the limit", f"{LOGS}&var-status=429")],
          about="RateLimitAbuse from 100 a second on. Messages over the limit leave no line each."),
    graph("Denied", "reqps",
          ('sum by (status_code) (rate(http_requests_total{OURS, status_code=~"401|403"}[RATE]))', "{{status_code}}"),
          links=[link("Requests with this status", f"{LOGS}&var-status={label('status_code')}"), DENIED]),
]

WEBSOCKET = [
    graph("Connections", "none", ("sum by (instance) (ws_connections_active{OURS})", "{{instance}}"),
          links=[logged("connection opened")]),
    graph("Connections asked for", "cps",
          ("sum by (status) (rate(ws_connections_total{OURS}[RATE]))", "{{status}}"),
          links=[logged("connection refused")]),
    graph("Connections ended, by close code", "cps",
          ("sum by (code) (rate(ws_disconnections_total{OURS}[RATE]))", "{{code}}"),
          links=[logged("connection closed")], about="docs/protocol.md says what each code means."),
    graph("Messages", "cps",
          ("sum(rate(ws_messages_received_total{OURS}[RATE]))", "in"),
          ("sum(rate(ws_messages_sent_total{OURS}[RATE]))", "out")),
    graph("Answers by status", "cps",
          ('sum by (pkg_id, status_code) (rate(ws_responses_total{OURS, pkg_id=~"$pkg_id"}[RATE])) > 0',
           "{{pkg_id}}: {{status_code}}"), about="0 ok, 1 error, 2 invalid data, 3 permission denied."),
    graph("Answers that are errors", "percentunit",
          ('sum by (pkg_id) (rate(ws_responses_total{OURS, pkg_id=~"$pkg_id", status_code!="0"}[RATE]))'
           ' / sum by (pkg_id) (rate(ws_responses_total{OURS, pkg_id=~"$pkg_id"}[RATE]))', "{{pkg_id}}"),
          links=[link("Lines of this package", f"{LOGS}&var-pkg_id={label('pkg_id')}")]),
    graph("Processing time by package, p99", "s",
          (p(0.99, "ws_message_processing_duration_seconds", "pkg_id", PACKAGE), "{{pkg_id}}"),
          about="From decoded to the answer ready.", links=[
              link("Slow messages of this package",
                   f"{LOGS}&var-slower=100&var-pkg_id={label('pkg_id')}")]),
    graph("Where the time goes, p99", "s", (p(0.99, "ws_message_phase_duration_seconds", "phase"), "{{phase}}"),
          about="Waiting for the handler, in it, and from the answer ready to flushed.", links=[ANY_SLOW]),
    graph("Requests in flight", "none", ("sum by (instance) (ws_requests_in_flight{OURS})", "{{instance}}")),
    graph("Slow clients and lost pushes", "cps",
          ("sum(rate(ws_send_queue_dropped_total{OURS}[RATE]))", "dropped: client too slow"),
          ("sum(rate(ws_broadcast_errors_total{OURS}[RATE]))", "not encoded, or not handed to other nodes"),
          links=[WARNINGS]),
]

DATABASE = [
    graph("Statements", "cps",
          ("sum by (operation) (rate(db_query_duration_seconds_count{OURS}[RATE]))", "{{operation}}")),
    graph("Time of a statement, p99", "s", (p(0.99, "db_query_duration_seconds", "operation"), "{{operation}}"),
          about="With the wait for a connection.", links=[logged("slow query")]),
    graph("Pool", "none",
          ("sum(db_connections_active{OURS})", "in use"), ("sum(db_connections_idle{OURS})", "at rest"),
          ("sum(db_connections_max{OURS})", "allowed")),
    graph("Shares of the pool in use", "percentunit",
          ("max by (share) (db_share_active{OURS} / db_share_max{OURS})", "{{share}}"),
          about="On the node where it is fullest."),
    graph("Errors", "cps",
          ("sum by (operation, error_type) (rate(db_errors_total{OURS}[RATE]))", "{{operation}}: {{error_type}}"),
          links=[WARNINGS]),
    graph("Slow statements", "cps", ("sum by (operation) (rate(db_slow_queries_total{OURS}[RATE]))", "{{operation}}"),
          about="Over DB_SLOW_QUERY_MS.", links=[logged("slow query")]),
    graph("Postgres: connections", "none",
          ('sum by (datname) (pg_stat_database_numbackends{datname!~"template.*|"})', "{{datname}}")),
    graph("Postgres: transactions", "cps",
          ('sum by (datname) (rate(pg_stat_database_xact_commit{datname!~"template.*|"}[RATE]))',
           "{{datname}} committed"),
          ('sum by (datname) (rate(pg_stat_database_xact_rollback{datname!~"template.*|"}[RATE]))',
           "{{datname}} rolled back")),
    graph("Postgres: blocks found in memory", "percentunit",
          ('sum by (datname) (rate(pg_stat_database_blks_hit{datname!~"template.*|"}[RATE]))'
           ' / (sum by (datname) (rate(pg_stat_database_blks_hit{datname!~"template.*|"}[RATE]))'
           ' + sum by (datname) (rate(pg_stat_database_blks_read{datname!~"template.*|"}[RATE])))', "{{datname}}")),
    graph("Postgres: size", "bytes",
          ('sum by (datname) (pg_database_size_bytes{datname!~"template.*"})', "{{datname}}")),
]

REDIS = [
    graph("Connected", "none", ("redis_connected{OURS}", "{{instance}}"), links=[logged("redis")]),
    graph("Operations", "ops",
          ("sum by (operation, status) (rate(redis_operations_total{OURS}[RATE]))", "{{operation}}: {{status}}"),
          links=[logged("redis")]),
    graph("Time of an operation, p99", "s",
          (p(0.99, "redis_operation_duration_seconds", "operation"), "{{operation}}")),
    graph("Redis: clients", "none", ("redis_connected_clients", "{{instance}}")),
    graph("Redis: memory", "bytes", ("redis_memory_used_bytes", "used"), ("redis_memory_max_bytes > 0", "allowed"),
          about="Nothing is allowed or forbidden where maxmemory is 0."),
    graph("Redis: commands", "cps", ("rate(redis_commands_processed_total[RATE])", "{{instance}}")),
    graph("Redis: keys found", "percentunit",
          ("rate(redis_keyspace_hits_total[RATE])"
           " / (rate(redis_keyspace_hits_total[RATE]) + rate(redis_keyspace_misses_total[RATE]))", "{{instance}}")),
]

AUTHENTICATION = [
    graph("Attempts", "cps", ("sum by (status) (rate(auth_attempts_total{OURS}[RATE]))", "{{status}}"),
          links=[link("Failed attempts", f"{LOGS}&var-status=401"), logged("connection refused")],
          about="Tokens over REST and WebSocket, and logins. HighFailedLoginRate from 10 failed a second on."),
    graph("Tokens looked at", "cps", ("sum by (status) (rate(token_validation_total{OURS}[RATE]))", "{{status}}")),
    graph("Tokens found in the cache", "percentunit",
          ("sum(rate(token_cache_hits_total{OURS}[RATE])) / (sum(rate(token_cache_hits_total{OURS}[RATE]))"
           " + sum(rate(token_cache_misses_total{OURS}[RATE])))", "found")),
    graph("Logins at Keycloak", "cps",
          ("sum by (method, status) (rate(keycloak_auth_attempts_total{OURS}[RATE]))", "{{method}}: {{status}}"),
          links=[link("Keycloak", "/d/keycloak-metrics?")]),
    graph("Calls to Keycloak, p99", "s",
          (p(0.99, "keycloak_operation_duration_seconds", "operation"), "{{operation}}"),
          links=[link("Keycloak", "/d/keycloak-metrics?")]),
    graph("Fetches of the keys", "cps", ("sum by (status) (rate(jwks_refreshes_total{OURS}[RATE]))", "{{status}}"),
          links=[logged("keys of the identity provider")]),
]

AUDIT = [
    graph("Audited actions", "cps", ("sum by (outcome) (rate(audit_logs_total{OURS}[RATE]))", "{{outcome}}"),
          ("sum(rate(audit_logs_aggregated_total{OURS}[RATE]))", "of them summed up"),
          links=[AUDITED]),
    graph("Rows on their way", "none", ("sum(audit_queue_size{OURS})", "in memory"),
          ("sum(audit_spool_rows{OURS})", "in the spool on disk"), links=[logged("audit rows")]),
    graph("Rows written", "cps", ("sum(rate(audit_logs_written_total{OURS}[RATE]))", "to the database"),
          ("sum(rate(audit_logs_spooled_total{OURS}[RATE]))", "to the spool"),
          ("sum(rate(audit_logs_rejected_total{OURS}[RATE]))", "refused by the database"),
          ("sum(rate(audit_logs_dropped_total{OURS}[RATE]))", "lost"), links=[logged("audit rows")]),
    graph("Time to write a batch, p99", "s", (p(0.99, "audit_log_creation_duration_seconds"), "p99")),
    graph("Rows in a batch, mean", "none",
          ("sum(rate(audit_batch_size_sum{OURS}[RATE])) / sum(rate(audit_batch_size_count{OURS}[RATE]))", "rows")),
    graph("Failures", "cps", ("sum by (error_type) (rate(audit_log_errors_total{OURS}[RATE]))", "{{error_type}}"),
          links=[WARNINGS]),
]

FAULTS = [
    graph("Circuit breakers", "none", ("circuit_breaker_state{OURS}", "{{service}} on {{instance}}"),
          about="0 closed, 1 half-open, 2 open.", links=[logged("circuit breaker")]),
    graph("Failures behind circuit breakers", "cps",
          ("sum by (service) (rate(circuit_breaker_failures_total{OURS}[RATE]))", "{{service}}: failures"),
          ("sum by (service) (rate(circuit_breaker_state_changes_total{OURS}[RATE]))", "{{service}}: changes of state"),
          links=[logged("circuit breaker")]),
    graph("Errors that are bugs or failed dependencies", "cps",
          ("sum by (error_type, handler) (rate(app_errors_total{OURS}[RATE])) > 0", "{{handler}}: {{error_type}}"),
          links=[WARNINGS]),
    graph("Actors started again", "cps", ("sum by (actor) (rate(actor_restarts_total{OURS}[RATE]))", "{{actor}}"),
          links=[logged("an actor ended")]),
]

PROCESS = [
    graph("CPU of the process", "percentunit", ("rate(process_cpu_seconds_total{OURS}[RATE])", "{{instance}}"),
          about="1 is one core."),
    graph("Memory of the process", "bytes", ("process_resident_memory_bytes{OURS}", "{{instance}}")),
    graph("Open files", "none", ("process_open_fds{OURS}", "{{instance}}: open"),
          ("process_max_fds{OURS}", "{{instance}}: allowed")),
    graph("CPU of the container", "percentunit",
          ('sum by (name) (rate(container_cpu_usage_seconds_total{name=~"switchboard-[0-9]+"}[RATE]))'
           ' / max by (name) (container_spec_cpu_quota{name=~"switchboard-[0-9]+"}'
           ' / container_spec_cpu_period{name=~"switchboard-[0-9]+"})', "{{name}}"),
          about="HighCPUUsage from 70 % of what it may have on.", limit=0.9),
    graph("Memory of the container", "percentunit",
          ('max by (name) (container_memory_working_set_bytes{name=~"switchboard-[0-9]+"})'
           ' / max by (name) (container_spec_memory_limit_bytes{name=~"switchboard-[0-9]+"} > 0)', "{{name}}"),
          about="HighMemoryUsage from 80 % of what it may have on.", limit=0.95),
    graph("Running since", "dateTimeFromNow", ("process_start_time_seconds{OURS} * 1000", "{{instance}}")),
]

DASHBOARD = dashboard(
    UID, "Switchboard", "What the server does: HTTP, WebSocket, and the parts behind them.", VARIABLES, [
        ("Overview", OVERVIEW), ("HTTP", HTTP), ("WebSocket", WEBSOCKET), ("Database", DATABASE), ("Redis", REDIS),
        ("Authentication", AUTHENTICATION), ("Audit trail", AUDIT), ("Circuit breakers and faults", FAULTS),
        ("Process and container", PROCESS),
    ])
