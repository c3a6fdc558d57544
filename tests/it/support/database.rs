//! Tests that run on each database: a test is a function of a [`Database`], and stands in `on_both!`.

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
