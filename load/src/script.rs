//! What the connections of a [`Client`](crate::client::Client) send, encoded once.
//!
//! A request's `req_id` ends in the number of its slot, so that each slot has one frame: sending is a
//! copy, and an answer says which slot is free again.

use std::{
    io::Write as _,
    net::SocketAddr,
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
};

use memchr::memmem::{self, Finder};

use crate::frame;

/// Requests that one connection can have in flight: the bits of a `u64`.
pub(crate) const MAX_IN_FLIGHT: usize = 64;

/// A `req_id` but for its first eight digits and its last two, the slot in hexadecimal.
const REQ_ID: &str = "-0000-4000-8000-0000000000";
static REQ_ID_FINDER: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(REQ_ID));

/// Stands for eight digits that no two requests share.
const UNIQUE: &str = "########";

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Package {
    Echo,
    GetAuthors,
    CreateAuthor,
}

impl Package {
    fn request(self, slot: usize) -> String {
        let (package, begin, data) = match self {
            Self::Echo => (100, "00000000", "{}"),
            Self::GetAuthors => (1, "00000000", "{}"),
            Self::CreateAuthor => (3, UNIQUE, r#"{"name":"Author ########"}"#),
        };
        format!(r#"{{"pkg_id":{package},"req_id":"{begin}{REQ_ID}{slot:02x}","data":{data}}}"#)
    }
}

/// The upgrade request and the frames.
pub(crate) struct Script {
    upgrade: Vec<u8>,
    /// A frame for each token.
    auth: Vec<Vec<u8>>,
    /// A frame for each slot.
    requests: Vec<Vec<u8>>,
    /// Where in a request unique digits go.
    unique: Vec<usize>,
}

impl Script {
    /// Requests of package 100 (echo) with an empty object.
    pub(crate) fn new(server: SocketAddr, tokens: &[String]) -> Self {
        let upgrade = format!(
            "GET /web HTTP/1.1\r\nHost: {server}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        let auth = |token| text(&format!(r#"{{"type":"auth","token":"Bearer {token}"}}"#));
        let auth = tokens.iter().map(auth).collect();
        let (requests, unique) = (Vec::new(), Vec::new());
        let mut script = Self { upgrade: upgrade.into(), auth, requests, unique };
        script.ask_for(Package::Echo);
        script
    }

    /// Changes what requests ask for.
    pub(crate) fn ask_for(&mut self, package: Package) {
        let request = |slot| text(&package.request(slot));
        self.requests = (0..MAX_IN_FLIGHT).map(request).collect();
        self.unique = memmem::find_iter(&self.requests[0], UNIQUE).collect();
    }

    pub(crate) fn upgrade(&self) -> &[u8] {
        &self.upgrade
    }

    /// Connections beyond the last token start again with the first.
    pub(crate) fn auth(&self, connection: usize) -> &[u8] {
        &self.auth[connection % self.auth.len()]
    }

    /// Appends the frame of a request.
    pub(crate) fn request(&self, slot: usize, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.requests[slot]);
        if self.unique.is_empty() {
            return;
        }
        let number = unique();
        for at in &self.unique {
            let mut digits = &mut out[start + at..];
            write!(digits, "{number:08x}").expect("there is room for eight digits");
        }
    }
}

/// Comes once in four billion, in no order: an index has to put it anywhere, as it does real names.
fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // A multiplication by an odd number maps no two numbers to one.
    NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9)
}

fn text(message: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    frame::encode(frame::TEXT, message.as_bytes(), &mut frame);
    frame
}

/// The slot that an answer frees; `None` if it answers no request of a script.
pub(crate) fn slot(answer: &[u8]) -> Option<usize> {
    let digits = REQ_ID_FINDER.find(answer)? + REQ_ID.len();
    let digits = std::str::from_utf8(answer.get(digits..digits + 2)?).ok()?;
    usize::from_str_radix(digits, 16).ok().filter(|slot| *slot < MAX_IN_FLIGHT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(package: Package, slot: usize) -> Vec<u8> {
        let mut script = Script::new(([127, 0, 0, 1], 80).into(), &["token".to_owned()]);
        script.ask_for(package);
        let mut out = Vec::new();
        script.request(slot, &mut out);
        out
    }

    #[test]
    fn an_answer_names_the_slot_of_its_request() {
        for expected in 0..MAX_IN_FLIGHT {
            for package in [Package::Echo, Package::GetAuthors, Package::CreateAuthor] {
                assert_eq!(slot(&request(package, expected)), Some(expected));
            }
        }
    }

    #[test]
    fn no_two_authors_have_a_name_or_a_request_id_in_common() {
        let [one, other] = [0, 0].map(|slot| request(Package::CreateAuthor, slot));
        let [one, other] = [&one, &other].map(|frame| String::from_utf8_lossy(frame));
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
        for answer in [
            r#"{"pkg_id":3,"req_id":"00000000-0000-0000-0000-000000000000","data":{}}"#,
            r#"{"pkg_id":3,"req_id":"00000000-0000-4000-8000-0000000000ff","data":{}}"#,
            r#"{"req_id":"00000000-0000-4000-8000-0000000000"#,
        ] {
            assert_eq!(slot(answer.as_bytes()), None, "{answer}");
        }
    }
}
