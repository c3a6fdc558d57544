//! The wire protocol: what frames mean and how they are written in both formats.
//!
//! Pure functions over bytes, no I/O. `connection` calls [`decode`] on what it reads; `router` and
//! `handlers` answer through a [`ReplyHead`], which knows the format its client speaks.
//! `docs/protocol.md` is this module's contract with client developers.

mod close;
mod control;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod json;
mod protobuf;
mod scratch;

use std::borrow::Cow;

use serde::Serialize;
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use uuid::Uuid;

pub use close::CloseReason;
pub use control::{ClientControl, ServerControl};

/// The encoding of data frames, chosen by the client with `?format=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Text frames of JSON.
    Json,
    /// Binary frames of `proto/switchboard.proto`.
    Protobuf,
}

impl Format {
    /// Reads the value of `?format=`; the error names what is allowed.
    pub fn parse(name: &str) -> Result<Self, String> {
        match name {
            "json" => Ok(Self::Json),
            "protobuf" => Ok(Self::Protobuf),
            other => Err(format!("unknown format {other:?}: json and protobuf are allowed")),
        }
    }
}

/// The `status_code` of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    /// The request was carried out.
    Ok = 0,
    /// It was not: `data.code` says why.
    Error = 1,
    /// The message, or its `data`, is not what the package takes.
    InvalidData = 2,
    /// A role is missing.
    PermissionDenied = 3,
}

impl Status {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Error, Self::InvalidData, Self::PermissionDenied];
}

/// A decoded request.
#[derive(Debug)]
pub struct Request {
    /// Which package is called.
    pub pkg_id: i32,
    /// Chosen by the client, returned with the answer.
    pub req_id: Uuid,
    /// JSON text of an object. A copy: a slice would pin the connection's read buffer.
    pub data: Option<Box<RawValue>>,
}

/// A data frame that is no request; the ids are there where they could be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The frame's `pkg_id`, or 0.
    pub pkg_id: i32,
    /// The frame's `req_id`, or nil.
    pub req_id: Uuid,
    /// What is wrong with it, for people.
    pub msg: String,
}

/// What a frame from a client says.
#[derive(Debug)]
pub enum Incoming {
    /// A text frame with a `type`.
    Control(ClientControl),
    /// A request of the connection's format.
    Request(Request),
    /// A data frame of the right kind that cannot be read as a request.
    Malformed(Malformed),
    /// A data frame of the other format's kind.
    WrongKind,
}

/// Reads a text frame: control in both formats, data only in JSON.
pub fn decode_text(format: Format, text: &str) -> Incoming {
    match json::decode(text) {
        Incoming::Control(control) => Incoming::Control(control),
        _ if format == Format::Protobuf => Incoming::WrongKind,
        data => data,
    }
}

/// Reads a binary frame: data, and only in protobuf.
pub fn decode_binary(format: Format, bytes: &[u8]) -> Incoming {
    match format {
        Format::Json => Incoming::WrongKind,
        Format::Protobuf => protobuf::decode(bytes),
    }
}

/// Where an answer stands among its pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Meta {
    /// Number of this page, from 1; always 1 in a cursor walk.
    pub page: i64,
    /// Items asked for on a page.
    pub per_page: i64,
    /// Items in all; 0 in a cursor walk, which does not count.
    pub total: i64,
    /// Pages in all; 0 in a cursor walk.
    pub pages: i64,
    /// Opaque; the next page of a cursor walk.
    pub next_cursor: Option<String>,
    /// Whether a further page has items.
    pub has_more: bool,
}

/// Why a request was not carried out, as REST and WebSocket clients see it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ErrorBody {
    /// For machines: one of the codes of `docs/protocol.md`.
    pub code: &'static str,
    /// For people.
    pub msg: Cow<'static, str>,
    /// What a client can act on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<serde_json::Value>,
}

impl ErrorBody {
    /// An error without details.
    pub fn new(code: &'static str, msg: impl Into<Cow<'static, str>>) -> Self {
        Self { code, msg: msg.into(), details: None }
    }

    /// Adds `details`.
    pub fn with(mut self, details: serde_json::Value) -> Self {
        self.details = Some(details);
        self
    }

    /// Whether the server is at fault, or something behind it.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(
            self.code,
            "internal_error" | "unavailable" | "timeout" | "overloaded" | "out_of_ids"
        )
    }

    /// The answer to a bug: says nothing about it.
    pub fn internal() -> Self {
        Self::new("internal_error", "Internal error")
    }
}

/// What an answer repeats of its request, and the format to write it in.
#[derive(Debug, Clone, Copy)]
pub struct ReplyHead {
    /// The client's format.
    pub format: Format,
    /// The request's package.
    pub pkg_id: i32,
    /// The request's id.
    pub req_id: Uuid,
}

/// An encoded answer.
#[derive(Debug)]
pub struct Reply {
    /// For the metrics; also in the frame.
    pub status: Status,
    /// Ready to be sent.
    pub frame: Message,
}

impl ReplyHead {
    /// Encodes a success. Data that cannot be written as JSON is a bug: `internal_error`.
    pub fn ok<T: Serialize>(&self, data: &T, meta: Option<&Meta>) -> Reply {
        match self.encode(Status::Ok, data, meta) {
            Ok(frame) => Reply { status: Status::Ok, frame },
            Err(error) => {
                tracing::error!(pkg_id = self.pkg_id, request_id = %self.req_id, %error, "an answer is not JSON");
                self.error(Status::Error, &ErrorBody::internal())
            }
        }
    }

    /// Encodes a failure.
    pub fn error(&self, status: Status, body: &ErrorBody) -> Reply {
        let frame = self.encode(status, body, None).expect("an error body is plain JSON");
        Reply { status, frame }
    }

    fn encode<T: Serialize>(
        &self,
        status: Status,
        data: &T,
        meta: Option<&Meta>,
    ) -> serde_json::Result<Message> {
        match self.format {
            Format::Json => json::encode(self, status, data, meta),
            Format::Protobuf => protobuf::encode(self, status, data, meta),
        }
    }
}

/// A message to clients that nobody asked for, encoded once for each format.
#[derive(Debug, Clone)]
pub struct Push {
    json: Message,
    protobuf: Message,
    roles: Vec<String>,
}

impl Push {
    /// Encodes `data` for every format, for everybody to see; the error is the serialiser's.
    pub fn new<T: Serialize>(pkg_id: i32, data: &T) -> serde_json::Result<Self> {
        Ok(Self {
            json: json::encode_push(pkg_id, data)?,
            protobuf: protobuf::encode_push(pkg_id, data)?,
            roles: Vec::new(),
        })
    }

    /// Lets only users see it who have all of these roles.
    pub fn seen_with(self, roles: Vec<String>) -> Self {
        Self { roles, ..self }
    }

    /// The roles that are all needed to see it; empty: everybody may.
    pub fn roles(&self) -> &[String] {
        &self.roles
    }

    /// Bytes of the frames for all formats together.
    pub fn bytes(&self) -> usize {
        self.json.len() + self.protobuf.len()
    }

    /// The frame for clients of `format`: a reference count, no copy.
    pub fn frame(&self, format: Format) -> Message {
        match format {
            Format::Json => self.json.clone(),
            Format::Protobuf => self.protobuf.clone(),
        }
    }
}

fn text_frame(text: String) -> Message {
    Message::Text(Utf8Bytes::from(text))
}

#[cfg(test)]
mod tests;
