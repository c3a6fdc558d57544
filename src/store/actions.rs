//! The audit trail: table `user_actions`.
//!
//! A row whose `uid` is there already is passed over, so that writing a batch twice does no harm. Its `id` is
//! the database's. On Postgres, a table of the previous release has the UUID in `id` until its rows are numbered
//! ([`super::numbering`]); statements on it name the column by [`Store::uid`]. Postgres takes
//! a batch as one text of JSON. SQLite works in this process, where its time counts: values are bound,
//! since it would search the JSON once for each column, and many batches share a transaction.

mod erase;
mod page;
mod stored;

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};
use uuid::Uuid;

use super::{
    Database, Store, StoreError,
    moment::{Since, Until},
    postgres::Postgres,
    shares::Shares,
    statement,
    unreadable::Maybe,
    with_conditions,
};
pub(crate) use page::{ActionPage, ActionPart, Place};

use crate::metrics::{DbOperation, DbShare, DbTable};
pub use stored::StoredAction;
use stored::{Row, stored};

/// Somebody did something, or was kept from it. Texts are shared: the same ones come again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Action {
    /// Made where it happened; version 7, so that they sort as times. In the spool it is called `id`, as in
    /// those of the previous release: either may take over a spool of the other.
    #[serde(rename = "id")]
    pub uid: Uuid,
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

/// What names one action.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ActionKey {
    Id(i64),
    Uid(Uuid),
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

// Not `ON CONFLICT`: a statement that can fail in its middle first copies every page that it changes to a
// file. What `OR IGNORE` passes over beside known ids, a NULL where none may be, is no [`Action`].
const INSERT_SQLITE: &str = "INSERT OR IGNORE INTO user_actions (uid, timestamp, user_id, username, \
    user_roles, action_type, resource, outcome, ip_address, user_agent, request_id, request_data, \
    response_status, error_message, duration_ms) VALUES ";
const VALUES_SQLITE: &str = "(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)";
/// Rows of a statement on SQLite: it allows 32,766 values.
const MOST_ROWS: usize = 500;

/// The columns beside the keys. They are named, since a newer program may have added others.
const COLUMNS: &str = "timestamp, user_id, username, user_roles, action_type, resource, outcome, \
    ip_address, user_agent, request_id, request_data, response_status, error_message, duration_ms";
/// The rows of a batch, `$1`. Their type is spelled out: for that of the table, the database has a function
/// that serves nodes of the previous release (migration 2).
const BATCH: &str = "json_to_recordset($1::json) AS batch (id uuid, timestamp timestamptz, user_id text, \
    username text, user_roles json, action_type text, resource text, outcome text, ip_address text, \
    user_agent text, request_id text, request_data json, response_status integer, error_message text, \
    duration_ms double precision)";

const SELECT_SQLITE: &str = "SELECT number, uid, timestamp, user_id, username, user_roles, action_type, \
    resource, outcome, ip_address, user_agent, request_id, request_data, response_status, \
    error_message, duration_ms FROM user_actions";

