//! Request data as the trail shows it: the parsed value, printed again. Blanks and members that stand twice
//! hide nothing. What is long is cut where it stands, and what the request's type does not know is shown by
//! its name alone.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;

use std::{borrow::Cow, cell::Cell, fmt, ops::Deref};

use serde::{
    Deserializer,
    de::{DeserializeOwned, DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{
    Map, Value, json,
    value::{RawValue, to_raw_value},
};

use super::secrets::{HIDDEN, is_card_number, is_secret, names_secret, without_secrets};
use crate::objects::{self, EVERYTHING, Known};

/// Bytes of request data in a row.
pub(super) const MAX_DATA: usize = 4096;
/// Stands for the value of a member that the request's type does not know, and for the rest of what is cut.
pub(crate) const UNKNOWN: &str = "…";
/// Bytes of a text that are looked at past those that are shown: a token may begin there.
const LOOK_AHEAD: usize = 8192;

/// Request data that can stand in a row: its secrets are hidden, and its size is bounded.
#[derive(Debug, Clone)]
pub(crate) struct Recorded(Box<RawValue>);

impl Recorded {
    /// Of a text that was, or would have been, read into a `T`.
    pub(crate) fn input<T: DeserializeOwned>(text: &str) -> Self {
        Self::known(text, &objects::known::<T>(text))
    }

    /// Of a document whose members are all known.
    pub(crate) fn document(text: &str) -> Self {
        Self::known(text, &EVERYTHING)
    }

    /// Of what this server says itself, which has no secrets.
    pub(crate) fn own(value: Value) -> Self {
        Self(printed(&bounded(value)))
    }

    fn known(text: &str, known: &Known) -> Self {
        let mut last = json!({ "_omitted_bytes": text.len() });
        for limits in STEPS {
            match Look::within(limits, text, known) {
                Looked::At(value) => {
                    let printed = printed(&value);
                    if printed.get().len() <= MAX_DATA {
                        return Self(printed);
                    }
                    last = value;
                }
                Looked::TooMuch => {}
                Looked::Unreadable => return Self(printed(&unreadable(text.len()))),
            }
        }
        Self(printed(&bounded(last)))
    }

    pub(super) fn json(&self) -> Box<RawValue> {
        self.0.clone()
    }
}

impl Deref for Recorded {
    type Target = str;

    fn deref(&self) -> &str {
        self.0.get()
    }
}

/// How much of a value is shown.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes of a text, and of a name.
    text: usize,
    /// Items of an array, and members that are not those of a type.
    items: usize,
    /// Objects and arrays within each other.
    depth: usize,
}

/// From what fits most often to what always does, but for a type with very many members.
const STEPS: [Limits; 4] = [
    Limits { text: MAX_DATA, items: 1000, depth: 64 },
    Limits { text: 1024, items: 64, depth: 16 },
    Limits { text: 128, items: 12, depth: 6 },
    Limits { text: 32, items: 3, depth: 3 },
];

/// What came of a look at a text.
enum Looked {
    At(Value),
    TooMuch,
    Unreadable,
}

fn printed(value: &Value) -> Box<RawValue> {
    to_raw_value(value).expect("a JSON value is written as JSON")
}

/// Bytes after which a value is known not to fit; a step that comes to them is given up.
const MOST: usize = 4 * MAX_DATA;

/// Such as a number that no type holds: what is not understood may hold anything.
fn unreadable(bytes: usize) -> Value {
    json!({ "_unreadable_bytes": bytes })
}

/// As many members as fit: numbers first, for ids are numbers.
fn bounded(value: Value) -> Value {
    let bytes = value.to_string().len();
    if bytes <= MAX_DATA {
        return value;
    }
    let Value::Object(members) = value else { return json!({ "_omitted_bytes": bytes }) };
    let all = members.len();
    let mut members: Vec<_> = members.into_iter().collect();
    members.sort_by_key(|(_, value)| match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) if text != UNKNOWN => 1,
        Value::Array(_) | Value::Object(_) => 2,
        Value::String(_) => 3,
    });
    let mut shown = Map::new();
    let mut left = MAX_DATA - 64;
    for (name, value) in members {
        // Quotes, a colon and a comma; a name may grow when it is escaped.
        let bytes = json!(name).to_string().len() + value.to_string().len() + 2;
        if bytes <= left {
            left -= bytes;
            shown.insert(name, value);
        }
    }
    let more = all - shown.len();
    shown.insert(UNKNOWN.to_owned(), rest(more));
    Value::Object(shown)
}

