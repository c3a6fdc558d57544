//! What the connections of a [`Client`](crate::client::Client) send, encoded once.
//!
//! A request is a copy of its package's template. Its `req_id` ends in the number of its slot, so that an
//! answer says which slot is free again. Over REST there is one slot, and no `req_id`.

use std::{io::Write as _, sync::LazyLock};

use anyhow::{Context as _, bail, ensure};
use memchr::memmem::{self, Finder};

use crate::{
    frame,
    mix::{Mix, Part},
};

/// Requests that one connection can have in flight: the bits of a `u64`.
pub(crate) const MAX_IN_FLIGHT: usize = 64;

/// A `req_id` but for its first eight digits and its last two, the slot in hexadecimal.
const REQ_ID: &str = "-0000-4000-8000-0000000000";
static REQ_ID_FINDER: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(REQ_ID));
static STATUS_OK: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(r#""status_code":0"#));
/// The tag of `status_code` in protobuf, which is left out where it is 0.
const STATUS_TAG: u8 = 3 << 3;

/// Stands for eight digits that no two requests share.
const UNIQUE: &str = "########";

/// How requests travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wire {
    /// WebSocket, text frames
    Json,
    /// WebSocket, binary frames
    Protobuf,
    /// HTTP, one request at a time on each connection
    Rest,
    /// Text frames that come back as they are, from servers that know no status
    #[value(skip)]
    Echo,
}

impl Wire {
    /// The name by which it is chosen.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Protobuf => "protobuf",
            Self::Rest => "rest",
            Self::Echo => "echo",
        }
    }

    /// Requests that a connection can have in flight.
    pub(crate) fn slots(self) -> usize {
        if self == Self::Rest { 1 } else { MAX_IN_FLIGHT }
    }
}

/// A request before its numbers are put in.
struct Template {
    /// What stands before a token; empty where none does.
    before: Vec<u8>,
    /// The frame, or what stands behind the token.
    after: Vec<u8>,
    /// Where in `after` the slot goes.
    slot: Option<usize>,
    /// Where in `after` unique digits go.
    unique: Vec<usize>,
}

/// The upgrade request, and what follows it.
pub(crate) struct Script {
    pub(crate) wire: Wire,
    host: String,
    upgrade: Vec<u8>,
    tokens: Vec<String>,
    templates: Vec<Template>,
    /// Indices of `templates` as often as their weight says, in the order they are sent in.
    deck: Vec<u8>,
    next: usize,
    number: u32,
}

impl Script {
    /// For the server that is called `host`.
    pub(crate) fn new(
        host: &str,
        wire: Wire,
        tokens: &[String],
        mix: &Mix,
    ) -> anyhow::Result<Self> {
        ensure!(!tokens.is_empty(), "there is no token to authenticate with");
        let format = if wire == Wire::Protobuf { "?format=protobuf" } else { "" };
        let upgrade = format!(
            "GET /web{format} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Version: 13\r\n\r\n"
        );
        let mut script = Self {
            wire,
            host: host.to_owned(),
            upgrade: upgrade.into(),
            tokens: tokens.to_vec(),
            templates: Vec::new(),
            deck: Vec::new(),
            next: 0,
            // Of a clock, so that a second run on the same database makes other names.
            number: jiff::Timestamp::now().as_microsecond() as u32,
        };
        script.ask_for(mix)?;
        Ok(script)
    }

    /// Changes what requests ask for.
    pub(crate) fn ask_for(&mut self, mix: &Mix) -> anyhow::Result<()> {
        let template = |part: &Part| match self.wire {
            Wire::Json | Wire::Echo => Ok(json(part)),
            Wire::Protobuf => Ok(protobuf(part)),
            Wire::Rest => rest(part, &self.host),
        };
        self.templates = mix.parts().iter().map(template).collect::<anyhow::Result<_>>()?;
        self.deck = mix.deck();
        self.next = 0;
        Ok(())
    }

    pub(crate) fn upgrade(&self) -> &[u8] {
        &self.upgrade
    }

