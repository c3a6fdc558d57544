//! The stack in `docker/` as its files say it: rules and routes of alerts by Prometheus' and Alertmanager's
//! own tools, and that what one file names is there in another.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use switchboard::config::{DatabasePlace, Sources};

use crate::support::programs::program;

const MISSING: &str = "the tests need promtool and amtool: install Prometheus and Alertmanager (Debian and \
     Ubuntu: apt-get install prometheus prometheus-alertmanager) or put them into PATH";

/// Those that operators know, and those of this server.
const ALERTS: [&str; 27] = [
    "ActorRestarting",
    "AuditLogDropping",
    "AuditQueueFull",
    "AuditRowsRejected",
    "AuditSpooling",
    "CircuitBreakerOpen",
    "ContainersUnseen",
    "DatabaseConnectionPoolExhausted",
    "DatabaseDown",
    "DatabaseUnusable",
    "HighCPUUsage",
    "HighErrorRate",
    "HighFailedLoginRate",
    "HighHandlerLatency",
    "HighMemoryUsage",
    "HighWebSocketConnections",
    "HighWebSocketRejections",
    "HttpConnectionsRefused",
    "LogLinesDropped",
    "RateLimitAbuse",
    "RedisDown",
    "ServiceDown",
    "SigningKeysOld",
    "SlowConsumers",
    "SlowResponseTime",
    "UnauthorizedAccessAttempts",
    "UnreadableRows",
];

fn docker() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docker")
}

fn yaml(path: &str) -> Value {
    let text = fs::read_to_string(docker().join(path)).unwrap();
    // `!override` and `!reset` of compose say how files are merged, not what they hold.
    let text = text.replace("!override ", "").replace("!reset ", "");
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn names(folder: &Path, ending: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> =
        entries.filter_map(|name| Some(name.to_str()?.strip_suffix(ending)?.to_owned())).collect();
    names.sort();
    names
}

/// The rules that are alerts.
fn alerts() -> Vec<Value> {
    let groups = yaml("prometheus/rules/alerts.yml");
    let rules = items(&groups["groups"]).iter().flat_map(|group| items(&group["rules"]).to_vec());
    rules.collect()
}

/// Runs a tool in a folder of `docker/`, and returns what it says.
fn run(tool: &str, package: &str, folder: &str, args: &[&str]) -> String {
    let mut command = Command::new(program(&[tool], package, MISSING));
    let ran = command.args(args).current_dir(docker().join(folder)).stdin(Stdio::null());
    let ran = ran.output().unwrap();
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&ran.stdout), said(&ran.stderr));
    assert!(ran.status.success(), "{tool} {args:?}: {out}{err}");
    out
}

fn promtool(args: &[&str]) -> String {
    run("promtool", "prometheus", "prometheus", args)
}

fn amtool(args: &[&str]) -> String {
    run("amtool", "prometheus-alertmanager", "alertmanager", args)
}

#[test]
fn prometheus_takes_its_configuration_and_rules() {
    let said = promtool(&["check", "config", "prometheus.yml"]);
    assert!(said.contains("2 rule files found"), "{said}");
}

#[test]
fn alerts_and_recorded_series_say_in_each_case_what_a_person_would_expect() {
    let cases = names(&docker().join("prometheus/tests"), ".yml");
    let files: Vec<_> = cases.iter().map(|name| format!("tests/{name}.yml")).collect();
    let mut args = vec!["test", "rules"];
    args.extend(files.iter().map(String::as_str));
    let said = promtool(&args);
    assert_eq!(said.matches("SUCCESS").count(), files.len(), "{said}");
}

#[test]
fn every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent() {
    let mut wanted = BTreeSet::new();
    for alert in alerts() {
        let name = alert["alert"].as_str().unwrap().to_owned();
        let severity = alert["labels"]["severity"].as_str().unwrap().to_owned();
        assert!(wanted.insert((name, severity)), "{alert} is there twice");
    }
    let (mut fire, mut silent) = (BTreeSet::new(), BTreeSet::new());
    for file in names(&docker().join("prometheus/tests"), ".yml") {
        for case in items(&yaml(&format!("prometheus/tests/{file}.yml"))["tests"]) {
            for seen in items(&case["alert_rule_test"]) {
                let name = seen["alertname"].as_str().unwrap();
                let fired: BTreeSet<_> = items(&seen["exp_alerts"])
                    .iter()
                    .map(|alert| alert["exp_labels"]["severity"].as_str().unwrap())
                    .collect();
                for (alert, severity) in wanted.iter().filter(|(alert, _)| alert == name) {
                    let fires = fired.contains(severity.as_str());
                    let cases = if fires { &mut fire } else { &mut silent };
                    cases.insert((alert.clone(), severity.clone()));
                }
            }
        }
    }
    assert_eq!(fire, wanted, "those that never fire are missing on the left");
    assert_eq!(silent, wanted, "those that are never silent are missing on the left");
}

