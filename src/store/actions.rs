//! The audit trail: table `user_actions`.
//!
//! A row that is there already is passed over, so that writing a batch twice does no harm. Postgres takes
//! a batch as one text of JSON. SQLite works in this process, where its time counts: values are bound,
//! since it would search the JSON once for each column, and many batches share a transaction.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sqlx::{AssertSqlSafe, Connection as _, SqlSafeStr as _, SqliteConnection};
use uuid::Uuid;

use super::{
    Database, Store, StoreError,
    moment::{Since, Until},
    statement,
    unreadable::Maybe,
    with_conditions,
};
use crate::metrics::{DbOperation, DbShare, DbTable};

/// Somebody did something, or was kept from it. Texts are shared: the same ones come again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Action {
    /// Made where it happened; version 7, so that ids sort as times.
    pub id: Uuid,
    /// When: RFC 3339 in UTC with six decimals, so that texts sort as times.
    pub timestamp: Arc<str>,
    /// The token's `sub`; none without a valid token.
    pub user_id: Option<Arc<str>>,
    /// For people.
    pub username: Option<Arc<str>>,
    /// The user's roles at that time.
    pub user_roles: Arc<[Box<str>]>,
    /// A method of HTTP, or `WS:` and the name of a package or an event.
    pub action_type: Arc<str>,
    /// A path, or the name of a package.
    pub resource: Arc<str>,
    /// `success`, `error` or `permission_denied`.
    pub outcome: Arc<str>,
    /// Of the client.
    pub ip_address: Option<Arc<str>>,
    /// As the client says.
    pub user_agent: Option<Arc<str>>,
    /// The correlation id, or the `req_id` of a message.
    pub request_id: Option<Arc<str>>,
    /// What was asked, without secrets.
    pub request_data: Option<Box<RawValue>>,
    /// A status of HTTP or of the protocol, or a close code.
    pub response_status: Option<i32>,
    /// What the client was told.
    pub error_message: Option<Arc<str>>,
    /// Milliseconds until the answer was ready.
    pub duration_ms: Option<f64>,
}

impl Action {
    /// The names of the columns, in their order.
    pub const COLUMNS: [&str; 15] = [
        "id",
        "timestamp",
        "user_id",
        "username",
        "user_roles",
        "action_type",
        "resource",
        "outcome",
        "ip_address",
        "user_agent",
        "request_id",
        "request_data",
        "response_status",
        "error_message",
        "duration_ms",
    ];
}

/// Which actions are meant; conditions that are set all hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct ActionFilter {
    pub(crate) user_id: Option<String>,
    pub(crate) username: Option<String>,
    pub(crate) action_type: Option<String>,
    pub(crate) resource: Option<String>,
    pub(crate) outcome: Option<String>,
    pub(crate) since: Option<Since>,
    pub(crate) until: Option<Until>,
}

/// A row as both databases give it: the columns of [`Action`] in their order.
type Row = (
    String,
    String,
    Option<String>,
    Option<String>,
    String,
    String,
    String,
    String,
    Option<String>,
    Option<String>,
    Option<String>,
    Option<String>,
    Option<i32>,
    Option<String>,
    Option<f64>,
);

// Not `ON CONFLICT`: a statement that can fail in its middle first copies every page that it changes to a
// file. What `OR IGNORE` passes over beside known ids, a NULL where none may be, is no [`Action`].
const INSERT_SQLITE: &str = "INSERT OR IGNORE INTO user_actions (id, timestamp, user_id, username, \
    user_roles, action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms) VALUES ";
const VALUES_SQLITE: &str = "(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)";
/// Rows of a statement on SQLite: it allows 32,766 values.
const MOST_ROWS: usize = 500;

// Named, since a newer program may have added others.
const INSERT_POSTGRES: &str = "INSERT INTO user_actions (id, timestamp, user_id, username, user_roles, \
    action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms) SELECT id, timestamp, user_id, username, \
    user_roles, action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms \
    FROM json_populate_recordset(NULL::user_actions, $1::json) ON CONFLICT (id) DO NOTHING";

const SELECT_SQLITE: &str = "SELECT id, timestamp, user_id, username, user_roles, action_type, \
    resource, outcome, ip_address, user_agent, request_id, request_data, response_status, \
    error_message, duration_ms FROM user_actions";

const SELECT_POSTGRES: &str = "SELECT id::text, \
    to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), user_id, username, \
    user_roles::text, action_type, resource, outcome, ip_address, user_agent, request_id, \
    request_data::text, response_status, error_message, duration_ms FROM user_actions";

// The columns, not what is selected under their names.
const NEWEST_FIRST: &str =
    " ORDER BY user_actions.timestamp DESC, user_actions.id DESC LIMIT $8 OFFSET $9";
const OLDEST_FIRST: &str = " ORDER BY user_actions.timestamp, user_actions.id LIMIT $5 OFFSET $6";