    /// Appends the auth frame. Users beyond the last token start again with the first.
    pub(crate) fn auth(&self, user: usize, out: &mut Vec<u8>) {
        let token = &self.tokens[user % self.tokens.len()];
        let message = format!(r#"{{"type":"auth","token":"Bearer {token}"}}"#);
        frame::encode(frame::TEXT, message.as_bytes(), out);
    }

    /// Appends the next request; returns the index of its package in the mix.
    pub(crate) fn request(&mut self, user: usize, slot: usize, out: &mut Vec<u8>) -> u8 {
        let package = self.deck[self.next];
        self.next = (self.next + 1) % self.deck.len();
        let template = &self.templates[usize::from(package)];
        if !template.before.is_empty() {
            out.extend_from_slice(&template.before);
            out.extend_from_slice(self.tokens[user % self.tokens.len()].as_bytes());
        }
        let start = out.len();
        out.extend_from_slice(&template.after);
        let after = &mut out[start..];
        if let Some(at) = template.slot {
            put(&mut after[at..], format_args!("{slot:02x}"));
        }
        if !template.unique.is_empty() {
            self.number = self.number.wrapping_add(1);
            // A multiplication by an odd number maps no two numbers to one, and leaves no order: an
            // index has to put a name anywhere, as it does real ones.
            let number = self.number.wrapping_mul(0x9e37_79b9);
            for at in &template.unique {
                put(&mut after[*at..], format_args!("{number:08x}"));
            }
        }
        package
    }
}

fn put(mut out: &mut [u8], digits: std::fmt::Arguments<'_>) {
    out.write_fmt(digits).expect("there is room for the digits");
}

fn req_id(part: &Part) -> String {
    let begin = if part.data.contains(UNIQUE) { UNIQUE } else { "00000000" };
    format!("{begin}{REQ_ID}00")
}

fn json(part: &Part) -> Template {
    let Part { package, data, .. } = part;
    let message = format!(r#"{{"pkg_id":{package},"req_id":"{}","data":{data}}}"#, req_id(part));
    let mut frame = Vec::new();
    frame::encode(frame::TEXT, message.as_bytes(), &mut frame);
    template(Vec::new(), frame)
}

/// The `Request` of proto/switchboard.proto.
fn protobuf(part: &Part) -> Template {
    let mut message = vec![1 << 3];
    // A negative number takes ten bytes, as those of 64 bits do.
    varint(i64::from(part.package) as u64, &mut message);
    for (field, text) in [(2, &*req_id(part)), (4, &*part.data)] {
        message.push(field << 3 | 2);
        varint(text.len() as u64, &mut message);
        message.extend_from_slice(text.as_bytes());
    }
    let mut frame = Vec::new();
    frame::encode(frame::BINARY, &message, &mut frame);
    template(Vec::new(), frame)
}

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// The route that does what the package does.
fn rest(part: &Part, host: &str) -> anyhow::Result<Template> {
    let (route, body) = match part.package {
        1 => ("GET /authors", ""),
        2 => ("GET /authors/paginated", ""),
        3 => ("POST /authors", &*part.data),
        other => bail!("package {other} has no route here: over REST there are 1, 2 and 3"),
    };
    let before = format!("{route} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer ");
    let length = body.len();
    let after = match body {
        "" => "\r\n\r\n".to_owned(),
        body => {
            format!("\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
        }
    };
    Ok(template(before.into(), after.into()))
}

fn template(before: Vec<u8>, after: Vec<u8>) -> Template {
    let slot = REQ_ID_FINDER.find(&after).map(|at| at + REQ_ID.len());
    let unique = memmem::find_iter(&after, UNIQUE).collect();
    Template { before, after, slot, unique }
}

/// An answer to a request of a script.
pub(crate) struct Answer {
    pub(crate) slot: usize,
    pub(crate) ok: bool,
}

/// Reads a data frame; `None` if it answers no request of a script.
pub(crate) fn answer(payload: &[u8], wire: Wire) -> Option<Answer> {
    let end = REQ_ID_FINDER.find(payload)? + REQ_ID.len();
    let digits = std::str::from_utf8(payload.get(end..end + 2)?).ok()?;
    let slot = usize::from_str_radix(digits, 16).ok().filter(|slot| *slot < MAX_IN_FLIGHT)?;
    let ok = match wire {
        Wire::Protobuf => payload.get(end + 2) != Some(&STATUS_TAG),
        Wire::Echo => true,
        Wire::Json | Wire::Rest => STATUS_OK.find(&payload[end..]).is_some(),
    };
    Some(Answer { slot, ok })
}

/// A member of text in a JSON object: `code` of an error, in whichever format.
pub(crate) fn member<'a>(payload: &'a [u8], name: &str) -> Option<&'a str> {
    let name = format!(r#""{name}":""#);
    let rest = &payload[memmem::find(payload, name.as_bytes())? + name.len()..];
    std::str::from_utf8(&rest[..memchr::memchr(b'"', rest)?]).ok()
}

/// A member that is a whole number.
pub(crate) fn number(payload: &[u8], name: &str) -> anyhow::Result<u64> {
    let name = format!(r#""{name}":"#);
    let start = memmem::find(payload, name.as_bytes()).context("a member is missing")? + name.len();
    let digits = payload[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    Ok(std::str::from_utf8(&payload[start..start + digits])?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "127.0.0.1:80";

    fn request(wire: Wire, mix: &str, slot: usize) -> Vec<u8> {
        let mix = Mix::parse(mix).unwrap();
        let mut script = Script::new(HOST, wire, &["token".to_owned()], &mix).unwrap();
        let mut out = Vec::new();
        script.request(0, slot, &mut out);
        out
    }

    #[test]
    fn an_answer_names_the_slot_of_its_request() {
        for expected in 0..MAX_IN_FLIGHT {
            for wire in [Wire::Json, Wire::Protobuf] {
                for mix in ["100=1", "1=1", "3=1"] {
                    let answer = answer(&request(wire, mix, expected), wire).unwrap();
                    assert_eq!(answer.slot, expected);
                }
            }
        }
    }

    #[test]
    fn no_two_authors_have_a_name_or_a_request_id_in_common() {
        let mix = Mix::parse("3=1").unwrap();
        let mut script = Script::new(HOST, Wire::Json, &["token".to_owned()], &mix).unwrap();
        let [one, other] = [0, 0].map(|slot| {
            let mut out = Vec::new();
            script.request(0, slot, &mut out);
            String::from_utf8_lossy(&out).into_owned()
        });
        assert!(!one.contains('#'), "{one}");
        for member in ["req_id\":\"", "Author "] {
            let digits = |text: &str| {
                let at = text.find(member).unwrap() + member.len();
                text[at..at + UNIQUE.len()].to_owned()
            };
            assert_ne!(digits(&one), digits(&other), "{member}");
        }
    }

    #[test]
    fn a_push_and_a_foreign_answer_free_no_slot() {
        for payload in [
            r#"{"pkg_id":3,"req_id":"00000000-0000-0000-0000-000000000000","data":{}}"#,
            r#"{"pkg_id":3,"req_id":"00000000-0000-4000-8000-0000000000ff","data":{}}"#,
            r#"{"req_id":"00000000-0000-4000-8000-0000000000"#,
        ] {
            assert!(answer(payload.as_bytes(), Wire::Json).is_none(), "{payload}");
        }
    }

    #[test]
    fn a_refusal_is_told_from_a_success_in_both_formats() {
        let refused =
            r#"{"pkg_id":1,"req_id":"00000000-0000-4000-8000-000000000000","status_code":1}"#;
        assert!(!answer(refused.as_bytes(), Wire::Json).unwrap().ok);
        let id = "00000000-0000-4000-8000-000000000000";
        let with = |status: &[u8]| [b"\x08\x01\x12\x24", id.as_bytes(), status].concat();
        assert!(answer(&with(b"\x22\x02{}"), Wire::Protobuf).unwrap().ok);
        assert!(!answer(&with(b"\x18\x01\x22\x02{}"), Wire::Protobuf).unwrap().ok);
    }

    #[test]
    fn a_rest_request_has_its_token_and_the_length_of_its_body() {
        let request = String::from_utf8(request(Wire::Rest, "3=1", 0)).unwrap();
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /authors HTTP/1.1\r\nHost: 127.0.0.1:80\r\n"), "{head}");
        assert!(head.contains("\r\nAuthorization: Bearer token\r\n"), "{head}");
        assert!(head.ends_with(&format!("\r\nContent-Length: {}", body.len())), "{head}");
        let mix = Mix::parse("100=1").unwrap();
        assert!(Script::new(HOST, Wire::Rest, &["token".to_owned()], &mix).is_err());
    }

    #[test]
    fn members_are_read_from_the_middle_of_a_frame() {
        let frame = br#"x{"code":"conflict","retry_after_ms":42}"#;
        assert_eq!(member(frame, "code"), Some("conflict"));
        assert_eq!(number(frame, "retry_after_ms").unwrap(), 42);
        assert_eq!(member(frame, "msg"), None);
    }
}
