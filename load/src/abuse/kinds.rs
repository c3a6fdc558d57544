//! The attacks: what each sends, and what it does once the server has answered.

use std::fmt::Write as _;

use clap::ValueEnum;

use crate::frame;

/// Connections of one user that the default `WS_MAX_CONNECTIONS_PER_USER` allows.
pub(super) const PER_USER: usize = 5;
/// What a server allows that has a foreign origin to refuse: with the default `*` none is foreign.
pub(crate) const ORIGIN: (&str, &str) = ("ALLOWED_WS_ORIGINS", "https://app.example");
/// The largest body that `MAX_REQUEST_BODY_SIZE` allows.
const BODY: usize = 1024 * 1024;
/// More than `WS_MAX_MESSAGE_BYTES`.
const TOO_LARGE: usize = 70_000;
/// Bytes that a flood writes at once.
const CHUNK: usize = 16 * 1024;

/// An attack, by the name it is chosen with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Upgrades that break RFC 6455
    BadUpgrades,
    /// Upgrades with an Origin that is not allowed
    ForeignOrigins,
    /// Upgrades with an expired token
    ExpiredTokens,
    /// Upgraded sockets that never authenticate
    SilentSockets,
    /// Forged logout tokens
    BackChannel,
    /// Bodies of 1 MiB to /auth/login and /authors, of which the last byte never comes
    LargeBodies,
    /// Pipelined GET /metrics whose answers are never read
    SlowReaders,
    /// Connections that send nothing, or half of a request's head
    HalfOpen,
    /// WebSocket pings without a payload
    Pings,
    /// WebSocket pings of 125 bytes
    LongPings,
    /// Pongs that answer no ping
    Pongs,
    /// Ping frames in JSON
    JsonPings,
    /// Empty fragments of a message that never ends
    Fragments,
    /// Refreshes with a good token
    Refreshes,
    /// Refreshes with a bad token
    BadRefreshes,
    /// Control frames of a type that is not known
    UnknownTypes,
    /// Text that is no frame
    Malformed,
    /// Requests over WS_MESSAGE_RATE_LIMIT
    Messages,
    /// Messages over WS_MAX_MESSAGE_BYTES
    TooLarge,
    /// Binary frames in a JSON connection
    Binary,
}

/// What a connection does after its opening bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Reads the answer and asks again.
    Ask,
    /// Waits until the server ends it.
    Hold,
    /// Sends the same for as long as the server takes it.
    Flood,
}

/// What the connections of an attack send.
pub(super) struct Plan {
    /// Once, after connecting.
    pub(super) opening: Vec<u8>,
    /// Once, after `auth_ok`.
    pub(super) prelude: Vec<u8>,
    /// Again and again; of a flood it is many units.
    pub(super) repeat: Vec<u8>,
    /// Bytes of one attempt in `repeat`.
    pub(super) unit: usize,
}

