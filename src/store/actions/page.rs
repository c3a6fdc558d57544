//! Which part of the matching actions is read: by number, or from a place on.

use jiff::Timestamp;
use serde::Deserialize;
use uuid::Uuid;

use super::StoredAction;

/// A part of the actions that match, newest first.
#[derive(Debug, Clone)]
pub(crate) enum ActionPage {
    /// After so many.
    Offset(i64),
    /// After, which is before in time, one that was seen.
    After(Place),
}

/// What was read of it.
#[derive(Debug)]
pub(crate) struct ActionPart {
    pub(crate) items: Vec<StoredAction>,
    /// How many rows that were, with those that cannot be read.
    pub(crate) rows: i64,
    pub(crate) has_more: bool,
}

impl ActionPart {
    /// How many rows cannot be read.
    pub(crate) fn left_out(&self) -> u64 {
        u64::try_from(self.rows).unwrap_or_default().saturating_sub(self.items.len() as u64)
    }
}

/// The place of an action in the trail: rows are ordered by time, and those of one moment by their `uid`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Place {
    pub(super) timestamp: String,
    pub(super) uid: Uuid,
}

impl Place {
    pub(crate) fn of(StoredAction { action, .. }: &StoredAction) -> Self {
        Self { timestamp: action.timestamp.to_string(), uid: action.uid }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.timestamp, self.uid)
    }
}

impl TryFrom<String> for Place {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let read = || {
            let (timestamp, uid) = text.split_once(' ')?;
            let at: Timestamp = timestamp.parse().ok()?;
            // As it is written here, and no other way: SQLite compares texts.
            let is_ours = format!("{at:.6}") == timestamp;
            is_ours.then_some(Self { timestamp: timestamp.to_owned(), uid: uid.parse().ok()? })
        };
        read().ok_or("a place is a time and a uid")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_was_written_and_in_no_other_form() {
        let place = Place { timestamp: "2026-11-22T10:00:00.000001Z".into(), uid: Uuid::nil() };
        assert_eq!(Place::try_from(place.to_string()), Ok(place));
        let uid = Uuid::nil();
        for text in [
            String::new(),
            "2026-11-22T10:00:00.000001Z".into(),
            format!("2026-11-22T10:00:00Z {uid}"),
            format!("2026-11-22T11:00:00.000001+01:00 {uid}"),
            format!("' OR 1=1 -- {uid}"),
            "2026-11-22T10:00:00.000001Z x".into(),
        ] {
            assert!(Place::try_from(text.clone()).is_err(), "{text}");
        }
    }
}
