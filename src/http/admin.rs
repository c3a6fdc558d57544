//! `/admin`: what operators see of open connections, and do to them.

use std::{fmt::Display, sync::Arc};

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
    cluster::Audience,
    handlers::{
        HandlerError,
        input::Exact,
        page::{PageNumber, PerPage},
        roles,
    },
    protocol::Meta,
};

const PARAMETERS: &[Parameter] = &[
    Parameter("page", "page", Kind::Number),
    Parameter("per_page", "per_page", Kind::Number),
    Parameter("user", "user", Kind::Text),
];

#[derive(Deserialize)]
struct Query {
    page: Option<PageNumber>,
    per_page: Option<PerPage>,
    user: Option<Exact>,
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
    caller(&request, roles::ADMIN)?;
    let Query { page, per_page, user } = input::query(&request, PARAMETERS)?;
    let (page, per_page) = (page.unwrap_or_default(), per_page.unwrap_or_default());
    let user = user.as_ref().map(|user| &*user.0);
    let part = api.context.cluster.connections(user, page.skip(per_page), per_page.items());
    let (items, total) = part.await.map_err(|error| away(&error))?;
    Ok(Json(Page { items, meta: page.meta(per_page, total) }))
}

/// Only Redis knows the connections of all nodes.
fn away(error: &impl Display) -> Problem {
    tracing::warn!(%error, "redis does not tell of connections");
    Problem::unavailable("Redis does not answer")
}

/// A push to everyone, or to one user by name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Broadcast {
    pkg_id: i32,
    data: Box<RawValue>,
    user: Option<String>,
}

pub(super) async fn broadcast(
    State(api): State<Arc<Api>>,
    request: Request<Body>,
) -> Result<Response, Problem> {
    caller(&request, roles::ADMIN)?;
    let Broadcast { pkg_id, data, user } =
        input::body(&api, request, api.config.max_body_bytes).await?;
    let cluster = &api.context.cluster;
    let audience = match &user {
        Some(user) => Audience::User(user),
        None => Audience::All { except: None },
    };
    let here = cluster
        .push(pkg_id, &data, &audience)
        .map_err(|error| HandlerError::Internal(error.into()))?;
    let connections = cluster.count(user.as_deref()).await.map_or(here, |all| all.max(here));
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
    if !api.context.cluster.close(id).await.map_err(|error| away(&error))? {
        return Err(HandlerError::NotFound(format!("No connection has the id {id}")).into());
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn disconnect_user(
    State(api): State<Arc<Api>>,
    path: RawPathParams,
    request: Request<Body>,
) -> Result<StatusCode, Problem> {
    caller(&request, roles::ADMIN)?;
    let name = parameter(&path);
    if name.len() > MAX_NAME {
        return Err(HandlerError::InvalidData {
            path: "user".into(),
            msg: format!("a user's name has at most {MAX_NAME} bytes"),
        }
        .into());
    }
    api.context.cluster.close_user(name);
    Ok(StatusCode::NO_CONTENT)
}
