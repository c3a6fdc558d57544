//! What REST tests ask of answers, and requests that no polite client sends.

use std::{net::SocketAddr, time::Duration};

use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::TestServer;

/// Checks the one shape of errors and returns `details`.
pub(crate) async fn refused(answer: Response, status: u16, code: &str) -> Value {
    let seen = answer.status().as_u16();
    let url = answer.url().clone();
    let kind = answer.headers().get("content-type").cloned();
    let text = answer.text().await.unwrap();
    assert_eq!(seen, status, "{url}: {text}");
    assert_eq!(kind.unwrap(), "application/json", "{url}");
    problem(&text, code)
}

/// Checks the one shape of errors and returns `details`.
pub(crate) fn problem(text: &str, code: &str) -> Value {
    let body: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("no JSON: {text:?}"));
    let members = |value: &Value| value.as_object().map(|object| object.len());
    assert_eq!((members(&body), members(&body["error"])), (Some(1), Some(3)), "{text}");
    assert_eq!(body["error"]["code"], code, "{text}");
    assert!(body["error"]["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{text}");
    let details = body["error"].get("details").expect("`details` is there, if only as null");
    assert!(details.is_null() || details.is_object(), "{text}");
    details.clone()
}

/// The path of the first of `details.errors`, each of which has a path and a msg.
pub(crate) fn path(details: &Value) -> &str {
    let errors = details["errors"].as_array().unwrap_or_else(|| panic!("no errors: {details}"));
    for error in errors {
        assert!(error["path"].is_string() && error["msg"].is_string(), "{error}");
    }
    errors[0]["path"].as_str().unwrap()
}

/// Adds an author over REST and returns its id.
pub(crate) async fn add_author(server: &TestServer, name: &str) -> i64 {
    let answer =
        server.rest(Method::POST, "/authors").json(&json!({ "name": name })).send().await.unwrap();
    assert_eq!(answer.status(), 201, "{name}");
    answer.json::<Value>().await.unwrap()["id"].as_i64().unwrap()
}

/// An answer as it came over the wire.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Raw {
    /// The value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (known, value) = line.split_once(':')?;
            known.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The body as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Sends bytes as they are and reads one answer. None: the server closed without one.
pub(crate) async fn send_raw(addr: SocketAddr, request: &[u8]) -> Option<Raw> {
    let mut tcp = TcpStream::connect(addr).await.unwrap();
    // A server that has heard enough may close while we still write.
    drop(tcp.write_all(request).await);
    let mut bytes = Vec::new();
    let reading = async {
        let mut buffer = [0; 4096];
        loop {
            match tcp.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            }
            if is_complete(&bytes) {
                return;
            }
        }
    };
    timeout(Duration::from_secs(10), reading).await.expect("no answer arrived");
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Some(Raw { status, head, body: bytes[end + 4..].to_vec() })
}

/// Whether an answer with a `Content-Length` is there to its end.
fn is_complete(bytes: &[u8]) -> bool {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    length.is_some_and(|length| bytes.len() >= end + 4 + length.trim().parse::<usize>().unwrap())
}
