//! `switchboard doctor --token`: what is wrong with a token is named with what fixes it, and it is judged
//! as the server would.

use std::{io::Write as _, process::Stdio, time::Duration};

use jsonwebtoken::{Algorithm, Header};
use serde_json::{Value, json};
use switchboard::{
    auth::DevIssuer,
    config::Config,
    doctor::{Question, examine},
    handlers::packages,
};
use tempfile::TempDir;

use crate::{
    bad_tokens::{KEYS, of_development, of_provider},
    doctor::{asked, entry, healthy, names},
    support::{
        issuer::{CLIENT, Issuer, SigningKey, claims, now},
        process::{finish, run, switchboard, token},
    },
};

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_with_another_name_outside_of_containers_is_named() {
    let issuer = Issuer::start().await;
    let base = format!("http://{}", issuer.addr);
    let outside = "https://sso.example/realms/test";
    let token = issuer.token(json!({ "iss": outside }));
    let keycloak = [("KEYCLOAK_BASE_URL", &*base), ("KEYCLOAK_REALM", "test")];
    let own = [&keycloak[..], &[("OIDC_ISSUER", outside)]].concat();
    names(
        &asked(&issuer, &keycloak, &token, &[]),
        "issuer",
        &[
            "the same path",
            "its signature fits the keys",
            "set OIDC_ISSUER=https://sso.example/realms/test",
            &format!("KEYCLOAK_BASE_URL={base}"),
            "KC_HOSTNAME",
        ],
    );
    // What it says helps.
    healthy(&asked(&issuer, &own, &token, &[]), &["ok token"]);

    for (iss, words) in [
        (format!("{}/", issuer.url()), "slash at the end"),
        (format!("{base}/realms/master"), "another realm"),
        ("https://sso.example/".to_owned(), "the same provider, under another name"),
        ("switchboard-dev".to_owned(), "development issuer"),
    ] {
        let ran = asked(&issuer, &[], &issuer.token(json!({ "iss": iss })), &[]);
        names(&ran, "token serve refuses it: the token is from another issuer", &["for ann"]);
        names(&ran, "issuer", &[words]);
    }
}

