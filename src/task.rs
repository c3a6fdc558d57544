//! Work that an actor owns: it ends with the actor, and the actor with it.

use ractor::{ActorRef, Message};
use tokio_util::task::AbortOnDropHandle;

/// Ends with what holds it.
pub(crate) type Task = AbortOnDropHandle<()>;

/// Stops the actor when its task ends, which a panic does too.
struct StopOnDrop<M: Message>(ActorRef<M>);

impl<M: Message> Drop for StopOnDrop<M> {
    fn drop(&mut self) {
        self.0.stop(None);
    }
}

/// Starts work that is to last as long as its owner, whose supervisor starts both again.
pub(crate) fn owned<M: Message>(
    owner: &ActorRef<M>,
    work: impl Future<Output = ()> + Send + 'static,
) -> Task {
    let stop = StopOnDrop(owner.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        work.await;
        drop(stop);
    }))
}
