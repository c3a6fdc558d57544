//! What operators see, on the real programs: every query of the dashboards and every rule on a server under
//! load, alerts that really fire, and the log lines of it all.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;
use tokio::{task::block_in_place, time::sleep};

use crate::support::{
    collector::Collector,
    issuer::Issuer,
    monitoring::{Monitoring, Query, documented, queries, runbooks},
    postgres,
    process::Process,
    redis::Redis,
    traffic::{Tokens, Traffic, WRONG},
    users::PASSWORD,
};

/// Seconds for which a query may find nothing.
const PATIENCE: usize = 20;

/// The id of the request that docs/monitoring.md follows.
const FOLLOWED: &str = "follow-me";

fn settings([issuer, database, redis, collector]: [&String; 4]) -> Vec<(&str, &str)> {
    vec![
        ("LOG_FORMAT", "json"),
        ("OIDC_ISSUER", issuer),
        ("DATABASE_URL", database),
        ("REDIS_URL", redis),
        ("DB_SLOW_QUERY_MS", "100"),
        ("WS_BROADCAST_CHANGES", "false"),
        ("WS_MAX_CONNECTIONS_PER_USER", "2"),
        // The limits are what one client asks for in seconds, and the mixed load in a minute.
        ("WS_MESSAGE_RATE_LIMIT", "1200"),
        ("WS_MAX_STRIKES", "0"),
        ("RATE_LIMIT_PER_MINUTE", "1800"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector),
        ("AUTH_FAILURES_PER_MINUTE", "0"),
        ("DRAIN_SPREAD", "0s"),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn dashboards_have_data_alerts_fire_and_lines_are_as_documented() {
    let (issuer, data) = (Issuer::start().await, TempDir::new().unwrap());
    let (database, redis) = (postgres::database().await, block_in_place(Redis::start));
    let (url, redis_url, collector) = (issuer.url(), redis.url(), Collector::start().await);
    redis.command("CONFIG SET maxmemory 100mb");
    let endpoint = collector.endpoint();
    let all = settings([&url, &database, &redis_url, &endpoint]);
    let process = block_in_place(|| Process::start(data.path(), &all));
    let monitoring = block_in_place(|| Monitoring::start(process.addr, &database, &redis_url));
    let tokens = Tokens::new(&issuer);
    let mut traffic = Traffic::start(process.addr, &tokens, &database);
    sleep(Duration::from_secs(3)).await;

    traffic.add_abuse(process.addr, &tokens);
    let mut connection = PgConnection::connect(&database).await.unwrap();
    connection.execute("ALTER TABLE author RENAME TO author_away").await.unwrap();
    follow(process.addr, &tokens.ann).await;
    every_panel_has_data(&monitoring, &redis).await;
    every_limit_refuses(&monitoring).await;
    every_rule_is_evaluated(&monitoring).await;
    every_table_has_rows(&mut connection).await;

    monitoring.until_alerted("RateLimitAbuse", "warning").await;
    monitoring.until_alerted("HighFailedLoginRate", "warning").await;
    let failing = monitoring.until_alerted("HighErrorRate", "critical").await;
    let runbook = "https://docs.example/docs/runbooks/HighErrorRate.md";
    assert_eq!(failing["annotations"]["runbook_url"], runbook);
    connection.execute("ALTER TABLE author_away RENAME TO author").await.unwrap();
    redis.kill();
    monitoring.until_alerted("RedisDown", "critical").await;

    traffic.stop().await;
    process.signal("-TERM");
    let ran = block_in_place(|| process.end());
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""));
    // For who wants to look, and for tests/loki.sh.
    fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("monitoring.log"), &ran.stdout).unwrap();
    followed(&mut connection, &ran.stdout).await;
    every_line_is_as_documented(&ran.stdout);
    lines_lead_to_others(&ran.stdout);
    no_line_holds_a_secret(&ran.stdout, &tokens);
}

