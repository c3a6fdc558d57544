//! `switchboard audit export`: the audit trail as CSV or as lines of JSON, oldest first.
//!
//! Read in parts that begin after the last row seen, so that neither memory nor the database notices how
//! long the trail is. Nothing is migrated, and nothing is written but a row that says who exports what.

use std::{
    fs::OpenOptions,
    io::{self, BufWriter, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uuid::Uuid;

use crate::{
    audit::{self, Deed},
    config::Config,
    metrics::Metrics,
    store::{ActionFilter, OpenError, Since, Store, StoreError, StoredAction, Until},
};

/// Rows in one statement.
const PART: i64 = 500;

/// How rows are written.
#[derive(Debug, Clone, Copy)]
pub enum Format {
    /// A header, then a line a row; lists and objects are JSON.
    Csv,
    /// A JSON object a line.
    Jsonl,
}

impl Format {
    /// Reads the name; the error says what is allowed.
    pub fn parse(name: &str) -> Result<Self, &'static str> {
        match name {
            "csv" => Ok(Self::Csv),
            "jsonl" => Ok(Self::Jsonl),
            _ => Err("csv or jsonl"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::Jsonl => "jsonl",
        }
    }
}

/// Which rows are written; an end that is not set is open.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// Included.
    pub since: Option<Since>,
    /// Excluded.
    pub until: Option<Until>,
}

/// Why not everything was written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The row that says who exports what.
    #[error("nothing was exported: the trail does not take the row that says so: {0}")]
    Unrecorded(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A statement.
    #[error("cannot read the audit trail: {0}")]
    Read(Box<dyn std::error::Error + Send + Sync>),
    /// All others were written.
    #[error("{0} rows cannot be read and are left out; all others were written")]
    Incomplete(u64),
    /// The file, or standard output.
    #[error("cannot write the audit trail")]
    Write(#[from] io::Error),
}

impl From<StoreError> for ExportError {
    fn from(error: StoreError) -> Self {
        Self::Read(error.into())
    }
}

/// Writes a range of the trail to a file, or else to standard output. Where whoever reads that has had
/// enough, it is done.
pub async fn export(
    config: &Config,
    range: &Range,
    format: Format,
    file: Option<&Path>,
) -> Result<(), ExportError> {
    let metrics = Metrics::new(&[], config.environment.as_str());
    let store = Store::open_existing(&config.store, metrics.db).await?;
    let written = record_and_write(&store, range, format, file).await;
    store.close().await;
    match written {
        Err(ExportError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// The row comes first: no export goes without one.
async fn record_and_write(
    store: &Store,
    range: &Range,
    format: Format,
    file: Option<&Path>,
) -> Result<(), ExportError> {
    let what = json!({
        "since": range.since,
        "until": range.until,
        "format": format.name(),
        "output": file.map(|path| path.display().to_string()),
    });
    let own = audit::leave(store, Deed::Export, what).await;
    let own = own.map_err(|error| ExportError::Unrecorded(error.into()))?;
    let Some(path) = file else {
        return write(store, range, format, own, io::stdout().lock()).await;
    };
    // Who did what is for its owner alone.
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    write(store, range, format, own, file).await
}

/// Writes all but the export's `own` row.
async fn write(
    store: &Store,
    range: &Range,
    format: Format,
    own: Uuid,
    out: impl Write,
) -> Result<(), ExportError> {
    let progress = progress(store, range).await;
    let mut rows = Rows::new(format, out)?;
    let (since, until) = (range.since.as_ref(), range.until.as_ref());
    let (mut last, mut left_out): (Option<StoredAction>, _) = (None, 0);
    loop {
        let part = store.actions_after(last.as_ref(), since, until, PART).await?;
        left_out += part.left_out();
        let mut part = part.items;
        for action in part.iter().filter(|row| row.action.uid != own) {
            rows.write(action)?;
        }
        progress.inc(part.len() as u64);
        match part.pop() {
            Some(action) => last = Some(action),
            None => break,
        }
    }
    rows.finish()?;
    progress.finish_and_clear();
    if left_out > 0 {
        return Err(ExportError::Incomplete(left_out));
    }
    Ok(())
}

/// A bar where somebody looks; the rows are counted for it alone, if the database has the time.
async fn progress(store: &Store, range: &Range) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (since, until) = (range.since.clone(), range.until.clone());
    let filter = ActionFilter { since, until, ..ActionFilter::default() };
    let Ok(rows) = store.count_actions(&filter, i64::MAX).await else {
        return ProgressBar::hidden();
    };
    let rows = u64::try_from(rows).unwrap_or_default();
    let style =
        ProgressStyle::with_template("{wide_bar} {human_pos} of {human_len} rows, {eta} left");
    ProgressBar::new(rows).with_style(style.expect("the template is well-formed"))
}

/// Where rows go, as what.
enum Rows<W: Write> {
    Csv(Box<csv::Writer<W>>),
    Jsonl(BufWriter<W>),
}

impl<W: Write> Rows<W> {
    fn new(format: Format, out: W) -> io::Result<Self> {
        Ok(match format {
            Format::Jsonl => Self::Jsonl(BufWriter::new(out)),
            Format::Csv => {
                let mut csv = csv::Writer::from_writer(out);
                csv.write_record(StoredAction::COLUMNS).map_err(unwrapped)?;
                Self::Csv(Box::new(csv))
            }
        })
    }

    fn write(&mut self, action: &StoredAction) -> io::Result<()> {
        match self {
            Self::Csv(csv) => csv.write_record(cells(action)?).map_err(unwrapped),
            Self::Jsonl(out) => {
                let line = serde_json::to_string(action)?;
                // What clients sent may have line ends between its parts; within texts they are escaped.
                out.write_all(line.replace(['\n', '\r'], " ").as_bytes())?;
                out.write_all(b"\n")
            }
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Csv(mut csv) => csv.flush(),
            Self::Jsonl(mut out) => out.flush(),
        }
    }
}

/// The error of the file beneath, whose kind tells a closed pipe.
fn unwrapped(error: csv::Error) -> io::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        kind => io::Error::other(format!("{kind:?}")),
    }
}

/// A row of CSV: what is absent is empty.
fn cells(stored: &StoredAction) -> io::Result<[String; 16]> {
    let StoredAction { id, action } = stored;
    let text = |text: &Option<Arc<str>>| text.as_deref().unwrap_or_default().to_owned();
    Ok([
        id.map(|id| id.to_string()).unwrap_or_default(),
        action.uid.to_string(),
        action.timestamp.to_string(),
        text(&action.user_id),
        text(&action.username),
        serde_json::to_string(&action.user_roles)?,
        action.action_type.to_string(),
        action.resource.to_string(),
        action.outcome.to_string(),
        text(&action.ip_address),
        text(&action.user_agent),
        text(&action.request_id),
        action.request_data.as_ref().map(|data| data.get().to_owned()).unwrap_or_default(),
        action.response_status.map(|status| status.to_string()).unwrap_or_default(),
        text(&action.error_message),
        action.duration_ms.map(|duration| duration.to_string()).unwrap_or_default(),
    ])
}
