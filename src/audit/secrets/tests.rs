use super::*;

#[test]
fn names_of_secrets_are_known_in_any_case_and_form() {
    for name in [
        "password",
        "Password",
        "PASSWORD",
        "user_password",
        "newPassword",
        "passwd",
        "pasword",
        "token",
        "access_token",
        "refreshToken",
        "X-Auth-Token",
        "secret",
        "clientSecret",
        "authorization",
        "Authorization",
        "card",
        "card_number",
        "cardNumber",
        "creditCard",
        "credit-card",
        "cvv",
        "CVC",
        "ssn",
        "SSN",
        "social_security_number",
        "socialSecurity",
        "pin",
        "api_key",
        "card1",
        "CARDINFO",
        "ssn2",
        "SSNumber",
        "userSSN",
        "PINCode",
        "pass",
        "PASS",
        "user_pass",
        "userPass",
        "pass1",
        "dbpass",
        "PassText",
        "passwort",
        "Passwort",
        "PASSWORT",
        "kennwort",
        "contraseña",
        "motDePasse",
        "otp",
        "OTP",
        "otpCode",
        "sms_otp",
        "TOTPSecret",
        "totp",
        "mfa_code",
        "PIN",
        "userPin",
        "pin_code",
        "PINNumber",
        "puk",
        "tan",
        "cookie",
        "Cookie",
        "cookies",
        "set-cookie",
        "session_cookie",
        "session",
        "SESSION",
        "sessionId",
        "session_id",
        "JSESSIONID",
        "PHPSESSID",
        "userSession",
        "sid",
        "iban",
        "IBAN",
        "IBANNumber",
        "userIban",
        "bearer",
        "privateKey",
        "recovery_code",
        "compassToken",
        "discardPassword",
        "surPassword",
    ] {
        assert!(is_secret(name), "{name}");
    }
}

#[test]
fn names_that_only_sound_like_secrets_stay() {
    for name in [
        "name",
        "business_name",
        "discard",
        "postcard",
        "cardinality",
        "spin",
        "passing",
        "passenger",
        "passage",
        "compass",
        "bypass",
        "spinner",
        "pinned",
        "opinion",
        "cookiebanner",
        "possession",
        "obsession",
        "caliban",
        "inside",
        "president",
        "tangent",
        "standard",
        "id",
        "titan",
        "option",
        "page",
        "per_page",
        "cursor",
        "filters",
        "search_term",
        "pkg_id",
        "data",
    ] {
        assert!(!is_secret(name), "{name}");
    }
}

/// `{"alg":"HS256","typ":"JWT"}`, `{"sub":"ann"}` and a signature.
const JWT: &str =
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg";
/// `{ "typ": "JWT", "alg": "none" }`, without a signature.
const SPACED: &str = "eyAidHlwIjogIkpXVCIsICJhbGciOiAibm9uZSIgfQ.eyJzdWIiOiJhbm4ifQ.";

#[test]
fn what_looks_like_a_token_is_hidden_also_within_a_text() {
    for token in [JWT, SPACED, &JWT[..60]] {
        for (before, after) in [
            ("", ""),
            ("Bearer ", ""),
            ("token=", "&x=1"),
            ("https://example.org/?t=", "#end"),
            ("my-", "\n"),
            ("(", ")"),
            ("ü", "ü"),
        ] {
            let shown = without_secrets(&format!("{before}{token}{after}")).into_owned();
            assert!(!shown.contains("eyJzdWI") && !shown.contains("HS256"), "{shown}");
            assert!(
                shown.contains(HIDDEN) && shown.starts_with(&before.replace("my-", "")),
                "{shown}"
            );
            assert!(shown.ends_with(after), "{shown}");
        }
    }
}

#[test]
fn what_looks_like_a_card_number_is_hidden_also_within_a_text() {
    for card in [
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111.1111.1111.1111",
        "4111\u{a0}1111\u{a0}1111\u{a0}1111",
        "3782 822463 10005",
        "30569309025904",
        "4222222222222",
        "6304000000000000000",
    ] {
        for (before, after) in
            [("", ""), ("pay with ", ", please"), ("no. 12 ", " 12/27"), ("#", "x ")]
        {
            if after == "x " && card.contains([' ', '-', '.', '\u{a0}']) {
                continue;
            }
            let shown = without_secrets(&format!("{before}{card}{after}")).into_owned();
            assert_eq!(shown, format!("{before}***{after}"), "{card}");
        }
    }
    assert!(is_card_number(4_111_111_111_111_111));
}

#[test]
fn texts_and_numbers_that_are_neither_stay() {
    for text in [
        "",
        "a.b.c",
        "www.example.org/index.html",
        "4111111111111112",
        "411111111111",
        "41111111111111111111",
        "1764500000000",
        "12345678-1234-4123-8123-a23456789012",
        "2026-11-22T10:00:00.123456Z",
        "eyJ0eXAiOiJKV1QifQ.eyJzdWIiOiJhbm4ifQ.x",
        "sha256.9f86d081884c7d659a2feaa0c55ad015",
    ] {
        assert!(matches!(without_secrets(text), Cow::Borrowed(_)), "{text}");
    }
    for number in [0, 7, 4_111_111_111_111_112, 1_764_500_000_000, u64::MAX] {
        assert!(!is_card_number(number), "{number}");
    }
    // Three groups that a card number could have, and a UUID all the same.
    let uuid = (0..10_000_u64).map(|i| format!("41111111-1111-{i:04}-8a23-0123456789ab"));
    for id in uuid {
        assert_eq!(without_secrets(&id), id);
    }
}

#[test]
fn a_path_has_neither() {
    let shown = |path: &str| path_without_secrets(path).into_owned();
    assert_eq!(shown("/authors/12"), "/authors/12");
    assert_eq!(shown("/audit-logs/user/J%C3%BCrgen"), "/audit-logs/user/J%C3%BCrgen");
    assert_eq!(shown(&format!("/audit-logs/user/{JWT}")), "/audit-logs/user/***");
    let encoded = JWT.replace('.', "%2E");
    assert_eq!(shown(&format!("/audit-logs/user/{encoded}")), "/audit-logs/user/***");
    assert_eq!(
        shown("/admin/users/4111%201111%201111%201111/connections"),
        "/admin/users/***/connections"
    );
}
