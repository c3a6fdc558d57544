//! Authors: the operations, which WebSocket and REST share, and the packages 1 to 5 on top of them.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::{
    Answer, Caller, Context, Effect, Handler, HandlerError,
    input::Exact,
    page::{PageNumber, PerPage},
};
use crate::{
    protocol::Meta,
    store::{Author, AuthorFilter, AuthorPage},
};

/// The packages whose numbers the pushes of changes carry.
const CREATE: i32 = 3;
const UPDATE: i32 = 4;
const DELETE: i32 = 5;

/// A name of 1 to 255 characters.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct AuthorName(String);

impl TryFrom<String> for AuthorName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        // Postgres cannot hold a NUL.
        match name.chars().count() {
            1..=255 if !name.contains('\0') => Ok(Self(name)),
            _ => Err("a name has 1 to 255 characters, none of them NUL"),
        }
    }
}

/// A part of a name. A longer one is in no name, and more than SQLite would look for.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct NamePart(String);

impl TryFrom<String> for NamePart {
    type Error = &'static str;

    fn try_from(part: String) -> Result<Self, Self::Error> {
        let fits = part.chars().count() <= 255 && !part.contains('\0');
        fits.then_some(Self(part))
            .ok_or("a part of a name has at most 255 characters, none of them NUL")
    }
}

/// Where a cursor walk begins: ids have 32 bits.
const BEFORE_ALL: i64 = i32::MIN as i64 - 1;

/// Where a cursor walk stands: after an author. Opaque to clients.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Cursor(i64);

impl TryFrom<String> for Cursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.is_empty() {
            return Ok(Self(BEFORE_ALL));
        }
        let id = BASE64_URL_SAFE_NO_PAD.decode(text).ok();
        let id = id.and_then(|id| String::from_utf8(id).ok()?.parse::<i32>().ok());
        id.map(|id| Self(id.into()))
            .ok_or("a cursor is a next_cursor of this server, or empty to start")
    }
}

impl Cursor {
    fn text(self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.0.to_string())
    }
}

/// A list of authors. `search_term` wins over the others.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuthorQuery {
    pub(crate) id: Option<i32>,
    pub(crate) name: Option<Exact>,
    pub(crate) search_term: Option<NamePart>,
}

/// A page of authors. A cursor, also an empty one, wins over the page.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PageQuery {
    page: Option<PageNumber>,
    per_page: Option<PerPage>,
    cursor: Option<Cursor>,
    filters: Option<PageFilters>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PageFilters {
    id: Option<i32>,
    /// A part of the name, unlike in [`AuthorQuery`].
    name: Option<NamePart>,
}

/// An author to be.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewAuthor {
    pub(crate) name: AuthorName,
}

/// A new name for an author.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rename {
    pub(crate) id: i32,
    pub(crate) name: AuthorName,
}

/// Which author.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuthorId {
    pub(crate) id: i32,
}

/// The authors that match, by id; `MAX_ROWS` at most.
pub(crate) async fn list(
    context: &Context,
    query: AuthorQuery,
) -> Result<Vec<Author>, HandlerError> {
    let filter = match query.search_term {
        Some(term) => AuthorFilter { contains: Some(term.0), ..AuthorFilter::default() },
        None => AuthorFilter { id: query.id, name: query.name.map(|name| name.0), contains: None },
    };
    let limit = i64::from(context.max_rows);
    if limit == 0 {
        return Ok(context.store.authors(&filter, None).await?.authors);
    }
    let part = AuthorPage::Offset { skip: 0, take: limit };
    let listed = context.store.authors(&filter, Some(part)).await?;
    if listed.next.is_some() {
        return Err(HandlerError::TooManyRows(format!(
            "More than {limit} authors match, the limit without a page (MAX_ROWS): \
             ask for pages with GET_PAGINATED_AUTHORS (pkg_id 2), or GET /authors/paginated"
        )));
    }
    Ok(listed.authors)
}

/// One page of the authors that match, and where it stands.
pub(crate) async fn page(
    context: &Context,
    query: PageQuery,
) -> Result<Answer<Vec<Author>>, HandlerError> {
    let filters = query.filters.unwrap_or_default();
    let filter =
        AuthorFilter { id: filters.id, name: None, contains: filters.name.map(|part| part.0) };
    let per_page = query.per_page.unwrap_or_default();
    match query.cursor {
        Some(cursor) => page_after(context, &filter, cursor, per_page.items()).await,
        None => page_number(context, &filter, query.page.unwrap_or_default(), per_page).await,
    }
}

async fn page_number(
    context: &Context,
    filter: &AuthorFilter,
    page: PageNumber,
    per_page: PerPage,
) -> Result<Answer<Vec<Author>>, HandlerError> {
    let part = AuthorPage::Offset { skip: page.skip(per_page), take: per_page.items() };
    let data = context.store.authors(filter, Some(part)).await?.authors;
    let total = context.store.count_authors(filter).await?;
    Ok(Answer { data, meta: Some(page.meta(per_page, total)) })
}