impl Store {
    /// Batches that are best written at once. Each transaction of SQLite writes all pages that it has
    /// changed, of six indexes; many rows change hardly more of them than a few.
    pub(crate) fn batches_at_once(&self) -> usize {
        self.either(20, 1)
    }

    /// Adds rows that are not there yet, at most `at_most` in a statement; all or, on Postgres, those of
    /// some statements. No text in them may hold a NUL or half a surrogate pair: Postgres would refuse
    /// the whole statement.
    pub(crate) async fn insert_actions(
        &self,
        rows: Vec<Action>,
        at_most: usize,
    ) -> Result<(), StoreError> {
        match &self.database {
            Database::Sqlite(sqlite) => {
                let write = async {
                    let mut taken = sqlite.shares().of(DbShare::AuditChanges).take().await?;
                    bound(&mut taken, rows, at_most.min(MOST_ROWS)).await
                };
                self.run(DbOperation::Insert, INSERT_SQLITE, write).await
            }
            Database::Postgres(postgres) => {
                let shares = postgres.shares();
                for rows in rows.chunks(at_most) {
                    let rows = serde_json::to_string(rows).expect("a row is written as JSON");
                    let insert = async {
                        let mut taken = shares.of(DbShare::AuditChanges).take().await?;
                        sqlx::query(INSERT_POSTGRES).bind(rows).execute(&mut *taken).await
                    };
                    self.run(DbOperation::Insert, INSERT_POSTGRES, postgres.while_up(insert))
                        .await?;
                }
                Ok(())
            }
        }
    }

    /// A part of the actions that match, newest first.
    pub(crate) async fn actions(
        &self,
        filter: &ActionFilter,
        skip: i64,
        take: i64,
    ) -> Result<Vec<Action>, StoreError> {
        let sql = self.matching(filter, self.either(SELECT_SQLITE, SELECT_POSTGRES), NEWEST_FIRST);
        let rows: Vec<Maybe<Row>> = statement!(
            self,
            AuditReads,
            Select,
            query_as(
                sql,
                &filter.user_id,
                &filter.username,
                &filter.action_type,
                &filter.resource,
                &filter.outcome,
                filter.since.as_ref().map(Since::as_str),
                filter.until.as_ref().map(Until::as_str),
                take,
                skip
            ),
            fetch_all
        )?;
        Ok(self.readable_actions(rows))
    }

    /// How many actions match.
    pub(crate) async fn count_actions(&self, filter: &ActionFilter) -> Result<i64, StoreError> {
        let sql = self.matching(filter, "SELECT COUNT(*) FROM user_actions", "");
        statement!(
            self,
            AuditReads,
            Select,
            query_scalar(
                sql,
                &filter.user_id,
                &filter.username,
                &filter.action_type,
                &filter.resource,
                &filter.outcome,
                filter.since.as_ref().map(Since::as_str),
                filter.until.as_ref().map(Until::as_str)
            ),
            fetch_one
        )
    }

    /// One action.
    pub(crate) async fn action(&self, id: Uuid) -> Result<Option<Action>, StoreError> {
        let head = self.either(SELECT_SQLITE, SELECT_POSTGRES);
        let sql = with_conditions(head, &[(true, self.either("id = $1", "id = $1::uuid"))], "");
        let row: Option<Maybe<Row>> =
            statement!(self, AuditReads, Select, query_as(sql, id.to_string()), fetch_optional)?;
        Ok(self.readable_actions(row).pop())
    }

    /// So many actions of a range after one that was seen, oldest first; fewer where some cannot be read, and none
    /// only at the end.
    pub(crate) async fn actions_after(
        &self,
        seen: Option<&Action>,
        since: Option<&Since>,
        until: Option<&Until>,
        take: i64,
    ) -> Result<Vec<Action>, StoreError> {
        let (from, before, after) = self.either(
            ("timestamp >= $1", "timestamp < $2", "(timestamp, id) > ($3, $4)"),
            (
                "timestamp >= $1::timestamptz",
                "timestamp < $2::timestamptz",
                "(timestamp, id) > ($3::timestamptz, $4::uuid)",
            ),
        );
        // What was seen is no earlier than the range: with both, the index could be entered at its start.
        let conditions = [
            (since.is_some() && seen.is_none(), from),
            (until.is_some(), before),
            (seen.is_some(), after),
        ];
        let sql =
            with_conditions(self.either(SELECT_SQLITE, SELECT_POSTGRES), &conditions, OLDEST_FIRST);
        let sql = sql.into_sql_str();
        let mut skip = 0;
        loop {
            let rows: Vec<Maybe<Row>> = statement!(
                self,
                AuditReads,
                Select,
                query_as(
                    sql.clone(),
                    since.map(Since::as_str),
                    until.map(Until::as_str),
                    seen.map(|seen| &*seen.timestamp),
                    seen.map(|seen| seen.id.to_string()),
                    take,
                    skip
                ),
                fetch_all
            )?;
            let is_end = rows.is_empty();
            let actions = self.readable_actions(rows);
            if is_end || !actions.is_empty() {
                return Ok(actions);
            }
            skip += take;
        }
    }

