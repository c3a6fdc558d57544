//! The integration tests: whole servers on free ports, real sockets, real clients. A module a behaviour.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]
#![allow(dead_code)]
mod authentication;
mod basics;
mod direction;
mod messages;
mod support;
mod upgrade;
