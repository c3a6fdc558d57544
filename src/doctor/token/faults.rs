//! Why a token is refused, in words, and which setting or mapper of Keycloak changes that. Only tokens
//! that the validator refused come here: nothing in this file decides.

use serde_json::Value;

use super::{content::Content, moment, now, shown, span};
use crate::{
    auth::{NOT_OF_ACCESS_TOKENS, Signature, Trust, is_allowed, is_of_access_tokens},
    config::AuthConfig,
    doctor::{
        Report,
        names::{Difference, settings_for},
    },
};

pub(super) fn explain(
    token: &str,
    content: &Content,
    trust: &Trust,
    config: &AuthConfig,
    report: &mut Report,
) {
    let kind = kind(content, config, report);
    let signature = key(token, content, trust, config, kind, report);
    issuer(content, trust, config, signature, report);
    times(content, config, report);
    // Such tokens are for another receiver by their nature.
    if kind == Kind::Access {
        client(content, config, report);
    }
    subject(content, report);
    types(content, config, report);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Access,
    Other,
}

fn kind(content: &Content, config: &AuthConfig, report: &mut Report) -> Kind {
    let fix = "send the access_token of the provider's answer";
    let fault = |says: String, report: &mut Report| {
        report.fault("kind", says, format!("{fix}, not its refresh_token or id_token"));
        Kind::Other
    };
    let Some(typ) = content.kind() else {
        return fault("the claim typ is no text".to_owned(), report);
    };
    if config.types.allow(&typ) {
        return match other(content, config, &typ) {
            None => Kind::Access,
            Some(says) => fault(says, report),
        };
    }
    let says = match &*typ {
        "refresh" | "offline" => "it is a refresh token (typ Refresh or Offline)".to_owned(),
        "id" => "it is an ID token: it tells the client who logged in".to_owned(),
        "logout" | "logout+jwt" => "it is a logout token".to_owned(),
        _ => {
            let says = match content.has("typ") {
                true => format!("its claim typ is {}", shown(&typ)),
                false => format!("there is no claim typ, and the header's is {}", shown(&typ)),
            };
            report.fault(
                "kind",
                format!("{says}, which is not in JWT_TYPES"),
                format!(
                    "{fix}; with another provider than Keycloak, switch RFC 9068 (at+jwt) on, or set \
                     JWT_TYPES as docs/identity.md has it for that provider"
                ),
            );
            return Kind::Other;
        }
    };
    fault(says, report)
}

/// Why a token is none for access, although its type may be one of access tokens.
fn other(content: &Content, config: &AuthConfig, typ: &str) -> Option<String> {
    if is_of_access_tokens(typ) {
        return None;
    }
    if let Some(claim) =
        NOT_OF_ACCESS_TOKENS.into_iter().find(|it| content.claims.contains_key(*it))
    {
        return Some(format!("it has {claim}, which ID and logout tokens have"));
    }
    if let Some(usage) = content.claims.get("token_use").filter(|usage| *usage != "access") {
        return Some(format!("its token_use is {}, not access", shown(&usage.to_string())));
    }
    let client = &config.claims.client;
    let is_issued = content.text(client).is_some() || content.text("jti").is_some();
    (!is_issued).then(|| format!("nothing says that it is an access token: no {client}, no jti"))
}