impl Kind {
    pub(crate) fn all() -> &'static [Self] {
        Self::value_variants()
    }

    /// The name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What it is, in words.
    pub(crate) fn title(self) -> String {
        let help =
            self.to_possible_value().and_then(|value| value.get_help().map(ToString::to_string));
        help.unwrap_or_else(|| self.name())
    }

    /// Whether its connections are those of users.
    pub(crate) fn authenticates(self) -> bool {
        self as usize >= Self::Pings as usize
    }

    /// Whether it is a flood of what no limit of messages counts: its cost grows with the connections.
    pub(crate) fn is_control(self) -> bool {
        self.authenticates() && (self as usize) <= Self::UnknownTypes as usize
    }

    /// Whether its connections are WebSockets that are let in.
    pub(super) fn upgrades(self) -> bool {
        self.authenticates() || self == Self::SilentSockets
    }

    /// Connections at once, where the command line does not say.
    pub(crate) fn connections(self) -> usize {
        match self {
            Self::SilentSockets | Self::HalfOpen => 10_000,
            Self::SlowReaders => 1000,
            Self::LargeBodies => 200,
            _ if self.authenticates() => PER_USER,
            _ => 64,
        }
    }

    /// The one setting that is not its default.
    pub(crate) fn setting(self) -> Option<(&'static str, &'static str)> {
        (self == Self::ForeignOrigins).then_some(ORIGIN)
    }

    pub(super) fn then(self) -> Then {
        match self {
            Self::BadUpgrades | Self::ForeignOrigins | Self::ExpiredTokens | Self::BackChannel => {
                Then::Ask
            }
            Self::SilentSockets | Self::LargeBodies | Self::HalfOpen => Then::Hold,
            _ => Then::Flood,
        }
    }

    /// Whether it reads what the server sends.
    pub(super) fn reads(self) -> bool {
        self != Self::SlowReaders
    }

    /// What connection `index` sends, with the token of its user or one that is expired.
    pub(super) fn plan(self, index: usize, host: &str, token: &str, expired: &str) -> Plan {
        let authorization = |token: &str| format!("Authorization: Bearer {token}\r\n");
        let opening = match self {
            Self::BadUpgrades => upgrade(host, "8", ""),
            Self::ForeignOrigins => upgrade(host, "13", "Origin: https://evil.example\r\n"),
            Self::ExpiredTokens => upgrade(host, "13", &authorization(expired)),
            Self::SilentSockets => upgrade(host, "13", ""),
            Self::BackChannel => back_channel(host),
            Self::LargeBodies if index.is_multiple_of(2) => body(host, "/auth/login", ""),
            Self::LargeBodies => body(host, "/authors", &authorization(token)),
            Self::HalfOpen if index.is_multiple_of(2) => String::new(),
            Self::HalfOpen => format!("GET /authors HTTP/1.1\r\nHost: {host}\r\n"),
            Self::SlowReaders => String::new(),
            _ => upgrade(host, "13", &authorization(token)),
        };
        let mut opening = opening.into_bytes();
        if self == Self::LargeBodies {
            // All but the last byte.
            opening.resize(opening.len() + BODY - 1, b' ');
        }
        let mut prelude = Vec::new();
        if self == Self::Fragments {
            frame::encode(frame::TEXT, b"x", &mut prelude);
            prelude[0] &= !frame::FIN;
        }
        let unit = match self {
            Self::SlowReaders => {
                format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
            }
            _ if self.authenticates() => self.frame(token),
            _ => opening.clone(),
        };
        let times = if self.then() == Then::Flood { CHUNK.div_ceil(unit.len()) } else { 1 };
        Plan { opening, prelude, unit: unit.len(), repeat: unit.repeat(times) }
    }

    /// The frame of a flood.
    fn frame(self, token: &str) -> Vec<u8> {
        let refresh = |token: &str| format!(r#"{{"type":"refresh","token":"Bearer {token}"}}"#);
        let echo = r#"{"pkg_id":100,"req_id":"00000000-0000-4000-8000-000000000000","data":{}}"#;
        let (opcode, payload) = match self {
            Self::Pings => (frame::PING, String::new()),
            Self::LongPings => (frame::PING, "x".repeat(125)),
            Self::Pongs => (frame::PONG, String::new()),
            Self::JsonPings => (frame::TEXT, r#"{"type":"ping"}"#.to_owned()),
            Self::Fragments => (frame::CONTINUATION, String::new()),
            Self::Refreshes => (frame::TEXT, refresh(token)),
            Self::BadRefreshes => (frame::TEXT, refresh("none")),
            Self::UnknownTypes => (frame::TEXT, r#"{"type":"nonsense"}"#.to_owned()),
            Self::Malformed => (frame::TEXT, r#"{"pkg_id":"#.to_owned()),
            Self::TooLarge => (frame::TEXT, "x".repeat(TOO_LARGE)),
            Self::Binary => (frame::BINARY, "x".to_owned()),
            _ => (frame::TEXT, echo.to_owned()),
        };
        let mut bytes = Vec::new();
        frame::encode(opcode, payload.as_bytes(), &mut bytes);
        if self == Self::Fragments {
            bytes[0] &= !frame::FIN;
        }
        bytes
    }
}

fn upgrade(host: &str, version: &str, headers: &str) -> String {
    format!(
        "GET /web HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: {version}\r\n\
         {headers}\r\n"
    )
}

fn back_channel(host: &str) -> String {
    let form = "logout_token=e30.e30.e30";
    let mut request = post(host, "/auth/backchannel-logout", "application/x-www-form-urlencoded");
    // A string takes what is written to it.
    let _ = write!(request, "Content-Length: {}\r\n\r\n{form}", form.len());
    request
}

/// The head of a request with the largest body.
fn body(host: &str, route: &str, headers: &str) -> String {
    let mut request = post(host, route, "application/json");
    let _ = write!(request, "{headers}Content-Length: {BODY}\r\n\r\n");
    request
}

fn post(host: &str, route: &str, content: &str) -> String {
    format!("POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content}\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_whole_units_and_at_least_a_chunk() {
        for kind in Kind::all().iter().filter(|kind| kind.then() == Then::Flood) {
            let plan = kind.plan(0, "host", "token", "expired");
            assert_eq!(plan.repeat.len() % plan.unit, 0, "{kind:?}");
            assert!(plan.repeat.len() >= CHUNK, "{kind:?}");
        }
    }

    #[test]
    fn fragments_never_end_their_message() {
        let plan = Kind::Fragments.plan(0, "host", "token", "expired");
        assert_eq!(plan.prelude[0], frame::TEXT);
        assert!(plan.repeat.chunks(plan.unit).all(|unit| unit == [0, 0x80, 0, 0, 0, 0]));
    }

    #[test]
    fn a_large_body_lacks_its_last_byte() {
        let plan = Kind::LargeBodies.plan(0, "host", "token", "expired");
        let head = memchr::memmem::find(&plan.opening, b"\r\n\r\n").unwrap() + 4;
        assert_eq!(plan.opening.len() - head, BODY - 1);
    }

    #[test]
    fn the_attacks_before_auth_ok_come_first_and_know_no_user() {
        let before: Vec<_> = Kind::all().iter().filter(|kind| !kind.authenticates()).collect();
        assert_eq!(before.len(), 8);
        assert!(Kind::all().iter().all(|kind| kind.authenticates() || !kind.is_control()));
        assert_eq!(Kind::HalfOpen.name(), "half-open");
        assert!(Kind::Pings.title().contains("pings"));
    }
}