/// What nothing in this test runs for: their expressions have to be right, and that is all.
fn is_foreign(query: &Query) -> bool {
    ["traefik_", "container_", "job=\"keycloak\""].iter().any(|word| query.text.contains(word))
}

/// Of `label_values(SERIES, LABEL)`, which is Grafana's, an expression.
fn expression(query: &Query) -> String {
    let Some(inner) = query.text.strip_prefix("label_values(") else { return query.text.clone() };
    let (series, label) = inner.trim_end_matches(')').rsplit_once(", ").unwrap();
    format!("count by ({label}) ({series})")
}

/// Whether a series says something: NaN is a ratio of nothing to nothing.
fn says_something(series: &Value) -> bool {
    series["value"][1].as_str().is_some_and(|value| value != "NaN")
}

/// The recorded series.
async fn recorded(monitoring: &Monitoring) -> Vec<Query> {
    let mut rules = monitoring.rules().await;
    rules.retain(|rule| rule["type"] == "recording");
    let query = |rule: &Value| Query {
        place: "recording.yml".to_owned(),
        source: "prometheus".to_owned(),
        text: rule["name"].as_str().unwrap().to_owned(),
    };
    rules.iter().map(query).collect()
}

/// Every query of dashboards and of the operators' guide finds something, and so does every recorded series.
async fn every_panel_has_data(monitoring: &Monitoring, redis: &Redis) {
    let mut all = queries();
    all.retain(|query| query.source == "prometheus");
    all.extend(documented("monitoring.md", "promql"));
    all.extend(recorded(monitoring).await);
    let (foreign, mut empty): (Vec<_>, Vec<_>) = all.into_iter().partition(is_foreign);
    assert!(foreign.len() > 20 && empty.len() > 100, "{} and {}", foreign.len(), empty.len());
    for query in foreign
        .iter()
        .chain(&runbooks().iter().flat_map(|file| documented(file, "promql")).collect::<Vec<_>>())
    {
        monitoring
            .query(&expression(query))
            .await
            .unwrap_or_else(|error| panic!("{}: {error}: {}", query.place, query.text));
    }
    for _ in 0..PATIENCE {
        // Others use this Redis too, for keys.
        redis.command("GET nothing");
        let mut still = Vec::new();
        for query in empty {
            let found = monitoring.query(&expression(&query)).await;
            let found =
                found.unwrap_or_else(|error| panic!("{}: {error}: {}", query.place, query.text));
            if !found.iter().any(says_something) {
                still.push(query);
            }
        }
        if still.is_empty() {
            return;
        }
        empty = still;
        sleep(Duration::from_secs(1)).await;
    }
    panic!("nothing was found: {empty:#?}");
}

/// The panel of refusals has more than the zeros with which its series begin, and so have those by status.
async fn every_limit_refuses(monitoring: &Monitoring) {
    let panels: Vec<_> = queries()
        .into_iter()
        .filter(|query| {
            ["Refused by a limit", "Requests by status"]
                .iter()
                .any(|title| query.place == format!("Switchboard: {title}"))
        })
        .collect();
    assert_eq!(panels.len(), 2);
    let mut missing = Vec::new();
    for _ in 0..PATIENCE {
        missing = ["http", "websocket_connection", "websocket_message", "429"].to_vec();
        for panel in &panels {
            for series in monitoring.query(&format!("({}) > 0", panel.text)).await.unwrap() {
                let labels = &series["metric"];
                missing.retain(|one| labels["limit_type"] != *one && labels["status_code"] != *one);
            }
        }
        if missing.is_empty() {
            return;
        }
        sleep(Duration::from_secs(1)).await;
    }
    panic!("nothing was refused: {missing:?}");
}

async fn every_rule_is_evaluated(monitoring: &Monitoring) {
    let rules = monitoring.rules().await;
    let count = |kind: &str| rules.iter().filter(|rule| rule["type"] == kind).count();
    assert!(count("alerting") >= 19 && count("recording") >= 10, "{rules:#?}");
    for rule in &rules {
        assert_eq!(rule["health"], "ok", "{rule:#}");
        monitoring.query(rule["query"].as_str().unwrap()).await.unwrap();
    }
}

