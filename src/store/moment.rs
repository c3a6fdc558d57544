//! The ends of a range of time, as people write them and as the database compares them.
//!
//! A day, `2026-11-22`, is one of UTC. Both databases keep microseconds, so a range that includes its end
//! is one that ends a microsecond later without it.

use jiff::{
    Timestamp,
    civil::{Date, Time},
    tz::TimeZone,
};
use serde::{Deserialize, Serialize};

/// What is allowed, for people.
const ALLOWED: &str = "a day such as 2026-11-22, in UTC, or a time of RFC 3339 with its offset, \
    such as 2026-11-22T08:00:00Z or 2026-11-22T09:00:00+01:00 (in a URL, + is written %2B)";
/// The first moment of the year 1: Postgres writes earlier ones in another way.
const FIRST: i64 = -62_135_596_800_000_000;

/// Where a range begins: RFC 3339 in UTC with six decimals, included.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Since(String);

/// Where a range ends: RFC 3339 in UTC with six decimals, excluded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Until(String);

impl TryFrom<String> for Since {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let micros = match read(&text).ok_or(ALLOWED)? {
            Written::Day(day) => start(day),
            Written::Moment(moment) => -(-moment.as_nanosecond()).div_euclid(1000),
        };
        Ok(Self(written(micros)))
    }
}

impl TryFrom<String> for Until {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let micros = match read(&text).ok_or(ALLOWED)? {
            Written::Day(day) => start(day.tomorrow().unwrap_or(Date::MAX)),
            Written::Moment(moment) => moment.as_nanosecond().div_euclid(1000) + 1,
        };
        Ok(Self(written(micros)))
    }
}

impl Since {
    /// For the database.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether nothing lies between this and the end.
    pub fn is_after(&self, end: &Until) -> bool {
        self.0 >= end.0
    }
}

impl Until {
    /// For the database.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

enum Written {
    Day(Date),
    Moment(Timestamp),
}

fn read(text: &str) -> Option<Written> {
    // The parser takes more for a day: one with a time and no offset, which it passes over.
    let is_day = text.len() == 10 && text.bytes().filter(|byte| *byte == b'-').count() == 2;
    match is_day {
        true => text.parse().ok().map(Written::Day),
        false => text.parse().ok().map(Written::Moment),
    }
}

/// Microseconds since 1970 at the beginning of a day.
fn start(day: Date) -> i128 {
    let midnight = day.to_datetime(Time::midnight()).to_zoned(TimeZone::UTC);
    // The last day of the calendar is not one of timestamps, and it is how people say "for ever".
    midnight.map_or(Timestamp::MAX, |midnight| midnight.timestamp()).as_microsecond().into()
}

/// Times before and after all that can be stored are the first and the last one.
fn written(micros: i128) -> String {
    let micros = i64::try_from(micros).unwrap_or(i64::MAX).max(FIRST);
    let moment = Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX);
    format!("{moment:.6}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Option<(String, String)> {
        Some((Since::try_from(text.to_owned()).ok()?.0, Until::try_from(text.to_owned()).ok()?.0))
    }

    #[test]
    fn a_range_holds_all_that_it_names() {
        for (text, since, until) in [
            ("2026-11-22", "2026-11-22T00:00:00.000000Z", "2026-11-23T00:00:00.000000Z"),
            ("2024-02-29", "2024-02-29T00:00:00.000000Z", "2024-03-01T00:00:00.000000Z"),
            ("2026-11-22T10:00:00Z", "2026-11-22T10:00:00.000000Z", "2026-11-22T10:00:00.000001Z"),
            (
                "2026-11-22T01:00:00.5+02:00",
                "2026-11-21T23:00:00.500000Z",
                "2026-11-21T23:00:00.500001Z",
            ),
            // Between two microseconds.
            (
                "2026-11-22T10:00:00.0000015Z",
                "2026-11-22T10:00:00.000002Z",
                "2026-11-22T10:00:00.000002Z",
            ),
            ("9999-12-31", "9999-12-30T22:00:00.999999Z", "9999-12-30T22:00:00.999999Z"),
            ("0000-01-01", "0001-01-01T00:00:00.000000Z", "0001-01-01T00:00:00.000000Z"),
        ] {
            assert_eq!(range(text), Some((since.to_owned(), until.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_is_no_day_and_has_no_offset_is_refused() {
        for text in [
            "",
            "today",
            "2026-13-01",
            "2026-02-30",
            "22.11.2026",
            "2026-11-22T10:00:00",
            "2026-11-22T10:00:00 01:00",
            "20261122T1",
            "2026-11-22T25:00:00Z",
            "1700000000",
            "2026-11-22\0",
        ] {
            assert_eq!(range(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_range_that_ends_before_it_begins_is_told_from_one_of_a_moment() {
        let since = |text: &str| Since::try_from(text.to_owned()).unwrap();
        let until = |text: &str| Until::try_from(text.to_owned()).unwrap();
        assert!(!since("2026-11-22").is_after(&until("2026-11-22")));
        assert!(!since("2026-11-22T10:00:00Z").is_after(&until("2026-11-22T10:00:00Z")));
        assert!(since("2026-11-23").is_after(&until("2026-11-22")));
        assert!(since("2026-11-22T10:00:00.000001Z").is_after(&until("2026-11-22T10:00:00Z")));
    }
}
