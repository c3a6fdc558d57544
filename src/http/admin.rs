//! `/admin`: what operators see of open connections, and do to them.

use std::{collections::BTreeSet, fmt::Display, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{RawPathParams, State},
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use uuid::Uuid;

use super::{
    Api, Problem,
    guard::caller,
    input::{self, Kind, Parameter},
};
use crate::{
    auth::MAX_NAME,
    cluster::{Audience, CloseError, NamedBy, User},
    handlers::{
        HandlerError,
        input::Exact,
        page::{PageNumber, PerPage},
        roles,
    },
    protocol::{ErrorBody, Meta},
};

const PARAMETERS: &[Parameter] = &[
    Parameter("page", "page", Kind::Number),
    Parameter("per_page", "per_page", Kind::Number),
    Parameter("user", "user", Kind::Text),
    BY,
];
/// What `user` is: see [`NamedBy`].
const BY: Parameter = Parameter("by", "by", Kind::Text);

#[derive(Deserialize)]
struct Query {
    page: Option<PageNumber>,
    per_page: Option<PerPage>,
    user: Option<Exact>,
    #[serde(default)]
    by: NamedBy,
}

/// Connections, the newest first.
#[derive(Serialize)]
pub(super) struct Page {
    items: Vec<Box<RawValue>>,
    meta: Meta,
}

pub(super) async fn connections(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<Json<Page>, Problem> {
    let query = input::query(&request, PARAMETERS);
    caller(&request, roles::ADMIN)?;
    let Query { page, per_page, user, by } = query?;
    let (page, per_page) = (page.unwrap_or_default(), per_page.unwrap_or_default());
    let user = match &user {
        Some(Exact(text)) => Some(self::user(&api, text, by).await?),
        None => None,
    };
    // Nobody has connections under the name of a user who is not known.
    let subject = user.as_ref().map(|user| user.subject.as_deref().unwrap_or_default());
    let part = api.context.cluster.connections(subject, page.skip(per_page), per_page.items());
    let (items, total) = part.await.map_err(|error| away(&error))?;
    Ok(Json(Page { items, meta: page.meta(per_page, total) }))
}

/// Only Redis knows the connections of all nodes.
fn away(error: &impl Display) -> Problem {
    tracing::warn!(%error, "redis does not tell of connections");
    Problem::unavailable("Redis does not answer")
}

/// The user whom an administrator names.
async fn user(api: &Api, text: &str, by: NamedBy) -> Result<User, Problem> {
    if text.is_empty() || text.len() > MAX_NAME {
        let msg = format!("a user's sub or name has 1 to {MAX_NAME} bytes, not {}", text.len());
        return Err(HandlerError::InvalidData { path: "user".into(), msg }.into());
    }
    api.context.cluster.user(text, by).await.map_err(|subjects| several(&subjects))
}

/// A text may mean each of these users.
fn several(subjects: &BTreeSet<Arc<str>>) -> Problem {
    let msg =
        "Several users have this sub or name: give the sub of one, and that it is one (by: sub)";
    let subjects: Vec<&str> = subjects.iter().map(|subject| &**subject).collect();
    let body = ErrorBody::new("conflict", msg).with(json!({ "subjects": subjects }));
    Problem::new(StatusCode::CONFLICT, body)
}

/// A push to everyone, or to one user.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Broadcast {
    pkg_id: i32,
    data: Box<RawValue>,
    user: Option<String>,
    #[serde(default)]
    by: NamedBy,
}

pub(super) async fn broadcast(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<Response, Problem> {
    caller(&request, roles::ADMIN)?;
    let Broadcast { pkg_id, data, user, by } =
        input::body(&api, request, api.config.max_body_bytes).await?;
    let cluster = &api.context.cluster;
    let user = match &user {
        Some(text) => Some(self::user(&api, text, by).await?),
        None => None,
    };
    let audience = user.as_ref().map_or(Audience::All, Audience::User);
    api.context.hub.room().await;
    let here = cluster
        .push(pkg_id, &data, &audience)
        .map_err(|error| HandlerError::Internal(error.into()))?;
    let listed = match &user {
        Some(User { subject: None, .. }) => None,
        Some(User { subject, .. }) => cluster.count(subject.as_deref()).await,
        None => cluster.count(None).await,
    };
    let connections = listed.map_or(here, |all| all.max(here));
    let reached = json!({ "nodes": cluster.nodes(), "connections": connections });
    Ok((StatusCode::ACCEPTED, Json(reached)).into_response())
}

/// The one parameter of a path, decoded.
fn parameter(path: &RawPathParams) -> &str {
    path.iter().next().map_or("", |(_, value)| value)
}

pub(super) async fn disconnect(
    State(api): State<Arc<Api>>,
    path: RawPathParams,
    request: Request<Body>,
) -> Result<StatusCode, Problem> {
    caller(&request, roles::ADMIN)?;
    let id = parameter(&path);
    let id = Uuid::try_parse(id).map_err(|_| HandlerError::InvalidData {
        path: "id".into(),
        msg: "a connection's id is a UUID".into(),
    })?;
    let closed = api.context.cluster.close(id).await.map_err(|error| match error {
        CloseError::Away(error) => away(&error),
        CloseError::NotKept(error) => Problem::unavailable(error.to_string()),
    });
    if !closed? {
        return Err(HandlerError::NotFound(format!("No connection has the id {id}")).into());
    }
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    by: NamedBy,
}

pub(super) async fn disconnect_user(
    State(api): State<Arc<Api>>,
    path: RawPathParams,
    request: Request<Body>,
) -> Result<StatusCode, Problem> {
    let query = input::query(&request, &[BY]);
    caller(&request, roles::ADMIN)?;
    let Named { by } = query?;
    let user = user(&api, parameter(&path), by).await?;
    let kept = api.context.cluster.close_user(user).await;
    kept.map_err(|error| Problem::unavailable(error.to_string()))?;
    Ok(StatusCode::NO_CONTENT)
}

/// The names of the signing keys in force.
#[derive(Serialize)]
pub(super) struct Keys {
    keys: Vec<String>,
}

pub(super) async fn refresh_keys(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<Json<Keys>, Problem> {
    caller(&request, roles::ADMIN)?;
    let keys = api.context.cluster.refresh_keys().await;
    let keys = keys.map_err(|error| Problem::unavailable(error.to_string()))?;
    Ok(Json(Keys { keys }))
}