fn key(
    token: &str,
    content: &Content,
    trust: &Trust,
    config: &AuthConfig,
    kind: Kind,
    report: &mut Report,
) -> Option<Signature> {
    let algorithm = content.header.get("alg").and_then(Value::as_str).unwrap_or_default();
    if algorithm.eq_ignore_ascii_case("none") {
        let fix = "get it from the provider: anybody can write such a one";
        report.fault("signature", "it is not signed (alg none)", fix);
        return None;
    }
    if !is_allowed(algorithm) {
        // Keycloak signs refresh tokens so: what they are is said already.
        if kind == Kind::Access || !algorithm.starts_with("HS") {
            report.fault(
                "signature",
                format!("its algorithm {} is not allowed", shown(algorithm)),
                "set the access token signature algorithm to RS256, PS256, ES256 or EdDSA \
                 (Keycloak: the client's Advanced tab, or Realm settings, Tokens)",
            );
        }
        return None;
    }
    if content.header.contains_key("crit") {
        let fix = "have the provider sign without extensions";
        report.fault("signature", "its header has critical extensions (crit)", fix);
    }
    let Some(kid) = content.header.get("kid").and_then(Value::as_str) else {
        let fix = "have the provider name its keys: tokens and key set need a kid";
        report.fault("key", "its header names no key (kid)", fix);
        return None;
    };
    let signature = trust.signature(token);
    match signature {
        Signature::Fits | Signature::Unchecked => {}
        Signature::OtherDevKey => {
            let file = config.dev_key_file.display();
            report.fault(
                "signature",
                format!("it was signed with another development key than {file}"),
                format!(
                    "get one with `switchboard token` and the server's DATA_DIR or \
                     DEV_KEY_FILE={file}; many nodes need one file, by DEV_KEY_FILE"
                ),
            );
        }
        Signature::Differs if config.provider.is_none() => {
            let file = config.dev_key_file.display();
            report.fault(
                "signature",
                format!("the signature does not fit {file}: another key's, or the token was changed or cut"),
                "copy it whole, or get a new one with `switchboard token` and the server's \
                 DATA_DIR or DEV_KEY_FILE",
            );
        }
        Signature::Differs => report.fault(
            "signature",
            "the signature does not fit: it was changed or cut, or signed by another's key",
            "copy it whole or get a new one; if that fails too, KEYCLOAK_BASE_URL or OIDC_ISSUER is \
             not the provider that signed it",
        ),
        Signature::OtherAlgorithm => report.fault(
            "signature",
            format!("its algorithm {algorithm} is not that of its key {}", shown(kid)),
            "get a new one from the provider: it would not sign so",
        ),
        Signature::UnknownKey => {
            let keys = trust.keys().join(", ");
            report.fault(
                "key",
                format!("its key (kid {}) is not among the usable ones: {keys}", shown(kid)),
                "get a new token, if the realm's keys were rotated; else it is from another realm or \
                 provider: see KEYCLOAK_BASE_URL, KEYCLOAK_REALM, OIDC_ISSUER",
            );
        }
    }
    Some(signature)
}

fn issuer(
    content: &Content,
    trust: &Trust,
    config: &AuthConfig,
    signature: Option<Signature>,
    report: &mut Report,
) {
    let expected = trust.issuer();
    let Some(named) = content.text("iss") else {
        let fix = "get a token from the provider: it writes its name there";
        return report.fault("issuer", "there is no iss, or it is no text", fix);
    };
    if named == expected {
        return;
    }
    let named = &*shown(named);
    let says = format!("iss is {named}, and serve expects {expected}");
    let Some(provider) = &config.provider else {
        let fix = format!(
            "set OIDC_ISSUER={named}, if that is your provider; tokens of the development issuer \
             come from `switchboard token`"
        );
        return report.fault("issuer", says, fix);
    };
    if named == "switchboard-dev" {
        let fix = format!("get one from {expected}: tokens of the development issuer do not count");
        return report.fault("issuer", says, fix);
    }
    let settings = settings_for(named, &provider.address);
    let fits = signature == Some(Signature::Fits);
    let same = if fits { "its signature fits the keys, so it is the same provider, " } else { "" };
    match Difference::between(expected, named) {
        Difference::Slash => {
            let fix = format!("set OIDC_ISSUER={named}: the slash at the end counts");
            report.fault("issuer", says, fix);
        }
        Difference::Place => report.fault(
            "issuer",
            format!(
                "{says}: the same path, another host, port or scheme; {same}\
                 it has one name inside and another outside of containers"
            ),
            format!("{settings}; or set KC_HOSTNAME of Keycloak, so that it has one name for all"),
        ),
        Difference::Path => report.fault(
            "issuer",
            format!("{says}: another realm"),
            "log in to the realm of this server, or set KEYCLOAK_REALM",
        ),
        Difference::All if fits => {
            report.fault("issuer", format!("{says}: {same}under another name"), settings)
        }
        Difference::All => report.fault(
            "issuer",
            format!("{says}: another provider"),
            format!("get a token from {expected}; or, if that is your provider, {settings}"),
        ),
    }
}

