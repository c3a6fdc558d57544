//! `switchboard migrate`: brings the schema up to date, and leaves a row in the audit trail that says so.

use crate::{
    audit,
    config::{Config, StoreConfig},
    metrics::Metrics,
    store::{self, OpenError, Progress, Schema, Store},
};

/// Why a database is not migrated, or not on record.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Names that were to be folded anew.
    #[error("cannot fold the names of authors anew: {0}")]
    Names(Box<dyn std::error::Error + Send + Sync>),
    /// The row, after migrations were run.
    #[error(
        "the migrations {ran:?} were run, but the audit trail does not take their row: {error}"
    )]
    Unrecorded {
        /// Their versions.
        ran: Vec<String>,
        /// The cause.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// How a database was found, and what was done beside its migrations.
#[derive(Debug)]
pub struct Migrated {
    /// As it was.
    pub schema: Schema,
    /// Names of authors that were folded anew for searches.
    pub names: usize,
}

/// Brings a database up to date, whatever `DB_AUTO_MIGRATE` is: its schema, and what is derived in its rows. A
/// long audit trail takes minutes; `tell` hears how far it is.
pub async fn migrate(
    config: &Config,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Migrated, MigrateError> {
    let schema = store::migrate(&config.store, tell).await?;
    let metrics = Metrics::new(&[], config.environment.as_str());
    let as_it_is = StoreConfig { auto_migrate: false, ..config.store.clone() };
    let store = Store::open(&as_it_is, metrics.db, None).await?;
    let done = derive(&store, schema, config.audit.enabled).await;
    store.close().await;
    done
}

/// What follows once the schema is there.
async fn derive(store: &Store, schema: Schema, audited: bool) -> Result<Migrated, MigrateError> {
    let names = store.fold_names().await.map_err(|error| MigrateError::Names(error.into()))?;
    if audited {
        let left = audit::leave_migrated(store, &schema).await;
        left.map_err(|error| MigrateError::Unrecorded {
            ran: schema.pending(),
            error: error.into(),
        })?;
    }
    Ok(Migrated { schema, names })
}
