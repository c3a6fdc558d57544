//! Close reasons, and that client developers can look up every one of them.

use std::collections::BTreeSet;

use super::*;

const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/protocol.md"));

/// Reason, code, label, whether a close frame is sent.
const TABLE: [(CloseReason, u16, &str, bool); 21] = [
    (CloseReason::Normal, 1000, "1000", false),
    (CloseReason::GoingAway, 1001, "1001", true),
    (CloseReason::ProtocolError, 1002, "1002", true),
    (CloseReason::WrongKind, 1003, "1003", true),
    (CloseReason::NotUtf8, 1007, "1007", true),
    (CloseReason::TooBig, 1009, "1009", true),
    (CloseReason::ConnectionLimit, 1008, "1008", true),
    (CloseReason::Replaced, 1008, "1008", true),
    (CloseReason::TooManyFailures, 1008, "1008", true),
    (CloseReason::TooManyExpulsions, 1008, "1008", true),
    (CloseReason::TooManyStrikes, 1008, "1008", true),
    (CloseReason::InternalError, 1011, "1011", true),
    (CloseReason::Unavailable, 1011, "1011", true),
    (CloseReason::Unauthorized, 4001, "4001", true),
    (CloseReason::TokenExpired, 4001, "4001", true),
    (CloseReason::AuthTimeout, 4002, "4002", true),
    (CloseReason::SessionExpired, 4003, "4003", true),
    (CloseReason::SessionRevoked, 4004, "4004", true),
    (CloseReason::SlowConsumer, 4005, "4005", true),
    (CloseReason::PongTimeout, 4006, "4006", true),
    (CloseReason::Abnormal, 1006, "abnormal", false),
];

#[test]
fn every_reason_has_its_code_label_and_frame() {
    assert_eq!(TABLE.map(|(reason, ..)| reason), CloseReason::ALL);
    for (reason, code, label, sent) in TABLE {
        assert_eq!((reason.code(), reason.label().as_str()), (code, label), "{reason:?}");
        match reason.frame() {
            Some(frame) => {
                assert!(sent && !frame.reason.is_empty(), "{reason:?}");
                assert_eq!((u16::from(frame.code), &*frame.reason), (code, reason.text()));
                // A control frame has 125 bytes, two of them for the code.
                assert!(frame.reason.len() <= 123, "{reason:?}");
                assert!(frame.code.is_allowed(), "{reason:?} must not be sent");
            }
            None => assert!(!sent, "{reason:?}"),
        }
    }
}

/// The rows of a section's tables, as trimmed cells.
fn rows(section: &str) -> Vec<Vec<&'static str>> {
    let heading = format!("\n## {section}\n");
    let (_, rest) = DOCUMENT.split_once(&heading).expect("the document has the section");
    let body = rest.split("\n## ").next().unwrap_or_default();
    body.lines()
        .filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'))
        .map(|row| row.split('|').map(str::trim).collect())
        .collect()
}

#[test]
fn the_documented_close_codes_are_those_of_the_server() {
    let documented: BTreeSet<u16> =
        rows("Close codes").iter().filter_map(|row| row[0].parse().ok()).collect();
    let sent: BTreeSet<u16> = CloseReason::ALL.into_iter().map(CloseReason::code).collect();
    assert_eq!(documented, sent);
}

#[test]
fn the_documented_authentication_errors_are_those_of_the_server() {
    let documented: BTreeSet<(String, String)> = rows("Authentication")
        .iter()
        .filter(|row| row[0].parse::<u16>().is_ok() && row[1] != "no error frame")
        .map(|row| (row[0].to_owned(), row[1].trim_matches('`').to_owned()))
        .collect();
    let sent: BTreeSet<(String, String)> = CloseReason::ALL
        .into_iter()
        .filter_map(|reason| Some((reason.code().to_string(), reason.error_code()?.to_owned())))
        .collect();
    assert_eq!(documented, sent);
}
