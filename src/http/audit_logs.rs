//! `/audit-logs`: the audit trail, newest first, for administrators.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{RawPathParams, State, rejection::RawPathParamsRejection},
    http::Request,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Api, Problem,
    guard::caller,
    input::{self, Kind, Parameter},
};
use crate::{
    handlers::{
        HandlerError,
        input::Exact,
        page::{PageNumber, PerPage},
        roles,
    },
    protocol::Meta,
    store::{ActionFilter, ActionKey, Recorded, Since, Until},
};

type Asked = Request<Body>;
/// A part of the path that is not UTF-8 is refused like any other that does not fit.
type Path = Result<RawPathParams, RawPathParamsRejection>;

const PARAMETERS: &[Parameter] = &[
    Parameter("page", "page", Kind::Number),
    Parameter("per_page", "per_page", Kind::Number),
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

#[derive(Debug, Deserialize)]
struct Query {
    page: Option<PageNumber>,
    per_page: Option<PerPage>,
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
    items: Vec<Recorded>,
    meta: Meta,
}

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<Json<Page>, Problem> {
    caller(&request, roles::ADMIN)?;
    page(&api, input::query(&request, PARAMETERS)?).await
}

pub(super) async fn of_user(
    State(api): State<Arc<Api>>,
    path: Path,
    request: Asked,
) -> Result<Json<Page>, Problem> {
    caller(&request, roles::ADMIN)?;
    let user = Exact::try_from(parameter(&path, "user_id")?)
        .map_err(|allowed| invalid("user_id", allowed))?;
    let query: Query = input::query(&request, PARAMETERS)?;
    page(&api, Query { user_id: Some(user), ..query }).await
}

pub(super) async fn read(
    State(api): State<Arc<Api>>,
    path: Path,
    request: Asked,
) -> Result<Json<Recorded>, Problem> {
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
        user_id: query.user_id.map(|text| text.0),
        username: query.username.map(|text| text.0),
        action_type: query.action_type.map(|text| text.0),
        resource: query.resource.map(|text| text.0),
        outcome: query.outcome.map(|outcome| outcome.0),
        since: query.start_date,
        until: query.end_date,
    };
    let (page, per_page) = (query.page.unwrap_or_default(), query.per_page.unwrap_or_default());
    let store = &api.context.store;
    let part = store.actions(&filter, page.skip(per_page), per_page.items());
    let items = part.await.map_err(HandlerError::from)?;
    let total = store.count_actions(&filter).await.map_err(HandlerError::from)?;
    Ok(Json(Page { items, meta: page.meta(per_page, total) }))
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