#[test]
fn every_alert_says_what_it_is_about_and_has_a_runbook_and_every_runbook_an_alert() {
    let mut seen = BTreeSet::new();
    for alert in alerts() {
        let name = alert["alert"].as_str().unwrap();
        seen.insert(name.to_owned());
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning"].contains(&severity), "{name}: {severity}");
        assert!(alert["labels"]["component"].is_string(), "{name}");
        for text in ["summary", "description"] {
            assert!(alert["annotations"][text].as_str().unwrap().len() > 10, "{name}: {text}");
        }
        let runbook = format!("{{{{ $externalLabels.docs }}}}/docs/runbooks/{name}.md");
        assert_eq!(alert["annotations"]["runbook_url"], runbook, "{name}");
    }
    assert_eq!(seen, ALERTS.map(ToOwned::to_owned).into());
    let folder = docker().join("../docs/runbooks");
    assert_eq!(names(&folder, ".md"), ALERTS);
    for name in ALERTS {
        let text = fs::read_to_string(folder.join(name).with_extension("md")).unwrap();
        assert!(text.starts_with(&format!("# {name}\n")), "{name}");
        assert!(text.contains("\n## First look\n") && text.contains("```promql\n"), "{name}");
        let headings: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        let parts = headings.join(", ").to_lowercase();
        assert!(parts.contains("likely causes") && parts.contains("what to do"), "{name}: {parts}");
        assert!(text.lines().count() < 60, "{name} is longer than half a page");
    }
}

#[test]
fn prometheus_understands_every_query_of_a_runbook() {
    let mut rules = String::from("groups: [{ name: runbooks, rules: [\n");
    let mut queries = 0;
    for name in ALERTS {
        let text =
            fs::read_to_string(docker().join(format!("../docs/runbooks/{name}.md"))).unwrap();
        for block in text.split("```promql\n").skip(1) {
            for query in block.split("```").next().unwrap().lines() {
                queries += 1;
                // JSON is YAML too.
                let rule = serde_json::json!({ "record": format!("q{queries}"), "expr": query });
                rules.push_str(&format!("{rule},\n"));
            }
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), rules + "]}]\n").unwrap();
    let said = promtool(&["check", "rules", file.path().to_str().unwrap()]);
    assert!(said.contains(&format!("SUCCESS: {queries} rules found")), "{said}");
    assert!(queries > ALERTS.len());
}

#[test]
fn alertmanager_sends_what_is_critical_to_pager_and_chat_and_all_else_to_the_chat() {
    let file = "alertmanager.yml";
    amtool(&["check-config", file]);
    for (severity, receivers) in
        [("critical", "pager,chat"), ("warning", "chat"), ("info", "chat"), ("", "chat")]
    {
        let label = format!("severity={severity}");
        let args = ["config", "routes", "test", "--config.file", file, "alertname=X", &label];
        assert_eq!(amtool(&args).trim(), receivers, "{severity}");
    }
    let rules = &yaml("alertmanager/alertmanager.yml")["inhibit_rules"];
    let expected = serde_json::json!([{
        "source_matchers": ["severity=\"critical\""],
        "target_matchers": ["severity=\"warning\""],
        "equal": ["component"],
    }]);
    assert_eq!(*rules, expected);
}