/// Stands for what is left out of an object or array.
fn rest(more: usize) -> Value {
    format!("{UNKNOWN} {more} more").into()
}

/// Postgres holds no NUL.
pub(super) fn storable(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text }
}

/// A look at one value, which makes a [`Value`] of what may be shown of it.
#[derive(Clone, Copy)]
struct Look<'k> {
    /// What the type knows of it; none where it has not come here, or has read a number or a text.
    known: Option<&'k Known>,
    /// Whether the text is read in one go; else its members are read one by one, and those that cannot be
    /// read are named.
    whole: bool,
    limits: Limits,
    spent: &'k Cell<usize>,
    depth: usize,
}

impl Look<'_> {
    /// Looks at a whole document.
    fn within(limits: Limits, text: &str, known: &Known) -> Looked {
        let spent = Cell::new(0);
        for whole in [true, false] {
            spent.set(0);
            let look = Look { known: Some(known), whole, limits, spent: &spent, depth: 0 };
            match look.at(text) {
                Ok(value) => return Looked::At(value),
                Err(_) if spent.get() > MOST => return Looked::TooMuch,
                Err(_) => {}
            }
        }
        Looked::Unreadable
    }

    fn at(self, text: &str) -> serde_json::Result<Value> {
        let mut reader = serde_json::Deserializer::from_str(text);
        let value = self.deserialize(&mut reader)?;
        reader.end()?;
        Ok(value)
    }

    fn is_free(&self) -> bool {
        self.known.is_some_and(Known::is_everything)
    }

    fn below(&self, place: usize) -> Self {
        let known = match self.known {
            Some(known) if known.is_everything() => Some(known),
            Some(known) => known.at(place),
            None => None,
        };
        Self { known, whole: true, depth: self.depth + 1, ..*self }
    }

    fn spend<E: Error>(&self, bytes: usize) -> Result<(), E> {
        self.spent.set(self.spent.get() + bytes);
        if self.spent.get() > MOST { Err(E::custom("too much")) } else { Ok(()) }
    }

    fn text<E: Error>(&self, text: &str) -> Result<Value, E> {
        let start = text.trim_start();
        let shown = match start.starts_with(['{', '[', '"']) {
            true => self.inner(text)?,
            false => without_secrets(self.beginning(text)),
        };
        let cut = self.cut(shown, text.len());
        self.spend(cut.len() + 3)?;
        Ok(storable(cut).into())
    }

    /// JSON within JSON.
    fn inner<'t, E: Error>(&self, text: &'t str) -> Result<Cow<'t, str>, E> {
        let look = Self { known: Some(&EVERYTHING), whole: true, ..*self };
        match look.at(text) {
            Ok(value) => Ok(value.to_string().into()),
            Err(_) if self.spent.get() > MOST => Err(E::custom("too much")),
            Err(_) => {
                let beginning = self.beginning(text);
                let hides = names_secret(beginning);
                Ok(if hides { HIDDEN.into() } else { without_secrets(beginning) })
            }
        }
    }

    /// All of a text that can have a part in what is shown.
    fn beginning<'t>(&self, text: &'t str) -> &'t str {
        &text[..text.floor_char_boundary(self.limits.text + LOOK_AHEAD)]
    }

    fn cut<'t>(&self, shown: Cow<'t, str>, bytes: usize) -> Cow<'t, str> {
        if shown.len() <= self.limits.text {
            return shown;
        }
        let end = shown.floor_char_boundary(self.limits.text);
        format!("{}{UNKNOWN} ({bytes} bytes)", &shown[..end]).into()
    }

    /// A member's name: unlike any that stands there already, and without secrets.
    fn name<E: Error>(
        &self,
        name: &str,
        place: usize,
        taken: &Map<String, Value>,
    ) -> Result<String, E> {
        let shown = self.cut(without_secrets(self.beginning(name)), name.len());
        let shown = storable(shown).into_owned();
        self.spend(shown.len() + 3)?;
        if !taken.contains_key(&shown) {
            return Ok(shown);
        }
        let mut numbered = (place + 1..).map(|number| format!("{shown}#{number}"));
        Ok(numbered.find(|name| !taken.contains_key(name)).unwrap_or(shown))
    }

    fn member<'de, A: MapAccess<'de>>(
        &self,
        name: &str,
        place: usize,
        members: &mut A,
    ) -> Result<Value, A::Error> {
        if is_secret(name) {
            members.next_value::<IgnoredAny>()?;
            return Ok(HIDDEN.into());
        }
        if !self.known.is_some_and(|known| known.has(name)) {
            members.next_value::<IgnoredAny>()?;
            return Ok(UNKNOWN.into());
        }
        let below = self.below(place);
        if self.whole {
            return members.next_value_seed(below);
        }
        let raw = members.next_value::<Box<RawValue>>()?;
        Ok(below.at(raw.get()).unwrap_or_else(|_| unreadable(raw.get().len())))
    }
}

