//! `/authors`: the operations of `handlers::authors` over REST.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{Request, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::json;

use super::{
    Api, Problem,
    guard::caller,
    input::{self, Kind, Parameter},
};
use crate::{
    handlers::{
        authors::{self, AuthorId, AuthorName, Rename},
        roles,
    },
    store::Author,
};

type Asked = Request<Body>;

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<Json<Vec<Author>>, Problem> {
    let query = input::query(
        &request,
        &[
            Parameter("id", "id", Kind::Number),
            Parameter("name", "name", Kind::Text),
            Parameter("search", "search_term", Kind::Text),
        ],
    );
    caller(&request, roles::GET_AUTHORS)?;
    Ok(Json(authors::list(&api.context, query?).await?))
}

pub(super) async fn page(State(api): State<Arc<Api>>, request: Asked) -> Result<Response, Problem> {
    let query = input::query(
        &request,
        &[
            Parameter("page", "page", Kind::Number),
            Parameter("per_page", "per_page", Kind::Number),
            Parameter("cursor", "cursor", Kind::Cursor),
            Parameter("id", "filters.id", Kind::Number),
            Parameter("name", "filters.name", Kind::Text),
        ],
    );
    caller(&request, roles::GET_AUTHORS)?;
    let answer = authors::page(&api.context, query?).await?;
    Ok(Json(json!({ "items": answer.data, "meta": answer.meta })).into_response())
}

pub(super) async fn read(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<Json<Author>, Problem> {
    caller(&request, roles::GET_AUTHORS)?;
    let id = input::id(&request)?;
    Ok(Json(authors::get(&api.context, id).await?))
}

pub(super) async fn create(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<Response, Problem> {
    let caller = caller(&request, roles::CREATE_AUTHOR)?;
    let new = input::body(&api, request, api.config.max_body_bytes).await?;
    let author = authors::create(&api.context, &caller, new).await?;
    let location = [(header::LOCATION, format!("/authors/{}", author.id))];
    Ok((StatusCode::CREATED, location, Json(author)).into_response())
}

/// The body of a rename: the id stands in the path.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewName {
    name: AuthorName,
}

pub(super) async fn update(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<Json<Author>, Problem> {
    let caller = caller(&request, roles::UPDATE_AUTHOR)?;
    let id = input::id(&request)?;
    let NewName { name } = input::body(&api, request, api.config.max_body_bytes).await?;
    Ok(Json(authors::update(&api.context, &caller, Rename { id, name }).await?))
}

pub(super) async fn remove(
    State(api): State<Arc<Api>>,
    request: Asked,
) -> Result<StatusCode, Problem> {
    let caller = caller(&request, roles::DELETE_AUTHOR)?;
    let id = AuthorId { id: input::id(&request)? };
    authors::delete(&api.context, &caller, id).await?;
    Ok(StatusCode::NO_CONTENT)
}
