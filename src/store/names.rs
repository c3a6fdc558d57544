//! Names of authors that are folded anew for searches: those from before the column, and those that an older
//! program writes while nodes are replaced. Until then searches look at what that program folded.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Store, StoreError, authors::Row, fold::fold, statement};

/// How often we look for such names; at the start after a migration alone. Without one it is a look at an empty
/// index.
const EVERY: Duration = Duration::from_secs(60);
/// Rows of one statement.
const FEW: i64 = 500;
/// After a statement: others want to write too.
const BREATH: Duration = Duration::from_millis(5);

/// Folds names anew until the server stops.
pub(crate) async fn keep_folded(store: Arc<Store>, stop: CancellationToken) {
    let fold = async {
        if !store.found().is_of_older_program() {
            sleep(EVERY).await;
        }
        loop {
            match store.fold_names().await {
                Ok(0) => {}
                Ok(names) => {
                    tracing::info!(names, "names of authors were folded anew for searches")
                }
                // We come to it in a minute.
                Err(error) => tracing::warn!(%error, "names of authors cannot be folded anew"),
            }
            sleep(EVERY).await;
        }
    };
    stop.run_until_cancelled(fold).await;
}

impl Store {
    /// Folds all names anew that need it; returns how many.
    pub(crate) async fn fold_names(&self) -> Result<usize, StoreError> {
        let (mut after, mut folded) = (i64::MIN, 0);
        loop {
            let rows = self.unfolded(after).await?;
            let Some(last) = rows.last() else { return Ok(folded) };
            // The next rows, also where one of these cannot be read or was changed meanwhile.
            after = last.id;
            folded += self.fold_rows(&rows).await?;
            sleep(BREATH).await;
        }
    }

    async fn unfolded(&self, after: i64) -> Result<Vec<Row>, StoreError> {
        // The condition of the index, word for word.
        let sql = self.either(
            "SELECT CAST(id AS BIGINT), name FROM author WHERE name_search_of IS NOT name \
             AND id > $1 ORDER BY author.id LIMIT $2",
            "SELECT CAST(id AS BIGINT), name FROM author WHERE name_search_of IS DISTINCT FROM name \
             AND id > $1 ORDER BY author.id LIMIT $2",
        );
        statement!(self, Reads, Select, query_as(sql, after, FEW), fetch_all)
    }

    async fn fold_rows(&self, rows: &[Row]) -> Result<usize, StoreError> {
        // A name that is no longer that of its row stays for the next time.
        let sql = self.either(
            "UPDATE author SET name_search = f.value ->> 'folded', name_search_of = author.name \
             FROM json_each($1) AS f \
             WHERE author.id = f.value ->> 'id' AND author.name = f.value ->> 'name' RETURNING 1",
            "UPDATE author SET name_search = f.folded, name_search_of = author.name \
             FROM json_to_recordset($1::json) AS f(id int, name text, folded text) \
             WHERE author.id = f.id AND author.name = f.name RETURNING 1",
        );
        let folded = |row: &Row| {
            // Of another program: such an id is refused, and with it all the others.
            i32::try_from(row.id).ok()?;
            let name = row.name.as_ref().ok()?;
            Some(json!({ "id": row.id, "name": name, "folded": fold(name) }))
        };
        let folded = Value::from_iter(rows.iter().filter_map(folded)).to_string();
        let done: Vec<i32> =
            statement!(self, Changes, Update, query_scalar(sql, &folded), fetch_all)?;
        Ok(done.len())
    }
}
