//! The audit trail: table `user_actions`.
//!
//! Rows travel as JSON, one text for a whole batch: the same text that the spool keeps. A row that is
//! there already is passed over, so that writing a batch twice does no harm.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{Store, StoreError, statement};

/// Somebody did something, or was kept from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Action {
    /// Made where it happened; version 7, so that ids sort as times.
    pub id: Uuid,
    /// When: RFC 3339 in UTC with six decimals, so that texts sort as times.
    pub timestamp: String,
    /// The token's `sub`; none without a valid token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// The user's roles at that time.
    pub user_roles: Vec<String>,
    /// A method of HTTP, or `WS:` and the name of a package or an event.
    pub action_type: String,
    /// A path, or the name of a package.
    pub resource: String,
    /// `success`, `error` or `permission_denied`.
    pub outcome: String,
    /// Of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_address: Option<String>,
    /// As the client says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<String>,
    /// The correlation id, or the `req_id` of a message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// What was asked, without secrets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_data: Option<Box<RawValue>>,
    /// A status of HTTP or of the protocol, or a close code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_status: Option<i32>,
    /// What the client was told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
    /// Milliseconds until the answer was ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<f64>,
}

const INSERT_SQLITE: &str = "INSERT INTO user_actions SELECT \
    value ->> 'id', value ->> 'timestamp', value ->> 'user_id', value ->> 'username', \
    value -> 'user_roles', value ->> 'action_type', value ->> 'resource', value ->> 'outcome', \
    value ->> 'ip_address', value ->> 'user_agent', value ->> 'request_id', value -> 'request_data', \
    value ->> 'response_status', value ->> 'error_message', value ->> 'duration_ms' \
    FROM json_each($1) WHERE true ON CONFLICT (id) DO NOTHING RETURNING 1";

const INSERT_POSTGRES: &str = "INSERT INTO user_actions \
    SELECT * FROM json_populate_recordset(NULL::user_actions, $1::json) \
    ON CONFLICT (id) DO NOTHING RETURNING 1";

impl Store {
    /// Adds rows, given as a JSON array of [`Action`]s; returns how many were not there.
    pub(crate) async fn insert_actions(&self, rows: &str) -> Result<usize, StoreError> {
        let sql = self.either(INSERT_SQLITE, INSERT_POSTGRES);
        let added: Vec<i32> = statement!(self, Insert, query_scalar(sql, rows), fetch_all)?;
        Ok(added.len())
    }
}
