//! The targets of the audit trail.

pub(crate) use super::{redact::fuzzing::redaction, spool::fuzzing::spool};
