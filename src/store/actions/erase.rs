//! Replaces what identifies a person in rows that are there.

use sqlx::AssertSqlSafe;

use super::{Action, Store, StoreError, statement};

/// What an erasure may change of a row. What it did, when, and with what outcome stays.
const SQLITE: &str = "UPDATE user_actions SET user_id = fresh.value ->> 'user_id', \
    username = fresh.value ->> 'username', resource = fresh.value ->> 'resource', \
    ip_address = fresh.value ->> 'ip_address', user_agent = fresh.value ->> 'user_agent', \
    request_id = fresh.value ->> 'request_id', request_data = fresh.value ->> 'request_data', \
    error_message = fresh.value ->> 'error_message' \
    FROM json_each($1) AS fresh WHERE user_actions.id = fresh.value ->> 'id' RETURNING 1";
const POSTGRES: &str = "UPDATE user_actions SET user_id = fresh.user_id, \
    username = fresh.username, resource = fresh.resource, ip_address = fresh.ip_address, \
    user_agent = fresh.user_agent, request_id = fresh.request_id, request_data = fresh.request_data, \
    error_message = fresh.error_message \
    FROM json_populate_recordset(NULL::user_actions, $1::json) AS fresh \
    WHERE user_actions.id = fresh.id RETURNING 1";

impl Store {
    /// Writes rows anew that are there, in one statement; returns how many.
    pub(crate) async fn rewrite_actions(&self, rows: &[Action]) -> Result<usize, StoreError> {
        let rows = serde_json::to_string(rows).expect("a row is written as JSON");
        let sql = AssertSqlSafe(self.either(SQLITE, POSTGRES));
        let done: Vec<i32> =
            statement!(self, AuditChanges, Update, query_scalar(sql, &rows), fetch_all)?;
        Ok(done.len())
    }
}
