//! `/audit-logs`: the audit trail, newest first, for administrators.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{RawPathParams, State, rejection::RawPathParamsRejection},
    http::Request,
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Api, Problem,
    guard::caller,
    input::{self, Kind, Parameter},
};
use crate::{
    audit,
    handlers::{
        HandlerError,
        input::Exact,
        page::{PageNumber, PerPage},
        roles,
    },
    protocol::Meta,
    store::{
        ActionFilter, ActionKey, ActionPage, ActionPart, Place, Since, Store, StoreError,
        StoredAction, Until,
    },
};

/// Rows that pages by number reach, and that are counted, at most: the database reads all that it passes
/// over. A cursor has no such end.
const DEPTH: i64 = 10_000;

type Asked = Request<Body>;
/// A part of the path that is not UTF-8 is refused like any other that does not fit.
type Path = Result<RawPathParams, RawPathParamsRejection>;

const PARAMETERS: &[Parameter] = &[
    Parameter("page", "page", Kind::Number),
    Parameter("per_page", "per_page", Kind::Number),
    Parameter("cursor", "cursor", Kind::Cursor),
    Parameter("total", "total", Kind::Text),
    Parameter("user_id", "user_id", Kind::Text),
    Parameter("username", "username", Kind::Text),
    Parameter("action_type", "action_type", Kind::Text),
    Parameter("resource", "resource", Kind::Text),
    Parameter("outcome", "outcome", Kind::Text),
    Parameter("start_date", "start_date", Kind::Text),
    Parameter("end_date", "end_date", Kind::Text),
];

/// How an action ended.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Outcome(String);

impl TryFrom<String> for Outcome {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let known = matches!(&*text, "success" | "error" | "permission_denied");
        known.then_some(Self(text)).ok_or("an outcome is success, error or permission_denied")
    }
}

/// Whether matches are counted.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Counted(bool);

impl TryFrom<String> for Counted {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self).map_err(|_| "total is true or false")
    }
}

/// Where a walk stands: after an action, or at the newest one. Opaque to clients.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Cursor(Option<Place>);

impl TryFrom<String> for Cursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let place = BASE64_URL_SAFE_NO_PAD.decode(text).ok();
        let place = place.and_then(|text| Place::try_from(String::from_utf8(text).ok()?).ok());
        place
            .map(|place| Self(Some(place)))
            .ok_or("a cursor is a next_cursor of this server, or empty to start")
    }
}

/// A text as a row has it, which may be cut.
fn as_stored(text: Exact) -> String {
    audit::cut(&text.0).into_owned()
}

/// The cursor of what comes after these, if there is more.
fn cursor_after(items: &[StoredAction], has_more: bool) -> Option<String> {
    let last = items.last().filter(|_| has_more)?;
    Some(BASE64_URL_SAFE_NO_PAD.encode(Place::of(last).to_string()))
}

#[derive(Debug, Deserialize)]
struct Query {
    page: Option<PageNumber>,
    per_page: Option<PerPage>,
    cursor: Option<Cursor>,
    total: Option<Counted>,
    user_id: Option<Exact>,
    username: Option<Exact>,
    action_type: Option<Exact>,
    resource: Option<Exact>,
    outcome: Option<Outcome>,
    start_date: Option<Since>,
    end_date: Option<Until>,
}

#[derive(Debug, Serialize)]
pub(super) struct Page {
    items: Vec<StoredAction>,
    meta: LogMeta,
}

#[derive(Debug, Serialize)]
struct LogMeta {
    #[serde(flatten)]
    meta: Meta,
    /// Or else `total` and `pages` are lower bounds.
    total_is_exact: bool,
}

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<Json<Page>, Problem> {
    let query = input::query(&request, PARAMETERS);
    caller(&request, roles::ADMIN)?;
    page(&api, query?).await
}

pub(super) async fn of_user(
    State(api): State<Arc<Api>>,
    path: Path,
    request: Asked,
) -> Result<Json<Page>, Problem> {
    let query = input::query(&request, PARAMETERS);
    caller(&request, roles::ADMIN)?;
    let user = Exact::try_from(parameter(&path, "user_id")?)
        .map_err(|allowed| invalid("user_id", allowed))?;
    page(&api, Query { user_id: Some(user), ..query? }).await
}

pub(super) async fn read(
    State(api): State<Arc<Api>>,
    path: Path,
    request: Asked,
) -> Result<Json<StoredAction>, Problem> {
    caller(&request, roles::ADMIN)?;
    let text = parameter(&path, "id")?;
    let key = key(&text).ok_or_else(|| {
        invalid("id", "an action's id is a whole number from 1, its uid is a UUID")
    })?;
    let action = api.context.store.action(key).await.map_err(HandlerError::from)?;
    let missing = || HandlerError::NotFound(format!("No action has the id {text}"));
    Ok(Json(action.ok_or_else(missing)?))
}

