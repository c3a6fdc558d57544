//! Rows of what servers and operators do without a request: starts and stops, migrations, exports,
//! retention, erasures. No client stands behind them, so they are neither counted nor summed up.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Audit, Cause, Entry, Event, Recorded, redact};
use crate::{
    auth::Remote,
    machine,
    metrics::AuditOutcome,
    store::{Schema, Store, StoreError},
};

/// Time for the database to take the rows of a start, before they go to the queue.
const START_PATIENCE: Duration = Duration::from_secs(2);

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    Start,
    Stop,
    Migrate,
    Export,
    Retention,
    Erase,
}

impl Deed {
    fn action(self) -> &'static str {
        match self {
            Self::Start => "SERVER:START",
            Self::Stop => "SERVER:STOP",
            Self::Migrate => "SERVER:MIGRATE",
            Self::Export => "AUDIT:EXPORT",
            Self::Retention => "AUDIT:RETENTION",
            Self::Erase => "AUDIT:ERASE",
        }
    }
}

impl Event {
    /// A server does something, by itself; `node` is the resource.
    pub(crate) fn of_node(node: &str, deed: Deed, outcome: AuditOutcome, data: &Value) -> Self {
        let nobody = Remote {
            address: Ipv4Addr::UNSPECIFIED.into(),
            user_agent: None,
            correlation: "".into(),
            trace: None,
        };
        Self {
            user: None,
            claimed: None,
            remote: Arc::new(nobody),
            req_id: None,
            action: deed.action().into(),
            resource: node.into(),
            route: deed.action().into(),
            outcome,
            data: Some(Recorded::own(data.clone())),
            status: 0,
            error: None,
            took: None,
            cause: Cause::Server,
        }
    }

    /// An operator does something on the command line of this host.
    fn of_operator(deed: Deed, mut data: Value) -> Self {
        // Who asked `sudo` is told by the environment alone, which the operator can set.
        if let Ok(user) = std::env::var("SUDO_USER") {
            data["sudo_user"] = json!(user);
        }
        Self {
            claimed: Some(machine::user()),
            ..Self::of_node(&machine::host(), deed, AuditOutcome::Success, &data)
        }
    }
}

/// What a migration did, where there was something to do.
fn migrated(schema: &Schema) -> Option<Value> {
    schema.is_old().then(
        || json!({ "from": schema.has(), "to": schema.needs(), "migrations": schema.pending() }),
    )
}

/// Leaves the row of an operator's command. Commands have no queue and no spool: what cannot be written is
/// for the caller to tell. Returns its id.
pub(crate) async fn leave(store: &Store, deed: Deed, data: Value) -> Result<Uuid, StoreError> {
    let entry = Entry::new(Event::of_operator(deed, data), None);
    store.insert_actions(vec![redact::row(&entry)], 1).await?;
    Ok(entry.id)
}

/// Leaves the row of the migrations that a command ran, if it ran any.
pub(crate) async fn leave_migrated(store: &Store, schema: &Schema) -> Result<(), StoreError> {
    match migrated(schema) {
        Some(data) => leave(store, Deed::Migrate, data).await.map(drop),
        None => Ok(()),
    }
}

impl Audit {
    /// Records that a server starts, and the migrations it ran. Straight into the database: a process that
    /// is killed a moment later has been there too.
    pub(crate) async fn started(self: &Arc<Self>, store: &Store, node: &str) {
        if !self.is_on() {
            return;
        }
        let event = |deed, data: &Value| Event::of_node(node, deed, AuditOutcome::Success, data);
        let start = json!({ "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id() });
        let migrate = migrated(store.found()).map(|data| event(Deed::Migrate, &data));
        let events = migrate.into_iter().chain([event(Deed::Start, &start)]);
        let entries: Vec<_> = events.map(|event| Entry::new(event, None)).collect();
        let rows: Vec<_> = entries.iter().map(|entry| redact::row(entry)).collect();
        let count = rows.len();
        let written = timeout(START_PATIENCE, store.insert_actions(rows, count)).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::warn!("the database does not take the audit rows of the start, which wait");
            for entry in entries {
                self.enter_own(entry);
            }
        }
        if let Some(later) = store.migrated_later() {
            let (audit, node) = (Arc::clone(self), node.to_owned());
            tokio::spawn(async move {
                // An error: the server ends before.
                if let Some(data) = later.await.ok().as_ref().and_then(migrated) {
                    let outcome = AuditOutcome::Success;
                    audit.record(Event::of_node(&node, Deed::Migrate, outcome, &data));
                }
            });
        }
    }

    /// Records that a server stops, in order or because its actors kept failing.
    pub(crate) fn stopped(&self, node: &str, in_order: bool, uptime: Duration) {
        let (outcome, cause) = match in_order {
            true => (AuditOutcome::Success, "told to"),
            false => (AuditOutcome::Error, "the actors keep failing"),
        };
        let data = json!({ "uptime_s": uptime.as_secs(), "cause": cause });
        self.record(Event::of_node(node, Deed::Stop, outcome, &data));
    }
}
