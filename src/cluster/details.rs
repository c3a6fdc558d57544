//! What administrators are shown of a connection, as it stands in Redis and in the answer of
//! `GET /admin/connections`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use crate::{
    hub::{Figures, Outbox},
    protocol::Format,
};

#[derive(Serialize)]
struct Details<'a> {
    id: Uuid,
    user: &'a str,
    subject: &'a str,
    node: &'a str,
    /// To the millisecond.
    since: String,
    format: &'static str,
    /// Received from the client, so far.
    messages: u64,
    queues: Queues,
}

/// What waits to be written.
#[derive(Serialize)]
struct Queues {
    replies: usize,
    pushes: usize,
}

/// Describes a connection of a node.
pub(super) fn describe(outbox: &Outbox, node: &str) -> Box<RawValue> {
    let Figures { messages, replies, pushes } = outbox.figures();
    let since = i64::try_from(outbox.since).unwrap_or(i64::MAX);
    let details = Details {
        id: outbox.id,
        user: outbox.username(),
        subject: outbox.subject(),
        node,
        since: format!("{:.3}", Timestamp::from_millisecond(since).unwrap_or_default()),
        format: match outbox.format {
            Format::Json => "json",
            Format::Protobuf => "protobuf",
        },
        messages,
        queues: Queues { replies, pushes },
    };
    to_raw_value(&details).expect("details have nothing that JSON lacks")
}

/// Whose connection it is, in a description.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Owner {
    pub(super) user: String,
    pub(super) subject: String,
}

impl Owner {
    /// Reads a description; nobody's where it is none.
    pub(super) fn read(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }
}
