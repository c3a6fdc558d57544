//! `/admin`: what operators do to open connections.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{RawPathParams, State},
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{json, value::RawValue};
use uuid::Uuid;

use super::{Api, Problem, guard::caller, input};
use crate::{
    cluster::Audience,
    handlers::{HandlerError, roles},
};

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
    let Broadcast { pkg_id, data, user } = input::body(request, api.config.max_body_bytes).await?;
    let cluster = &api.context.cluster;
    let audience = match &user {
        Some(user) => Audience::User(user),
        None => Audience::All { except: None },
    };
    let connections = cluster
        .push(pkg_id, &data, &audience)
        .map_err(|error| HandlerError::Internal(error.into()))?;
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
    if !api.context.cluster.close(id) {
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
    api.context.cluster.close_user(parameter(&path));
    Ok(StatusCode::NO_CONTENT)
}