/// What follows the keys.
const SELECTED_POSTGRES: &str = "\
    to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), user_id, username, \
    user_roles::text, action_type, resource, outcome, ip_address, user_agent, request_id, \
    request_data::text, response_status, error_message, duration_ms FROM user_actions";

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
                    self.insert_batch(postgres, &shares, &rows).await?;
                }
                Ok(())
            }
        }
    }

    async fn insert_batch(
        &self,
        postgres: &Postgres,
        shares: &Shares<sqlx::Postgres>,
        rows: &str,
    ) -> Result<(), StoreError> {
        loop {
            let uid = self.uid();
            let sql = format!(
                "INSERT INTO user_actions ({uid}, {COLUMNS}) SELECT id, {COLUMNS} FROM {BATCH} \
                 ON CONFLICT ({uid}) DO NOTHING"
            );
            let insert = async {
                let mut taken = shares.of(DbShare::AuditChanges).take().await?;
                sqlx::query(AssertSqlSafe(&*sql)).bind(rows).execute(&mut *taken).await
            };
            let result =
                self.run(DbOperation::Insert, &sql, postgres.while_up(insert)).await.map(drop);
            if !self.is_numbered_since(&result).await {
                return result;
            }
        }
    }

    /// A part of the actions that match, newest first.
    pub(crate) async fn actions(
        &self,
        filter: &ActionFilter,
        page: &ActionPage,
        take: i64,
    ) -> Result<ActionPart, StoreError> {
        let (mut skip, place) = match page {
            ActionPage::Offset(skip) => (*skip, None),
            ActionPage::After(place) => (0, Some(place)),
        };
        // Pages by number keep their places, whatever can be read of them.
        let walks = skip == 0;
        loop {
            // The columns, not what is selected under their names.
            let newest_first = format!(
                " ORDER BY user_actions.timestamp DESC, user_actions.{} DESC LIMIT $8 OFFSET $9",
                self.uid()
            );
            let sql = self.matching(filter, place.is_some(), &self.select(), &newest_first);
            let rows: Result<Vec<Maybe<Row>>, _> = statement!(
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
                    // One more than asked for tells whether there is more, without counting.
                    take + 1,
                    skip,
                    place.map(|place| &*place.timestamp),
                    place.map(|place| place.uid.to_string())
                ),
                fetch_all
            );
            if self.is_numbered_since(&rows).await {
                continue;
            }
            let mut rows = rows?;
            let wanted = usize::try_from(take).unwrap_or(usize::MAX);
            let has_more = rows.len() > wanted;
            rows.truncate(wanted);
            let count = i64::try_from(rows.len()).unwrap_or(i64::MAX);
            let items = self.readable_actions(rows);
            if !items.is_empty() || !has_more || !walks {
                return Ok(ActionPart { items, rows: count, has_more });
            }
            skip += take;
        }
    }

    /// How many actions match, `at_most` so many: no more are looked at.
    pub(crate) async fn count_actions(
        &self,
        filter: &ActionFilter,
        at_most: i64,
    ) -> Result<i64, StoreError> {
        // In an order that an index has, or Postgres might read the table from its start.
        let head = "SELECT COUNT(*) FROM (SELECT 1 FROM user_actions";
        let tail = " ORDER BY user_actions.timestamp DESC LIMIT $8) AS counted";
        let sql = self.matching(filter, false, head, tail);
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
                filter.until.as_ref().map(Until::as_str),
                at_most
            ),
            fetch_one
        )
    }

    /// One action. By its `id` none is found until the trail's rows are numbered.
    pub(crate) async fn action(&self, key: ActionKey) -> Result<Option<StoredAction>, StoreError> {
        let row: Option<Maybe<Row>> = loop {
            let (number, uid) = match key {
                ActionKey::Id(number) => (Some(number), None),
                ActionKey::Uid(uid) => (None, Some(uid.to_string())),
            };
            let (by_number, by_uid) = self.either(
                ("number = $1", "uid = $2"),
                if self.is_numbered() {
                    ("id = $1", "uid = $2::uuid")
                } else {
                    ("$1 < 0", "id = $2::uuid")
                },
            );
            let conditions = [(number.is_some(), by_number), (uid.is_some(), by_uid)];
            let sql = with_conditions(&self.select(), &conditions, "");
            let row =
                statement!(self, AuditReads, Select, query_as(sql, number, &uid), fetch_optional);
            if !self.is_numbered_since(&row).await {
                break row?;
            }
        };
        Ok(self.readable_actions(row).pop())
    }

    /// So many actions of a range after one that was seen, oldest first; fewer where some cannot be read, and none
    /// only at the end.
    pub(crate) async fn actions_after(
        &self,
        seen: Option<&StoredAction>,
        since: Option<&Since>,
        until: Option<&Until>,
        take: i64,
    ) -> Result<ActionPart, StoreError> {
        let (from, before, after_types) = self.either(
            ("timestamp >= $1", "timestamp < $2", ("$3", "$4")),
            (
                "timestamp >= $1::timestamptz",
                "timestamp < $2::timestamptz",
                ("$3::timestamptz", "$4::uuid"),
            ),
        );
        let (mut skip, mut count) = (0, 0);
        loop {
            let (uid, (moment, last)) = (self.uid(), after_types);
            let after = format!("(timestamp, {uid}) > ({moment}, {last})");
            // What was seen is no earlier than the range: with both, the index could be entered at its start.
            let conditions = [
                (since.is_some() && seen.is_none(), from),
                (until.is_some(), before),
                (seen.is_some(), &*after),
            ];
            let oldest_first =
                format!(" ORDER BY user_actions.timestamp, user_actions.{uid} LIMIT $5 OFFSET $6");
            let sql = with_conditions(&self.select(), &conditions, &oldest_first);
            let rows: Result<Vec<Maybe<Row>>, _> = statement!(
                self,
                AuditReads,
                Select,
                query_as(
                    sql,
                    since.map(Since::as_str),
                    until.map(Until::as_str),
                    seen.map(|seen| &*seen.action.timestamp),
                    seen.map(|seen| seen.action.uid.to_string()),
                    take,
                    skip
                ),
                fetch_all
            );
            if self.is_numbered_since(&rows).await {
                continue;
            }
            let rows = rows?;
            let has_more = !rows.is_empty();
            count += i64::try_from(rows.len()).unwrap_or(i64::MAX);
            let items = self.readable_actions(rows);
            if !has_more || !items.is_empty() {
                return Ok(ActionPart { items, rows: count, has_more });
            }
            skip += take;
        }
    }

    /// The rows that can be read.
    fn readable_actions(&self, rows: impl IntoIterator<Item = Maybe<Row>>) -> Vec<StoredAction> {
        let read = |Maybe { key, row }| {
            let read = row.map_err(StoreError::Other).and_then(stored);
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
        // An array: Postgres may join the table with a subquery, and read all of it for that. Both columns are
        // the key of their table, whatever its layout.
        let sql = self.either(
            "DELETE FROM user_actions WHERE number IN (SELECT number FROM user_actions \
             WHERE timestamp < $1 ORDER BY timestamp LIMIT $2) RETURNING 1",
            "DELETE FROM user_actions WHERE id = ANY (ARRAY(SELECT id FROM user_actions \
             WHERE timestamp < $1::timestamptz ORDER BY timestamp LIMIT $2)) RETURNING 1",
        );
        let before = format!("{before:.6}");
        let gone: Vec<i32> =
            statement!(self, AuditChanges, Delete, query_scalar(sql, &before, at_most), fetch_all)?;
        Ok(gone.len())
    }

    /// Whether `id` is the integer key. SQLite's tables are never found otherwise.
    fn is_numbered(&self) -> bool {
        match &self.database {
            Database::Sqlite(_) => true,
            Database::Postgres(postgres) => postgres.is_numbered(),
        }
    }

    /// The column of the UUID.
    fn uid(&self) -> &'static str {
        if self.is_numbered() { "uid" } else { "id" }
    }

    /// Selects a [`Row`].
    fn select(&self) -> String {
        let keys = match (&self.database, self.is_numbered()) {
            (Database::Sqlite(_), _) => return SELECT_SQLITE.to_owned(),
            (Database::Postgres(_), true) => "id, uid::text",
            // The second cast fails as soon as `id` is the integer.
            (Database::Postgres(_), false) => "NULL::bigint, id::uuid::text",
        };
        format!("SELECT {keys}, {SELECTED_POSTGRES}")
    }

    /// Whether a statement failed because the trail's rows have been numbered since its text was made: then it
    /// is to be run once more.
    async fn is_numbered_since<T>(&self, result: &Result<T, StoreError>) -> bool {
        match (&self.database, result) {
            (Database::Postgres(postgres), Err(StoreError::Other(error))) => {
                postgres.is_numbered_since(error).await
            }
            _ => false,
        }
    }

    /// A statement with the conditions of a filter as `$1` to `$7`, and the place after which a page begins
    /// as `$10` and `$11`.
    fn matching(
        &self,
        filter: &ActionFilter,
        after_place: bool,
        head: &str,
        tail: &str,
    ) -> AssertSqlSafe<String> {
        let place = self.either("($10, $11)", "($10::timestamptz, $11::uuid)");
        let after = format!("(timestamp, {}) < {place}", self.uid());
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
            (after_place, &*after),
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
                .bind(row.uid.to_string())
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

#[cfg(test)]
mod tests;
