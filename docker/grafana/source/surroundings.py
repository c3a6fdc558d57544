"""What stands before Switchboard and beside it: Traefik and Keycloak."""

from panels import choice, dashboard, graph, label, link, stat


def logs(service, **variables):
    chosen = "".join(f"&var-{name}={value}" for name, value in variables.items())
    return link("Log lines", f"/d/application-logs?var-service={service}{chosen}")


CHOSEN = 'service=~"$service"'
# The duration of a WebSocket is its life.
TIMED = f'{CHOSEN}, protocol!="websocket"'

TRAEFIK = dashboard(
    "traefik-metrics", "Traefik", "What comes in, and where it goes.",
    [choice("service", "label_values(traefik_service_requests_total, service)")], [
        ("Overview", [
            stat("Requests", "reqps", f"sum(rate(traefik_service_requests_total{{{CHOSEN}}}[RATE]))",
                 detail="Requests by service"),
            stat("Errors", "percentunit",
                 f'(sum(rate(traefik_service_requests_total{{{CHOSEN}, code=~"5.."}}[RATE])) or vector(0))'
                 f" / sum(rate(traefik_service_requests_total{{{CHOSEN}}}[RATE]))",
                 ((None, "green"), (0.01, "orange"), (0.05, "red")), links=[logs("traefik")],
                 detail="Requests by status"),
            stat("Open connections", "none", "sum(traefik_open_connections)",
                 detail="Open connections"),
            stat("Backends up", "none", f"sum(traefik_service_server_up{{{CHOSEN}}})",
                 ((None, "red"), (1, "green")), detail="Backends"),
            stat("Configuration loaded", "dateTimeFromNow", "max(traefik_config_last_reload_success) * 1000"),
            stat("Certificate ends", "dateTimeFromNow", "min(traefik_tls_certs_not_after) * 1000",
                 about="Empty without TLS."),
        ]),
        ("Requests", [
            graph("Requests by service", "reqps",
                  (f"sum by (service) (rate(traefik_service_requests_total{{{CHOSEN}}}[RATE]))", "{{service}}"),
                  links=[logs("traefik")]),
            graph("Requests by status", "reqps",
                  (f"sum by (code) (rate(traefik_service_requests_total{{{CHOSEN}}}[RATE]))", "{{code}}"),
                  links=[logs("traefik", status=label("code"))]),
            graph("Requests by method", "reqps",
                  (f"sum by (method) (rate(traefik_service_requests_total{{{CHOSEN}}}[RATE]))", "{{method}}")),
            graph("Response time", "s", *[
                (f"histogram_quantile({q}, sum by (le)"
                 f" (rate(traefik_service_request_duration_seconds_bucket{{{TIMED}}}[RATE])))", f"p{q * 100:g}")
                for q in (0.5, 0.9, 0.99)], about="Without WebSockets."),
            graph("Response time by service, mean", "s",
                  (f"sum by (service) (rate(traefik_service_request_duration_seconds_sum{{{TIMED}}}[RATE]))"
                   f" / sum by (service) (rate(traefik_service_request_duration_seconds_count{{{TIMED}}}[RATE]))",
                   "{{service}}")),
            graph("Bytes", "Bps",
                  (f"sum(rate(traefik_service_requests_bytes_total{{{CHOSEN}}}[RATE]))", "in"),
                  (f"sum(rate(traefik_service_responses_bytes_total{{{CHOSEN}}}[RATE]))", "out")),
        ]),
        ("Connections and backends", [
            graph("Open connections", "none",
                  ("sum by (entrypoint, protocol) (traefik_open_connections)", "{{entrypoint}} {{protocol}}")),
            graph("Backends", "none", (f"traefik_service_server_up{{{CHOSEN}}}", "{{service}} {{url}}"),
                  about="1 where the health check succeeds."),
        ]),
    ])

HEAP = 'job="keycloak", area="heap"'

