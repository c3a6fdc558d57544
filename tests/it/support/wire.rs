//! The protobuf messages as a deployed client has them: by number, from no schema of the server's.

use prost::Message as _;
use serde_json::Value;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Request {
    #[prost(int32, tag = "1")]
    pub(crate) pkg_id: i32,
    #[prost(string, tag = "2")]
    pub(crate) req_id: String,
    #[prost(string, tag = "3")]
    pub(crate) method: String,
    #[prost(string, tag = "4")]
    pub(crate) data_json: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Response {
    #[prost(int32, tag = "1")]
    pub(crate) pkg_id: i32,
    #[prost(string, tag = "2")]
    pub(crate) req_id: String,
    #[prost(int32, tag = "3")]
    pub(crate) status_code: i32,
    #[prost(string, tag = "4")]
    pub(crate) data_json: String,
    #[prost(message, optional, tag = "5")]
    pub(crate) meta: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Metadata {
    #[prost(int32, tag = "1")]
    pub(crate) page: i32,
    #[prost(int32, tag = "2")]
    pub(crate) per_page: i32,
    #[prost(int32, tag = "3")]
    pub(crate) total: i32,
    #[prost(int32, tag = "4")]
    pub(crate) pages: i32,
    #[prost(string, tag = "5")]
    pub(crate) next_cursor: String,
    #[prost(bool, tag = "6")]
    pub(crate) has_more: bool,
}

impl Request {
    /// A request with an id of its own.
    pub(crate) fn new(pkg_id: i32, data_json: &str) -> Self {
        Self {
            pkg_id,
            req_id: Uuid::new_v4().to_string(),
            method: String::new(),
            data_json: data_json.to_owned(),
        }
    }

    pub(crate) fn frame(&self) -> Message {
        Message::binary(self.encode_to_vec())
    }
}

impl Response {
    pub(crate) fn data(&self) -> Value {
        serde_json::from_str(&self.data_json).unwrap()
    }
}
