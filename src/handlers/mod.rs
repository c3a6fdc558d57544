//! What the packages do: one file a resource, and [`packages`], the table of all of them.
//!
//! A handler takes typed, validated input and returns typed output or a [`HandlerError`]; it knows
//! nothing of sockets, formats or status codes. REST calls the same operations as the packages.
//!
//! To add one: write an `impl Handler` in its resource's file, and a line in [`packages`]. Without the
//! line the handler is dead code, which does not compile.

pub(crate) mod authors;
mod echo;
pub(crate) mod input;
pub(crate) mod page;

use std::{future::Future, pin::Pin, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::{
    audit::{Audit, Recorded},
    auth::{Identity, Remote},
    cluster::{Audience, Cluster},
    hub::Hub,
    protocol::{ErrorBody, Meta, Reply, ReplyHead, Status},
    store::{Store, StoreError},
};

/// The roles of the built-in packages and routes.
pub mod roles {
    /// May read authors.
    pub const GET_AUTHORS: &str = "get-authors";
    /// May add authors.
    pub const CREATE_AUTHOR: &str = "create-author";
    /// May rename authors.
    pub const UPDATE_AUTHOR: &str = "update-author";
    /// May remove authors.
    pub const DELETE_AUTHOR: &str = "delete-author";
    /// May operate the server.
    pub const ADMIN: &str = "admin";
    /// All of them.
    pub const ALL: [&str; 5] = [GET_AUTHORS, CREATE_AUTHOR, UPDATE_AUTHOR, DELETE_AUTHOR, ADMIN];
}

/// The table of packages: id, name, roles that are all needed, handler.
pub fn packages() -> Vec<Package> {
    use authors::{CreateAuthor, DeleteAuthor, GetAuthors, GetPaginatedAuthors, UpdateAuthor};
    use roles::{CREATE_AUTHOR, DELETE_AUTHOR, GET_AUTHORS, UPDATE_AUTHOR};
    vec![
        stored(1, "GET_AUTHORS", &[GET_AUTHORS], GetAuthors),
        stored(2, "GET_PAGINATED_AUTHORS", &[GET_AUTHORS], GetPaginatedAuthors),
        stored(3, "CREATE_AUTHOR", &[CREATE_AUTHOR], CreateAuthor).seen_with(&[GET_AUTHORS]),
        stored(4, "UPDATE_AUTHOR", &[UPDATE_AUTHOR], UpdateAuthor).seen_with(&[GET_AUTHORS]),
        stored(5, "DELETE_AUTHOR", &[DELETE_AUTHOR], DeleteAuthor).seen_with(&[GET_AUTHORS]),
        Package::new(100, "ECHO", &[], echo::Echo),
    ]
}

/// Ids that no package may have: 999 is promised to clients as unknown, and in Protobuf 0 is the same as none.
const RESERVED: [i32; 2] = [0, 999];

/// Two packages of one id, or one whose id is reserved: a client would reach another one than it meant.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// Clients count on it that there is no such package.
    #[error("the package {name} has the pkg_id {id}, which is reserved: give it another one")]
    Reserved {
        /// Its id.
        id: i32,
        /// Its name.
        name: &'static str,
    },
    /// One of them would never be called.
    #[error(
        "the packages {one} and {other} have the same pkg_id {id}: give one of them another id"
    )]
    Duplicate {
        /// The id of both.
        id: i32,
        /// The one that stands first.
        one: &'static str,
        /// The other.
        other: &'static str,
    },
}

/// Whether every package can be called by its id.
pub(crate) fn check(packages: &[Package]) -> Result<(), PackageError> {
    for (place, package) in packages.iter().enumerate() {
        let Package { id, name, .. } = *package;
        if RESERVED.contains(&id) {
            return Err(PackageError::Reserved { id, name });
        }
        if let Some(first) = packages[..place].iter().find(|first| first.id == id) {
            return Err(PackageError::Duplicate { id, one: first.name, other: name });
        }
    }
    Ok(())
}

/// A package whose requests wait for the database.
fn stored<H: Handler>(
    id: i32,
    name: &'static str,
    roles: &'static [&'static str],
    handler: H,
) -> Package {
    Package { uses_store: true, ..Package::new(id, name, roles, handler) }
}

/// What a package does to the world, which says whether the audit trail has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It changes something: always audited.
    Change,
    /// It shows something: audited with `AUDIT_READS`.
    Read,
    /// Neither: never audited, unless a role was missing.
    Nothing,
}

