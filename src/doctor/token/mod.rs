//! A token: what the validator says of it, in more words; and whether it may call a package.

mod content;
mod faults;
mod roles;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Question, Report};
use crate::{
    auth::{AuthError, Identity, Trust, bearer},
    config::AuthConfig,
    handlers::Package,
};
use content::Content;

/// Characters of a claim that are shown.
const SHOWN: usize = 200;

pub(super) async fn check(
    asked: &Question,
    trust: Option<&Trust>,
    config: &AuthConfig,
    packages: &[Package],
    report: &mut Report,
) {
    let Some(trust) = trust else { return };
    let of_development = config.provider.is_none().then(|| config.for_development());
    let config = of_development.as_ref().unwrap_or(config);
    let token = bearer(&asked.token).unwrap_or(&asked.token).trim();
    let content = Content::of(token);
    let verdict = trust.judge(token, config).await;
    match (&verdict, &content) {
        (Ok(identity), Ok(content)) => {
            let who = who(content, Some(identity), config);
            report.ok("token", format!("serve lets it in: {who}"));
            remarks(content, identity, config, report);
            roles::check(content, identity, config, packages, report);
        }
        (Err(error), Ok(content)) => {
            refused(token, error, Some(content), config, report);
            faults::explain(token, content, trust, config, report);
        }
        (Err(error), Err(fault)) => {
            refused(token, error, None, config, report);
            report.fault("form", fault.says(), fault.fix());
        }
        (Ok(_), Err(_)) => report.ok("token", "serve lets it in"),
    }
    if let Some(id) = asked.package {
        roles::package(id, &verdict, content.ok().as_ref(), config, packages, report);
    }
}

/// The validator's own words; the lines after this one explain them.
fn refused(
    token: &str,
    error: &AuthError,
    content: Option<&Content>,
    config: &AuthConfig,
    report: &mut Report,
) {
    let says = match error {
        AuthError::Unavailable => "serve cannot say: there are no keys to check it with".to_owned(),
        error => format!("serve refuses it: {error}"),
    };
    let who = content.map(|content| {
        let identity = Trust::unverified(token, config);
        format!("\nit says it is for {}", who(content, identity.as_ref(), config))
    });
    report.fault("token", says + &who.unwrap_or_default(), "");
}

/// User, subject, client, roles and time left.
fn who(content: &Content, identity: Option<&Identity>, config: &AuthConfig) -> String {
    let text = |claim: &str| content.text(claim).map(shown);
    let subject = text("sub").unwrap_or_else(|| "nobody".to_owned());
    let name = text(&config.claims.username).unwrap_or_else(|| subject.clone());
    let client = text(&config.claims.client).unwrap_or_else(|| "no client".to_owned());
    let roles = match identity.map(|identity| &*identity.roles) {
        None => "roles unknown".to_owned(),
        Some([]) => "no roles".to_owned(),
        Some(roles) => format!("roles {}", shown(&roles.join(", "))),
    };
    let left = match content.seconds("exp").map(|exp| exp.saturating_sub(now())) {
        None => "without an end".to_owned(),
        Some(0) => "expired".to_owned(),
        Some(left) => format!("expires in {}", span(left)),
    };
    format!("{name} (sub {subject}), issued to {client}, {roles}, {left}")
}

/// What is odd about a token that is let in.
fn remarks(content: &Content, identity: &Identity, config: &AuthConfig, report: &mut Report) {
    let claim = &config.claims.username;
    if content.text(claim).is_none_or(str::is_empty) {
        report.warning(
            "username",
            format!("there is no {claim}: the user is called {} after sub", shown(&identity.subject)),
            format!(
                "add the client scope `profile` in Keycloak (it maps the username to \
                 preferred_username), or set JWT_USERNAME_CLAIM to a claim that is there instead of {claim}"
            ),
        );
    }
    let audience = content.audience();
    let us = &*config.client_id;
    let named = audience.contains(&us) || matches!(audience[..], [] | ["account"]);
    if config.audience.is_empty() && !named {
        report.warning(
            "audience",
            format!(
                "aud is {}: other services; it is let in because {} is {us}",
                shown(&audience.join(", ")),
                config.claims.client
            ),
            format!(
                "set JWT_AUDIENCE={us} to let in only tokens whose aud names it, once the provider writes \
                 it there (Keycloak: a mapper of the type Audience)"
            ),
        );
    }
    if identity.expires_at <= now() {
        let says = "it is expired, and let in within JWT_LEEWAY alone";
        report.warning("time", says, "get a new token");
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// A time for people.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A moment for people.
fn moment(seconds: u64) -> String {
    let moment = i64::try_from(seconds).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    moment.map_or_else(|| format!("second {seconds}"), |moment| moment.to_string())
}

/// The beginning of a text that somebody else wrote.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
