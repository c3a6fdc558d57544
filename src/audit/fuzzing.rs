//! The targets of the audit trail.

pub(crate) use super::{document::fuzzing::redaction, spool::fuzzing::spool};