#[test]
fn every_image_is_of_one_version() {
    let mut images = Vec::new();
    for file in ["compose.yml", "compose.prod.yml"] {
        for (_, service) in yaml(file)["services"].as_object().unwrap() {
            images.extend(service["image"].as_str().map(ToOwned::to_owned));
        }
    }
    let dockerfile = fs::read_to_string(docker().join("Dockerfile")).unwrap();
    let bases = dockerfile.lines().filter_map(|line| line.strip_prefix("FROM "));
    images.extend(
        bases
            .filter(|base| *base != "scratch")
            .map(|base| base.split_whitespace().next().unwrap().to_owned()),
    );
    assert!(images.len() > 13, "{images:?}");
    for image in images {
        let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
        let numbers = tag.trim_start_matches('v').split(['.', '-']);
        let digits = numbers.take_while(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
        assert!(digits.count() >= 2, "{image} may be another one tomorrow");
    }
}

#[test]
fn the_stack_has_the_keycloak_that_the_tests_run() {
    let script = fs::read_to_string(docker().join("../tests/keycloak.sh")).unwrap();
    let version = script.lines().find_map(|line| line.strip_prefix("version=")).unwrap();
    let image = yaml("compose.yml")["services"]["keycloak"]["image"].clone();
    assert_eq!(image, format!("quay.io/keycloak/keycloak:{version}"));
}

#[test]
fn operators_read_which_versions_the_stack_has_beside_those_of_the_tests() {
    let guide = fs::read_to_string(docker().join("../docs/monitoring.md")).unwrap();
    let compose = yaml("compose.yml");
    for (row, services) in [
        ("Prometheus, promtool", &["prometheus"] as &[_]),
        ("Alertmanager, amtool", &["alertmanager"]),
        ("exporter of Postgres", &["postgres-exporter"]),
        ("exporter of Redis", &["redis-exporter"]),
        ("Postgres", &["postgres"]),
        ("Redis", &["redis"]),
        ("Traefik, Keycloak, Loki", &["traefik", "keycloak", "loki"]),
    ] {
        let version = |service: &&str| {
            let image = compose["services"][service]["image"].as_str().unwrap();
            let tag = image.rsplit_once(':').unwrap().1.trim_start_matches('v');
            tag.split('-').next().unwrap().to_owned()
        };
        let versions = services.iter().map(version).collect::<Vec<_>>().join(", ");
        let found = guide.lines().any(|line| {
            line.starts_with(&format!("| {row} |")) && line.ends_with(&format!("| {versions} |"))
        });
        assert!(found, "docs/monitoring.md: {row} is {versions} in compose.yml");
    }
}

#[test]
fn every_service_is_watched_and_limited_and_starts_after_what_it_needs() {
    let compose = yaml("compose.yml");
    let services = compose["services"].as_object().unwrap();
    for (name, service) in services {
        for part in ["healthcheck", "cpus", "mem_limit", "restart", "image", "networks"] {
            assert!(!service[part].is_null(), "{name} has no {part}");
        }
        for (other, how) in service["depends_on"].as_object().into_iter().flatten() {
            assert_eq!(how["condition"], "service_healthy", "{name} on {other}");
            assert!(services.contains_key(other), "{name} waits for {other}");
        }
    }
    let config = yaml("prometheus/prometheus.yml");
    let mut jobs = BTreeSet::new();
    for job in items(&config["scrape_configs"]) {
        jobs.insert(job["job_name"].as_str().unwrap());
        for target in items(&job["static_configs"][0]["targets"]) {
            let host = target.as_str().unwrap().split(':').next().unwrap();
            assert!(host == "localhost" || services.contains_key(host), "nobody is {host}");
        }
    }
    let all = "alertmanager alloy cadvisor grafana keycloak loki postgres prometheus redis switchboard traefik";
    assert_eq!(jobs, all.split(' ').collect());
}

#[test]
fn services_name_only_networks_volumes_and_secrets_that_are_declared() {
    let (compose, more) = (yaml("compose.yml"), yaml("compose.prod.yml"));
    let declared = |kind: &str, name: &str| {
        [&compose, &more].iter().any(|file| !file[kind].is_null() && !file[kind][name].is_null())
    };
    for file in [&compose, &more] {
        for (service, parts) in file["services"].as_object().unwrap() {
            for secret in items(&parts["secrets"]) {
                assert!(declared("secrets", secret.as_str().unwrap()), "{service}: {secret}");
            }
            for volume in items(&parts["volumes"]) {
                let source = volume.as_str().unwrap().split(':').next().unwrap();
                let of_machine = source.starts_with(['.', '/']);
                assert!(of_machine || declared("volumes", source), "{service}: {source}");
            }
            let by_name = parts["networks"].as_object().into_iter().flat_map(|all| all.keys());
            let listed = items(&parts["networks"]).iter().map(|name| name.as_str().unwrap());
            for network in by_name.map(String::as_str).chain(listed) {
                assert!(declared("networks", network), "{service}: {network}");
            }
        }
    }
}

#[test]
fn every_file_that_the_stack_mounts_is_there_and_every_secret_can_be_made() {
    let mut secrets = BTreeMap::new();
    for file in ["compose.yml", "compose.prod.yml"] {
        let compose = yaml(file);
        for (name, service) in compose["services"].as_object().unwrap() {
            for volume in items(&service["volumes"]) {
                let source = volume.as_str().unwrap().split(':').next().unwrap();
                let of_grafana = source.starts_with("./grafana");
                let here = source.starts_with('.') && !of_grafana;
                assert!(!here || docker().join(source).exists(), "{name} mounts {source}");
            }
        }
        for (name, secret) in compose["secrets"].as_object().unwrap() {
            let path = secret["file"].as_str().unwrap().to_owned();
            assert!(path.ends_with(&format!("/{name}")), "{name} is {path}");
            secrets.insert(name.clone(), file);
        }
    }
    let development = names(&docker().join("secrets/development"), "");
    let known = secrets.iter().filter(|(_, file)| **file == "compose.yml");
    assert_eq!(development, known.map(|(name, _)| name.clone()).collect::<Vec<_>>());

    let folder = tempfile::TempDir::new().unwrap();
    let production = folder.path().join("production");
    let make = || {
        let made = Command::new(docker().join("secrets/make.sh"))
            .arg(&production)
            .envs([("SLACK_URL", "s"), ("PAGERDUTY_KEY", "p"), ("OPERATORS", "o")])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        names(&production, "")
            .into_iter()
            .map(|name| (name.clone(), fs::read_to_string(production.join(name)).unwrap()))
            .collect::<BTreeMap<_, _>>()
    };
    let made = make();
    assert!(made.keys().eq(secrets.keys()), "{:?}", made.keys());
    let random: BTreeSet<_> = made.values().collect();
    assert_eq!(random.len(), made.len(), "two secrets are the same");
    assert_eq!(make(), made, "what is there stays");
}

/// A value of a compose file with its variables put in place: `${NAME}`, `${NAME:-default}`, `${NAME:?why}`.
fn filled(text: &str, variables: &BTreeMap<String, String>) -> String {
    let Some((start, rest)) = text.split_once("${") else { return text.to_owned() };
    let (inner, rest) = rest.split_once('}').unwrap();
    let (name, default) = inner.split_once(':').unwrap_or((inner, ""));
    let value =
        variables.get(name).cloned().or_else(|| Some(default.strip_prefix('-')?.to_owned()));
    let value = value.unwrap_or_else(|| panic!(".env.example has no {name}"));
    format!("{start}{value}{}", filled(rest, variables))
}

/// What `docker/compose.prod.yml` gives a node, over `compose.yml` and the image.
fn production_environment() -> BTreeMap<String, String> {
    let example = fs::read_to_string(docker().join(".env.example")).unwrap();
    let pairs = example.lines().filter(|line| !line.starts_with('#'));
    let pairs = pairs.filter_map(|line| line.split_once('='));
    let variables = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut environment = BTreeMap::new();
    let image = fs::read_to_string(docker().join("Dockerfile")).unwrap();
    let image = image.lines().find_map(|line| line.strip_prefix("ENV ")).unwrap();
    for (name, value) in image.split_whitespace().filter_map(|pair| pair.split_once('=')) {
        environment.insert(name.to_owned(), value.to_owned());
    }
    for file in ["compose.yml", "compose.prod.yml"] {
        let node = &yaml(file)["services"]["switchboard-1"]["environment"];
        for (name, value) in node.as_object().unwrap() {
            environment.insert(name.clone(), filled(value.as_str().unwrap(), &variables));
        }
    }
    environment
}

#[test]
fn production_starts_without_a_warning() {
    // The hosts and schemes of the secrets are those of production, see secrets/make.sh.
    let secrets = docker().join("secrets/development");
    let read = |path: &Path| fs::read_to_string(secrets.join(path.file_name().unwrap()));
    let environment = production_environment();
    assert_eq!(environment["ENV"], "production");
    let strict = [("PRODUCTION_STRICT".to_owned(), "true".to_owned())];
    for more in [&[][..], &strict] {
        let all = environment.clone().into_iter().chain(more.iter().cloned());
        let all = all.map(|(name, value)| (name, value.into()));
        let config = Sources::new(HashMap::new(), all, None, read).config().unwrap();
        assert_eq!(config.weaknesses(), []);
        assert!(matches!(config.store.place, DatabasePlace::Postgres(_)));
        assert!(config.cluster.redis.is_some());
    }
}

#[test]
fn everybody_who_asks_for_operations_asks_at_their_port() {
    let address =
        yaml("compose.yml")["services"]["switchboard-1"]["environment"]["OPS_ADDR"].clone();
    let port = address.as_str().unwrap().rsplit_once(':').unwrap().1.to_owned();
    let nodes: BTreeSet<_> = ["1", "2"].map(|node| format!("switchboard-{node}:{port}")).into();
    let routes = yaml("traefik/switchboard.yml");
    let services = &routes["http"]["services"];
    let check = &services["switchboard"]["loadBalancer"]["healthCheck"];
    assert_eq!(check["port"].as_u64().unwrap().to_string(), port);
    let asked: BTreeSet<_> = items(&services["operations"]["loadBalancer"]["servers"])
        .iter()
        .map(|server| server["url"].as_str().unwrap().trim_start_matches("http://").to_owned())
        .collect();
    assert_eq!(asked, nodes);
    let scraped = &yaml("prometheus/prometheus.yml")["scrape_configs"];
    let ours = items(scraped).iter().find(|job| job["job_name"] == "switchboard").unwrap();
    let scraped: BTreeSet<_> = items(&ours["static_configs"][0]["targets"])
        .iter()
        .map(|target| target.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(scraped, nodes);
}
