//! Tests that run on each database: a test is a function of a [`Database`], and stands in `on_both!`.

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row, SqliteConnection};
use switchboard::config::{Config, DatabasePlace};
use tempfile::TempDir;

use super::{TestServer, postgres};

/// Which database a test runs on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Database {
    Sqlite,
    Postgres,
}

impl Database {
    /// Starts a server on an empty database.
    pub(crate) async fn server(self, settings: &[(&str, &str)]) -> TestServer {
        let url = match self {
            Self::Sqlite => return TestServer::start(settings).await,
            Self::Postgres => postgres::database().await,
        };
        TestServer::start(&[settings, &[("DATABASE_URL", &url)]].concat()).await
    }

    /// An empty database that the test itself looks into.
    pub(crate) async fn place(self) -> Place {
        let data = TempDir::new().unwrap();
        let url = match self {
            Self::Sqlite => format!("sqlite://{}", data.path().join("switchboard.db").display()),
            Self::Postgres => postgres::database().await,
        };
        Place { url, data }
    }
}

/// A database, and a data folder for the process that uses it.
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) data: TempDir,
}

impl Place {
    /// `DATABASE_URL` and `DATA_DIR`.
    pub(crate) fn settings(&self) -> [(&str, &str); 2] {
        [("DATABASE_URL", &self.url), ("DATA_DIR", self.data.path().to_str().unwrap())]
    }

    /// Starts a server on it.
    pub(crate) async fn server(&self, settings: &[(&str, &str)]) -> TestServer {
        TestServer::start(&[&self.settings(), settings].concat()).await
    }

    /// Where it is, for a look past the server.
    pub(crate) fn place(&self) -> DatabasePlace {
        let config = Config::read(|name| (name == "DATABASE_URL").then(|| self.url.clone()));
        config.unwrap().store.place
    }

    fn is_postgres(&self) -> bool {
        self.url.starts_with("postgres")
    }

    /// Runs statements; returns the first column of the last one's rows, as texts.
    pub(crate) async fn execute(&self, sql: &str) -> Vec<String> {
        let sql = AssertSqlSafe(sql.to_owned());
        if self.is_postgres() {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            let rows = connection.fetch_all(sqlx::raw_sql(sql)).await.unwrap();
            return rows.iter().map(|row| row.try_get(0).unwrap_or_default()).collect();
        }
        let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
        let rows = connection.fetch_all(sqlx::raw_sql(sql)).await.unwrap();
        // `EXPLAIN QUERY PLAN` tells in its fourth column.
        let column = |row: &sqlx::sqlite::SqliteRow| if row.len() == 4 { 3 } else { 0 };
        rows.iter().map(|row| row.try_get(column(row)).unwrap_or_default()).collect()
    }

    /// Whether the audit trail has its integer key.
    pub(crate) async fn is_numbered(&self) -> bool {
        let sql = if self.is_postgres() {
            "SELECT attname::text FROM pg_attribute
             WHERE attrelid = 'user_actions'::regclass AND attname = 'uid'"
        } else {
            "SELECT name FROM pragma_table_info('user_actions') WHERE name = 'uid'"
        };
        !self.execute(sql).await.is_empty()
    }

    /// Adds rows to the audit trail, as objects with the columns that matter; the others are made up.
    pub(crate) async fn audit(&self, rows: &[Value]) {
        let rows: Vec<Value> = rows.iter().enumerate().map(|(i, row)| filled(i, row)).collect();
        let rows = json!(rows).to_string();
        let names = ACTION.map(|(name, _)| name).join(", ");
        // In a table of the previous release, the UUID is called `id`.
        let columns = if self.is_numbered().await { names } else { names.replacen("uid", "id", 1) };
        let rows =
            if columns.starts_with("uid") { rows } else { rows.replace("\"uid\":", "\"id\":") };
        if self.is_postgres() {
            let sql = format!(
                "INSERT INTO user_actions ({columns})
                 SELECT {columns} FROM pg_catalog.json_populate_recordset(NULL::user_actions, $1::json)"
            );
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            sqlx::query(AssertSqlSafe(sql)).bind(rows).execute(&mut connection).await.unwrap();
            return;
        }
        let values = columns.split(", ").map(|name| match name {
            // A text of JSON stays one.
            "request_data" => "nullif(value -> 'request_data', 'null')".to_owned(),
            name => format!("value ->> '{name}'"),
        });
        let values = values.collect::<Vec<_>>().join(", ");
        let sql =
            format!("INSERT INTO user_actions ({columns}) SELECT {values} FROM json_each($1)");
        let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
        sqlx::query(AssertSqlSafe(sql)).bind(rows).execute(&mut connection).await.unwrap();
    }
}

/// The columns of the audit trail, and what stands there unless a test says otherwise.
const ACTION: [(&str, &str); 15] = [
    ("uid", ""),
    ("timestamp", ""),
    ("user_id", r#""7a1f""#),
    ("username", r#""ann""#),
    ("user_roles", r#"["admin","get-authors"]"#),
    ("action_type", r#""POST""#),
    ("resource", r#""/authors""#),
    ("outcome", r#""success""#),
    ("ip_address", r#""192.0.2.7""#),
    ("user_agent", r#""curl/8""#),
    ("request_id", r#""c0ffee""#),
    ("request_data", r#"{"name":"Ann"}"#),
    ("response_status", "201"),
    ("error_message", "null"),
    ("duration_ms", "1.25"),
];

/// Row number `i` with a column for each; without a time, it is of so many seconds after midnight.
fn filled(i: usize, row: &Value) -> Value {
    let mut all = serde_json::Map::new();
    for (name, value) in ACTION {
        let value = match name {
            "uid" => json!(uuid::Uuid::from_u128(i as u128)),
            "timestamp" => {
                json!(format!(
                    "2026-11-22T{:02}:{:02}:{:02}.000000Z",
                    i / 3600,
                    i / 60 % 60,
                    i % 60
                ))
            }
            _ => serde_json::from_str(value).unwrap(),
        };
        all.insert(name.to_owned(), row.get(name).cloned().unwrap_or(value));
    }
    Value::Object(all)
}

/// Makes two tests of each function. One that is not listed is dead code, which does not compile.
macro_rules! on_both {
    ($($test:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$test($crate::support::Database::Sqlite).await;
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $test() {
                super::$test($crate::support::Database::Postgres).await;
            })+
        }
    };
}
pub(crate) use on_both;
