//! Log lines: one JSON object each, or text for eyes.
//!
//! Called once by `main`. The library only emits `tracing` events; their fields become members of the
//! object beside those of the request's span (`request_id`, `method`, `endpoint`). A thread of its own
//! writes the lines (`queue`).

mod queue;

use std::{
    fmt,
    io::{self, IsTerminal},
    time::Duration,
};

use serde_json::{Map, Value};
use tracing::{Event, Subscriber, field::Field, field::Visit};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields, format::JsonFields, format::Writer,
    },
    layer::{Layer, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::{
    config::{Environment, LogConfig, LogFormat},
    traces,
};

pub(crate) use queue::DROPPED;

/// Time for the last lines to be written when the process ends.
const LAST_LINES: Duration = Duration::from_secs(1);
/// Bytes of a text in a line at most: a client chooses its path, which may have 64 KiB.
const MAX_TEXT: usize = 4096;

/// Writes the last lines when it is dropped.
#[must_use = "without it the last lines are lost"]
pub struct LastLines(());

impl Drop for LastLines {
    fn drop(&mut self) {
        flush();
    }
}

/// Waits until all lines are written, at most a second: the reader of stdout may be stuck.
pub fn flush() {
    queue::flush(LAST_LINES);
}

/// Whether lines of a format are JSON.
pub fn is_json(format: LogFormat) -> bool {
    match format {
        LogFormat::Human => false,
        LogFormat::Json => true,
        LogFormat::Auto => !io::stdout().is_terminal(),
    }
}

/// A line of JSON at the level ERROR, for what is said where there is no log, or none any longer.
pub fn error_line(message: &str, error: &str, environment: Environment) -> String {
    let mut line = beginning("ERROR", "switchboard");
    line.insert("message".into(), message.into());
    line.insert("error".into(), error.into());
    line.values_mut().for_each(cut);
    line.insert("environment".into(), environment.as_str().into());
    Value::Object(line).to_string()
}

/// The members that every line begins with.
fn beginning(level: &str, logger: &str) -> Map<String, Value> {
    let mut line = Map::new();
    let now = jiff::Timestamp::now();
    line.insert("timestamp".into(), format!("{now:.6}").into());
    line.insert("level".into(), level.into());
    line.insert("logger".into(), logger.replace("::", ".").into());
    line.insert("message".into(), "".into());
    line
}

/// Installs the process's subscriber and a panic hook that logs.
pub fn install(config: &LogConfig, environment: Environment) -> io::Result<LastLines> {
    queue::start()?;
    let filter: Targets = config.filter.parse().expect("the configuration was checked");
    // An actor of ractor lives in a span at info: a line for each would drown the rest.
    let filter = filter.with_target("ractor", LevelFilter::WARN);
    // See no-color.org.
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stdout().is_terminal() && !no_color)
        .with_writer(|| queue::Lines);
    if !is_json(config.format) {
        tracing_subscriber::registry().with(lines.with_filter(filter)).init();
    } else {
        let lines = lines
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines { environment: environment.as_str() });
        tracing_subscriber::registry().with(lines.with_filter(filter)).init();
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panic: {}", panic.payload_as_str().unwrap_or("no message"));
    }));
    Ok(LastLines(()))
}

/// `timestamp`, `level`, `logger`, `message`, the fields of span and event, `trace_id` where there are
/// traces, `environment`.
struct JsonLines {
    environment: &'static str,
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut line = beginning(metadata.level().as_str(), metadata.target());
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<N>>()
                && let Ok(Value::Object(fields)) = serde_json::from_str(fields.as_str())
            {
                line.extend(fields);
            }
        }
        if let Some(id) = traces::current_id() {
            line.insert("trace_id".into(), id.into());
        }
        event.record(&mut Members(&mut line));
        line.values_mut().for_each(cut);
        line.insert("environment".into(), self.environment.into());
        writeln!(writer, "{}", Value::Object(line))
    }
}

/// Cuts a long text.
fn cut(value: &mut Value) {
    if let Value::String(text) = value
        && text.len() > MAX_TEXT
    {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
}

struct Members<'a>(&'a mut Map<String, Value>);

impl Members<'_> {
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Members<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }

    /// Milliseconds of a `Duration`.
    fn record_u128(&mut self, field: &Field, value: u128) {
        self.set(field, u64::try_from(value).unwrap_or(u64::MAX));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}"));
    }
}
