//! The token in force on a connection: who asks, until when, and the check of the one that is to
//! replace it. The session asks for the caller of every request here.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::{
    auth::{Identity, Remote},
    connection::handshake::Refusal,
    handlers::Caller,
    protocol::CloseReason,
};

/// A longer life cannot be added to an `Instant` on every system.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// What became of a token that a client presented.
pub(super) type Checked = Result<Arc<Identity>, Refusal>;

/// The token in force, and at most one that is being checked.
pub(super) struct Credential {
    caller: Arc<Caller>,
    /// When the token expires, as the wall clock had it when it was last looked at: for timers, which know no other
    /// clock. The wall clock may step, and the machine may be suspended.
    expires: Instant,
    /// The client was told that this token expires soon.
    warned: bool,
    /// A task only where the check has to wait, for a key to be fetched. Ends with the connection.
    check: Option<AbortOnDropHandle<Checked>>,
}

impl Credential {
    pub(super) fn new(identity: Arc<Identity>, connection: Uuid, remote: Arc<Remote>) -> Self {
        Self {
            expires: expiry(&identity),
            caller: Arc::new(Caller { identity, connection: Some(connection), remote }),
            warned: false,
            check: None,
        }
    }

    /// Whom requests come from.
    pub(super) fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.caller.identity
    }

    /// When the token expires, as far as timers know.
    pub(super) fn expires(&self) -> Instant {
        self.expires
    }

    /// Compares the token's expiry with the wall clock.
    pub(super) fn look(&mut self) {
        self.expires = expiry(self.identity());
    }

    /// When there is something to do: the warning, or the end. The warning goes out `ahead` of expiry.
    pub(super) fn next_deadline(&self, ahead: Duration) -> Instant {
        if self.warned {
            return self.expires;
        }
        self.expires.checked_sub(ahead).unwrap_or_else(Instant::now)
    }

    /// The time left, if the client is to be told of it now: once for each token.
    pub(super) fn warn(&mut self, now: Instant, ahead: Duration) -> Option<Duration> {
        if self.warned || now + ahead < self.expires {
            return None;
        }
        self.warned = true;
        Some(self.expires.saturating_duration_since(now))
    }

    /// Whether a check is waiting.
    pub(super) fn is_checking(&self) -> bool {
        self.check.is_some()
    }

    /// Begins a check and returns its result, unless it has to wait: then it goes on in a task of its
    /// own and [`Credential::poll_checked`] has it later. Never polled by the session's task after
    /// that: a write that waits would hold up whatever the check holds.
    pub(super) fn check(
        &mut self,
        check: impl Future<Output = Checked> + Send + 'static,
    ) -> Option<Checked> {
        let mut check = Box::pin(check);
        let checked = check.as_mut().now_or_never();
        if checked.is_none() {
            self.check = Some(AbortOnDropHandle::new(tokio::spawn(check)));
        }
        checked
    }

    /// The result of a check that had to wait.
    pub(super) fn poll_checked(&mut self, context: &mut Context<'_>) -> Poll<Checked> {
        let Some(check) = &mut self.check else { return Poll::Pending };
        let checked = ready!(Pin::new(check).poll(context));
        self.check = None;
        // The panic hook has logged a panic.
        Poll::Ready(checked.unwrap_or_else(|_| Err(CloseReason::InternalError.into())))
    }

    /// Whether `identity` is the same user of the same issuer.
    pub(super) fn is_of(&self, identity: &Identity) -> bool {
        let current = self.identity();
        current.subject == identity.subject && current.issuer == identity.issuer
    }

    /// Puts a fresh token in force. Requests on their way keep the caller they came with.
    pub(super) fn replace(&mut self, identity: Arc<Identity>) {
        self.expires = expiry(&identity);
        self.warned = false;
        self.caller = Arc::new(Caller { identity, ..Caller::clone(&self.caller) });
    }
}

