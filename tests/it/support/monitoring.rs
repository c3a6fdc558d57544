//! A real Prometheus, Alertmanager and exporters, with the configuration of `docker/` on this machine and
//! with seconds for its minutes.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::programs::{Serving, program};

const MISSING: &str = "the test needs Prometheus, Alertmanager and the exporters: install them (Debian and \
     Ubuntu: apt-get install prometheus prometheus-alertmanager prometheus-postgres-exporter \
     prometheus-redis-exporter) or put them into PATH";

/// Seconds that a rate looks back over: `[5m]` and `$__rate_interval`.
pub(crate) const WINDOW: &str = "5s";

/// What watches a server, its database and its Redis.
pub(crate) struct Monitoring {
    prometheus: Serving,
    alertmanager: Serving,
    _exporters: [Serving; 2],
    http: reqwest::Client,
}

impl Monitoring {
    /// Starts all of it. Blocks until it runs.
    pub(crate) fn start(server: SocketAddr, postgres: &str, redis: &str) -> Self {
        let exporter = |name: &str, args: &[&str], environment: &[(&str, &str)]| {
            let (folder, addr) = Serving::prepare();
            let mut args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
            args.push(format!("--web.listen-address={addr}"));
            let program = program(
                &[&format!("prometheus-{name}"), &underscored(name)],
                &format!("prometheus-{name}"),
                MISSING,
            );
            Serving::start(&program, &args, environment, (folder, addr))
        };
        let database = format!("{postgres}?sslmode=disable");
        let exporters = [
            exporter("postgres-exporter", &[], &[("DATA_SOURCE_NAME", &database)]),
            exporter("redis-exporter", &[&format!("--redis.addr={redis}")], &[]),
        ];
        let alertmanager = alertmanager();
        let targets = [
            ("\"switchboard-1:8001\", \"switchboard-2:8001\"", server),
            ("\"postgres-exporter:9187\"", exporters[0].addr),
            ("\"redis-exporter:9121\"", exporters[1].addr),
            ("\"alertmanager:9093\"", alertmanager.addr),
        ];
        let prometheus = prometheus(&targets);
        Self { prometheus, alertmanager, _exporters: exporters, http: reqwest::Client::new() }
    }

    /// What an expression is now; the error is Prometheus' own.
    pub(crate) async fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let url = format!("http://{}/api/v1/query", self.prometheus.addr);
        let form = form_urlencoded::Serializer::new(String::new())
            .append_pair("query", expression)
            .finish();
        let request =
            self.http.post(url).header("content-type", "application/x-www-form-urlencoded");
        let answer = request.body(form).send().await.unwrap();
        let mut answer: Value = answer.json().await.unwrap();
        match answer["status"].as_str() {
            Some("success") if answer["data"]["resultType"] == "vector" => {
                Ok(answer["data"]["result"].as_array_mut().map(std::mem::take).unwrap())
            }
            _ => Err(answer.to_string()),
        }
    }

    /// Every rule as Prometheus has it: its expression, and how the last evaluation went.
    pub(crate) async fn rules(&self) -> Vec<Value> {
        let url = format!("http://{}/api/v1/rules", self.prometheus.addr);
        let answer: Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        let groups = answer["data"]["groups"].as_array().unwrap();
        groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).cloned().collect()
    }

    /// Waits until an alert of a severity is in Alertmanager; returns it.
    pub(crate) async fn until_alerted(&self, name: &str, severity: &str) -> Value {
        let url = format!("http://{}/api/v2/alerts", self.alertmanager.addr);
        let started = Instant::now();
        loop {
            let alerts: Value = self.http.get(&url).send().await.unwrap().json().await.unwrap();
            let alert = alerts.as_array().unwrap().iter().find(|alert| {
                alert["labels"]["alertname"] == name && alert["labels"]["severity"] == severity
            });
            if let Some(alert) = alert {
                return alert.clone();
            }
            assert!(started.elapsed() < Duration::from_secs(30), "no {name}: {alerts:#}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn underscored(name: &str) -> String {
    name.replace('-', "_")
}

fn alertmanager() -> Serving {
    let names = ["prometheus-alertmanager", "alertmanager"];
    let program = program(&names, "prometheus-alertmanager", MISSING);
    let (folder, addr) = Serving::prepare();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/alertmanager/alertmanager.yml");
    let args = [
        format!("--config.file={}", config.display()),
        format!("--storage.path={}", folder.display()),
        format!("--web.listen-address={addr}"),
        "--cluster.listen-address=".to_owned(),
    ];
    Serving::start(&program, &args, &[], (folder, addr))
}

/// With the configuration of `docker/prometheus`, every second instead of every 15, and other targets.
fn prometheus(targets: &[(&str, SocketAddr)]) -> Serving {
    let program = program(&["prometheus"], "prometheus", MISSING);
    let (folder, addr) = Serving::prepare();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/prometheus");
    let mut config = fs::read_to_string(source.join("prometheus.yml")).unwrap();
    for (there, here) in targets {
        assert!(config.contains(there), "{there} is no target of prometheus.yml");
        config = config.replace(there, &format!("\"{here}\""));
    }
    config = config.replace("localhost:9090", &addr.to_string());
    config = config.replace(": 15s", ": 1s").replace(": 10s", ": 1s");
    fs::write(folder.join("prometheus.yml"), config).unwrap();
    fs::create_dir(folder.join("rules")).unwrap();
    for file in fs::read_dir(source.join("rules")).unwrap().map(Result::unwrap) {
        let rules = quickened(&fs::read_to_string(file.path()).unwrap());
        fs::write(folder.join("rules").join(file.file_name()), rules).unwrap();
    }
    let args = [
        "--config.file=prometheus.yml".to_owned(),
        "--storage.tsdb.path=data".to_owned(),
        format!("--web.listen-address={addr}"),
        "--enable-feature=expand-external-labels".to_owned(),
    ];
    Serving::start(&program, &args, &[("DOCS_URL", "https://docs.example")], (folder, addr))
}

/// Rules with seconds for minutes, which are true of what happens within a test.
fn quickened(rules: &str) -> String {
    let mut rules = rules.replace("interval: 15s", "interval: 1s").replace("[10m]", "[10s]");
    for minutes in 1..=5 {
        rules = rules.replace(&format!("for: {minutes}m"), "for: 1s");
    }
    let rules = rules.replace("[5m]", &format!("[{WINDOW}]")).replace("[1m]", "[3s]");
    assert!(!rules.contains("m]") && !rules.contains("for: 1m"), "a window was not shortened");
    rules
}

/// A query of a panel, of a variable, or of a document, with all variables filled in.
#[derive(Debug)]
pub(crate) struct Query {
    /// Dashboard and title of the panel, or name of the variable; or the document.
    pub(crate) place: String,
    /// `prometheus`, `loki` or `postgres`.
    pub(crate) source: String,
    pub(crate) text: String,
}

/// Every query of every dashboard.
pub(crate) fn queries() -> Vec<Query> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/grafana/dashboards");
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files.iter().flat_map(|file| queries_of(file)).collect()
}

/// The names of a dashboard's metrics that begin in some way and that a program's `/metrics` does not have.
pub(crate) fn unserved(dashboard: &str, beginnings: &[&str], served: &str) -> Vec<String> {
    let ours = queries().into_iter().filter(|query| {
        query.source == "prometheus" && query.place.starts_with(&format!("{dashboard}: "))
    });
    let names: BTreeSet<String> = ours
        .flat_map(|query| {
            let words = query.text.split(|c: char| !c.is_alphanumeric() && c != '_');
            words.map(ToOwned::to_owned).collect::<Vec<_>>()
        })
        .filter(|word| beginnings.iter().any(|beginning| word.starts_with(beginning)))
        .collect();
    assert!(names.len() > 8, "{dashboard} names only {names:?}");
    let series: BTreeSet<_> =
        served.lines().filter_map(|line| line.split([' ', '{']).next()).collect();
    names.into_iter().filter(|name| !series.contains(&**name)).collect()
}

fn queries_of(file: &Path) -> Vec<Query> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let variables = dashboard["templating"]["list"].as_array().cloned().unwrap_or_default();
    let values = variables.iter().map(value).collect();
    let query = |place: &Value, source: &Value, text: &Value| Query {
        place: format!("{}: {}", dashboard["title"].as_str().unwrap(), place.as_str().unwrap()),
        source: source["uid"].as_str().unwrap().to_owned(),
        text: filled(text.as_str().unwrap(), &values),
    };
    let mut queries = Vec::new();
    for variable in variables.iter().filter(|variable| variable["type"] == "query") {
        queries.push(query(&variable["name"], &variable["datasource"], &variable["query"]));
    }
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let text =
                if target["rawSql"].is_string() { &target["rawSql"] } else { &target["expr"] };
            queries.push(query(&panel["title"], &target["datasource"], text));
        }
    }
    queries
}

