//! Replaces what identifies a person in rows that are there.

use sqlx::AssertSqlSafe;

use super::{Action, BATCH, Database, Store, StoreError, statement};
use crate::metrics::{DbOperation, DbShare};

/// What an erasure may change of a row. What it did, when, and with what outcome stays.
const SQLITE: &str = "UPDATE user_actions SET user_id = fresh.value ->> 'user_id', \
    username = fresh.value ->> 'username', resource = fresh.value ->> 'resource', \
    ip_address = fresh.value ->> 'ip_address', user_agent = fresh.value ->> 'user_agent', \
    request_id = fresh.value ->> 'request_id', request_data = nullif(fresh.value -> 'request_data', 'null'), \
    error_message = fresh.value ->> 'error_message' \
    FROM json_each($1) AS fresh WHERE user_actions.uid = fresh.value ->> 'id' RETURNING 1";
const POSTGRES: &str = "UPDATE user_actions SET user_id = batch.user_id, \
    username = batch.username, resource = batch.resource, ip_address = batch.ip_address, \
    user_agent = batch.user_agent, request_id = batch.request_id, request_data = batch.request_data, \
    error_message = batch.error_message";

impl Store {
    /// Takes the bytes of old rows out of SQLite's files, as far as no other process reads its log meanwhile.
    /// It rewrites them: nobody else can write until it is done.
    pub(crate) async fn vacuum(&self) -> Result<(), StoreError> {
        self.pragma("VACUUM").await?;
        self.pragma("PRAGMA wal_checkpoint(TRUNCATE)").await
    }

    /// Nothing on Postgres, which has its own vacuum.
    async fn pragma(&self, sql: &'static str) -> Result<(), StoreError> {
        let Database::Sqlite(sqlite) = &self.database else { return Ok(()) };
        let statement = async {
            let mut taken = sqlite.shares().of(DbShare::AuditChanges).take().await?;
            sqlx::raw_sql(sql).execute(&mut *taken).await
        };
        self.run(DbOperation::Update, sql, statement).await.map(drop)
    }

    /// Writes rows anew that are there, in one statement; returns how many.
    pub(crate) async fn rewrite_actions(&self, rows: &[Action]) -> Result<usize, StoreError> {
        let rows = serde_json::to_string(rows).expect("a row is written as JSON");
        let done: Vec<i32> = loop {
            let uid = self.uid();
            let postgres =
                format!("{POSTGRES} FROM {BATCH} WHERE user_actions.{uid} = batch.id RETURNING 1");
            let sql = AssertSqlSafe(self.either(SQLITE.to_owned(), postgres));
            let done = statement!(self, AuditChanges, Update, query_scalar(sql, &rows), fetch_all);
            if !self.is_numbered_since(&done).await {
                break done?;
            }
        };
        Ok(done.len())
    }
}
