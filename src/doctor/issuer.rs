//! The issuer of tokens: a provider and its keys, or the development issuer and its key file.

use std::io;

use super::{
    Report,
    names::{Difference, settings_for},
};
use crate::{
    auth::{DevIssuer, Discovery, Provider, ProviderError, Trust},
    config::{AuthConfig, ProviderConfig},
    machine,
};

/// Seconds that clocks differ by without a word: `Date` has whole ones.
const SAME_TIME: u64 = 2;

/// Reports on the issuer, and returns what is known of its keys.
pub(super) async fn check(config: &AuthConfig, report: &mut Report) -> Option<Trust> {
    let Some(provider) = &config.provider else { return development(config, report) };
    match Provider::unobserved(config)? {
        Ok(client) => Some(asked(provider, config, &client, report).await),
        Err(error) => {
            let fix = "install the root certificates of this system (ca-certificates)";
            report.fault("provider", format!("an HTTP client cannot be made: {error}"), fix);
            None
        }
    }
}

fn development(config: &AuthConfig, report: &mut Report) -> Option<Trust> {
    let file = config.dev_key_file.display();
    let made = DevIssuer::read(&config.dev_key_file, &config.client_id)
        .and_then(|issuer| Trust::development(Some(&issuer)));
    let error = match made {
        Ok(trust) => {
            report.ok("dev issuer", format!("{file} can be read, and no provider is configured"));
            return Some(trust);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match machine::can_make(&config.dev_key_file) {
                Ok(()) => {
                    let says = format!("{file} will be made at the first start");
                    report.ok("dev issuer", says);
                    return Trust::development(None).ok();
                }
                Err(error) => error,
            }
        }
        Err(error) => error,
    };
    report.fault(
        "dev issuer",
        format!("{file} cannot be used: {error}"),
        "let the user that serves read and write it, remove it so that a new one is made, \
         or set DEV_KEY_FILE or DATA_DIR to another place",
    );
    Trust::development(None).ok()
}

async fn asked(
    provider: &ProviderConfig,
    config: &AuthConfig,
    client: &Provider,
    report: &mut Report,
) -> Trust {
    // At once, so that a provider that does not answer is waited for once.
    let (discovery, trust) = tokio::join!(client.discover(), Trust::fetched(client));
    let discovered = match discovery {
        Ok(discovery) => {
            clock(&discovery, config, report);
            named(&discovery, provider, report)
        }
        Err(error) => {
            unreachable(&error, provider, report);
            false
        }
    };
    if !discovered {
        return Trust::without_keys(client);
    }
    let error = match trust {
        Ok(trust) => {
            let keys = trust.keys();
            report.ok("keys", format!("{} usable: {}", keys.len(), keys.join(", ")));
            return trust;
        }
        Err(error) => error,
    };
    report.fault(
        "keys",
        format!("there are no usable keys, no token can be checked: {error}"),
        "give the realm an active signing key (Realm settings, Keys): RSA of 2048 bits or more, \
         P-256, P-384 or Ed25519, with use sig",
    );
    Trust::without_keys(client)
}

fn unreachable(error: &ProviderError, provider: &ProviderConfig, report: &mut Report) {
    let address = &provider.address;
    let fix = match error {
        ProviderError::Status { status, .. } if status.as_u16() == 404 => {
            "set KEYCLOAK_REALM to a realm that exists, and KEYCLOAK_BASE_URL with the path of \
             Keycloak, if it has one (such as /auth)"
        }
        ProviderError::Unreachable(_) => {
            "start the provider, or set KEYCLOAK_BASE_URL (OIDC_ISSUER where it is not Keycloak) to \
             where this server reaches it: in a container, localhost is the container itself"
        }
        _ => "look into the provider's log, and at KEYCLOAK_BASE_URL or OIDC_ISSUER",
    };
    report.fault("provider", format!("{address} does not answer as a provider: {error}"), fix);
}

/// Whether the provider is the one that is expected.
fn named(discovery: &Discovery, provider: &ProviderConfig, report: &mut Report) -> bool {
    let Discovery { url, issuer: named, .. } = discovery;
    let ProviderConfig { issuer, address, .. } = provider;
    if named == issuer {
        report.ok("provider", format!("{address} answers, its issuer is {issuer}"));
        return true;
    }
    if named == address {
        report.ok(
            "provider",
            format!("{address} answers, its issuer is {named}; tokens must bear {issuer}"),
        );
        return true;
    }
    let settings = settings_for(named, address);
    let fix = match Difference::between(issuer, named) {
        Difference::Slash => format!("set OIDC_ISSUER={named}: the slash at the end counts"),
        Difference::Place => format!(
            "it has one name inside and another outside of containers: {settings}; \
             or set KC_HOSTNAME of Keycloak to the name that clients and this server share"
        ),
        Difference::Path => format!("this is another realm: set KEYCLOAK_REALM, or {settings}"),
        Difference::All => format!("if this is the provider that is meant, {settings}"),
    };
    report.fault("provider", format!("{url} is of the issuer {named}, not of {issuer}"), fix);
    false
}

fn clock(discovery: &Discovery, config: &AuthConfig, report: &mut Report) {
    let Some(ahead) = discovery.ahead else {
        let fix = "compare the clocks by hand";
        return report.warning("clock", "the provider does not tell the time", fix);
    };
    let (apart, leeway) = (ahead.unsigned_abs(), config.leeway.as_secs());
    let word = if ahead > 0 { "behind" } else { "ahead of" };
    let says = format!("this machine's clock is {apart} s {word} the provider's");
    let fix = "set both clocks by NTP (timedatectl, chronyd)";
    if apart > leeway.max(SAME_TIME) {
        report.fault(
            "clock",
            format!("{says}, JWT_LEEWAY is {leeway} s: good tokens are refused, or bad ones taken"),
            fix,
        );
    } else if apart > SAME_TIME {
        report.warning("clock", format!("{says}, JWT_LEEWAY is {leeway} s"), fix);
    } else {
        report.ok("clock", "this machine and the provider agree on the time");
    }
}