async fn page_after(
    context: &Context,
    filter: &AuthorFilter,
    cursor: Cursor,
    per_page: i64,
) -> Result<Answer<Vec<Author>>, HandlerError> {
    let part = AuthorPage::After { id: cursor.0, take: per_page };
    let listed = context.store.authors(filter, Some(part)).await?;
    // After a row whose id is no author's there is no author either: its id is too large.
    let next = listed.next.filter(|id| i32::try_from(*id).is_ok());
    let (next_cursor, has_more) = (next.map(|id| Cursor(id).text()), next.is_some());
    let meta = Meta { page: 1, per_page, total: 0, pages: 0, next_cursor, has_more };
    Ok(Answer { data: listed.authors, meta: Some(meta) })
}

/// One author.
pub(crate) async fn get(context: &Context, id: i32) -> Result<Author, HandlerError> {
    context.store.author(id).await?.ok_or_else(|| not_found(id))
}

/// Adds an author, and tells everybody else.
pub(crate) async fn create(
    context: &Context,
    caller: &Caller,
    new: NewAuthor,
) -> Result<Author, HandlerError> {
    context.room().await;
    let author = context.store.create_author(&new.name.0).await?;
    context.changed(CREATE, &author, caller);
    Ok(author)
}

/// Renames an author, and tells everybody else.
pub(crate) async fn update(
    context: &Context,
    caller: &Caller,
    rename: Rename,
) -> Result<Author, HandlerError> {
    context.room().await;
    let author = context.store.update_author(rename.id, &rename.name.0).await?;
    let author = author.ok_or_else(|| not_found(rename.id))?;
    context.changed(UPDATE, &author, caller);
    Ok(author)
}

/// Removes an author, and tells everybody else its id.
pub(crate) async fn delete(
    context: &Context,
    caller: &Caller,
    id: AuthorId,
) -> Result<(), HandlerError> {
    context.room().await;
    if !context.store.delete_author(id.id).await? {
        return Err(not_found(id.id));
    }
    context.changed(DELETE, &id, caller);
    Ok(())
}

fn not_found(id: i32) -> HandlerError {
    HandlerError::NotFound(format!("No author has the id {id}"))
}

pub(super) struct GetAuthors;

impl Handler for GetAuthors {
    type Input = AuthorQuery;
    type Output = Vec<Author>;
    const INPUT: &'static str = "{id?, name?, search_term?}";
    const OUTPUT: &'static str = "[{id, name}]";
    const EFFECT: Effect = Effect::Read;

    async fn handle(
        &self,
        context: &Context,
        _: &Caller,
        query: AuthorQuery,
    ) -> Result<Answer<Vec<Author>>, HandlerError> {
        list(context, query).await.map(Answer::from)
    }
}

pub(super) struct GetPaginatedAuthors;

impl Handler for GetPaginatedAuthors {
    type Input = PageQuery;
    type Output = Vec<Author>;
    const INPUT: &'static str = "{page?, per_page?, cursor?, filters?: {id?, name?}}";
    const OUTPUT: &'static str = "[{id, name}] and meta";
    const EFFECT: Effect = Effect::Read;

    async fn handle(
        &self,
        context: &Context,
        _: &Caller,
        query: PageQuery,
    ) -> Result<Answer<Vec<Author>>, HandlerError> {
        page(context, query).await
    }
}

pub(super) struct CreateAuthor;

impl Handler for CreateAuthor {
    type Input = NewAuthor;
    type Output = Author;
    const INPUT: &'static str = "{name}";
    const OUTPUT: &'static str = "{id, name}";

    async fn handle(
        &self,
        context: &Context,
        caller: &Caller,
        new: NewAuthor,
    ) -> Result<Answer<Author>, HandlerError> {
        create(context, caller, new).await.map(Answer::from)
    }
}

pub(super) struct UpdateAuthor;

impl Handler for UpdateAuthor {
    type Input = Rename;
    type Output = Author;
    const INPUT: &'static str = "{id, name}";
    const OUTPUT: &'static str = "{id, name}";

    async fn handle(
        &self,
        context: &Context,
        caller: &Caller,
        rename: Rename,
    ) -> Result<Answer<Author>, HandlerError> {
        update(context, caller, rename).await.map(Answer::from)
    }
}

pub(super) struct DeleteAuthor;

/// `{}`.
#[derive(Serialize)]
pub(crate) struct Nothing {}

impl Handler for DeleteAuthor {
    type Input = AuthorId;
    type Output = Nothing;
    const INPUT: &'static str = "{id}";
    const OUTPUT: &'static str = "{}";

    async fn handle(
        &self,
        context: &Context,
        caller: &Caller,
        id: AuthorId,
    ) -> Result<Answer<Nothing>, HandlerError> {
        delete(context, caller, id).await.map(|()| Nothing {}.into())
    }
}
