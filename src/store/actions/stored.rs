//! An action as it is read from the trail: with the key that the database gave it.

use std::sync::Arc;

use serde::{Serialize, Serializer, ser::SerializeStruct as _};
use serde_json::value::RawValue;

use super::{Action, StoreError};

/// A row of the trail.
#[derive(Debug, Clone)]
pub struct StoredAction {
    /// Made by the database. None while the rows of a trail from the previous release are being numbered.
    pub id: Option<i64>,
    /// What happened.
    pub action: Action,
}

impl StoredAction {
    /// The names of the columns, in their order.
    pub const COLUMNS: [&str; 16] = [
        "id",
        "uid",
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

impl Serialize for StoredAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { id, action } = self;
        let mut item = serializer.serialize_struct("StoredAction", Self::COLUMNS.len())?;
        item.serialize_field("id", id)?;
        item.serialize_field("uid", &action.uid)?;
        item.serialize_field("timestamp", &action.timestamp)?;
        item.serialize_field("user_id", &action.user_id)?;
        item.serialize_field("username", &action.username)?;
        item.serialize_field("user_roles", &action.user_roles)?;
        item.serialize_field("action_type", &action.action_type)?;
        item.serialize_field("resource", &action.resource)?;
        item.serialize_field("outcome", &action.outcome)?;
        item.serialize_field("ip_address", &action.ip_address)?;
        item.serialize_field("user_agent", &action.user_agent)?;
        item.serialize_field("request_id", &action.request_id)?;
        item.serialize_field("request_data", &action.request_data)?;
        item.serialize_field("response_status", &action.response_status)?;
        item.serialize_field("error_message", &action.error_message)?;
        item.serialize_field("duration_ms", &action.duration_ms)?;
        item.end()
    }
}

/// A row as both databases give it: [`StoredAction::COLUMNS`].
pub(super) type Row = (
    Option<i64>,
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

/// Reads a row; one that cannot be read was written by somebody else.
pub(super) fn stored(row: Row) -> Result<StoredAction, StoreError> {
    let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| {
        StoreError::Other(sqlx::Error::Decode(error))
    };
    let action = Action {
        uid: row.1.parse().map_err(|error: uuid::Error| unreadable(error.into()))?,
        timestamp: row.2.into(),
        user_id: row.3.map(Arc::from),
        username: row.4.map(Arc::from),
        user_roles: serde_json::from_str(&row.5).map_err(|error| unreadable(error.into()))?,
        action_type: row.6.into(),
        resource: row.7.into(),
        outcome: row.8.into(),
        ip_address: row.9.map(Arc::from),
        user_agent: row.10.map(Arc::from),
        request_id: row.11.map(Arc::from),
        request_data: row
            .12
            .map(RawValue::from_string)
            .transpose()
            .map_err(|error| unreadable(error.into()))?,
        response_status: row.13,
        error_message: row.14.map(Arc::from),
        duration_ms: row.15,
    };
    Ok(StoredAction { id: row.0, action })
}