async fn page(api: &Api, query: Query) -> Result<Json<Page>, Problem> {
    if let (Some(start), Some(end)) = (&query.start_date, &query.end_date)
        && start.is_after(end)
    {
        return Err(invalid("start_date", "start_date must not be after end_date"));
    }
    let filter = ActionFilter {
        user_id: query.user_id.map(as_stored),
        username: query.username.map(as_stored),
        action_type: query.action_type.map(as_stored),
        resource: query.resource.map(as_stored),
        outcome: query.outcome.map(|outcome| outcome.0),
        since: query.start_date,
        until: query.end_date,
    };
    let (page, per_page) = (query.page.unwrap_or_default(), query.per_page.unwrap_or_default());
    let store = &api.context.store;
    match query.cursor {
        Some(Cursor(place)) => page_after(store, &filter, place, per_page).await,
        None => {
            let is_counted = query.total.is_none_or(|counted| counted.0);
            page_number(store, &filter, page, per_page, is_counted).await
        }
    }
}

/// A page of a walk, which counts nothing.
async fn page_after(
    store: &Store,
    filter: &ActionFilter,
    place: Option<Place>,
    per_page: PerPage,
) -> Result<Json<Page>, Problem> {
    let part = place.map_or(ActionPage::Offset(0), ActionPage::After);
    let part = store.actions(filter, &part, per_page.items()).await;
    let ActionPart { items, has_more, .. } = part.map_err(HandlerError::from)?;
    let (next_cursor, per_page) = (cursor_after(&items, has_more), per_page.items());
    let meta = Meta { page: 1, per_page, total: 0, pages: 0, next_cursor, has_more };
    Ok(Json(Page { items, meta: LogMeta { meta, total_is_exact: false } }))
}

async fn page_number(
    store: &Store,
    filter: &ActionFilter,
    page: PageNumber,
    per_page: PerPage,
    is_counted: bool,
) -> Result<Json<Page>, Problem> {
    let skip = page.skip(per_page);
    if skip >= DEPTH {
        let msg = format!("pages reach the newest {DEPTH} rows: beyond them, follow next_cursor");
        return Err(invalid("page", &msg));
    }
    let part = store.actions(filter, &ActionPage::Offset(skip), per_page.items()).await;
    let ActionPart { items, rows, has_more } = part.map_err(HandlerError::from)?;
    let (seen, next_cursor) = (skip + rows, cursor_after(&items, has_more));
    let is_last = !has_more && (skip == 0 || rows > 0);
    let (total, total_is_exact) = match (is_last, is_counted) {
        (true, _) => (seen, true),
        (false, true) => count(store, filter, seen).await?,
        (false, false) => (0, false),
    };
    let meta = Meta { next_cursor, has_more, ..page.meta(per_page, total) };
    Ok(Json(Page { items, meta: LogMeta { meta, total_is_exact } }))
}

/// How many actions match, and whether that is all of them. Conditions that seldom meet may take the
/// database longer than it has: then what was seen is the answer, and the page is there all the same.
async fn count(store: &Store, filter: &ActionFilter, seen: i64) -> Result<(i64, bool), Problem> {
    match store.count_actions(filter, DEPTH + 1).await {
        Ok(total) if total > DEPTH => Ok((DEPTH, false)),
        Ok(total) => Ok((total, true)),
        Err(StoreError::Unavailable(_)) => Ok((seen, false)),
        Err(error) => Err(HandlerError::from(error).into()),
    }
}

/// An `id` or a `uid`, as a path has it.
fn key(text: &str) -> Option<ActionKey> {
    if let Ok(uid) = Uuid::try_parse(text) {
        return Some(ActionKey::Uid(uid));
    }
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let id = digits.then(|| text.parse().ok()).flatten();
    id.filter(|id| *id > 0).map(ActionKey::Id)
}

/// The one parameter of a path, decoded.
fn parameter(path: &Path, name: &str) -> Result<String, Problem> {
    let value = path.as_ref().ok().and_then(|path| path.iter().next());
    value.map(|(_, value)| value.to_owned()).ok_or_else(|| invalid(name, "UTF-8 is allowed"))
}

fn invalid(path: &str, msg: &str) -> Problem {
    HandlerError::InvalidData { path: path.into(), msg: msg.into() }.into()
}