fn expiry(identity: &Identity) -> Instant {
    Instant::now() + identity.expires_in().min(LONGEST)
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn, ready};

    use tokio::sync::oneshot;

    use super::*;

    fn identity(subject: &str, issuer: &str) -> Arc<Identity> {
        Arc::new(Identity {
            subject: subject.into(),
            issuer: issuer.into(),
            session: None,
            username: "ann".into(),
            roles: [].into(),
            issued_at: 0,
            expires_at: u64::MAX,
        })
    }

    fn credential() -> Credential {
        let remote = Remote {
            address: [127, 0, 0, 1].into(),
            user_agent: None,
            correlation: "c".into(),
            trace: None,
        };
        Credential::new(identity("ann", "issuer"), Uuid::max(), remote.into())
    }

    #[test]
    fn another_subject_or_issuer_is_another_user() {
        for (subject, issuer, same) in
            [("ann", "issuer", true), ("bob", "issuer", false), ("ann", "issuer/", false)]
        {
            assert_eq!(credential().is_of(&identity(subject, issuer)), same, "{subject} {issuer}");
        }
    }

    #[test]
    fn a_warning_goes_out_once_for_each_token() {
        let mut credential = credential();
        let (expires, minute) = (credential.expires(), Duration::from_secs(60));
        assert_eq!(credential.next_deadline(minute), expires - minute);
        assert_eq!(credential.warn(expires - minute - Duration::from_nanos(1), minute), None);
        assert_eq!(credential.warn(expires - minute, minute), Some(minute));
        assert_eq!(credential.warn(expires, minute), None);
        assert_eq!(credential.next_deadline(minute), expires);
        credential.replace(identity("ann", "issuer"));
        assert_eq!(credential.next_deadline(minute), credential.expires() - minute);
        assert_eq!(credential.warn(credential.expires(), minute), Some(Duration::ZERO));
        assert_eq!(credential.caller().connection, Some(Uuid::max()));
    }

    #[test]
    fn the_wall_clock_says_when_a_token_expires() {
        let mut credential = credential();
        let in_a_minute = Instant::now() + Duration::from_secs(60);
        let expires_at = crate::auth::since_1970().as_secs() + 60;
        let identity = Identity { expires_at, ..Identity::clone(credential.identity()) };
        credential.replace(Arc::new(identity));
        // As if the clock had been another one when the token came.
        credential.expires += Duration::from_secs(3600);
        credential.look();
        assert!(credential.expires() <= in_a_minute + Duration::from_secs(5));
    }

    #[tokio::test]
    async fn a_check_that_need_not_wait_costs_no_task() {
        let mut credential = credential();
        let checked = credential.check(ready(Err(CloseReason::TokenExpired.into()))).unwrap();
        assert_eq!(checked.unwrap_err().reason, CloseReason::TokenExpired);
        assert!(!credential.is_checking());
    }

    #[tokio::test]
    async fn a_check_that_waits_reports_when_it_is_through() {
        let mut credential = credential();
        let (fetched, key) = oneshot::channel();
        assert!(credential.check(async { key.await.unwrap() }).is_none());
        assert!(credential.is_checking());
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(credential.poll_checked(&mut context).is_pending());
        tokio::spawn(async { fetched.send(Ok(identity("ann", "issuer"))) });
        let checked = poll_fn(|context| credential.poll_checked(context)).await.unwrap();
        assert_eq!(&*checked.subject, "ann");
        assert!(!credential.is_checking());
        assert!(credential.poll_checked(&mut context).is_pending());
    }

    #[tokio::test]
    async fn a_check_that_panics_is_an_internal_error() {
        let mut credential = credential();
        let check = async {
            tokio::task::yield_now().await;
            panic!("on purpose")
        };
        assert!(credential.check(check).is_none());
        let checked = poll_fn(|context| credential.poll_checked(context)).await;
        assert_eq!(checked.unwrap_err().reason, CloseReason::InternalError);
    }

    #[tokio::test]
    async fn a_check_ends_with_its_connection() {
        let mut credential = credential();
        let (held, ended) = oneshot::channel::<()>();
        let check = async move {
            let _held = held;
            pending().await
        };
        assert!(credential.check(check).is_none());
        drop(credential);
        assert!(ended.await.is_err());
    }
}
