//! The roles that `docker/postgres/roles.sh` makes in a Postgres of the stack: each may do what its program
//! needs, and no more.

use std::fs;

use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::support::{TestServer, monitoring::queries, postgres::Cluster};

const SECRETS: [(&str, &str); 4] = [
    ("database_url", "postgres://switchboard:one@postgres/switchboard"),
    ("postgres_keycloak_password", "two"),
    ("postgres_grafana_password", "three"),
    ("postgres_monitor_password", "four"),
];

/// A cluster whose superuser is `postgres`, as that of the image, after its first start.
async fn set_up() -> Cluster {
    let cluster = block_in_place(Cluster::start);
    execute(&cluster.url("postgres"), "CREATE ROLE postgres SUPERUSER LOGIN").await;
    let rename = "ALTER ROLE switchboard RENAME TO nobody";
    execute(&as_role(&cluster, "postgres", "postgres"), rename).await;
    let secrets = TempDir::new().unwrap();
    for (name, text) in SECRETS {
        fs::write(secrets.path().join(name), text).unwrap();
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/docker/postgres/roles.sh");
    let script = fs::read_to_string(script).unwrap();
    let script = script.replace("/run/secrets", secrets.path().to_str().unwrap());
    block_in_place(|| cluster.first_start("postgres", &script));
    cluster
}

fn as_role(cluster: &Cluster, role: &str, database: &str) -> String {
    cluster.url(database).replace("switchboard@", &format!("{role}@"))
}

async fn execute(url: &str, sql: &'static str) {
    PgConnection::connect(url).await.unwrap().execute(sql).await.unwrap();
}

/// The code of Postgres' refusal.
async fn refused(connection: &mut PgConnection, sql: &'static str) -> String {
    let error = connection.execute(sql).await.expect_err(sql);
    error.as_database_error().and_then(|error| error.code()).expect(sql).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn grafana_reads_the_audit_trail_that_is_made_later_and_nothing_else() {
    let cluster = set_up().await;
    let server =
        TestServer::start(&[("DATABASE_URL", &as_role(&cluster, "switchboard", "switchboard"))])
            .await;
    let mut client = server.client("ann").await;
    client.call(3, serde_json::json!({ "name": "Ann" })).await;
    server.stop().await.unwrap();

    let grafana = as_role(&cluster, "grafana", "switchboard");
    let mut grafana = PgConnection::connect(&grafana).await.unwrap();
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM user_actions")
        .fetch_one(&mut grafana)
        .await
        .unwrap();
    assert_eq!(rows, 1);
    for query in queries().iter().filter(|query| query.source == "postgres") {
        let asked = grafana.execute(sqlx::AssertSqlSafe(query.text.clone())).await;
        asked.unwrap_or_else(|error| panic!("{error}: {query:?}"));
    }
    for sql in [
        "SELECT FROM author",
        "SELECT FROM _switchboard_migrations",
        "DELETE FROM user_actions",
        "UPDATE user_actions SET outcome = 'success'",
        "INSERT INTO user_actions SELECT * FROM user_actions",
        "CREATE TABLE more (id INT)",
        "SELECT FROM pg_authid",
    ] {
        assert_eq!(refused(&mut grafana, sql).await, "42501", "{sql}");
    }
    for (role, database) in
        [("grafana", "keycloak"), ("switchboard", "keycloak"), ("keycloak", "switchboard")]
    {
        let url = as_role(&cluster, role, database);
        assert!(PgConnection::connect(&url).await.is_err(), "{role} is let into {database}");
    }
}
