//! What the trail never shows: members whose names sound like secrets, and values that look like a token
//! or a card number, whatever their name.

use std::{borrow::Cow, ops::Range, sync::LazyLock};

use base64::{Engine as _, alphabet, engine};
use serde_json::{Map, Value};
use uuid::Uuid;

/// Stands for what is hidden.
pub(super) const HIDDEN: &str = "***";

/// Where a word makes a name one of a secret. Names are compared in lower case, letters alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Anywhere: no other word has it in it, but for [`PLAIN`].
    Anywhere,
    /// At the beginning or at the end.
    Ends,
    /// As a word of its own: `userPin`, `PIN_1`; not `spin`.
    Word,
}

use Place::{Anywhere, Ends, Word};

const SECRETS: &[(Place, &[&str])] = &[
    (
        Anywhere,
        &[
            "passw",
            "pasword",
            "passphrase",
            "passcode",
            "passkey",
            "kennwort",
            "contrasena",
            "contraseña",
            "motdepasse",
            "wachtwoord",
            "пароль",
            "パスワード",
            "hasło",
            "haslo",
            "şifre",
            "sifre",
            "geheim",
            "密码",
            "token",
            "secret",
            "authorization",
            "credential",
            "bearer",
            "apikey",
            "accesskey",
            "privatekey",
            "privkey",
            "signingkey",
            "encryptionkey",
            "seedphrase",
            "mnemonic",
            "onetimecode",
            "recoverycode",
            "backupcode",
            "securitycode",
            "verificationcode",
            "socialsecurity",
            "pincode",
            "pinnumber",
            "userpin",
            "newpin",
            "oldpin",
            "sessionid",
            "sessid",
            "setcookie",
            "cookievalue",
            "card",
        ],
    ),
    (Ends, &["cvv", "cvc", "ssn", "pwd", "otp", "iban", "session"]),
    (
        Word,
        &[
            "pass", "pw", "auth", "pin", "pins", "puk", "tan", "totp", "hotp", "mfa", "jwt",
            "cookie", "cookies", "sessions", "sid", "csc", "csrf", "xsrf", "parola", "senha",
        ],
    ),
];

/// A secret at the end of a name: `dbpass`. At its beginning it is one as a word alone: not `passenger`.
const PASS: &str = "pass";

/// Have one of the above in them, and are no secrets.
const PLAIN: &[&str] = &[
    "discard",
    "postcard",
    "wildcard",
    "scorecard",
    "cardinal",
    "cardio",
    "cardiac",
    "compass",
    "bypass",
    "overpass",
    "underpass",
    "surpass",
    "trespass",
    "possession",
    "obsession",
    "taliban",
    "caliban",
    "ibanez",
];

/// [`SECRETS`] by their first byte: this is looked up for each letter of each name.
static BY_FIRST: LazyLock<[Vec<(&'static str, Place)>; 256]> = LazyLock::new(|| {
    let mut all = [const { Vec::new() }; 256];
    for (place, words) in SECRETS {
        for word in *words {
            all[usize::from(word.as_bytes()[0])].push((*word, *place));
        }
    }
    all
});