fn times(content: &Content, config: &AuthConfig, report: &mut Report) {
    let (now, leeway) = (now(), config.leeway.as_secs());
    match content.seconds("exp") {
        None => {
            let fix = "have the provider give access tokens a lifespan";
            report.fault("time", "there is no exp, or it is no time", fix);
        }
        Some(exp) if exp.saturating_add(leeway) < now => report.fault(
            "time",
            format!("it is expired since {}, for {}", moment(exp), span(now - exp)),
            "get a new one, with the refresh token; if it was new, compare the clocks and the \
             Access Token Lifespan (Keycloak: Realm settings, Tokens)",
        ),
        Some(_) => {}
    }
    match content.seconds("nbf") {
        None if content.has("nbf") => {
            report.fault("time", "nbf is no time", "remove the mapper that writes nbf");
        }
        Some(nbf) if nbf > now.saturating_add(leeway) => report.fault(
            "time",
            format!("it is not valid before {}, in {}", moment(nbf), span(nbf - now)),
            "set the clocks of this machine and of the provider by NTP; JWT_LEEWAY allows for less",
        ),
        _ => {}
    }
}

fn client(content: &Content, config: &AuthConfig, report: &mut Report) {
    let us = &*config.client_id;
    let claim = &*config.claims.client;
    let (audience, issued_to) = (content.audience(), content.text(claim));
    let strict = !config.audience.is_empty();
    let is_ours = issued_to == Some(us);
    let is_named = match strict {
        true => config.audience.iter().any(|name| audience.contains(&&**name)),
        false => audience.contains(&us),
    };
    if is_named || is_ours && !strict {
        return;
    }
    let aud = match audience[..] {
        [] => "there is no aud".to_owned(),
        ["account"] => "aud is only account, which every token of Keycloak has".to_owned(),
        ref clients => format!("aud is {}", shown(&clients.join(", "))),
    };
    let issued_to = issued_to.map(shown);
    let to = issued_to.as_deref().unwrap_or("the client that logs in");
    let mapper = format!("(Keycloak: Clients, {to}, Client scopes, dedicated)");
    if strict {
        let wanted = config.audience.join(" or ");
        let not_enough =
            if is_ours { format!(", and {claim} is not enough with it") } else { String::new() };
        return report.fault(
            "client",
            format!("{aud}, and JWT_AUDIENCE wants {wanted} there{not_enough}"),
            format!(
                "have the provider write {wanted} into aud, by a mapper of the type Audience {mapper}; \
                 or set JWT_AUDIENCE to what stands there; without JWT_AUDIENCE, {claim}={us} is enough"
            ),
        );
    }
    let issued = match &issued_to {
        Some(client) => format!("{claim} is {client}: it was issued to that client"),
        None => format!("there is no {claim}"),
    };
    let other = issued_to.as_deref().unwrap_or("CLIENT");
    report.fault(
        "client",
        format!("it is for another client than {us}: {aud}, and {issued}"),
        format!(
            "add a mapper of the type Audience with {us} as Included Client Audience to {to} {mapper}; \
             or set KEYCLOAK_CLIENT_ID={other}; or JWT_AUDIENCE, if aud is to name a service"
        ),
    );
}

fn subject(content: &Content, report: &mut Report) {
    if content.text("sub").is_none_or(str::is_empty) {
        report.fault(
            "subject",
            "there is no sub: nothing says who the user is",
            "add the client scope `basic` to the client (Keycloak 26 has the mapper of sub in it)",
        );
    }
}

/// Claims whose types refuse a token and that nothing else was said of.
fn types(content: &Content, config: &AuthConfig, report: &mut Report) {
    for claim in ["sid", &config.claims.client, &config.claims.username] {
        if content.has(claim) && content.text(claim).is_none() {
            let fix = format!("change the mapper that writes {claim} to one text");
            report.fault("claims", format!("{claim} is no text"), fix);
        }
    }
    let texts = |value: &Value| match value {
        Value::Array(items) => items.iter().all(Value::is_string),
        _ => value.is_string(),
    };
    if content.claims.get("aud").is_some_and(|aud| !texts(aud)) {
        let fix = "change the mapper that writes aud to names of clients";
        report.fault("claims", "aud is neither a text nor a list of texts", fix);
    }
    if !super::roles::readable(content, config) {
        let claim = &config.claims.roles;
        report.fault(
            "claims",
            format!("{claim} is not a list of texts"),
            "change the mapper of the roles (multivalued, of strings), or JWT_ROLES_CLAIM",
        );
    }
}
