//! The databases that a mode measures: SQLite always, Postgres where there is one.

use crate::postgres::Cluster;

#[derive(clap::Args)]
pub(crate) struct DatabaseOption {
    /// An empty database of Postgres [default: a private one, if initdb and pg_ctl are found]
    #[arg(long, value_name = "URL")]
    postgres: Option<String>,
}

/// A database as a server is told of it.
pub(crate) struct Database {
    pub(crate) name: &'static str,
    /// `DATABASE_URL`; empty is a file in the server's folder.
    pub(crate) url: String,
}

pub(crate) struct Databases {
    pub(crate) all: Vec<Database>,
    /// Which Postgres it is, or why there is none.
    pub(crate) postgres: String,
    /// Held to be dropped.
    _cluster: Option<Cluster>,
}

impl DatabaseOption {
    /// Finds them. A private Postgres runs on the cores of this process, which is best not pinned yet.
    pub(crate) fn databases(&self) -> Databases {
        let sqlite = Database { name: "SQLite", url: String::new() };
        let postgres = |url: &str| Database { name: "Postgres", url: url.to_owned() };
        if let Some(url) = &self.postgres {
            let all = vec![sqlite, postgres(url)];
            return Databases { all, postgres: "as given".to_owned(), _cluster: None };
        }
        match Cluster::start() {
            Ok(cluster) => Databases {
                all: vec![sqlite, postgres(&cluster.url)],
                postgres: format!("{}, on any core, its settings as they come", cluster.version),
                _cluster: Some(cluster),
            },
            Err(error) => {
                let why = format!("left out: {error:#}");
                eprintln!("Postgres is {why}");
                Databases { all: vec![sqlite], postgres: why, _cluster: None }
            }
        }
    }
}