KEYCLOAK = dashboard(
    "keycloak-metrics", "Keycloak", "The identity provider: its JVM, its requests, and what Switchboard asks of it.",
    [], [
        ("Overview", [
            stat("Up", "none", 'sum(up{job="keycloak"})', ((None, "red"), (1, "green"))),
            stat("Heap", "percentunit",
                 f"sum(jvm_memory_used_bytes{{{HEAP}}}) / sum(jvm_memory_max_bytes{{{HEAP}}} > 0)",
                 ((None, "green"), (0.8, "orange"), (0.95, "red")), detail="Heap"),
            stat("Time in the collector", "percentunit", 'sum(rate(jvm_gc_pause_seconds_sum{job="keycloak"}[RATE]))',
                 ((None, "green"), (0.05, "orange"), (0.2, "red")), detail="Time in the collector by cause"),
            stat("Threads", "none", 'sum(jvm_threads_live_threads{job="keycloak"})', detail="Threads"),
            stat("Requests", "reqps", 'sum(rate(http_server_requests_seconds_count{job="keycloak"}[RATE]))',
                 detail="Requests by status", links=[logs("keycloak")]),
            stat("Running since", "dateTimeFromNow", 'process_start_time_seconds{job="keycloak"} * 1000'),
        ]),
        ("JVM", [
            graph("Heap", "bytes", (f"sum(jvm_memory_used_bytes{{{HEAP}}})", "used"),
                  (f"sum(jvm_memory_committed_bytes{{{HEAP}}})", "committed"),
                  (f"sum(jvm_memory_max_bytes{{{HEAP}}} > 0)", "allowed")),
            graph("Memory by pool", "bytes", ('sum by (id) (jvm_memory_used_bytes{job="keycloak"})', "{{id}}")),
            graph("Collections", "cps",
                  ('sum by (action, cause) (rate(jvm_gc_pause_seconds_count{job="keycloak"}[RATE]))',
                   "{{action}}: {{cause}}")),
            graph("Time in the collector by cause", "percentunit",
                  ('sum by (action, cause) (rate(jvm_gc_pause_seconds_sum{job="keycloak"}[RATE]))',
                   "{{action}}: {{cause}}")),
            graph("Threads", "none", ('jvm_threads_live_threads{job="keycloak"}', "live"),
                  ('jvm_threads_peak_threads{job="keycloak"}', "most so far"),
                  ('jvm_threads_daemon_threads{job="keycloak"}', "daemons")),
            graph("CPU", "percentunit", ('process_cpu_usage{job="keycloak"}', "Keycloak"),
                  ('system_cpu_usage{job="keycloak"}', "machine")),
        ]),
        ("Requests", [
            graph("Requests by status", "reqps",
                  ('sum by (status) (rate(http_server_requests_seconds_count{job="keycloak"}[RATE]))', "{{status}}"),
                  links=[logs("keycloak")]),
            graph("Response time by path, mean", "s",
                  ('sum by (uri) (rate(http_server_requests_seconds_sum{job="keycloak"}[RATE]))'
                   ' / sum by (uri) (rate(http_server_requests_seconds_count{job="keycloak"}[RATE]))', "{{uri}}"),
                  links=[logs("keycloak")]),
            graph("Database pool", "none", ('sum(agroal_active_count{job="keycloak"})', "in use"),
                  ('sum(agroal_available_count{job="keycloak"})', "at rest"),
                  ('sum(agroal_awaiting_count{job="keycloak"})', "waiting for one")),
        ]),
        ("As Switchboard sees it", [
            graph("Logins and refreshes", "cps",
                  ('sum by (method, status) (rate(keycloak_auth_attempts_total{job="switchboard"}[RATE]))',
                   "{{method}}: {{status}}"),
                  links=[logs("switchboard", search="identity%20provider")]),
            graph("Calls, p99", "s",
                  ("histogram_quantile(0.99, sum by (le, operation)"
                   ' (rate(keycloak_operation_duration_seconds_bucket{job="switchboard"}[RATE])))', "{{operation}}")),
            graph("Circuit breaker", "none",
                  ('circuit_breaker_state{job="switchboard", service="keycloak"}', "{{instance}}"),
                  about="0 closed, 1 half-open, 2 open."),
        ]),
    ])