impl<'de> DeserializeSeed<'de> for Look<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Look<'_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("any JSON value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.spend(5)?;
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.spend(8)?;
        Ok(if is_card_number(value) { HIDDEN.into() } else { value.into() })
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.spend(8)?;
        Ok(if is_card_number(value.unsigned_abs()) { HIDDEN.into() } else { value.into() })
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.spend(8)?;
        // Past these digits a float is exact, or rounded: `4.111111111111111e15`.
        let is_card = value.fract() == 0.0 && is_card_number(value.abs() as u64);
        Ok(if is_card { HIDDEN.into() } else { value.into() })
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.spend(5)?;
        Ok(Value::Null)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        self.text(text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.spend(3)?;
        let is_known = self.is_free() || self.known.is_some_and(Known::has_items);
        let most = if is_known && self.depth < self.limits.depth { self.limits.items } else { 0 };
        let mut shown = Vec::new();
        while shown.len() < most {
            match items.next_element_seed(self.below(shown.len()))? {
                Some(item) => shown.push(item),
                None => return Ok(Value::Array(shown)),
            }
        }
        let mut more = 0;
        while items.next_element::<IgnoredAny>()?.is_some() {
            more += 1;
        }
        if !is_known {
            return Ok(UNKNOWN.into());
        }
        if more > 0 {
            shown.push(rest(more));
        }
        Ok(Value::Array(shown))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        self.spend(3)?;
        let names = self.known.and_then(Known::names).unwrap_or_default();
        let most = if self.depth < self.limits.depth { self.limits.items } else { 0 };
        let mut shown = Map::new();
        let (mut others, mut more, mut place) = (0, 0, 0);
        while let Some(name) = members.next_key::<String>()? {
            // Those of the type are few, and the id is one of them: they stay whatever comes before them.
            if names.contains(&&*name) && !shown.contains_key(&name) {
                let value = self.member(&name, place, &mut members)?;
                self.spend(name.len() + 3)?;
                shown.insert(name, value);
            } else if others < most {
                others += 1;
                let value = self.member(&name, place, &mut members)?;
                shown.insert(self.name(&name, place, &shown)?, value);
            } else {
                more += 1;
                members.next_value::<IgnoredAny>()?;
            }
            place += 1;
        }
        if more > 0 {
            shown.insert(UNKNOWN.to_owned(), rest(more));
        }
        Ok(Value::Object(shown))
    }
}

#[cfg(test)]
mod tests;
