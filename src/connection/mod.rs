//! One connection: an actor for control, and one I/O task ([`session`]) that is the whole data path.
//!
//! The registry spawns the actor and supervises it. The actor owns the task: when the actor ends, for
//! whatever cause, the task is told to close; when the task ends, the actor stops, and the registry
//! cleans up.

mod frames;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod handshake;
pub(crate) mod pace;
mod session;
pub(crate) mod socket;

use std::sync::Arc;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    audit::Audit,
    auth::{Identity, Validator},
    cluster::Lease,
    config::WsConfig,
    hub::{Command, Outbox},
    limits::{Limits, MessageBudget},
    metrics::Metrics,
    protocol::CloseReason,
    router::Router,
    traces::Traces,
};
use session::Session;
use socket::Socket;

/// What every connection works with.
pub(crate) struct Shared {
    pub(crate) config: WsConfig,
    /// Cancelled when the server drains: from then on nobody is admitted, whichever registry is asked.
    pub(crate) draining: CancellationToken,
    /// How long open requests may take after a drain was announced.
    pub(crate) drain_timeout: std::time::Duration,
    pub(crate) router: Arc<Router>,
    /// Checks the tokens of refreshes.
    pub(crate) validator: Arc<Validator>,
    /// Says whether a token may be looked at.
    pub(crate) limits: Arc<Limits>,
    pub(crate) audit: Arc<Audit>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) traces: Option<Arc<Traces>>,
    /// The I/O tasks of all connections, for a shutdown to wait for.
    pub(crate) tasks: TaskTracker,
}

/// An authenticated socket.
pub(crate) struct Admission {
    pub(crate) socket: Socket,
    pub(crate) identity: Arc<Identity>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) budget: Arc<MessageBudget>,
    /// For the registry to keep; none where the node is alone.
    pub(crate) lease: Option<Lease>,
}

/// The actor of a connection. Its messages are commands for the session; data never passes it.
pub(crate) struct Connection {
    pub(crate) shared: Arc<Shared>,
}

/// Ends the session when the actor ends.
pub(crate) struct Owned(Arc<Outbox>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.command(Command::Close(CloseReason::InternalError));
    }
}

/// Stops the actor when the I/O task ends, also by a panic.
struct StopOnDrop(ActorRef<Command>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop(None);
    }
}

impl Actor for Connection {
    type Msg = Command;
    type State = Owned;
    type Arguments = Box<Admission>;

    async fn pre_start(
        &self,
        myself: ActorRef<Command>,
        admission: Box<Admission>,
    ) -> Result<Owned, ActorProcessingErr> {
        let owned = Owned(Arc::clone(&admission.outbox));
        // Boxed: moved into the task by value it would lie in there twice.
        let session = Box::new(Session::new(*admission, Arc::clone(&self.shared)));
        self.shared.tasks.spawn(session.run(StopOnDrop(myself)));
        Ok(owned)
    }

    async fn handle(
        &self,
        _: ActorRef<Command>,
        command: Command,
        owned: &mut Owned,
    ) -> Result<(), ActorProcessingErr> {
        owned.0.command(command);
        Ok(())
    }
}
