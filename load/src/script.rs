//! What the connections of a [`Client`](crate::client::Client) send, encoded once.
//!
//! A request's `req_id` ends in the number of its slot, so that each slot has one frame: sending is a
//! copy, and an answer says which slot is free again.

use std::{net::SocketAddr, sync::LazyLock};

use memchr::memmem::Finder;

use crate::frame;

/// Requests that one connection can have in flight: the bits of a `u64`.
pub(crate) const MAX_IN_FLIGHT: usize = 64;

/// A `req_id` but for its last two digits, the slot in hexadecimal.
const REQ_ID: &str = "00000000-0000-4000-8000-0000000000";
static REQ_ID_FINDER: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(REQ_ID));

/// The upgrade request and the frames.
pub(crate) struct Script {
    upgrade: Vec<u8>,
    /// A frame for each token.
    auth: Vec<Vec<u8>>,
    /// A frame for each slot.
    requests: Vec<Vec<u8>>,
}

impl Script {
    /// Requests of package 100 (echo) with an empty object.
    pub(crate) fn new(server: SocketAddr, tokens: &[String]) -> Self {
        let upgrade = format!(
            "GET /web HTTP/1.1\r\nHost: {server}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        let auth = |token| text(&format!(r#"{{"type":"auth","token":"Bearer {token}"}}"#));
        let request =
            |slot| text(&format!(r#"{{"pkg_id":100,"req_id":"{REQ_ID}{slot:02x}","data":{{}}}}"#));
        Self {
            upgrade: upgrade.into(),
            auth: tokens.iter().map(auth).collect(),
            requests: (0..MAX_IN_FLIGHT).map(request).collect(),
        }
    }

    pub(crate) fn upgrade(&self) -> &[u8] {
        &self.upgrade
    }

    /// Connections beyond the last token start again with the first.
    pub(crate) fn auth(&self, connection: usize) -> &[u8] {
        &self.auth[connection % self.auth.len()]
    }

    pub(crate) fn request(&self, slot: usize) -> &[u8] {
        &self.requests[slot]
    }
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

    #[test]
    fn an_answer_names_the_slot_of_its_request() {
        let script = Script::new(([127, 0, 0, 1], 80).into(), &["token".to_owned()]);
        for expected in 0..MAX_IN_FLIGHT {
            assert_eq!(slot(script.request(expected)), Some(expected));
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
