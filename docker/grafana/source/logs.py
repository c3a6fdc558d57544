"""What the log lines say (Loki) and what the audit trail says (Postgres).

Alloy gives a line the labels `service`, `level` and `logger`; ids and numbers are taken from the line itself. The
names of the fields are those of docs/log.schema.json.
"""

from panels import (
    LOKI, POSTGRES, choice, dashboard, lines, link, log_graph, log_table, options, sql_graph,
    sql_stat, sql_table, text,
)

# --- application logs ---

OURS = '{service="switchboard", level=~"$level"}'
FILTERS = (
    '|~ `(?i)$search` | json | route=~"$endpoint" | status_code=~"$status" | user_id=~"$user"'
    ' | pkg_id=~"$pkg_id" | request_id=~"$request_id"'
)

FAILED_LOGINS = (
    'status_code="401" or (message="connection refused" and code="4001") or message="refresh refused"'
)
WEBSOCKET = 'logger=~"switchboard\\\\.(server|registry|connection|router|handlers).*"'
LIMITED = 'status_code="429" or (message="connection refused" and code="1008")'

APPLICATION_LOGS = dashboard(
    "application-logs", "Application Logs", "What the services write, and how to follow one request through it.", [
        choice("service", "label_values(service)", source=LOKI).all_value(".+"),
        options("level", ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]),
        choice("endpoint", 'label_values(http_requests_total{job="switchboard"}, endpoint)'),
        text("status", "status code", ".*"), text("user", "user id", ".*"), text("pkg_id", "package", ".*"),
        text("request_id", "request id", ".*"), text("slower", "slower than, ms", "100"), text("search", "holds"),
    ], [
        ("Overview", [
            log_graph("Lines by service", ('sum by (service) (count_over_time({service=~"$service"}[$__auto]))',
                                           "{{service}}"), about="Of all services that write to Loki."),
            log_graph("Lines by level", (f"sum by (level) (count_over_time({OURS}[$__auto]))", "{{level}}")),
            log_graph("Errors a second", ('sum(rate({service="switchboard", level="ERROR"}[$__auto]))', "errors"),
                      unit="cps", stacked=False),
            log_graph("Requests by status", (f"sum by (status_code) (count_over_time({OURS} {FILTERS}"
                                             ' | status_code!="" [$__auto]))', "{{status_code}}")),
            log_graph("Over a limit", (f"sum(count_over_time({OURS} | json | {LIMITED} [$__auto]))", "refused")),
            log_graph("Failed authentication", (f"sum(count_over_time({OURS} | json | {FAILED_LOGINS} [$__auto]))",
                                                "refused")),
            log_table("Most frequent errors", 'topk(10, sum by (message) (count_over_time({service="switchboard",'
                                              ' level="ERROR"} | json [$__range])))'),
            log_table("Loggers with most lines", f"topk(10, sum by (logger) (count_over_time({OURS}[$__range])))"),
        ]),
        ("Lines", [
            lines("Chosen lines", '{service=~"$service", level=~"$level"} ' + FILTERS,
                  about="What all the filters above let through. A line's details lead to those of the same request."),
            lines("Slow requests, messages and statements", f"{OURS} {FILTERS} | duration_ms >= $slower",
                  about="From the time above on."),
        ]),
        ("By subject", [
            lines("Errors and warnings", '{service="switchboard", level=~"ERROR|WARN"} ' + FILTERS, width=12),
            lines("HTTP requests", f'{OURS} {FILTERS} | logger=~"switchboard\\\\.http.*"', width=12),
            lines("WebSocket", f"{OURS} {FILTERS} | {WEBSOCKET}", width=12),
            lines("Over a limit", f"{OURS} | json | {LIMITED}", width=12,
                  about="Requests with 429 and refused connections. Messages over the limit are only counted."),
            lines("Failed authentication", f"{OURS} | json | {FAILED_LOGINS}", width=12),
            lines("Calls to the identity provider", f'{OURS} {FILTERS} | logger=~"switchboard\\\\.auth.*"', width=12),
        ]),
    ], refresh="30s")

