//! Reads JSON where objects are meant: structs that serde derives would take an array as well.
//!
//! Whatever a client or a provider sends is read through [`read`]. [`known`] tells which members of a text
//! the type knows: the audit trail records the others by name alone.

mod reader;

use serde::{Deserialize, Deserializer};

use reader::{Objects, Seen, Watch};

/// Places of one value whose notes are kept; more than the audit trail shows of a value without member names.
const MAX_PLACES: usize = 1024;

/// Reads JSON text into a type whose structs, at any depth, are read from objects only.
#[inline]
pub(crate) fn read<'de, T: Deserialize<'de>>(text: &'de str) -> serde_json::Result<T> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = T::deserialize(Objects::new(&mut reader, ()))?;
    reader.end()?;
    Ok(value)
}

/// As [`read`], from bytes.
pub(crate) fn read_bytes<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> serde_json::Result<T> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = T::deserialize(Objects::new(&mut reader, ()))?;
    reader.end()?;
    Ok(value)
}

/// The same rule around another reader, such as one that tracks paths.
pub(crate) fn only<'de, D: Deserializer<'de>>(
    reader: D,
) -> impl Deserializer<'de, Error = D::Error> {
    Objects::new(reader, ())
}

/// What a type knows of a text that is read into it. Where reading fails, nothing is known of what it has
/// not reached.
pub(crate) fn known<'de, T: Deserialize<'de>>(text: &'de str) -> Known {
    let mut known = Known::default();
    let mut reader = serde_json::Deserializer::from_str(text);
    drop(T::deserialize(Objects::new(&mut reader, &mut known)));
    known
}

/// What a type knows of one value.
#[derive(Debug, Default)]
pub(crate) struct Known {
    seen: Option<Seen>,
    /// By place: the number of a member in the order of the text, or of an item.
    below: Vec<Known>,
}

/// Of a value that may hold anything.
pub(crate) static EVERYTHING: Known = Known { seen: Some(Seen::Everything), below: Vec::new() };

impl Known {
    /// Whether the type takes whatever is here and below.
    pub(crate) fn is_everything(&self) -> bool {
        matches!(self.seen, Some(Seen::Everything))
    }

    /// Whether the type reads items here.
    pub(crate) fn has_items(&self) -> bool {
        matches!(self.seen, Some(Seen::Items))
    }

    /// The members that the type has, where they are a fixed set.
    pub(crate) fn names(&self) -> Option<&'static [&'static str]> {
        match self.seen {
            Some(Seen::Members(names)) => Some(names),
            _ => None,
        }
    }

    /// Whether the type has a member of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self.seen {
            Some(Seen::Members(names)) => names.contains(&name),
            Some(Seen::AnyMember | Seen::Everything) => true,
            Some(Seen::Items) | None => false,
        }
    }

    /// What is known of a member or an item.
    pub(crate) fn at(&self, place: usize) -> Option<&Self> {
        self.below.get(place).filter(|_| place < MAX_PLACES)
    }
}

impl Watch for &mut Known {
    type Below<'a>
        = &'a mut Known
    where
        Self: 'a;

    fn note(&mut self, seen: Seen) {
        self.seen = Some(seen);
    }

    fn below(&mut self, place: usize) -> &mut Known {
        // All that is past the last place shares one, which nobody looks at.
        let place = place.min(MAX_PLACES);
        if self.below.len() <= place {
            self.below.resize_with(place + 1, Known::default);
        }
        &mut self.below[place]
    }
}

#[cfg(test)]
mod tests;
