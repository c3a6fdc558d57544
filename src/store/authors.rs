//! The authors: one statement an operation, `$N` placeholders, `name_folded` for searches.
//!
//! Changes are fetched to their end: SQLite gives the row of `RETURNING` before it commits.

use serde::Serialize;
use sqlx::AssertSqlSafe;

use super::{Store, StoreError, statement, with_conditions};

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
        /// The last id seen; 0 at the start.
        id: i32,
        /// Authors at most.
        take: i64,
    },
}

impl AuthorFilter {
    /// `contains` as a pattern in which `%` and `_` are ordinary characters.
    fn pattern(&self) -> Option<String> {
        let text = self.contains.as_ref()?;
        let mut pattern = String::from("%");
        for c in text.to_lowercase().chars() {
            if matches!(c, '%' | '_' | '\\') {
                pattern.push('\\');
            }
            pattern.push(c);
        }
        pattern.push('%');
        Some(pattern)
    }

    /// A statement with these conditions as `$1` to `$3`, and an id to be passed as `$4`.
    fn statement(&self, head: &str, is_after: bool, tail: &str) -> AssertSqlSafe<String> {
        let conditions = [
            (self.id.is_some(), "id = $1"),
            (self.name.is_some(), "name = $2"),
            (self.contains.is_some(), r"name_folded LIKE $3 ESCAPE '\'"),
            (is_after, "id > $4"),
        ];
        with_conditions(head, &conditions, tail)
    }
}

impl Store {
    /// The authors that match, by id.
    pub(crate) async fn authors(
        &self,
        filter: &AuthorFilter,
        page: Option<AuthorPage>,
    ) -> Result<Vec<Author>, StoreError> {
        let (after, skip, take) = match page {
            // Postgres knows no negative limit.
            None => (0, 0, i64::MAX),
            Some(AuthorPage::Offset { skip, take }) => (0, skip, take),
            Some(AuthorPage::After { id, take }) => (id, 0, take),
        };
        let is_after = matches!(page, Some(AuthorPage::After { .. }));
        let tail = " ORDER BY id LIMIT $5 OFFSET $6";
        let sql = filter.statement("SELECT id, name FROM author", is_after, tail);
        let rows: Vec<(i32, String)> = statement!(
            self,
            Reads,
            Select,
            query_as(sql, filter.id, &filter.name, filter.pattern(), after, take, skip),
            fetch_all
        )?;
        Ok(rows.into_iter().map(|(id, name)| Author { id, name }).collect())
    }

    /// How many authors match.
    pub(crate) async fn count_authors(&self, filter: &AuthorFilter) -> Result<i64, StoreError> {
        let sql = filter.statement("SELECT COUNT(*) FROM author", false, "");
        statement!(
            self,
            Reads,
            Select,
            query_scalar(sql, filter.id, &filter.name, filter.pattern()),
            fetch_one
        )
    }

    /// One author.
    pub(crate) async fn author(&self, id: i32) -> Result<Option<Author>, StoreError> {
        let sql = "SELECT name FROM author WHERE id = $1";
        let name: Option<String> =
            statement!(self, Reads, Select, query_scalar(sql, id), fetch_optional)?;
        Ok(name.map(|name| Author { id, name }))
    }

    /// Adds an author; a taken name is a conflict.
    pub(crate) async fn create_author(&self, name: &str) -> Result<Author, StoreError> {
        let sql = "INSERT INTO author (name, name_folded) VALUES ($1, $2) RETURNING id";
        let folded = name.to_lowercase();
        let ids: Vec<i32> =
            statement!(self, Changes, Insert, query_scalar(sql, name, folded), fetch_all)?;
        let id = ids.first().copied().ok_or(StoreError::Other(sqlx::Error::RowNotFound))?;
        Ok(Author { id, name: name.to_owned() })
    }

    /// Renames an author; none if there is none, a conflict if another has the name.
    pub(crate) async fn update_author(
        &self,
        id: i32,
        name: &str,
    ) -> Result<Option<Author>, StoreError> {
        let sql = "UPDATE author SET name = $2, name_folded = $3 WHERE id = $1 RETURNING id";
        let folded = name.to_lowercase();
        let ids: Vec<i32> =
            statement!(self, Changes, Update, query_scalar(sql, id, name, folded), fetch_all)?;
        Ok(ids.first().map(|id| Author { id: *id, name: name.to_owned() }))
    }

    /// Removes an author; false if there is none.
    pub(crate) async fn delete_author(&self, id: i32) -> Result<bool, StoreError> {
        let sql = "DELETE FROM author WHERE id = $1 RETURNING id";
        let ids: Vec<i32> = statement!(self, Changes, Delete, query_scalar(sql, id), fetch_all)?;
        Ok(!ids.is_empty())
    }
}
