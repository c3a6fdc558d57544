//! Settings in any text: a fault names its setting and tells no secret, and an accepted text means the same from
//! every source.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
};

use super::{allow_list::Entry, *};

/// No text of a fuzzer has it by chance.
const PASSWORD: &str = "hush-hush-4711";

/// Lines `NAME=value`, and after an empty line a file of TOML.
pub(crate) fn settings(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let (lines, file) = text.split_once("\n\n").map_or((text, None), |(a, b)| (a, Some(b)));
    let pairs: BTreeMap<_, _> = lines.lines().filter_map(|line| line.split_once('=')).collect();
    let owned = || pairs.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value)));
    let read = |_: &Path| Ok(file.unwrap_or_default().to_owned());
    let sources = Sources::new(HashMap::new(), owned(), file.map(|_| Path::new("file.toml")), read);
    match sources.config() {
        Err(faults) => {
            assert!(!faults.faults().is_empty() && faults.faults().iter().all(|f| !f.is_empty()));
        }
        Ok(config) => {
            same_from_every_source(&sources, &config);
            same_printed(&sources, &config);
        }
    }
    for value in pairs.values() {
        if let Ok(time) = duration(value)
            && time.subsec_nanos() == 0
        {
            assert_eq!(duration(&format!("{}s", time.as_secs())), Ok(time));
        }
    }
    let secret =
        |name: &str| SETTINGS.iter().find(|s| s.name == name && s.file_variable().is_some());
    let secret = pairs.iter().find_map(|(name, value)| Some((secret(name)?, value)));
    if let Some((setting, value)) = secret {
        tells_no_secret(setting, value);
    }
}

fn same_from_every_source(sources: &Sources, config: &Config) {
    let mut flags = HashMap::new();
    let mut file = String::new();
    for setting in SETTINGS {
        if let Some((text, _)) = sources.get(setting.name) {
            let shown = text.to_str().expect("the input is UTF-8");
            file.push_str(&format!("{} = {}\n", setting.key(), quoted(shown)));
            flags.insert(setting.name.to_owned(), text.to_owned());
        }
    }
    let none = || io::Error::from(io::ErrorKind::NotFound);
    let from_flags = Sources::new(flags, std::iter::empty(), None, |_| Err(none()));
    let nothing = HashMap::new();
    let from_file =
        Sources::new(nothing, std::iter::empty(), Some(Path::new("f")), |_| Ok(file.clone()));
    for other in [from_flags.config(), from_file.config()] {
        let other = other.expect("what one source has another may have");
        assert_eq!(format!("{other:?}"), format!("{config:?}"));
    }
}

/// A string of TOML.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A value that is written out as one would write it is the same value.
fn same_printed(sources: &Sources, config: &Config) {
    let Config { server, ws, handlers, http, audit, .. } = config;
    let mut printed = HashMap::from([
        ("LISTEN_ADDR", server.listen_addr.to_string()),
        ("OPS_ADDR", server.ops_addr.map(|address| address.to_string()).unwrap_or_default()),
        ("ENV", config.environment.as_str().to_owned()),
        ("RATE_LIMIT_FAIL_MODE", config.cluster.fail_mode.as_str().to_owned()),
        ("WS_CONNECTION_POLICY", ws.connection_policy.as_str().to_owned()),
        ("LOG_FORMAT", config.log.format.as_str().to_owned()),
        ("WS_QUERY_TOKEN", ws.query_token.to_string()),
        ("WS_MAX_PENDING", ws.max_pending.to_string()),
        ("WS_MESSAGE_RATE_LIMIT", ws.message_rate_limit.to_string()),
        ("WS_MAX_MESSAGE_BYTES", ws.max_message_bytes.to_string()),
        ("MAX_REQUEST_BODY_SIZE", http.max_body_bytes.to_string()),
        ("AUDIT_SPOOL_LIMIT", format!("{}b", audit.spool_limit)),
        ("ALLOWED_WS_ORIGINS", listed(&ws.allowed_origins)),
        ("ALLOWED_HOSTS", listed(&http.allowed_hosts)),
        ("CORS_ALLOWED_ORIGINS", listed(&http.cors_allowed_origins)),
    ]);
    for (name, time) in [
        ("WS_HANDLER_TIMEOUT", handlers.timeout),
        ("WS_PING_INTERVAL", ws.ping_interval),
        ("READY_AFTER", server.ready_after),
        ("DRAIN_GRACE", server.drain_grace),
        ("HTTP_KEEP_ALIVE", http.keep_alive),
        ("JWT_LEEWAY", config.auth.leeway),
    ] {
        // Beyond that an f64 has no room for nanoseconds.
        if time.as_secs() < 1 << 22 {
            printed.insert(name, format!("{}.{:09}s", time.as_secs(), time.subsec_nanos()));
        }
    }
    let again = Config::read(|name| {
        let set = sources.get(name).and_then(|(text, _)| Some(text.to_str()?.to_owned()));
        printed.get(name).cloned().or(set)
    });
    let again = again.expect("a value that was accepted is accepted as it is printed");
    assert_eq!(format!("{again:?}"), format!("{config:?}"));
}

fn listed(list: &AllowList) -> String {
    let AllowList::Only(entries) = list else { return "*".to_owned() };
    let text = |entry: &Entry| match entry {
        Entry::Name(name) => name.clone(),
        Entry::Below { before, after } => format!("{before}*{after}"),
    };
    entries.iter().map(text).collect::<Vec<_>>().join(",")
}

/// A password is shown nowhere, wherever it stands in a value that may hold one.
fn tells_no_secret(setting: &Setting, text: &str) {
    // It stands where no secret does.
    if text.contains(PASSWORD) {
        return;
    }
    let values = match setting.value {
        "SECRET" if setting.name == "OTEL_EXPORTER_OTLP_HEADERS" => {
            vec![format!("authorization={PASSWORD}{text}")]
        }
        "SECRET" => vec![format!("{PASSWORD}{text}"), format!("{text}{PASSWORD}")],
        "URL" => vec![
            format!("postgres://ann:{text}{PASSWORD}@db.example/x"),
            format!("redis://ann:{PASSWORD}{text}@db.example/1"),
            format!("https://:{PASSWORD}@sso.example/{text}"),
        ],
        _ => return,
    };
    for value in values {
        assert!(!setting.shown(&value).contains(PASSWORD), "{} shows it", setting.name);
        let said = match Config::read(|name| (name == setting.name).then(|| value.clone())) {
            Ok(config) => format!("{config:?}"),
            Err(faults) => faults.to_string(),
        };
        assert!(!said.contains(PASSWORD), "{said}");
    }
}
