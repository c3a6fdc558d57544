//! The schema: brought up to date by `serve` or by `migrate`, refused when old, served when newer.

use reqwest::Method;
use serde_json::json;

use crate::{
    doctor::{doctor, entry, healthy, names},
    support::{
        Database,
        database::Place,
        on_both,
        process::{Process, Ran, finish, run, switchboard, token},
        rest::add_author,
    },
};

const BY_HAND: (&str, &str) = ("DB_AUTO_MIGRATE", "false");
/// What a newer program's migration leaves behind: its row, and columns that this one does not know.
const NEWER: &str = "INSERT INTO _switchboard_migrations
        (version, description, success, checksum, execution_time) VALUES (9999, 'later', true, '', 0);
    INSERT INTO _authors_migrations
        (version, description, success, checksum, execution_time) VALUES (8888, 'later', true, '', 0);
    ALTER TABLE author ADD COLUMN born INTEGER;
    ALTER TABLE user_actions ADD COLUMN tenant TEXT";
/// As a program left it that knew no audit trail.
async fn make_old(place: &Place) {
    // With what depends on it.
    let cascade = if place.url.starts_with("postgres") { "CASCADE" } else { "" };
    let sql = format!(
        "DROP TABLE revocations; DROP TABLE user_actions {cascade}; DELETE FROM _switchboard_migrations"
    );
    place.execute(&sql).await;
}

fn migrate(place: &Place) -> Ran {
    run(&["migrate"], &place.settings())
}

/// Starts a server that must not migrate, and adds an author.
async fn serves(place: &Place) -> Ran {
    let data = place.data.path();
    let process = Process::start(data, &[("DATABASE_URL", &place.url), BY_HAND]);
    let create = reqwest::Client::new()
        .request(Method::POST, format!("http://{}/authors", process.addr))
        .bearer_auth(token(data, &["--user", "ann"]))
        .json(&json!({ "name": "Ann" }));
    assert_eq!(create.send().await.unwrap().status(), 201);
    process.signal("-TERM");
    process.end()
}

fn refuses(place: &Place, words: &[&str]) {
    let settings = [("DATABASE_URL", &*place.url), BY_HAND];
    let ran = finish(Process::spawn(place.data.path(), &settings));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    for word in words {
        assert_eq!(ran.stderr.matches(word).count(), 1, "{word} in {ran:?}");
    }
}

async fn serve_refuses_an_old_schema_until_it_is_migrated_by_hand(database: Database) {
    let place = database.place().await;
    let how = "run `switchboard migrate`";
    let file = place.data.path().join("switchboard.db");
    let absent = format!("{} does not exist", file.display());
    match database {
        Database::Sqlite => refuses(&place, &[&absent, how]),
        Database::Postgres => {
            let versions = ["schema versions server 0, authors 0", "needs server 3, authors 2"];
            refuses(&place, &[&versions[..], &[how]].concat());
        }
    }
    assert!(!file.exists(), "nothing was made");
    let ran = migrate(&place);
    assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
    assert_eq!(
        ran.stdout,
        "server migration 1 was run\nserver migration 2 was run\nserver migration 3 was run\nauthors migration 1 was run\nauthors migration 2 was run\n"
    );

    make_old(&place).await;
    refuses(&place, &["schema versions server 0, authors 2", "needs server 3, authors 2", how]);
    assert_eq!(
        migrate(&place).stdout,
        "server migration 1 was run\nserver migration 2 was run\nserver migration 3 was run\n"
    );
    let ran = migrate(&place);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let nothing = "nothing to do: the schema versions are server 3, authors 2";
    assert!(ran.stdout.starts_with(nothing), "{ran:?}");
    serves(&place).await;
}

async fn serve_migrates_by_itself_unless_it_is_told_not_to(database: Database) {
    let place = database.place().await;
    assert_eq!(migrate(&place).code, Some(0));
    make_old(&place).await;
    let server = place.server(&[]).await;
    add_author(&server, "Ann").await;
    let versions =
        place.execute("SELECT CAST(count(*) AS TEXT) FROM _switchboard_migrations").await;
    assert_eq!(versions, ["3"]);
}

