//! The audit trail as a dashboard reads it: out of the database, past the server.

use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::{Connection, PgConnection, SqliteConnection};
use switchboard::config::DatabasePlace;

use super::TestServer;

/// One row a line of JSON, oldest first.
const SQLITE: &str = "SELECT json_object('id', id, 'uid', uid, 'timestamp', timestamp, 'user_id', user_id, \
    'username', username, 'user_roles', json(user_roles), 'action_type', action_type, \
    'resource', resource, 'outcome', outcome, 'ip_address', ip_address, 'user_agent', user_agent, \
    'request_id', request_id, 'request_data', json(request_data), \
    'response_status', response_status, 'error_message', error_message, \
    'duration_ms', duration_ms) FROM user_actions ORDER BY id";
const POSTGRES: &str = "SELECT row_to_json(u)::text FROM user_actions u ORDER BY id";

/// The rows of clients: without those of servers and operators, which every start and stop leaves.
pub(crate) async fn rows(place: &DatabasePlace) -> Vec<Value> {
    let mut rows = all_rows(place).await;
    rows.retain(|row| !is_own(row));
    rows
}

/// The rows of servers and operators themselves.
pub(crate) async fn own_rows(place: &DatabasePlace) -> Vec<Value> {
    let mut rows = all_rows(place).await;
    rows.retain(is_own);
    rows
}

fn is_own(row: &Value) -> bool {
    let action = row["action_type"].as_str().unwrap();
    action.starts_with("SERVER:") || action.starts_with("AUDIT:")
}

/// Every row.
pub(crate) async fn all_rows(place: &DatabasePlace) -> Vec<Value> {
    let rows: Vec<String> = match place {
        DatabasePlace::Sqlite(file) => {
            let url = format!("sqlite://{}?mode=ro", file.display());
            let mut connection = SqliteConnection::connect(&url).await.unwrap();
            sqlx::query_scalar(SQLITE).fetch_all(&mut connection).await.unwrap()
        }
        DatabasePlace::Postgres(url) => {
            let mut connection = PgConnection::connect(url.expose()).await.unwrap();
            sqlx::query_scalar(POSTGRES).fetch_all(&mut connection).await.unwrap()
        }
    };
    rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect()
}

impl TestServer {
    /// Every row of clients in the trail, once there are `expected`.
    pub(crate) async fn audited(&self, expected: usize) -> Vec<Value> {
        let started = Instant::now();
        loop {
            let rows = rows(&self.database).await;
            let late = started.elapsed() > Duration::from_secs(10);
            if rows.len() >= expected || late {
                assert_eq!(rows.len(), expected, "{rows:#?}");
                return rows;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where its database is, for a look after its end.
    pub(crate) fn database(&self) -> DatabasePlace {
        self.database.clone()
    }

    /// Its data directory.
    pub(crate) fn data(&self) -> &std::path::Path {
        self.data.path()
    }
}