/// Faults of single tokens: claims, the line, its words.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_token_is_named_with_what_fixes_it() {
    let issuer = Issuer::start().await;
    let table: &[(Value, &str, &[&str])] = &[
        (
            json!({ "azp": "shop", "aud": "account" }),
            "client",
            &["aud is only account", "azp is shop", "Audience", "KEYCLOAK_CLIENT_ID=shop"],
        ),
        (
            json!({ "azp": "shop", "aud": ["shop", "account"] }),
            "client",
            &["another client than switchboard", "aud is shop, account", "Audience"],
        ),
        (
            json!({ "azp": CLIENT, "typ": null }),
            "kind",
            &["the header's is jwt", "not in JWT_TYPES", "at+jwt", "docs/identity.md"],
        ),
        (json!({ "exp": now() - 7300 }), "time", &["expired since", "for 2 h", "refresh token"]),
        (json!({ "nbf": now() + 600 }), "time", &["not valid before", "clocks", "JWT_LEEWAY"]),
        (json!({ "typ": "Refresh", "aud": "x" }), "kind", &["refresh token", "access_token"]),
        (json!({ "typ": "ID", "aud": CLIENT }), "kind", &["ID token", "access_token"]),
        (json!({ "sub": null }), "subject", &["no sub", "`basic`"]),
        (json!({ "resource_access": 5 }), "claims", &["list of texts", "JWT_ROLES_CLAIM"]),
    ];
    for (changes, about, words) in table {
        names(&asked(&issuer, &[], &issuer.token(changes.clone()), &[]), about, words);
    }
    // All of them at once.
    let all = issuer.token(json!({ "iss": "x", "azp": "shop", "exp": 5, "sub": null }));
    let ran = asked(&issuer, &[], &all, &[]);
    for about in ["issuer", "time", "client", "subject"] {
        names(&ran, about, &["fix: "]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn for_whom_a_token_is_is_explained_with_an_audience_and_without() {
    let issuer = Issuer::start().await;
    let token = issuer.token(json!({ "azp": CLIENT, "aud": ["orders", "account"] }));
    let ran = asked(&issuer, &[], &token, &[]);
    entry(&ran, "ok token serve lets it in");
    let said = entry(&ran, "warning audience");
    for word in ["aud is orders, account", "azp is switchboard", "JWT_AUDIENCE=switchboard"] {
        assert!(said.contains(word), "{said}");
    }
    let strict = [("JWT_AUDIENCE", CLIENT)];
    let words = ["JWT_AUDIENCE wants switchboard", "azp is not enough", "type Audience"];
    names(&asked(&issuer, &strict, &token, &[]), "client", &words);
    let named = issuer.token(json!({ "azp": "shop", "aud": CLIENT }));
    healthy(&asked(&issuer, &strict, &named, &[]), &["ok token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_only_looks_like_one_for_access_is_told_from_one() {
    let issuer = Issuer::start().await;
    let settings = [("JWT_TYPES", "JWT")];
    for (changes, words) in [
        (json!({ "nonce": "n" }), ["it has nonce", "id_token"]),
        (json!({ "token_use": "id" }), ["its token_use is \"id\"", "id_token"]),
        (json!({ "azp": null, "aud": CLIENT }), ["no azp, no jti", "id_token"]),
        (json!({ "typ": "ID" }), ["it is an ID token", "id_token"]),
    ] {
        let mut claims = json!({ "typ": null });
        claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        names(&asked(&issuer, &settings, &issuer.token(claims), &[]), "kind", &words);
    }
    let access = issuer.token(json!({ "typ": null, "exp": now() as f64 + 99.5 }));
    healthy(&asked(&issuer, &settings, &access, &[]), &["ok token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_that_is_not_the_providers_is_named() {
    let issuer = Issuer::start().await;
    let good = claims(&issuer.url(), &json!({}));
    let unknown = SigningKey::new("rotated", Algorithm::ES256).sign(&good);
    let words = ["kid rotated", "rsa (RS256)", "rotated", "another realm"];
    names(&asked(&issuer, &[], &unknown, &[]), "key", &words);
    let other = SigningKey::other_rsa("rsa").sign(&good);
    names(&asked(&issuer, &[], &other, &[]), "signature", &["does not fit", "copy it whole"]);
    let elsewhere = claims("https://evil.example/", &json!({}));
    let elsewhere = SigningKey::new("theirs", Algorithm::ES256).sign(&elsewhere);
    names(&asked(&issuer, &[], &elsewhere, &[]), "issuer", &["another provider", &issuer.url()]);
    let header = Header { kid: Some("rsa".into()), ..Header::new(Algorithm::HS256) };
    let secret = jsonwebtoken::EncodingKey::from_secret(b"secret");
    let symmetric = jsonwebtoken::encode(&header, &good, &secret).unwrap();
    names(&asked(&issuer, &[], &symmetric, &[]), "signature", &["HS256", "RS256"]);
    let none = format!("eyJhbGciOiJub25lIn0.{}.", symmetric.split('.').nth(1).unwrap());
    names(&asked(&issuer, &[], &none, &[]), "signature", &["not signed (alg none)"]);
    for (token, words) in [
        ("an-opaque-token-of-another-provider", "no JWT"),
        ("eyJhbGciOiJub25lIn0.eyJhbGciOiJub25lIn0", "three parts"),
        ("a.b.c.d.e", "encrypted"),
        ("a b", "spaces"),
    ] {
        names(&asked(&issuer, &[], token, &[]), "form", &[words, "fix: "]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_that_stand_in_another_claim_are_found() {
    let issuer = Issuer::start().await;
    let roles = ["get-authors"];
    for (changes, words, settings) in [
        (
            json!({ "resource_access": null, "realm_access": { "roles": roles } }),
            ["realm_access.roles: get-authors", "JWT_REALM_ROLES=true"],
            ("JWT_REALM_ROLES", "true"),
        ),
        (
            json!({ "resource_access": { "shop": { "roles": roles } }, "aud": [CLIENT, "shop"] }),
            ["resource_access.shop.roles: get-authors", "KEYCLOAK_CLIENT_ID=shop"],
            ("KEYCLOAK_CLIENT_ID", "shop"),
        ),
        (
            json!({ "resource_access": null, "groups": roles }),
            ["groups: get-authors", "JWT_ROLES_CLAIM=groups"],
            ("JWT_ROLES_CLAIM", "groups"),
        ),
    ] {
        let token = issuer.token(changes);
        let ran = asked(&issuer, &[], &token, &["--pkg", "1"]);
        entry(&ran, "ok token serve lets it in");
        names(&ran, "roles", &words);
        names(&ran, "package 1 GET_AUTHORS may not be called", &["needs get-authors", "no roles"]);
        let ran = asked(&issuer, &[settings], &token, &["--pkg", "1"]);
        healthy(&ran, &["ok package 1 GET_AUTHORS may be called"]);
    }
    let ran = asked(&issuer, &[], &issuer.token(json!({ "resource_access": null })), &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    assert!(entry(&ran, "warning roles").contains("resource_access.switchboard.roles"));
    let nameless = issuer.token(json!({ "preferred_username": null }));
    let ran = asked(&issuer, &[], &nameless, &[]);
    let said = entry(&ran, "warning username");
    assert!(said.contains("7a1f") && said.contains("JWT_USERNAME_CLAIM"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whether_a_package_may_be_called_is_said_with_the_reason() {
    let issuer = Issuer::start().await;
    let reader = json!({ "resource_access": { CLIENT: { "roles": ["get-authors"] } } });
    let token = issuer.token(reader);
    let about = |id| asked(&issuer, &[], &token, &["--pkg", id]);
    entry(&about("2"), "ok package 2 GET_PAGINATED_AUTHORS may be called: it needs get-authors");
    entry(&about("100"), "ok package 100 ECHO may be called: it needs no role");
    let words = ["needs delete-author", "has get-authors", "assign delete-author", "Role mapping"];
    names(&about("5"), "package 5 DELETE_AUTHOR may not be called", &words);
    names(&about("7"), "package there is no package 7", &["1 GET_AUTHORS", "100 ECHO"]);
    let expired = issuer.token(json!({ "exp": 5 }));
    let ran = asked(&issuer, &[], &expired, &["--pkg", "100"]);
    names(&ran, "package 100 ECHO cannot be called", &["a token that is let in"]);
}

#[test]
fn a_token_is_read_from_standard_input_with_its_scheme_or_without() {
    let data = TempDir::new().unwrap();
    let token = token(data.path(), &["--user", "ann"]);
    let settings = [("DATA_DIR", data.path().to_str().unwrap()), ("LISTEN_ADDR", "127.0.0.1:0")];
    for text in [format!("{token}\n"), format!("Bearer {token}"), format!("bearer  {token} \n")] {
        let mut command = switchboard(&["doctor", "--token", "-"], &settings);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        healthy(&finish(child), &["ok token serve lets it in: ann"]);
    }
    let given = run(&["doctor", "--token", &format!("Bearer {token}")], &settings);
    healthy(&given, &["ok token serve lets it in: ann"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_wrote_cannot_look_like_a_verdict() {
    let issuer = Issuer::start().await;
    let name = "ann\u{1b}[2J\nok       token          serve lets it in";
    let token = issuer.token(json!({ "preferred_username": name, "exp": 5 }));
    let ran = asked(&issuer, &[], &token, &[]);
    assert!(!ran.stdout.contains('\u{1b}'), "{}", ran.stdout);
    assert!(!ran.stdout.lines().any(|line| line.starts_with("ok       token")), "{}", ran.stdout);
}

/// The report on a token, and what it says of the token itself.
async fn judged(config: &Config, token: &str) -> (String, bool) {
    let question = Question { token: token.to_owned(), package: None };
    let report = examine(config, &packages(), Some(&question)).await.to_string();
    let good = report.lines().any(|line| line.starts_with("ok       token "));
    (report, good)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_lets_in_what_the_server_lets_in_and_nothing_else() {
    let issuer = Issuer::with(KEYS.clone()).await;
    let data = TempDir::new().unwrap();
    let folder = data.path().to_str().unwrap();
    let dev = DevIssuer::open(&data.path().join("dev-key.pem"), CLIENT).unwrap();
    let url = issuer.url();
    let good = claims(&url, &json!({}));
    let own = dev.token("ann", &["get-authors"], Duration::from_secs(60));
    let expired = claims(&url, &json!({ "exp": now() - 60 }));
    let mut provided = of_provider(&issuer);
    provided.push(("expired", KEYS[0].sign(&expired)));
    let good = KEYS[..3].iter().map(|key| key.sign(&good)).collect();
    for (provider, good, bad) in
        [(&*url, good, provided), ("", vec![own], of_development(&dev, data.path()))]
    {
        let settings =
            [("OIDC_ISSUER", provider), ("DATA_DIR", folder), ("LISTEN_ADDR", "[::1]:0")];
        let config = Config::read(|name| {
            settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
        .unwrap();
        for token in good {
            let (report, good) = judged(&config, &token).await;
            assert!(good, "{report}");
        }
        // The server refuses all of these: the tests of the table ask it.
        for (name, token) in bad {
            let (report, good) = judged(&config, &token).await;
            assert!(!good, "{name}: {report}");
            let token_line = report.lines().position(|line| line.starts_with("fault    token "));
            let explained = report.lines().skip(token_line.unwrap() + 1);
            let explained = explained.filter(|line| line.starts_with("fault    ")).count();
            assert!(explained > 0 || name == "huge", "{name} is not explained: {report}");
        }
    }
}
