//! The authors: one statement an operation, `$N` placeholders, `name_search` for searches.
//!
//! Changes are fetched to their end: SQLite gives the row of `RETURNING` before it commits.

use serde::Serialize;
use sqlx::{AssertSqlSafe, ColumnIndex, Decode, FromRow, Type};

use super::{Store, StoreError, fold::fold, statement, with_conditions};
use crate::metrics::DbTable;

/// The condition of a search. What an older program has written since is in lower case, as that program folded it
/// and looks for it, until it is folded anew.
const SEARCH: &str = r"CASE WHEN name_search_of = name THEN name_search LIKE $3 ESCAPE '\'
    ELSE name_folded LIKE $4 ESCAPE '\' END";

/// An author as clients see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Author {
    /// Given by the database.
    pub id: i32,
    /// Unique.
    pub name: String,
}

/// Which authors are meant; conditions that are set all hold.
#[derive(Debug, Clone, Default)]
pub struct AuthorFilter {
    /// This one.
    pub id: Option<i32>,
    /// Of exactly this name.
    pub name: Option<String>,
    /// With this in the name, in any case.
    pub contains: Option<String>,
}

/// Which part of a list is meant.
#[derive(Debug, Clone, Copy)]
pub enum AuthorPage {
    /// So many from so far on.
    Offset {
        /// Authors passed over.
        skip: i64,
        /// Authors at most.
        take: i64,
    },
    /// So many after an id.
    After {
        /// The last id seen; less than any at the start.
        id: i64,
        /// Authors at most.
        take: i64,
    },
}

/// A part of a list.
#[derive(Debug)]
pub(crate) struct Listed {
    /// Those that can be read.
    pub(crate) authors: Vec<Author>,
    /// The id of the last row of this part, if there are more.
    pub(crate) next: Option<i64>,
}

/// An author as the database has it. SQLite keeps whatever it is given, whatever the column's type is.
pub(super) struct Row {
    pub(super) id: i64,
    pub(super) name: sqlx::Result<String>,
}

impl<'r, R: sqlx::Row> FromRow<'r, R> for Row
where
    usize: ColumnIndex<R>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
    String: Decode<'r, R::Database> + Type<R::Database>,
{
    fn from_row(row: &'r R) -> sqlx::Result<Self> {
        Ok(Self { id: row.try_get(0)?, name: row.try_get(1) })
    }
}

impl AuthorFilter {
    /// `contains`, folded and in lower case, as patterns.
    fn patterns(&self) -> [Option<String>; 2] {
        let contains = self.contains.as_deref();
        [fold, str::to_lowercase].map(|folded| contains.map(|text| pattern(&folded(text))))
    }

    /// A statement with these conditions as `$1` to `$4`, and an id to be passed as `$5`.
    fn statement(&self, head: &str, is_after: bool, tail: &str) -> AssertSqlSafe<String> {
        let conditions = [
            (self.id.is_some(), "id = $1"),
            (self.name.is_some(), "name = $2"),
            (self.contains.is_some(), SEARCH),
            (is_after, "id > $5"),
        ];
        with_conditions(head, &conditions, tail)
    }
}

/// A text as a pattern for a part, in which `%` and `_` are ordinary characters.
fn pattern(text: &str) -> String {
    let mut pattern = String::from("%");
    for c in text.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('%');
    pattern
}

