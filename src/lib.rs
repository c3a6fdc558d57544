//! Switchboard: an actor-based real-time WebSocket server.
//!
//! The life of a message, which is also the order to read the modules in:
//!
//! 1. [`server`] accepts TCP; hyper serves the connection. `GET /web` is checked and upgraded.
//! 2. [`connection`]`::handshake` authenticates the socket through [`auth`].
//! 3. [`registry`], an actor, checks the limits, spawns the connection's actor and lists it in [`hub`].
//! 4. [`connection`]`::session`, one task, reads frames, and [`protocol`] decodes them.
//! 5. [`router`] finds the handler actor of the `pkg_id`, checks the roles and casts the job.
//! 6. [`handlers`] do the work on [`store`]; REST ([`http`]) calls the same operations.
//! 7. The job's `Responder` encodes the answer into the connection's outbox ([`hub`]), and the session
//!    writes all that is there with one flush.
//!
//! What happened stands in the audit trail ([`audit`]), which no message waits for. [`doctor`] says beforehand what would keep all that from working, with the same parts.
//!
//! [`export`] writes out the audit trail, [`erase`] takes a person out of it. [`migrate`] brings the schema up to date. [`healthcheck`] asks a server that runs whether it is ready.
//!
//! Where many nodes are one server, [`cluster`] carries pushes and the ends of sessions to the others, and
//! counts the connections of each user on all of them.
//!
//! Beside the way: [`limits`], [`redis`], [`breaker`], `task`, `sync`, `outbound`, `objects`, `files`, [`metrics`], [`config`], [`telemetry`], [`traces`],
//! [`machine`]; `fuzzing`, compiled for the fuzzer and the tests alone. A module imports
//! only from modules below it; `tests/it/direction.rs` has the order and enforces it.

#![warn(clippy::print_stdout, clippy::print_stderr, reason = "commands print, the library returns")]

mod audit;
pub mod auth;
mod breaker;
mod cluster;
pub mod config;
mod connection;
pub mod doctor;
pub mod erase;
pub mod export;
mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handlers;
pub mod healthcheck;
mod http;
mod hub;
mod limits;
pub mod machine;
pub mod metrics;
pub mod migrate;
mod objects;
mod outbound;
pub mod protocol;
mod redis;
mod registry;
mod router;
pub mod server;
pub mod store;
mod sync;
mod task;
pub mod telemetry;
mod traces;
