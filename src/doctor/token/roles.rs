//! The roles of a token: whether they stand where serve looks, and which packages they open.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{content::Content, shown};
use crate::{
    auth::{AuthError, Identity},
    config::AuthConfig,
    doctor::Report,
    handlers::Package,
};

/// Roles that stand where serve does not look.
struct Elsewhere<'a> {
    path: String,
    roles: Vec<&'a str>,
    fix: String,
}

/// Whether a token that is let in can call anything that needs a role.
pub(super) fn check(
    content: &Content,
    identity: &Identity,
    config: &AuthConfig,
    packages: &[Package],
    report: &mut Report,
) {
    let needed: BTreeSet<_> = packages.iter().flat_map(|package| package.roles).copied().collect();
    if needed.iter().any(|role| identity.has(&[role])) {
        return;
    }
    let place = place(config);
    match elsewhere(content, config, |role| needed.contains(role)) {
        Some(found) => report.fault(
            "roles",
            format!(
                "no roles in {place}, but in {}: {}",
                found.path,
                shown(&found.roles.join(", "))
            ),
            found.fix,
        ),
        None => report.warning(
            "roles",
            format!("it has none of the roles that packages need; serve looks in {place}"),
            assign("the roles", config),
        ),
    }
}

/// Whether a token may call a package, and why.
pub(super) fn package(
    id: i32,
    verdict: &Result<Identity, AuthError>,
    content: Option<&Content>,
    config: &AuthConfig,
    packages: &[Package],
    report: &mut Report,
) {
    let Some(package) = packages.iter().find(|package| package.id == id) else {
        let known = packages.iter().map(|package| format!("{} {}", package.id, package.name));
        let known: Vec<_> = known.collect();
        let fix = format!("call one of {}", known.join(", "));
        return report.fault("package", format!("there is no package {id}"), fix);
    };
    let name = format!("{id} {}", package.name);
    let needs = match package.roles {
        [] => "it needs no role".to_owned(),
        roles => format!("it needs {}", roles.join(" and ")),
    };
    let Ok(identity) = verdict else {
        let says = format!("{name} cannot be called: {needs}, and a token that is let in");
        return report.fault("package", says, "");
    };
    if identity.has(package.roles) {
        let has = if package.roles.is_empty() { "" } else { ", which the token has" };
        return report.ok("package", format!("{name} may be called: {needs}{has}"));
    }
    let missing: Vec<_> =
        package.roles.iter().copied().filter(|role| !identity.has(&[role])).collect();
    let has = match &*identity.roles {
        [] => "no roles".to_owned(),
        roles => shown(&roles.join(", ")),
    };
    let found = content.and_then(|it| elsewhere(it, config, |role| missing.contains(&role)));
    let missing = missing.join(" and ");
    let (found, fix) = match found {
        Some(found) => (format!("; {missing} stands in {}", found.path), found.fix),
        None => (String::new(), assign(&missing, config)),
    };
    let says = format!("{name} may not be called: {needs}, and the token has {has}{found}");
    report.fault("package", says, fix);
}

fn assign(roles: &str, config: &AuthConfig) -> String {
    let client = &config.client_id;
    if config.provider.is_none() {
        return format!("name {roles} in `switchboard token --roles`");
    }
    format!(
        "assign {roles} of the client {client} to the user (Keycloak: Users, Role mapping) and log in \
         anew; the client needs the client scope `roles`"
    )
}

/// Where serve looks for roles.
fn place(config: &AuthConfig) -> String {
    let place = config.claims.roles.replace("{client}", &config.client_id);
    if config.claims.realm_roles { format!("{place} and realm_access.roles") } else { place }
}

/// The first other place with a role that is wanted.
fn elsewhere<'a>(
    content: &'a Content,
    config: &AuthConfig,
    wanted: impl Fn(&str) -> bool,
) -> Option<Elsewhere<'a>> {
    let us = &config.client_id;
    let claims = &content.claims;
    let mut places: Vec<(String, &Value, String)> = Vec::new();
    if let Some(roles) = claims.get("realm_access").and_then(|realm| realm.get("roles")) {
        let fix = format!(
            "set JWT_REALM_ROLES=true; or make them roles of the client {us} and assign those \
             (Keycloak: Clients, {us}, Roles)"
        );
        places.push(("realm_access.roles".to_owned(), roles, fix));
    }
    let clients = claims.get("resource_access").and_then(Value::as_object);
    for (client, access) in clients.into_iter().flatten() {
        let Some(roles) = access.get("roles") else { continue };
        let client = shown(client);
        let fix = if client == *us {
            "set JWT_ROLES_CLAIM=resource_access.{client}.roles".to_owned()
        } else {
            format!(
                "these are roles of the client {client}: assign those of {us}, or set \
                 KEYCLOAK_CLIENT_ID={client}"
            )
        };
        places.push((format!("resource_access.{client}.roles"), roles, fix));
    }
    for claim in
        ["roles", "groups", "permissions", "cognito:groups", "urn:zitadel:iam:org:project:roles"]
    {
        let Some(roles) = claims.get(claim) else { continue };
        places.push((claim.to_owned(), roles, format!("set JWT_ROLES_CLAIM={claim}")));
    }
    places.into_iter().find_map(|(path, roles, fix)| {
        let roles: Vec<_> = match roles {
            Value::Object(roles) => roles.keys().map(String::as_str).collect(),
            roles => roles.as_array()?.iter().filter_map(Value::as_str).collect(),
        };
        roles.iter().any(|role| wanted(role)).then_some(Elsewhere { path, roles, fix })
    })
}

/// Whether the claims in which serve looks for roles have the types that it wants.
pub(super) fn readable(content: &Content, config: &AuthConfig) -> bool {
    let names = &config.claims.roles;
    let own: Vec<String> = match content.claims.contains_key(names) {
        true => vec![names.clone()],
        false => names.split('.').map(|name| name.replace("{client}", &config.client_id)).collect(),
    };
    let realm = ["realm_access", "roles"].map(String::from);
    is_list(content, &own) && (!config.claims.realm_roles || is_list(content, &realm))
}

fn is_list(content: &Content, path: &[String]) -> bool {
    let mut path = path.iter();
    let mut at = path.next().and_then(|name| content.claims.get(name));
    for name in path {
        let Some(value) = at else { return true };
        let Some(object) = value.as_object() else { return false };
        at = object.get(name);
    }
    at.is_none_or(|roles| match roles {
        Value::Array(roles) => roles.iter().all(Value::is_string),
        roles => roles.is_object(),
    })
}
