//! Control frames: text in both formats, told from data by their `type`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use super::text_frame;

/// A control frame from a client.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientControl {
    /// `{"type":"auth","token":"Bearer …"}`; no token where it is missing or no string.
    Auth {
        /// With its scheme.
        token: Option<String>,
    },
    /// `{"type":"refresh","token":"Bearer …"}`; no token where it is missing or no string.
    Refresh {
        /// With its scheme.
        token: Option<String>,
    },
    /// `{"type":"ping"}`.
    Ping,
    /// Any other `type`.
    Unknown(String),
}

impl ClientControl {
    /// Reads a text that is known to be an object with a string `type`.
    pub(super) fn parse(text: &str) -> Self {
        #[derive(Deserialize)]
        struct Members<'a> {
            #[serde(rename = "type")]
            kind: String,
            #[serde(borrow)]
            token: Option<&'a RawValue>,
        }
        let Ok(Members { kind, token }) = serde_json::from_str(text) else {
            return Self::Unknown(String::new());
        };
        let token = || token.and_then(|raw| serde_json::from_str(raw.get()).ok());
        match kind.as_str() {
            "auth" => Self::Auth { token: token() },
            "refresh" => Self::Refresh { token: token() },
            "ping" => Self::Ping,
            _ => Self::Unknown(kind),
        }
    }
}

/// A control frame to a client.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerControl<'a> {
    /// The connection is authenticated and serves requests from now on.
    AuthOk {
        /// Also in the logs and in the administrator's list.
        connection_id: Uuid,
        /// The token's user name.
        user: &'a str,
        /// Seconds until the token expires.
        expires_in: u64,
    },
    /// A fresh token is in force from now on.
    RefreshOk {
        /// Seconds until it expires.
        expires_in: u64,
        /// The packages that its roles opened, by id.
        gained: &'a [i32],
        /// The packages that its roles closed, by id.
        lost: &'a [i32],
    },
    /// The token in force expires soon.
    AuthExpiring {
        /// Seconds until then.
        expires_in: u64,
    },
    /// A control frame was refused, or the connection is about to be closed.
    Error {
        /// For machines.
        code: &'static str,
        /// For people.
        msg: &'a str,
        /// Milliseconds after which the frame may be sent again.
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
    /// Answers `ping`.
    Pong,
    /// The server goes away: send nothing more here, and come back after the time given.
    Drain {
        /// Milliseconds, different for each client.
        reconnect_after_ms: u64,
    },
}

impl ServerControl<'_> {
    /// Encodes it: a text frame in both formats.
    pub fn frame(&self) -> Message {
        text_frame(serde_json::to_string(self).expect("a control frame is plain JSON"))
    }
}
