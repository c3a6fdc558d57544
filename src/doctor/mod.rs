//! `switchboard doctor`: would `serve` work with this configuration, and would it let this token in?
//!
//! The doctor asks the same parts that serve: the configuration's own rules, the database's migrations,
//! the provider's client, the validator of tokens. It only puts their answers into words, and says what
//! to change. Nothing is made, migrated or written.

mod database;
mod issuer;
mod names;
mod report;
mod surroundings;
mod token;

use crate::{
    config::{Config, ConfigErrors},
    handlers::Package,
};
pub use report::Report;

/// A token to be explained.
pub struct Question {
    /// With its scheme or without.
    pub token: String,
    /// The package that is to be called with it.
    pub package: Option<i32>,
}

/// Checks everything that a server of this configuration needs, and a token if there is one.
pub async fn examine(config: &Config, packages: &[Package], asked: Option<&Question>) -> Report {
    let mut report = Report::default();
    surroundings::settings(config, &mut report);
    surroundings::addresses(&config.server, &mut report).await;
    surroundings::files(config, &mut report);
    surroundings::rights(config, &mut report);
    database::check(&config.store, &mut report).await;
    let trust = issuer::check(&config.auth, &mut report).await;
    if let Some(asked) = asked {
        token::check(asked, trust.as_ref(), &config.auth, packages, &mut report).await;
    }
    report
}

/// What there is to say where the configuration cannot be read: nothing else can be checked.
pub fn misconfigured(faults: &ConfigErrors) -> Report {
    let mut report = Report::default();
    for fault in faults.faults() {
        report.fault("configuration", fault, "");
    }
    report
}