/// Whether a member of this name is hidden.
pub(super) fn is_secret(name: &str) -> bool {
    let letters: String =
        name.chars().filter(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect();
    let (found, may_be_word) = look_at(&letters, |_| false);
    // Here and below, what copies is left to the few names that call for it.
    if may_be_word {
        // Whatever its case: `pIN` is no camel.
        let whole = name.to_lowercase();
        let mut apart = whole.split(|c: char| !c.is_alphabetic());
        if apart.any(is_secret_word) || words(name).iter().any(|word| is_secret_word(word)) {
            return true;
        }
    }
    found && look_at(&letters, |secret| is_plain(&letters, &secret)).0
}

/// Whether a part of a name is only a part of a word in [`PLAIN`]: `passw` is none of `surpass` in `surPassword`.
fn is_plain(letters: &str, part: &Range<usize>) -> bool {
    PLAIN.iter().any(|plain| {
        let mut places = letters.match_indices(plain);
        places.any(|(at, _)| at <= part.start && part.end <= at + plain.len())
    })
}

/// Whether there is a secret in it that is not `left_out`, and whether there may be one that counts as a word alone.
fn look_at(letters: &str, left_out: impl Fn(Range<usize>) -> bool) -> (bool, bool) {
    let end = letters.len();
    let mut found = letters.ends_with(PASS) && !left_out(end - PASS.len()..end);
    let mut may_be_word = false;
    for (at, first) in letters.bytes().enumerate() {
        for (word, place) in &BY_FIRST[usize::from(first)] {
            let here = &letters.as_bytes()[at..];
            if here.starts_with(word.as_bytes()) {
                let counts = match place {
                    Anywhere => true,
                    Ends => at == 0 || here.len() == word.len(),
                    Word => false,
                };
                may_be_word |= *place != Anywhere;
                found |= counts && !left_out(at..at + word.len());
            }
        }
    }
    (found, may_be_word)
}

fn is_secret_word(word: &str) -> bool {
    let Some(first) = word.bytes().next() else { return false };
    BY_FIRST[usize::from(first)].iter().any(|(secret, place)| *place != Anywhere && *secret == word)
}

/// The words of `card_number`, `cardNumber`, `CARD-NUMBER` or `CARDNumber`, in lower case.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    let mut letters = name.chars().peekable();
    while let Some(c) = letters.next() {
        let ends_capitals =
            before.is_uppercase() && letters.peek().is_some_and(|next| next.is_lowercase());
        let begins =
            !c.is_alphabetic() || (c.is_uppercase() && (before.is_lowercase() || ends_capitals));
        if begins {
            words.push(String::new());
        }
        if c.is_alphabetic()
            && let Some(word) = words.last_mut()
        {
            word.extend(c.to_lowercase());
        }
        before = c;
    }
    words
}

/// Whether a text that is no JSON, though it begins like it, names a secret.
pub(super) fn names_secret(text: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    text.split(|c| !is_part(c)).any(is_secret)
}

/// A text without its tokens and card numbers.
pub(super) fn without_secrets(text: &str) -> Cow<'_, str> {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let mut hidden = if text.contains('.') { tokens(text) } else { Vec::new() };
    if digits >= CARD_DIGITS.start {
        hidden.extend(cards(text));
    }
    if hidden.is_empty() {
        return text.into();
    }
    hidden.sort_unstable_by_key(|range| range.start);
    let (mut shown, mut end) = (String::new(), 0);
    for range in hidden {
        if range.start >= end {
            shown.push_str(&text[end..range.start]);
            shown.push_str(HIDDEN);
        }
        end = end.max(range.end);
    }
    shown.push_str(&text[end..]);
    shown.into()
}

/// The path of a request without them; decoded only where it has some.
pub(crate) fn path_without_secrets(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return without_secrets(path);
    }
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    match without_secrets(&decoded) {
        Cow::Owned(shown) => shown.into(),
        Cow::Borrowed(_) => path.into(),
    }
}

/// The shortest header of a token: `{"alg":""}`.
const MIN_HEADER: usize = 14;

/// JWTs, with all that their dots hold together. Two parts will do: a text may be cut in the third.
fn tokens(text: &str) -> Vec<Range<usize>> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let mut found = Vec::new();
    let mut start = 0;
    for run in text.split(|c| !is_part(c)) {
        let mut at = start;
        for part in run.split('.') {
            let has_next = run[at - start + part.len()..].len() > 1;
            if let Some(header) = header(part).filter(|_| has_next) {
                found.push(at + header..start + run.len());
                break;
            }
            at += part.len() + 1;
        }
        start += run.len();
        start += text[start..].chars().next().map_or(0, char::len_utf8);
    }
    found
}

