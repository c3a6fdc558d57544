//! `switchboard audit erase`: takes a person out of the audit trail, and leaves rows that say so.
//!
//! Walks once over the whole trail, oldest first, as an export does: a person may stand in rows of others
//! too, where no index finds it. Rows are written anew a few at a time. An erasure that was interrupted is
//! run again: with the same pseudonym it goes on as if it had never ended.

mod blank;

use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use crate::{
    audit::{self, Deed},
    config::Config,
    metrics::Metrics,
    store::{OpenError, Store, StoreError, StoredAction},
};
use blank::{About, Person};

/// Rows that are read with one statement, and written with one at most.
const PART: i64 = 500;
/// After a statement that wrote, for others.
const BREATH: Duration = Duration::from_millis(20);
/// Of every pseudonym.
const PREFIX: &str = "erased-";
/// Names that are shown at most.
const NAMES: usize = 20;

/// Stands for a person in the trail from then on: random, so that nobody can find out for whom.
#[derive(Debug, Clone)]
pub struct Pseudonym(Arc<str>);

impl Pseudonym {
    /// A new one.
    pub fn random() -> Self {
        Self(format!("{PREFIX}{}", Uuid::new_v4().simple()).into())
    }
}

impl fmt::Display for Pseudonym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Pseudonym {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_ours = text.strip_prefix(PREFIX).is_some_and(|rest| {
            rest.len() == 32
                && rest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        let allowed = "one that an earlier run printed, erased- and 32 hexadecimal digits";
        if is_ours { Ok(Self(text.into())) } else { Err(allowed) }
    }
}

/// What is to be erased.
#[derive(Debug, Clone)]
pub struct Erasure {
    /// The person's `sub`.
    pub subject: String,
    /// Names by which the person stands in rows that have no `user_id`, such as failed logins.
    pub usernames: Vec<String>,
    /// Of this erasure.
    pub pseudonym: Pseudonym,
    /// Only count.
    pub dry_run: bool,
    /// Take the bytes of old rows out of SQLite's files too.
    pub vacuum: bool,
}

/// Why not everything was erased.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The row that says who began it.
    #[error("nothing was erased: the trail does not take the row that says so: {0}")]
    Unrecorded(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A statement in the middle.
    #[error(
        "the erasure was interrupted after {rows} rows; run it again with --pseudonym {pseudonym}: {error}"
    )]
    Interrupted {
        /// Written anew until then.
        rows: u64,
        /// Stands in them.
        pseudonym: Arc<str>,
        /// The cause.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What an erasure did.
#[derive(Debug, Default)]
pub struct Erased {
    /// Rows that were looked at.
    pub read: u64,
    /// Rows of the person's own.
    pub own: u64,
    /// Rows without a `user_id`, of one of the names.
    pub named: u64,
    /// Rows of others, who did something to the person.
    pub target: u64,
    /// Names that the person had in its own rows, some at most.
    pub names: BTreeSet<Arc<str>>,
    /// Rows that cannot be read, and may have the person in them.
    pub left_out: u64,
    /// Whether rows still wait in the spool here, where no erasure reaches them.
    pub spooled: bool,
}

impl Erased {
    /// Rows in which the person was.
    pub fn rows(&self) -> u64 {
        self.own + self.named + self.target
    }

    fn count(&mut self, about: About) {
        match about {
            About::Own => self.own += 1,
            About::Named => self.named += 1,
            About::Target => self.target += 1,
        }
    }
}

impl fmt::Display for Erased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read, own, named, target, .. } = self;
        write!(f, "{} of {read} rows: {own} of the subject, ", self.rows())?;
        write!(f, "{named} by name alone, {target} of others")
    }
}

/// Takes a person out of the trail, or counts the rows that would be changed.
pub async fn erase(config: &Config, erasure: &Erasure) -> Result<Erased, EraseError> {
    let metrics = Metrics::new(&[], config.environment.as_str());
    let store = Store::open_existing(&config.store, metrics.db).await?;
    let done = run(&store, erasure).await;
    store.close().await;
    let mut erased = done?;
    erased.spooled = audit::has_spooled_rows(&config.audit.spool);
    Ok(erased)
}

async fn run(store: &Store, erasure: &Erasure) -> Result<Erased, EraseError> {
    let mut erased = Erased::default();
    let Pseudonym(pseudonym) = &erasure.pseudonym;
    let row = |what: Value| json!({ "pseudonym": pseudonym, "erasure": what });
    if !erasure.dry_run {
        let begun = audit::leave(store, Deed::Erase, row(json!("begun"))).await;
        begun.map_err(|error| EraseError::Unrecorded(error.into()))?;
    }
    let walked = async {
        walk(store, erasure, &mut erased).await?;
        if erasure.vacuum && !erasure.dry_run {
            store.vacuum().await?;
        }
        if !erasure.dry_run {
            let mut done = row(json!("done"));
            done["rows"] = json!(erased.rows());
            done["unreadable"] = json!(erased.left_out);
            audit::leave(store, Deed::Erase, done).await?;
        }
        Ok::<_, StoreError>(())
    };
    walked.await.map_err(|error| EraseError::Interrupted {
        rows: erased.rows(),
        pseudonym: Arc::clone(pseudonym),
        error: error.into(),
    })?;
    Ok(erased)
}

/// A text, and what rows have of it where it is long: a column with an index ends sooner, and a list of names
/// sooner still.
fn as_stored(text: &str) -> [String; 3] {
    let listed = &text[..text.floor_char_boundary(audit::NAME_BYTES)];
    [text.to_owned(), audit::cut(text).into_owned(), listed.to_owned()]
}

async fn walk(store: &Store, erasure: &Erasure, erased: &mut Erased) -> Result<(), StoreError> {
    let mut person = Person {
        subjects: as_stored(&erasure.subject).into(),
        usernames: erasure.usernames.iter().flat_map(|name| as_stored(name)).collect(),
        pseudonym: Arc::clone(&erasure.pseudonym.0),
        sessions: HashSet::new(),
    };
    let mut last: Option<StoredAction> = None;
    loop {
        let part = store.actions_after(last.as_ref(), None, None, PART).await?;
        erased.left_out += part.left_out();
        let part = part.items;
        let Some(newest) = part.last().cloned() else { return Ok(()) };
        erased.read += part.len() as u64;
        let mut found = Vec::new();
        let mut fresh: Vec<_> = part.into_iter().map(|row| row.action).collect();
        fresh.retain_mut(|action| {
            let name = action.username.clone();
            let about = person.blank(action);
            if about == Some(About::Own) && erased.names.len() < NAMES {
                erased.names.extend(name);
            }
            found.extend(about);
            about.is_some()
        });
        if !fresh.is_empty() && !erasure.dry_run {
            store.rewrite_actions(&fresh).await?;
            sleep(BREATH).await;
        }
        // Only now: an error tells how many rows were written anew.
        found.into_iter().for_each(|about| erased.count(about));
        last = Some(newest);
    }
}