# --- audit logs ---

# Where `All` is chosen, a column is compared with itself.
WHO = "coalesce(username, '')"
WHERE = f"""WHERE $__timeFilter(timestamp)
  AND {WHO} IN (${{username:sqlstring}})
  AND action_type IN (${{action:sqlstring}})
  AND outcome IN (${{outcome:sqlstring}})
  AND (${{resource:sqlstring}} = '' OR resource LIKE ${{resource:sqlstring}})
  AND (${{request_id:sqlstring}} = '' OR request_id = ${{request_id:sqlstring}})"""


def over_time(what):
    return (f"SELECT $__timeGroupAlias(timestamp, $__interval), {what} AS metric, count(*) AS value\n"
            f"FROM user_actions\n{WHERE}\nGROUP BY 1, 2 ORDER BY 1")


def most(what, condition="", more="count(*) AS actions"):
    return (f"SELECT {what}, {more}\nFROM user_actions\n{WHERE}{condition}\n"
            "GROUP BY 1 ORDER BY 2 DESC LIMIT 20")


def rows(condition="", order="timestamp DESC"):
    return ("SELECT timestamp, username, action_type, resource, outcome, response_status, error_message, duration_ms,\n"
            "  request_id, user_id, user_roles, ip_address, user_agent, request_data\n"
            f"FROM user_actions\n{WHERE}{condition}\nORDER BY {order} LIMIT 500")


LINES = link("Log lines of this request",
             "/d/application-logs?var-service=switchboard&var-request_id=${__data.fields.request_id:percentencode}")

AUDIT_LOGS = dashboard(
    "audit-logs", "Audit Logs", "Who did what, when, and what became of it: the table user_actions.", [
        choice("username", f"SELECT DISTINCT {WHO} FROM user_actions ORDER BY 1", "user", POSTGRES).all_value(WHO),
        choice("action", "SELECT DISTINCT action_type FROM user_actions ORDER BY 1", source=POSTGRES)
        .all_value("action_type"),
        options("outcome", ["success", "error", "permission_denied"]).all_value("outcome"),
        text("resource", "resource, with % for any"), text("request_id", "request id"),
    ], [
        ("Overview", [
            sql_stat("Actions", f"SELECT count(*) AS actions FROM user_actions\n{WHERE}"),
            sql_stat("Users", f"SELECT count(DISTINCT user_id) AS users FROM user_actions\n{WHERE}"),
            sql_stat("Errors", f"SELECT count(*) AS errors FROM user_actions\n{WHERE}\n  AND outcome = 'error'"),
            sql_stat("Denied",
                     f"SELECT count(*) AS denied FROM user_actions\n{WHERE}\n  AND outcome = 'permission_denied'"),
            sql_graph("Actions by outcome", over_time("outcome")),
            sql_graph("Actions by kind", over_time("action_type")),
            sql_table("Users with most actions", most(f"{WHO} AS username"),
                      width=8, height=8),
            sql_table("Users with most denials and errors", most("username", "\n  AND outcome <> 'success'"),
                      width=8, height=8),
            sql_table("Addresses with most denials and errors", most("ip_address", "\n  AND outcome <> 'success'"),
                      width=8, height=8),
            sql_table("Kinds of actions", most("action_type", more="count(*) AS actions, avg(duration_ms) AS mean_ms,"
                      " percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms) AS p99_ms"), width=12, height=8),
            sql_table("Resources that are changed most", most("resource", "\n  AND outcome = 'success'"),
                      width=12, height=8),
        ]),
        ("Rows", [
            sql_table("Rows, newest first", rows(), links=[LINES],
                      about="Filled by request id, this is what became of one request."),
            sql_table("Denials and errors, newest first", rows("\n  AND outcome <> 'success'"), links=[LINES]),
            sql_table("Slowest first", rows("\n  AND duration_ms IS NOT NULL", "duration_ms DESC"), links=[LINES]),
        ]),
    ], refresh="30s")