/// What a package does.
pub trait Handler: Send + Sync + 'static {
    /// Read from `data`; what does not fit is answered `invalid_data` before the handler is called. The
    /// audit trail shows the members that it has; others by name alone, so no `serde(flatten)` or `untagged`
    /// here: they hide from the trail which members there are.
    type Input: DeserializeOwned + Send;
    /// Written to `data`.
    type Output: Serialize + Send;
    /// The input for people, as `switchboard packages` shows it.
    const INPUT: &'static str;
    /// The output for people.
    const OUTPUT: &'static str;
    /// What is audited.
    const EFFECT: Effect = Effect::Change;

    /// Carries out one request. It may wait: other requests of the package go on meanwhile.
    fn handle(
        &self,
        context: &Context,
        caller: &Caller,
        input: Self::Input,
    ) -> impl Future<Output = Result<Answer<Self::Output>, HandlerError>> + Send;
}

/// What handlers work with.
pub struct Context {
    pub(crate) store: Arc<Store>,
    pub(crate) audit: Arc<Audit>,
    /// Changes that have begun, and that a stop waits for, whoever has left meanwhile.
    pub(crate) changes: TaskTracker,
    pub(crate) hub: Arc<Hub>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) broadcast_changes: bool,
    /// Rows of a list without a page at most; 0: no limit.
    pub(crate) max_rows: u32,
}

impl Context {
    /// Waits until there is room for the push of a change. To be called before the change is carried out.
    pub(crate) async fn room(&self) {
        if self.broadcast_changes {
            self.hub.room().await;
        }
    }

    /// Pushes a change to every connection whose user may see it (see [`Package::seen_with`]), but not to
    /// its author's, if changes are pushed at all.
    pub(crate) fn changed<T: Serialize>(&self, pkg_id: i32, data: &T, caller: &Caller) {
        if !self.broadcast_changes {
            return;
        }
        let audience = Audience::Viewers { except: caller.connection };
        if let Err(error) = self.cluster.push(pkg_id, data, &audience) {
            tracing::error!(pkg_id, %error, "a change cannot be pushed");
        }
    }
}

/// Who asks.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The user.
    pub identity: Arc<Identity>,
    /// The connection asked on; none over REST.
    pub connection: Option<Uuid>,
    /// Where the connection or the request comes from.
    pub remote: Arc<Remote>,
}

/// What a handler returns.
#[derive(Debug)]
pub struct Answer<T> {
    /// For `data`.
    pub data: T,
    /// For `meta`.
    pub meta: Option<Meta>,
}

impl<T> From<T> for Answer<T> {
    fn from(data: T) -> Self {
        Self { data, meta: None }
    }
}

/// Why a request was not carried out. The connection lives on.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// What was asked for is not there.
    #[error("{0}")]
    NotFound(String),
    /// It clashes with what is there.
    #[error("{0}")]
    Conflict(String),
    /// A part of the input is out of range: the path to it, and what is allowed.
    #[error("{path}: {msg}")]
    InvalidData {
        /// Such as `filters.id`.
        path: String,
        /// For people.
        msg: String,
    },
    /// A list without a page has too many rows: the limit, and how to ask for pages.
    #[error("{0}")]
    TooManyRows(String),
    /// A dependency is down; the cause is logged, not sent.
    #[error("unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A dependency went away in the middle of a change, which may have been made; the cause is logged, not
    /// sent.
    #[error("the outcome is unknown: {0}")]
    Unknown(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No id is left for what was to be added; the cause is logged, not sent.
    #[error("no id is left: {0}")]
    OutOfIds(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A bug; the cause is logged, not sent.
    #[error("internal error: {0}")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl HandlerError {
    /// What the client is told. The two wire protocols add their own status.
    pub(crate) fn body(&self) -> ErrorBody {
        match self {
            Self::NotFound(msg) => ErrorBody::new("not_found", msg.clone()),
            Self::Conflict(msg) => ErrorBody::new("conflict", msg.clone()),
            Self::InvalidData { path, msg } => input::invalid_data(path, msg),
            Self::TooManyRows(msg) => {
                ErrorBody { msg: msg.clone().into(), ..input::invalid_data("", msg) }
            }
            Self::Unavailable(_) => {
                ErrorBody::new("unavailable", "A part of the server is down; try again later")
            }
            Self::Unknown(_) => ErrorBody::new(
                "unavailable",
                "A part of the server went away: whether this was done is unknown; look before repeating it",
            ),
            Self::OutOfIds(_) => ErrorBody::new(
                "out_of_ids",
                "Nothing was added: no id is left for it; the operator of the server has to act",
            ),
            Self::Internal(_) => ErrorBody::internal(),
        }
    }

    /// Whether it is the server's fault, to be logged and counted.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(
            self,
            Self::Unavailable(_) | Self::Unknown(_) | Self::OutOfIds(_) | Self::Internal(_)
        )
    }

    fn status(&self) -> Status {
        match self {
            Self::NotFound(_)
            | Self::Unavailable(_)
            | Self::Unknown(_)
            | Self::OutOfIds(_)
            | Self::Internal(_) => Status::Error,
            // Deployed clients expect 2 for a conflict.
            Self::Conflict(_) | Self::InvalidData { .. } | Self::TooManyRows(_) => {
                Status::InvalidData
            }
        }
    }
}

