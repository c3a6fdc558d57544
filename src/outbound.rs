//! The client of HTTP for whatever this server asks of others: the identity provider, the collector of
//! traces.

use std::{error::Error, time::Duration};

use reqwest::{Client, redirect};

/// A client for `address`, whose calls take `timeout` at most.
pub(crate) fn client(address: &str, timeout: Duration) -> reqwest::Result<Client> {
    // A redirect could carry a password elsewhere.
    let client = || Client::builder().timeout(timeout).redirect(redirect::Policy::none());
    match client().build() {
        // A machine without root certificates can still speak plain HTTP.
        Err(_) if address.starts_with("http:") => client().tls_certs_only([]).build(),
        built => built,
    }
}

/// An error of the client says what it did; why that failed stands in its causes.
pub(crate) fn with_causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
