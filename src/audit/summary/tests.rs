use super::*;
use crate::{
    auth::{Identity, Remote},
    config::Config,
    protocol::CloseReason,
};

fn summary(settings: &[(&str, &str)]) -> Summary {
    let text = |name: &str| {
        let known = settings.iter().find(|(known, _)| *known == name);
        known.map(|(_, text)| (*text).to_owned())
    };
    Summary::new(&Config::read(text).unwrap().audit)
}

fn remote(address: &str) -> Arc<Remote> {
    let correlation = "c0ffee".into();
    Arc::new(Remote {
        address: address.parse().unwrap(),
        user_agent: None,
        correlation,
        trace: None,
    })
}

fn user(name: &str) -> Arc<Identity> {
    Arc::new(Identity {
        subject: name.into(),
        issuer: "i".into(),
        session: None,
        username: name.into(),
        roles: [].into(),
        issued_at: 0,
        expires_at: 0,
    })
}

fn failed(address: &str) -> Event {
    let resource = "/web".to_owned();
    let reason = CloseReason::Unauthorized;
    Event::of_connection("AUTH", resource, AuditOutcome::Error, &remote(address), reason)
}

fn failed_at(address: &str, path: &str, route: &str, status: i32) -> Event {
    let (resource, route) = (path.into(), route.into());
    Event { action: "GET".into(), resource, route, status, ..failed(address) }
}

fn denied(name: &str) -> Event {
    let event = failed("192.0.2.1");
    Event {
        user: Some(user(name)),
        outcome: AuditOutcome::PermissionDenied,
        cause: Cause::Other,
        ..event
    }
}

/// What the rows of an interval are: scope, address, resource, and how many events each sums up.
fn rows(summary: &Summary) -> Vec<(Scope, String, String, u64)> {
    let row = |sum: Sum| {
        let (scope, times) = (sum.scope, sum.times);
        let event = sum.into_event();
        (scope, event.remote.address.to_string(), event.resource.to_string(), times)
    };
    let mut rows: Vec<_> = summary.end().into_iter().map(row).collect();
    rows.sort_by(|a, b| (&a.1, &a.2, a.3).cmp(&(&b.1, &b.2, b.3)));
    rows
}

fn row(scope: Scope, address: &str, resource: &str, times: u64) -> (Scope, String, String, u64) {
    (scope, address.to_owned(), resource.to_owned(), times)
}

#[test]
fn an_unknown_caller_has_a_row_for_each_kind_whatever_it_chooses() {
    let summary = summary(&[]);
    for i in 0..1000 {
        assert!(summary.take(failed(&format!("2001:db8::{i:x}"))).is_none());
        let author = failed_at("192.0.2.1", &format!("/authors/{i}"), "/authors/{id}", 401);
        assert!(summary.take(author).is_none());
        assert!(summary.take(failed_at("192.0.2.1", "/authors", "/authors", 401)).is_none());
    }
    let expected = [
        row(Scope::Network, "192.0.2.1", "/authors", 1000),
        row(Scope::Network, "192.0.2.1", "/authors/{id}", 1000),
        row(Scope::Network, "2001:db8::", "/web", 1000),
    ];
    assert_eq!(rows(&summary), expected);
    assert_eq!(rows(&summary), []);
}

#[test]
fn all_unknown_callers_together_have_fifty_rows_and_one_more() {
    let summary = summary(&[]);
    for i in 0..200 {
        for _ in 0..2 {
            assert!(summary.take(failed(&format!("192.0.2.{i}"))).is_none());
        }
    }
    let rows = rows(&summary);
    assert_eq!(rows.len(), UNKNOWN_ROWS + 1);
    let other: Vec<_> = rows.iter().filter(|row| row.0 == Scope::OtherNetworks).collect();
    assert_eq!((other.len(), &*other[0].2, other[0].3), (1, "unknown callers", 300));
}

#[test]
fn one_address_does_not_take_the_rows_of_all_others() {
    let summary = summary(&[]);
    for status in 400..500 {
        summary.take(failed_at("192.0.2.1", "/authors", "/authors", status));
    }
    summary.take(failed("192.0.2.2"));
    let rows = rows(&summary);
    assert_eq!(rows.len(), ROWS_OF_ONE + 2);
    assert!(rows.contains(&row(Scope::Network, "192.0.2.2", "/web", 1)), "{rows:?}");
}

#[test]
fn a_login_that_succeeds_and_a_change_that_fails_are_rows_of_their_own() {
    let summary = summary(&[("AUDIT_DENIALS_PER_USER", "1")]);
    for _ in 0..10 {
        let login = Event { outcome: AuditOutcome::Success, ..failed("192.0.2.1") };
        assert!(summary.take(login).is_some());
        let change = Event { outcome: AuditOutcome::Error, ..denied("ann") };
        assert!(summary.take(change).is_some());
    }
    assert_eq!(rows(&summary), []);
}