/// The name of a variable, and its value where nobody has chosen one: raw, and as SQL.
fn value(variable: &Value) -> (String, (String, String)) {
    let text = |name: &str| variable[name].as_str().unwrap_or_default().to_owned();
    let (raw, sql) = match variable["includeAll"].as_bool() {
        Some(true) => (text("allValue"), text("allValue")),
        _ => (text("query"), format!("'{}'", text("query"))),
    };
    (text("name"), (raw, sql))
}

/// A query as Grafana sends it.
fn filled(query: &str, values: &HashMap<String, (String, String)>) -> String {
    let mut query = query
        .replace("$__rate_interval", WINDOW)
        .replace("$__range", "30s")
        .replace("$__auto", "30s")
        .replace("$__timeFilter(timestamp)", "timestamp > now() - interval '1 hour'")
        .replace(
            "$__timeGroupAlias(timestamp, $__interval)",
            "date_trunc('second', timestamp) AS time",
        );
    // Those with the longest names first: one may begin with another.
    let mut names: Vec<_> = values.keys().collect();
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    for name in names {
        let (raw, sql) = &values[name];
        query = query.replace(&format!("${{{name}:sqlstring}}"), sql);
        query = query.replace(&format!("${name}"), raw);
    }
    assert!(!query.contains('$'), "a variable is left: {query}");
    query
}

/// Every query in a document's blocks of a language, `promql` or `sql`. What is indented, or begins with a
/// bracket that closes, belongs to the line before.
pub(crate) fn documented(document: &str, language: &str) -> Vec<Query> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(document);
    let (text, fence) = (fs::read_to_string(file).unwrap(), format!("```{language}\n"));
    let mut queries: Vec<Query> = Vec::new();
    for block in text.split(&fence).skip(1) {
        let lines = block.split("```").next().unwrap().lines();
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let line = line.replace("[5m]", &format!("[{WINDOW}]"));
            match queries.last_mut() {
                Some(query) if line.starts_with([' ', ')']) => query.text.push_str(&line),
                _ => queries.push(Query {
                    place: document.to_owned(),
                    source: language.to_owned(),
                    text: line,
                }),
            }
        }
    }
    queries
}

/// The documents that an alert leads to.
pub(crate) fn runbooks() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/runbooks");
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
    files.map(|name| format!("runbooks/{}", name.into_string().unwrap())).collect()
}