impl From<StoreError> for HandlerError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::Conflict("This name is taken".into()),
            StoreError::Unavailable(_) => Self::Unavailable(error.into()),
            StoreError::Unknown(_) => Self::Unknown(error.into()),
            StoreError::OutOfIds(_) => Self::OutOfIds(error.into()),
            StoreError::Other(_) => Self::Internal(error.into()),
        }
    }
}

/// A line of the table of packages.
#[derive(Clone)]
pub struct Package {
    /// What clients call it by.
    pub id: i32,
    /// For people, metrics and the audit trail.
    pub name: &'static str,
    /// All of these are needed.
    pub roles: &'static [&'static str],
    /// All of these are needed to be pushed its changes; none where it pushes no changes.
    pub viewers: Option<&'static [&'static str]>,
    /// See [`Handler::INPUT`].
    pub input: &'static str,
    /// See [`Handler::OUTPUT`].
    pub output: &'static str,
    /// See [`Handler::EFFECT`].
    pub effect: Effect,
    /// Its requests wait for the database: no more at once than may use it.
    pub(crate) uses_store: bool,
    /// What the audit trail has of a request's `data`, also of one that the handler never sees.
    pub(crate) recorded: fn(&str) -> Recorded,
    pub(crate) handler: Arc<dyn AnyHandler>,
}

impl Package {
    /// Binds a handler to its id.
    pub fn new<H: Handler>(
        id: i32,
        name: &'static str,
        roles: &'static [&'static str],
        handler: H,
    ) -> Self {
        let (input, output, effect) = (H::INPUT, H::OUTPUT, H::EFFECT);
        Self {
            id,
            name,
            roles,
            viewers: None,
            input,
            output,
            effect,
            uses_store: false,
            recorded: Recorded::input::<H::Input>,
            handler: Arc::new(handler),
        }
    }

    /// Lets it push its changes to users who have all of these roles: those of the package that reads the
    /// resource. Without any, to everybody.
    #[must_use]
    pub fn seen_with(self, roles: &'static [&'static str]) -> Self {
        Self { viewers: Some(roles), ..self }
    }
}

/// An answer, and the error that it tells of.
pub(crate) type Outcome = (Reply, Option<HandlerError>);

/// A [`Handler`] without its types: text in, encoded answer out.
pub(crate) trait AnyHandler: Send + Sync {
    /// Starts a request; nothing happens before the future is polled.
    fn start(
        self: Arc<Self>,
        context: Arc<Context>,
        caller: Arc<Caller>,
        head: ReplyHead,
        data: Option<Box<RawValue>>,
    ) -> Pin<Box<dyn Future<Output = Outcome> + Send>>;
}

impl<H: Handler> AnyHandler for H {
    fn start(
        self: Arc<Self>,
        context: Arc<Context>,
        caller: Arc<Caller>,
        head: ReplyHead,
        data: Option<Box<RawValue>>,
    ) -> Pin<Box<dyn Future<Output = Outcome> + Send>> {
        Box::pin(async move {
            let result = match input::read(data.as_deref().map_or("{}", RawValue::get)) {
                Ok(input) => self.handle(&context, &caller, input).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(answer) => (head.ok(&answer.data, answer.meta.as_ref()), None),
                Err(error) => (head.error(error.status(), &error.body()), Some(error)),
            }
        })
    }
}
