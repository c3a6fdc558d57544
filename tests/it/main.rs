//! The integration tests: whole servers on free ports, real sockets, real clients. A module a behaviour.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]
#![allow(dead_code)]
mod basics;
mod commands;
mod direction;
mod readme;
mod health;
mod logs;
mod metrics;
mod metrics_names;
mod process;
mod rest_authors;
mod rest_errors;
mod rest_headers;
mod support;
mod tokens;