/// Where in a part the header of a token begins, up to its end.
fn header(part: &str) -> Option<usize> {
    // What `{` and a quote or a blank begin with in this encoding.
    let begins = part.match_indices("ey").chain(part.match_indices("ew")).map(|(at, _)| at);
    begins.filter(|at| part.len() - at >= MIN_HEADER).take(8).find(|at| is_header(&part[*at..]))
}

fn is_header(part: &str) -> bool {
    const LENIENT: engine::GeneralPurpose = engine::GeneralPurpose::new(
        &alphabet::URL_SAFE,
        engine::GeneralPurposeConfig::new()
            .with_decode_allow_trailing_bits(true)
            .with_decode_padding_mode(engine::DecodePaddingMode::Indifferent),
    );
    let header = LENIENT.decode(part).ok();
    let header = header.and_then(|text| serde_json::from_slice::<Map<String, Value>>(&text).ok());
    header.is_some_and(|members| members.contains_key("alg"))
}

/// How many digits a card number has.
const CARD_DIGITS: Range<usize> = 13..20;

/// Card numbers: digits in groups, as far as a checksum holds for some of them.
fn cards(text: &str) -> Vec<Range<usize>> {
    let groups = groups(text);
    let mut found: Vec<Range<usize>> = Vec::new();
    for (first, group) in groups.iter().enumerate() {
        if found.last().is_some_and(|card| group.start < card.end) {
            continue;
        }
        let mut digits = Vec::with_capacity(CARD_DIGITS.end);
        for (i, part) in groups[first..].iter().enumerate() {
            if i > 0 && !is_separator(&text[groups[first + i - 1].end..part.start]) {
                break;
            }
            digits
                .extend(text[part.clone()].bytes().take(CARD_DIGITS.end).map(|digit| digit - b'0'));
            if digits.len() >= CARD_DIGITS.end {
                break;
            }
            if is_card(&digits) && (i == 0 || stands_alone(text, group.start..part.end)) {
                found.push(group.start..part.end);
                break;
            }
        }
    }
    found
}

fn groups(text: &str) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (at, byte) in text.bytes().enumerate() {
        if byte.is_ascii_digit() {
            match groups.last_mut() {
                Some(group) if group.end == at => group.end += 1,
                _ => groups.push(at..at + 1),
            }
        }
    }
    groups
}

fn is_separator(between: &str) -> bool {
    between.len() <= 4
        && between.chars().all(|c| matches!(c, ' ' | '-' | '.' | '_' | '+' | '\u{a0}'))
}

/// Whether groups of digits are no part of a word, and of no UUID.
fn stands_alone(text: &str, groups: Range<usize>) -> bool {
    let before = text[..groups.start].chars().next_back();
    let after = text[groups.end..].chars().next();
    if before.is_some_and(char::is_alphanumeric) || after.is_some_and(char::is_alphanumeric) {
        return false;
    }
    let is_part = |c: char| c.is_ascii_hexdigit() || c == '-';
    let start = text[..groups.start]
        .rfind(|c| !is_part(c))
        .map_or(0, |at| at + text[at..].chars().next().map_or(0, char::len_utf8));
    let end = text[groups.end..].find(|c| !is_part(c)).map_or(text.len(), |at| groups.end + at);
    Uuid::try_parse(&text[start..end]).is_err()
}

/// Whether digits are a card number: 13 to 19 that pass the checksum of Luhn. None begins with 0 or 1, as
/// times in milliseconds do.
fn is_card(digits: &[u8]) -> bool {
    if !CARD_DIGITS.contains(&digits.len()) || digits[0] <= 1 {
        return false;
    }
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, digit)| match u32::from(*digit) * (1 + place as u32 % 2) {
            doubled if doubled > 9 => doubled - 9,
            single => single,
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Whether a number is one of a card.
pub(super) fn is_card_number(number: u64) -> bool {
    // The least of 13 digits.
    number >= 1_000_000_000_000 && {
        let digits: Vec<u8> = number.to_string().bytes().map(|digit| digit - b'0').collect();
        is_card(&digits)
    }
}

#[cfg(test)]
mod tests;