    /// The rows that can be read.
    fn readable_actions(&self, rows: impl IntoIterator<Item = Maybe<Row>>) -> Vec<Action> {
        let read = |Maybe { key, row }| {
            let read = row.map_err(StoreError::Other).and_then(action);
            read.inspect_err(|error| self.left_out(DbTable::UserActions, key, error)).ok()
        };
        rows.into_iter().filter_map(read).collect()
    }

    /// Removes the oldest actions from before a time, `at_most` so many; returns how many.
    pub(crate) async fn delete_actions(
        &self,
        before: Timestamp,
        at_most: i64,
    ) -> Result<usize, StoreError> {
        // An array: Postgres may join the table with a subquery, and read all of it for that.
        let sql = self.either(
            "DELETE FROM user_actions WHERE id IN (SELECT id FROM user_actions \
             WHERE timestamp < $1 ORDER BY timestamp LIMIT $2) RETURNING 1",
            "DELETE FROM user_actions WHERE id = ANY (ARRAY(SELECT id FROM user_actions \
             WHERE timestamp < $1::timestamptz ORDER BY timestamp LIMIT $2)) RETURNING 1",
        );
        let before = format!("{before:.6}");
        let gone: Vec<i32> =
            statement!(self, AuditChanges, Delete, query_scalar(sql, &before, at_most), fetch_all)?;
        Ok(gone.len())
    }

    /// A statement with the conditions of a filter as `$1` to `$7`.
    fn matching(&self, filter: &ActionFilter, head: &str, tail: &str) -> AssertSqlSafe<String> {
        let (since, until) = self.either(
            ("timestamp >= $6", "timestamp < $7"),
            ("timestamp >= $6::timestamptz", "timestamp < $7::timestamptz"),
        );
        let conditions = [
            (filter.user_id.is_some(), "user_id = $1"),
            (filter.username.is_some(), "username = $2"),
            (filter.action_type.is_some(), "action_type = $3"),
            (filter.resource.is_some(), "resource = $4"),
            (filter.outcome.is_some(), "outcome = $5"),
            (filter.since.is_some(), since),
            (filter.until.is_some(), until),
        ];
        with_conditions(head, &conditions, tail)
    }
}

/// Adds rows to SQLite, in one transaction.
async fn bound(
    connection: &mut SqliteConnection,
    mut rows: Vec<Action>,
    at_most: usize,
) -> sqlx::Result<()> {
    let mut transaction = connection.begin().await?;
    while !rows.is_empty() {
        let part = rows.drain(..at_most.min(rows.len()));
        let values = vec![VALUES_SQLITE; part.len()].join(",");
        // Prepared statements are kept, so the usual one alone is to be.
        let is_usual = part.len() == at_most;
        let insert = sqlx::query(AssertSqlSafe(INSERT_SQLITE.to_owned() + &values));
        let insert = part.fold(insert.persistent(is_usual), |insert, row| {
            let roles = serde_json::to_string(&row.user_roles).expect("texts are written as JSON");
            let data = row.request_data.filter(|data| data.get() != "null");
            insert
                .bind(row.id.to_string())
                .bind(row.timestamp)
                .bind(row.user_id)
                .bind(row.username)
                .bind(roles)
                .bind(row.action_type)
                .bind(row.resource)
                .bind(row.outcome)
                .bind(row.ip_address)
                .bind(row.user_agent)
                .bind(row.request_id)
                .bind(data.map(|data| Box::<str>::from(data).into_string()))
                .bind(row.response_status)
                .bind(row.error_message)
                .bind(row.duration_ms)
        });
        insert.execute(&mut *transaction).await?;
    }
    transaction.commit().await
}

/// Reads a row; one that cannot be read was written by somebody else.
fn action(row: Row) -> Result<Action, StoreError> {
    let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| {
        StoreError::Other(sqlx::Error::Decode(error))
    };
    Ok(Action {
        id: row.0.parse().map_err(|error: uuid::Error| unreadable(error.into()))?,
        timestamp: row.1.into(),
        user_id: row.2.map(Arc::from),
        username: row.3.map(Arc::from),
        user_roles: serde_json::from_str(&row.4).map_err(|error| unreadable(error.into()))?,
        action_type: row.5.into(),
        resource: row.6.into(),
        outcome: row.7.into(),
        ip_address: row.8.map(Arc::from),
        user_agent: row.9.map(Arc::from),
        request_id: row.10.map(Arc::from),
        request_data: row
            .11
            .map(RawValue::from_string)
            .transpose()
            .map_err(|error| unreadable(error.into()))?,
        response_status: row.12,
        error_message: row.13.map(Arc::from),
        duration_ms: row.14,
    })
}

#[cfg(test)]
mod tests;
