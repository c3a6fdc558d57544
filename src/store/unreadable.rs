//! Rows that another program wrote and this one cannot read. A list leaves them out: one row must not take all others
//! away. Each is logged once, and counted whenever it is left out.

use std::{
    collections::HashSet,
    error::Error,
    fmt::Display,
    sync::{Mutex, PoisonError},
};

use sqlx::{ColumnIndex, Decode, FromRow, Row, Type};

use super::Store;
use crate::metrics::{DbTable, Label as _};

/// Rows that are remembered as logged. Beyond it, more of them are only counted.
const MOST: usize = 1_000;

/// A row of a `query_as`, or why it cannot be read: so one does not fail all of them.
pub(super) struct Maybe<T> {
    /// The first column, as far as it can be read.
    pub(super) key: String,
    pub(super) row: sqlx::Result<T>,
}

impl<'r, R: Row, T: FromRow<'r, R>> FromRow<'r, R> for Maybe<T>
where
    usize: ColumnIndex<R>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
    String: Decode<'r, R::Database> + Type<R::Database>,
{
    fn from_row(row: &'r R) -> sqlx::Result<Self> {
        let number = || row.try_get(0).map(|key: i64| key.to_string());
        let key = row.try_get(0).or_else(|_| number()).unwrap_or_default();
        Ok(Self { key, row: T::from_row(row) })
    }
}

/// The rows that were logged, by table and key.
#[derive(Default)]
pub(super) struct Logged(Mutex<HashSet<(&'static str, String)>>);

impl Logged {
    /// Whether a row is to be logged: the first time, and while there is room to remember it.
    fn is_new(&self, table: &'static str, key: String) -> bool {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.len() < MOST && rows.insert((table, key))
    }
}

impl Store {
    /// Counts a row that is left out of an answer, and logs it the first time.
    pub(super) fn left_out(&self, table: DbTable, key: impl Display, error: &dyn Error) {
        self.metrics.unreadable.inc(table);
        let (table, row) = (table.label(), key.to_string());
        if self.unreadable.is_new(table, row.clone()) {
            tracing::error!(table, row, %error, "a row cannot be read and is left out of answers");
        }
    }
}
