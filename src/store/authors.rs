//! The authors: one statement an operation, `$N` placeholders, `name_folded` for searches.

use serde::Serialize;

use super::{Store, StoreError};
use crate::metrics::DbOperation;

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

/// A condition that is not set holds for every row.
const MATCHES: &str = "($1 IS NULL OR id = $1) AND ($2 IS NULL OR name = $2) AND ($3 IS NULL OR name_folded LIKE $3 ESCAPE '\\')";

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
}

impl Store {
    /// The authors that match, by id.
    pub(crate) async fn authors(
        &self,
        filter: &AuthorFilter,
        page: Option<AuthorPage>,
    ) -> Result<Vec<Author>, StoreError> {
        let (after, skip, take) = match page {
            None => (0, 0, -1),
            Some(AuthorPage::Offset { skip, take }) => (0, skip, take),
            Some(AuthorPage::After { id, take }) => (id, 0, take),
        };
        let sql = matching(
            "SELECT id, name FROM author WHERE ",
            " AND id > $4 ORDER BY id LIMIT $5 OFFSET $6",
        );
        let query = sqlx::query_as::<_, (i32, String)>(sqlx::AssertSqlSafe(sql))
            .bind(filter.id)
            .bind(&filter.name)
            .bind(filter.pattern())
            .bind(after)
            .bind(take)
            .bind(skip);
        let rows = self.run(DbOperation::Select, query.fetch_all(&self.read)).await?;
        Ok(rows.into_iter().map(|(id, name)| Author { id, name }).collect())
    }

    /// How many authors match.
    pub(crate) async fn count_authors(&self, filter: &AuthorFilter) -> Result<i64, StoreError> {
        let sql = matching("SELECT COUNT(*) FROM author WHERE ", "");
        let query = sqlx::query_scalar::<_, i64>(sqlx::AssertSqlSafe(sql))
            .bind(filter.id)
            .bind(&filter.name)
            .bind(filter.pattern());
        self.run(DbOperation::Select, query.fetch_one(&self.read)).await
    }

    /// One author.
    pub(crate) async fn author(&self, id: i32) -> Result<Option<Author>, StoreError> {
        let query = sqlx::query_as::<_, (i32, String)>("SELECT id, name FROM author WHERE id = $1")
            .bind(id);
        let row = self.run(DbOperation::Select, query.fetch_optional(&self.read)).await?;
        Ok(row.map(|(id, name)| Author { id, name }))
    }

    /// Adds an author; a taken name is a conflict.
    pub(crate) async fn create_author(&self, name: &str) -> Result<Author, StoreError> {
        let query = sqlx::query_scalar::<_, i32>(
            "INSERT INTO author (name, name_folded) VALUES ($1, $2) RETURNING id",
        )
        .bind(name)
        .bind(name.to_lowercase());
        let id = self.run(DbOperation::Insert, query.fetch_one(&self.write)).await?;
        Ok(Author { id, name: name.to_owned() })
    }

    /// Renames an author; none if there is none, a conflict if another has the name.
    pub(crate) async fn update_author(
        &self,
        id: i32,
        name: &str,
    ) -> Result<Option<Author>, StoreError> {
        let query = sqlx::query("UPDATE author SET name = $2, name_folded = $3 WHERE id = $1")
            .bind(id)
            .bind(name)
            .bind(name.to_lowercase());
        let done = self.run(DbOperation::Update, query.execute(&self.write)).await?;
        Ok((done.rows_affected() > 0).then(|| Author { id, name: name.to_owned() }))
    }

    /// Removes an author; false if there is none.
    pub(crate) async fn delete_author(&self, id: i32) -> Result<bool, StoreError> {
        let query = sqlx::query("DELETE FROM author WHERE id = $1").bind(id);
        let done = self.run(DbOperation::Delete, query.execute(&self.write)).await?;
        Ok(done.rows_affected() > 0)
    }
}

/// A statement around the conditions of a filter.
fn matching(head: &str, tail: &str) -> String {
    format!("{head}{MATCHES}{tail}")
}
