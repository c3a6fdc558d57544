//! The integration tests: whole servers on free ports, real sockets, real clients. A module a behaviour.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]
#![allow(dead_code)]
mod authentication;
mod basics;
mod closing;
mod direction;
mod lifecycle;
mod limits;
mod liveness;
mod messages;
mod promises;
mod protobuf;
mod push;
mod secrets;
mod slow_consumers;
mod support;
mod upgrade;
