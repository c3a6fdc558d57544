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

/// Brings the schema up to date, whatever `DB_AUTO_MIGRATE` is; returns how it was. A long audit trail takes
/// minutes; `tell` hears how far it is.
pub async fn migrate(
    config: &Config,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Schema, MigrateError> {
    let schema = store::migrate(&config.store, tell).await?;
    if !schema.is_old() || !config.audit.enabled {
        return Ok(schema);
    }
    let metrics = Metrics::new(&[], config.environment.as_str());
    let as_it_is = StoreConfig { auto_migrate: false, ..config.store.clone() };
    let store = Store::open(&as_it_is, metrics.db, None).await?;
    let left = audit::leave_migrated(&store, &schema).await;
    store.close().await;
    match left {
        Ok(()) => Ok(schema),
        Err(error) => Err(MigrateError::Unrecorded { ran: schema.pending(), error: error.into() }),
    }
}
