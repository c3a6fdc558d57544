//! What a client sends beside its requests, in any order and any pieces: control frames and fragments.

use std::io::{self, Cursor, Read, Write};

use tokio_tungstenite::tungstenite::{
    Message, WebSocket,
    protocol::{Role, WebSocketConfig},
};

use super::{
    frames::{Breach, Frames},
    session,
};
use crate::protocol::{ClientControl, Format, Incoming, decode_text};

/// As `frames` has them: what a client may send up to the end of its first message.
const FIRST_MESSAGE: usize = 20 * 1024;
const FIRST_CONTROL: usize = 10;

/// The first byte says what the rest is: calls of the budget, or bytes of a socket and how they arrive.
pub(crate) fn control(input: &[u8]) {
    match input {
        [0, calls @ ..] => session::fuzzing::budget(calls),
        [piece, bytes @ ..] => socket(bytes, usize::from(*piece)),
        [] => {}
    }
}

fn socket(bytes: &[u8], piece: usize) {
    let (whole, pieces) = (followed(bytes, bytes.len().max(1)), followed(bytes, piece));
    assert_eq!(whole.0, pieces.0, "it depends on where the reads end");
    assert_eq!(whole.1, small_fragments(bytes), "small fragments");
    first_message_is_bounded(bytes, whole.0.is_err());
}

/// What [`Frames`] says: with the bound of the first message, and without.
fn followed(bytes: &[u8], piece: usize) -> (Result<bool, Breach>, u32) {
    let (mut bounded, mut free) = (Frames::default(), Frames::default());
    bounded.bound_first_message();
    let mut breach = Ok(());
    let mut begun = false;
    for piece in bytes.chunks(piece) {
        if breach.is_ok() {
            breach = bounded.follow(piece);
        }
        free.follow(piece).expect("without a bound there is no breach");
        begun |= free.arriving() == Some(true);
    }
    let arriving = free.arriving().is_some();
    assert!(!arriving || begun, "a message arrives that never began");
    assert_eq!(free.has_small_fragments(), small_fragments(bytes) > 0);
    (breach.map(|()| arriving), free.take_small_fragments())
}

/// The fragments of fewer than 64 bytes that are not the last of their message, read header by header.
fn small_fragments(mut bytes: &[u8]) -> u32 {
    let mut count = 0;
    while let [kind, short, rest @ ..] = bytes {
        let digits = match short & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let Some((long, rest)) = rest.split_at_checked(digits) else { break };
        let long = long.iter().fold(0_u128, |number, byte| (number << 8) | u128::from(*byte));
        let payload = if digits == 0 { u128::from(short & 0x7f) } else { long };
        count += u32::from(payload < 64 && kind & 0x88 == 0);
        let mask = if short & 0x80 == 0 { 0 } else { 4 };
        let Ok(skip) = usize::try_from(payload + mask) else { break };
        bytes = rest.get(skip..).unwrap_or_default();
    }
    count
}

/// What tungstenite lets through of the same bytes keeps to the bound, unless [`Frames`] has told of a breach.
fn first_message_is_bounded(bytes: &[u8], breached: bool) {
    let config = WebSocketConfig::default().max_message_size(Some(1 << 20));
    let mut socket =
        WebSocket::from_raw_socket(Wire(Cursor::new(bytes)), Role::Server, Some(config));
    let mut before = 0;
    while let Ok(message) = socket.read() {
        match message {
            Message::Ping(_) | Message::Pong(_) => before += 1,
            Message::Text(text) => {
                is_bounded(before, text.len(), breached);
                return understood(&text);
            }
            Message::Binary(bytes) => return is_bounded(before, bytes.len(), breached),
            Message::Close(_) | Message::Frame(_) => return,
        }
    }
}

fn is_bounded(control: usize, message: usize, breached: bool) {
    let fits = control <= FIRST_CONTROL && message <= FIRST_MESSAGE;
    assert!(fits || breached, "{control} control frames, then {message} bytes");
}

/// A control message says its kind and its token, whatever else is in it.
fn understood(text: &str) {
    let Incoming::Control(control) = decode_text(Format::Protobuf, text) else { return };
    let Ok(tree) = serde_json::from_str::<serde_json::Value>(text) else { return };
    let kind = tree["type"].as_str();
    let sent = tree["token"].as_str();
    match control {
        ClientControl::Auth { token } => assert_eq!((kind, sent), (Some("auth"), token.as_deref())),
        ClientControl::Refresh { token } => {
            assert_eq!((kind, sent), (Some("refresh"), token.as_deref()));
        }
        ClientControl::Ping => assert_eq!(kind, Some("ping")),
        // Empty: a member stands twice.
        ClientControl::Unknown(name) => assert!(name.is_empty() || Some(&*name) == kind),
    }
}

/// The bytes of a client; what it is sent goes nowhere.
struct Wire<'a>(Cursor<&'a [u8]>);

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
