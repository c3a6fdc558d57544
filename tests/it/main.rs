//! The integration tests: whole servers on free ports, real sockets, real clients. A module a behaviour.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

mod admin;
mod audit_logs;
mod auth_routes;
mod authentication;
mod backchannel;
mod bad_tokens;
mod basics;
mod brute_force;
mod closing;
mod commands;
mod crowd;
mod defaults;
mod direction;
mod doctor;
mod doctor_postgres;
mod doctor_tokens;
mod export;
mod health;
mod keycloak;
mod lifecycle;
mod limits;
mod liveness;
mod logs;
mod messages;
mod metrics;
mod metrics_names;
mod migrate;
mod oidc;
mod outage;
mod plans;
mod process;
mod promises;
mod protobuf;
mod push;
mod readme;
mod refresh;
mod rest_authors;
mod rest_errors;
mod rest_headers;
mod secrets;
mod slow_consumers;
mod support;
mod tokens;
mod upgrade;