impl Store {
    /// The authors that match, by id.
    pub(crate) async fn authors(
        &self,
        filter: &AuthorFilter,
        page: Option<AuthorPage>,
    ) -> Result<Listed, StoreError> {
        let (after, skip, take) = match page {
            // Postgres knows no negative limit.
            None => (0, 0, i64::MAX),
            Some(AuthorPage::Offset { skip, take }) => (0, skip, take),
            Some(AuthorPage::After { id, take }) => (id, 0, take),
        };
        let is_after = matches!(page, Some(AuthorPage::After { .. }));
        // The column, not what is selected under its name.
        let tail = " ORDER BY author.id LIMIT $6 OFFSET $7";
        let sql = filter.statement("SELECT CAST(id AS BIGINT), name FROM author", is_after, tail);
        // One more than asked for tells whether there is more, without counting.
        let at_most = take.saturating_add(1);
        let [folded, lower] = filter.patterns();
        let mut rows: Vec<Row> = statement!(
            self,
            Reads,
            Select,
            query_as(sql, filter.id, &filter.name, &folded, &lower, after, at_most, skip),
            fetch_all
        )?;
        let wanted = usize::try_from(take).unwrap_or(usize::MAX);
        let has_more = rows.len() > wanted;
        rows.truncate(wanted);
        let next = rows.last().filter(|_| has_more).map(|last| last.id);
        let authors = rows.into_iter().filter_map(|row| self.readable(row)).collect();
        Ok(Listed { authors, next })
    }

    /// An author, unless the row cannot be read.
    fn readable(&self, Row { id, name }: Row) -> Option<Author> {
        let author = i32::try_from(id)
            .map_err(|error| sqlx::Error::Decode(error.into()))
            .and_then(|id| Ok(Author { id, name: name? }));
        author.inspect_err(|error| self.left_out(DbTable::Author, id, error)).ok()
    }

    /// How many authors match.
    pub(crate) async fn count_authors(&self, filter: &AuthorFilter) -> Result<i64, StoreError> {
        let sql = filter.statement("SELECT COUNT(*) FROM author", false, "");
        let [folded, lower] = filter.patterns();
        statement!(
            self,
            Reads,
            Select,
            query_scalar(sql, filter.id, &filter.name, &folded, &lower),
            fetch_one
        )
    }

    /// One author; none also where its row cannot be read.
    pub(crate) async fn author(&self, id: i32) -> Result<Option<Author>, StoreError> {
        let sql = "SELECT CAST(id AS BIGINT), name FROM author WHERE id = $1";
        let row: Option<Row> = statement!(self, Reads, Select, query_as(sql, id), fetch_optional)?;
        Ok(row.and_then(|row| self.readable(row)))
    }

    /// Adds an author; a taken name is a conflict.
    pub(crate) async fn create_author(&self, name: &str) -> Result<Author, StoreError> {
        let sql = "INSERT INTO author (name, name_folded, name_search, name_search_of) \
            VALUES ($1, $2, $3, $1) RETURNING id";
        let (lower, folded) = (name.to_lowercase(), fold(name));
        let ids: Vec<i32> =
            statement!(self, Changes, Insert, query_scalar(sql, name, lower, folded), fetch_all)?;
        let id = ids.first().copied().ok_or(StoreError::Other(sqlx::Error::RowNotFound))?;
        Ok(Author { id, name: name.to_owned() })
    }

    /// Renames an author; none if there is none, a conflict if another has the name.
    pub(crate) async fn update_author(
        &self,
        id: i32,
        name: &str,
    ) -> Result<Option<Author>, StoreError> {
        let sql = "UPDATE author SET name = $2, name_folded = $3, name_search = $4, \
            name_search_of = $2 WHERE id = $1 RETURNING id";
        let (lower, folded) = (name.to_lowercase(), fold(name));
        let ids: Vec<i32> = statement!(
            self,
            Changes,
            Update,
            query_scalar(sql, id, name, lower, folded),
            fetch_all
        )?;
        Ok(ids.first().map(|id| Author { id: *id, name: name.to_owned() }))
    }

    /// Removes an author; false if there is none.
    pub(crate) async fn delete_author(&self, id: i32) -> Result<bool, StoreError> {
        let sql = "DELETE FROM author WHERE id = $1 RETURNING id";
        let ids: Vec<i32> = statement!(self, Changes, Delete, query_scalar(sql, id), fetch_all)?;
        Ok(!ids.is_empty())
    }
}