async fn a_schema_of_a_newer_program_is_served_with_a_warning(database: Database) {
    let place = database.place().await;
    migrate(&place);
    place.execute(NEWER).await;
    let ran = serves(&place).await;
    let warning = ran.stdout.lines().find(|line| line.contains("the schema is that of a newer"));
    let warning: serde_json::Value = serde_json::from_str(warning.unwrap()).unwrap();
    assert_eq!(
        (&warning["level"], &warning["has"], &warning["needs"]),
        (&json!("WARN"), &json!("server 9999, authors 8888"), &json!("server 3, authors 2"))
    );

    // And by one that may migrate.
    place.audit(&[json!({})]).await;
    let server = place.server(&[("AUDIT_ENABLED", "false")]).await;
    add_author(&server, "Bea").await;
    let page = server.rest(Method::GET, "/audit-logs?action_type=POST").send().await.unwrap();
    // That of `serves`, and the one from before.
    assert_eq!(page.json::<serde_json::Value>().await.unwrap()["meta"]["total"], 2);
    let ran = migrate(&place);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stdout.contains("nothing to do: the schema versions are server 9999, authors 8888"),
        "{ran:?}"
    );
}

async fn processes_that_migrate_at_once_run_each_migration_once(database: Database) {
    let place = database.place().await;
    let started: Vec<_> =
        (0..4).map(|_| switchboard(&["migrate"], &place.settings()).spawn().unwrap()).collect();
    let mut all = String::new();
    for ran in started.into_iter().map(finish) {
        assert_eq!((ran.code, &*ran.stderr), (Some(0), ""), "{ran:?}");
        all += &ran.stdout;
    }
    for migration in [
        "server migration 1",
        "server migration 2",
        "server migration 3",
        "authors migration 1",
        "authors migration 2",
    ] {
        assert_eq!(all.matches(&format!("{migration} was run")).count(), 1, "{all}");
    }
    serves(&place).await;
}

async fn a_migration_that_was_changed_is_refused(database: Database) {
    let place = database.place().await;
    migrate(&place);
    place.execute("UPDATE _switchboard_migrations SET checksum = ''").await;
    refuses(&place, &["server migration 1 is not the one of this program"]);
}

async fn the_doctor_says_what_the_next_start_makes_of_the_schema(database: Database) {
    let place = database.place().await;
    let look = |settings: &[(&str, &str)]| {
        doctor(&[&[("DATABASE_URL", &*place.url)], settings].concat(), &[])
    };
    names(&look(&[BY_HAND]), "database", &["DB_AUTO_MIGRATE is false", "switchboard migrate"]);
    healthy(&look(&[]), &["ok database"]);
    migrate(&place);
    healthy(&look(&[BY_HAND]), &["ok database"]);
    make_old(&place).await;
    let ran = look(&[BY_HAND]);
    names(&ran, "database", &["server 3, authors 2 are needed", "switchboard migrate"]);
    assert!(entry(&look(&[]), "ok database").contains("server 0, authors 2, and will be server 3"));
    migrate(&place);
    place.execute(NEWER).await;
    let ran = look(&[BY_HAND]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        entry(&ran, "warning database")
            .contains("9999, authors 8888, newer than this program's server 3")
    );
}

on_both![
    serve_refuses_an_old_schema_until_it_is_migrated_by_hand,
    serve_migrates_by_itself_unless_it_is_told_not_to,
    a_schema_of_a_newer_program_is_served_with_a_warning,
    processes_that_migrate_at_once_run_each_migration_once,
    a_migration_that_was_changed_is_refused,
    the_doctor_says_what_the_next_start_makes_of_the_schema,
];

#[tokio::test]
async fn a_user_of_postgres_that_may_not_change_the_schema_serves_a_migrated_one() {
    let mut place = Database::Postgres.place().await;
    migrate(&place);
    place
        .execute(
            "CREATE ROLE humble LOGIN; GRANT SELECT ON _switchboard_migrations, _authors_migrations TO humble;
             GRANT SELECT, INSERT, UPDATE, DELETE ON author, user_actions, revocations TO humble",
        )
        .await;
    place.url = place.url.replace("switchboard@", "humble@");
    serves(&place).await;
    let ran = doctor(&[("DATABASE_URL", &place.url)], &[]);
    healthy(&ran, &["ok database"]);
    let ran = migrate(&place);
    assert!(ran.stdout.starts_with("nothing to do"), "{ran:?}");
}