#[test]
fn denials_of_a_user_beyond_the_limit_share_a_row_and_so_do_refreshes_and_disconnects() {
    let summary = summary(&[("AUDIT_DENIALS_PER_USER", "3")]);
    let event = |name: &str, reason| {
        let id = uuid::Uuid::new_v4().to_string();
        let event =
            Event::of_connection(name, id, AuditOutcome::Error, &remote("192.0.2.1"), reason);
        Event { user: Some(user("bob")), ..event }
    };
    let own = (0..10).filter(|_| summary.take(denied("ann")).is_some()).count();
    assert_eq!(own, 3);
    for _ in 0..5 {
        summary.take(event("REFRESH", CloseReason::Unauthorized));
        summary.take(event("DISCONNECT", CloseReason::TooManyStrikes));
        let revoked = event("DISCONNECT", CloseReason::SessionRevoked);
        assert!(summary.take(revoked).is_some(), "no user does this to itself");
    }
    let sums = rows(&summary);
    let times: Vec<_> = sums.iter().map(|row| (row.0, &*row.2, row.3)).collect();
    let expected = [(Scope::User, "/web", 3), (Scope::User, "/web", 4), (Scope::User, "/web", 7)];
    assert_eq!(times, expected);
    assert!(summary.take(denied("ann")).is_some(), "a new interval has a new budget");
}

#[test]
fn breaches_of_many_users_of_one_network_share_a_row_and_what_honest_users_cause_does_not() {
    let summary = summary(&[("AUDIT_DENIALS_PER_USER", "3")]);
    let ended = |user_name: &str, address: &str, reason| {
        let id = uuid::Uuid::new_v4().to_string();
        let outcome = AuditOutcome::Success;
        let event = Event::of_connection("DISCONNECT", id, outcome, &remote(address), reason);
        summary.take(Event { user: Some(user(user_name)), ..event })
    };
    let mut own = 0;
    for i in 0..20 {
        let (name, address) = (format!("user-{i}"), format!("2001:db8::{i}"));
        own += usize::from(ended(&name, &address, CloseReason::TooManyStrikes).is_some());
        assert!(ended(&name, &address, CloseReason::SessionExpired).is_some());
    }
    assert_eq!(own, 3);
    assert!(ended("bob", "2001:db8:0:1::1", CloseReason::TooManyStrikes).is_some());
    let sums = summary.end();
    assert_eq!(
        sums.iter().map(|sum| (sum.scope, sum.times)).collect::<Vec<_>>(),
        [(Scope::UsersOfNetwork, 17)]
    );
    let event = sums.into_iter().next().unwrap().into_event();
    assert!(event.user.is_none());
    let data = event.data.unwrap();
    assert!(data.contains(r#""usernames":["user-3","user-4""#), "{data:?}");
}

#[test]
fn without_a_limit_every_denial_of_a_user_is_a_row() {
    let summary = summary(&[("AUDIT_DENIALS_PER_USER", "0")]);
    assert!((0..1000).all(|_| summary.take(denied("ann")).is_some()));
}

#[test]
fn the_table_of_users_is_bounded_and_forgets() {
    let summary = summary(&[("AUDIT_DENIALS_PER_USER", "1")]);
    for i in 0..USERS + 10 {
        assert_eq!(summary.take(denied(&i.to_string())).is_some(), i < USERS);
    }
    for i in 0..USER_ROWS + 10 {
        assert!(summary.take(denied(&i.to_string())).is_none());
    }
    assert_eq!(summary.entries(), USERS + USER_ROWS + 1);
    let sums = rows(&summary);
    assert_eq!(sums.len(), USER_ROWS + 1);
    let other = sums.iter().find(|row| row.0 == Scope::OtherUsers).unwrap();
    assert_eq!((&*other.2, other.3), ("users", 20));
    assert_eq!(summary.entries(), 0);
}

#[test]
fn what_comes_after_the_last_interval_is_a_row_of_its_own() {
    let summary = summary(&[]);
    assert!(summary.take(failed("192.0.2.1")).is_none());
    summary.close();
    assert!(summary.take(failed("192.0.2.1")).is_some());
    assert_eq!(rows(&summary).len(), 1);
    assert!(summary.take(failed("192.0.2.1")).is_some());
}

#[test]
fn a_row_names_a_few_of_those_that_were_tried_and_stays_small() {
    let summary = summary(&[]);
    for i in 0..1000 {
        let claimed = Some(format!("{i:03}{}", "\u{1}\"".repeat(5000)));
        summary.take(Event { claimed, ..failed("192.0.2.1") });
    }
    summary.take(Event { claimed: Some("ann".to_owned()), ..failed("192.0.2.2") });
    let mut events: Vec<_> = summary.end().into_iter().map(Sum::into_event).collect();
    let one = events.pop().unwrap();
    assert_eq!(one.claimed.as_deref(), Some("ann"));
    let many = events.pop().unwrap();
    assert_eq!(many.claimed, None);
    let data = many.data.unwrap();
    assert!(data.len() < 4096, "{} bytes", data.len());
    let data: serde_json::Value = serde_json::from_str(&data).unwrap();
    assert_eq!(
        (&data["times"], data["usernames"].as_array().unwrap().len()),
        (&json!(1000), NAMES)
    );
}

#[test]
fn an_event_without_room_in_the_queue_shares_a_row_whatever_it_is() {
    let summary = summary(&[]);
    for name in ["ann", "ann", "bob"] {
        let ended = Event { outcome: AuditOutcome::Success, ..denied(name) };
        assert!(summary.absorb(ended).is_none());
    }
    let times: Vec<_> =
        rows(&summary).into_iter().map(|(scope, .., times)| (scope, times)).collect();
    assert_eq!(times, [(Scope::User, 1), (Scope::User, 2)]);
    summary.close();
    assert!(summary.absorb(denied("ann")).is_some(), "nobody would make a row of it");
}