async fn every_table_has_rows(connection: &mut PgConnection) {
    let mut tables = queries();
    tables.retain(|query| query.source == "postgres");
    assert!(tables.len() > 10, "only {} were found", tables.len());
    for query in &tables {
        let sql = sqlx::AssertSqlSafe(query.text.clone());
        let rows = connection
            .fetch_all(sql)
            .await
            .unwrap_or_else(|error| panic!("{}: {error}: {}", query.place, query.text));
        assert!(!rows.is_empty(), "{query:?}");
    }
}

/// Of a request that fails, client, log lines and audit trail have the same id. Prints what each of them says.
async fn follow(addr: SocketAddr, token: &str) {
    let http = reqwest::Client::new();
    let request = http.post(format!("http://{addr}/authors")).bearer_auth(token);
    let request = request.header("x-correlation-id", FOLLOWED);
    let answer = request.json(&json!({ "name": "Follow Me" })).send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["x-correlation-id"]),
        (500, &FOLLOWED.parse().unwrap())
    );
    println!("{:?}", answer.headers());
    println!("{}", answer.text().await.unwrap());
}

async fn followed(connection: &mut PgConnection, lines: &str) {
    let of_request = |line: &&str| line.contains(&format!("\"request_id\":\"{FOLLOWED}\""));
    let found: Vec<_> = lines.lines().filter(of_request).collect();
    println!("{}", found.join("\n"));
    let has = |part: &str| found.iter().any(|line| line.contains(part));
    assert!(has("\"level\":\"ERROR\"") && has("\"status_code\":500"), "{found:?}");
    for query in documented("monitoring.md", "sql") {
        let json = format!(
            "SELECT to_json(found)::text FROM ({}) AS found",
            query.text.trim_end_matches(';')
        );
        let rows: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(json))
            .fetch_all(&mut *connection)
            .await
            .unwrap();
        println!("{}", rows.join("\n"));
        assert!(
            rows.len() == 1 && rows[0].contains("\"outcome\":\"error\""),
            "{query:?}: {rows:?}"
        );
    }
}

fn every_line_is_as_documented(lines: &str) {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/log.schema.json");
    let schema = serde_json::from_str(&fs::read_to_string(schema).unwrap()).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    assert!(lines.lines().count() > 500, "{} lines are few", lines.lines().count());
    for line in lines.lines() {
        let value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        let faults: Vec<_> = schema.iter_errors(&value).map(|fault| fault.to_string()).collect();
        assert!(faults.is_empty(), "{line}: {faults:?}");
    }
}

/// Grafana finds in lines what it makes links of, and refused requests are there to be asked for.
fn lines_lead_to_others(lines: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docker/grafana/provisioning/datasources/datasources.yml");
    let sources: Value = serde_saphyr::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let mut sources = sources["datasources"].as_array().unwrap().iter();
    let loki = sources.find(|source| source["uid"] == "loki").unwrap();
    let links = loki["jsonData"]["derivedFields"].as_array().unwrap();
    assert_eq!(links.len(), 3);
    let found = |pattern: &Value| {
        let schema = jsonschema::validator_for(&json!({ "pattern": pattern })).unwrap();
        lines.lines().any(|line| schema.is_valid(&json!(line)))
    };
    for link in links {
        assert!(found(&link["matcherRegex"]), "{link}");
    }
    assert!(found(&json!("\"status_code\":429\\b")));
}

fn no_line_holds_a_secret(lines: &str, tokens: &Tokens) {
    // The first part of a token, its header, is that of all tokens.
    let parts = tokens.all().into_iter().flat_map(|token| token.split('.').skip(1));
    for secret in parts.chain(WRONG).chain([PASSWORD]) {
        assert!(!lines.contains(secret), "a line holds {secret}");
    }
}
