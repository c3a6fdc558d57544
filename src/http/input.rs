//! Reading paths, queries and bodies into the same types that the WebSocket packages take.

use std::{error::Error, time::Duration};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::{HeaderMap, Request, StatusCode, header},
};
use bytes::BytesMut;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use tokio::time::timeout;

use super::{Api, Problem, audit::Noted, remote};
use crate::{
    audit::Recorded,
    handlers::{HandlerError, input},
    limits::{Full, Share},
    protocol::ErrorBody,
};

/// Time for a whole body.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads a JSON body of at most `limit` bytes, and notes it for the audit trail.
pub(super) async fn body<T: DeserializeOwned>(
    api: &Api,
    request: Request<Body>,
    limit: usize,
) -> Result<T, Problem> {
    let noted = request.extensions().get::<Noted>().cloned();
    let (text, _memory) = text(api, request, limit).await?;
    if let Some(noted) = noted {
        noted.body(Recorded::input::<T>(&text));
    }
    Ok(input::read(&text)?)
}

/// As [`body`], for one of which the audit trail has nothing.
pub(super) async fn unrecorded_body<T: DeserializeOwned>(
    api: &Api,
    request: Request<Body>,
    limit: usize,
) -> Result<T, Problem> {
    let (text, _memory) = text(api, request, limit).await?;
    Ok(input::read(&text)?)
}

/// The text of a JSON body, and the memory that it takes.
async fn text(api: &Api, request: Request<Body>, limit: usize) -> Result<(String, Share), Problem> {
    if !is_json(request.headers()) {
        let body = ErrorBody::new("unsupported_media_type", "The body must be application/json");
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, body));
    }
    let mut memory = memory(api, &request)?;
    let bytes = bytes(request.into_body(), limit, BODY_TIMEOUT, &mut memory).await?;
    let text = String::from_utf8(bytes.into()).map_err(|_| invalid("", "the body is not UTF-8"))?;
    Ok((text, memory))
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

/// What the body of a request takes of the memory for all bodies: nothing yet.
pub(super) fn memory(api: &Api, request: &Request<Body>) -> Result<Share, Problem> {
    let holder = api.config.counted(remote(request.extensions()).address);
    api.held.bodies.take(holder, 0).map_err(no_memory)
}

fn no_memory(full: Full) -> Problem {
    Problem::unavailable(match full {
        Full::Pool => "Too many bodies are being read",
        Full::Address => "Too many bodies of this address are being read",
    })
}

/// Reads a body of at most `limit` bytes, which has `time` to arrive. It takes memory as it arrives: for a
/// declared length alone nothing is held.
pub(super) async fn bytes(
    body: Body,
    limit: usize,
    time: Duration,
    memory: &mut Share,
) -> Result<Bytes, Problem> {
    let too_large = || {
        let msg = format!("The body is larger than {limit} bytes");
        let body = ErrorBody::new("payload_too_large", msg);
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, body)
    };
    // A declared length is believed before a byte is read: a client may wait for our word to send it.
    if body.size_hint().lower() > u64::try_from(limit).unwrap_or(u64::MAX) {
        return Err(too_large());
    }
    let collected = timeout(time, collect(Limited::new(body, limit), memory)).await;
    let Ok(collected) = collected else {
        let body = ErrorBody::new("timeout", "The body did not arrive in time");
        return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, body));
    };
    collected.map_err(|broken| match broken {
        Broken::NoMemory(full) => no_memory(full),
        Broken::Read(error) if error.is::<LengthLimitError>() => too_large(),
        Broken::Read(_) => {
            let body = ErrorBody::new("bad_request", "The body could not be read to its end");
            Problem::new(StatusCode::BAD_REQUEST, body)
        }
    })
}

/// Why a body was not read to its end.
enum Broken {
    NoMemory(Full),
    Read(Box<dyn Error + Send + Sync>),
}

async fn collect(mut body: Limited<Body>, memory: &mut Share) -> Result<Bytes, Broken> {
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame.map_err(Broken::Read)?.data_ref() {
            memory.grow(data.len()).map_err(Broken::NoMemory)?;
            all.extend_from_slice(data);
        }
    }
    Ok(all.freeze())
}

/// A parameter of a query: its name there, the path of the member it becomes, and what it holds.
#[derive(Debug)]
pub(super) struct Parameter(pub(super) &'static str, pub(super) &'static str, pub(super) Kind);

/// What a parameter holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A number; anything else is left to be refused by the type it is read into.
    Number,
    /// A text; empty is as good as absent.
    Text,
    /// A text that may be empty.
    Cursor,
}

/// Reads the known parameters of a query; unknown ones are ignored. Called before the role is checked, so
/// that the audit trail knows the parameters of a denied read as well.
pub(super) fn query<T: DeserializeOwned>(
    request: &Request<Body>,
    parameters: &'static [Parameter],
) -> Result<T, Problem> {
    if let Some(noted) = request.extensions().get::<Noted>() {
        noted.parameters(parameters);
    }
    let query = request.uri().query().unwrap_or_default();
    let mut object = Map::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let Some(Parameter(_, member, kind)) = parameters.iter().find(|known| known.0 == name)
        else {
            continue;
        };
        if value.is_empty() && *kind != Kind::Cursor {
            continue;
        }
        let number = (*kind == Kind::Number).then(|| value.parse::<i64>().ok()).flatten();
        let value = number.map_or_else(|| Value::from(value.as_ref()), Value::from);
        match member.split_once('.') {
            None => drop(object.insert((*member).to_owned(), value)),
            Some((outer, inner)) => {
                object.entry(outer).or_insert_with(|| Value::Object(Map::new()))[inner] = value;
            }
        }
    }
    input::read(&Value::Object(object).to_string()).map_err(|error| match error {
        // The client knows the parameter, not the member.
        HandlerError::InvalidData { path, msg } => {
            let named = parameters.iter().find(|known| known.1 == path);
            invalid(named.map_or(&path, |known| known.0), &msg)
        }
        error => error.into(),
    })
}

/// Reads an id out of a path such as `/authors/{id}`.
pub(super) fn id(request: &Request<Body>) -> Result<i32, Problem> {
    let text = request.uri().path().rsplit('/').next().unwrap_or_default();
    text.parse().map_err(|_| invalid("id", "an id is a whole number up to 2147483647"))
}

fn invalid(path: &str, msg: &str) -> Problem {
    HandlerError::InvalidData { path: path.into(), msg: msg.into() }.into()
}

#[cfg(test)]
mod tests {
    use std::io;

    use axum::response::IntoResponse;
    use futures_util::{StreamExt, stream};

    use super::*;
    use crate::limits::Pool;

    async fn status(body: Body) -> StatusCode {
        let mut memory = Pool::new(1000, 1000).take(None, 0).unwrap();
        let refused = bytes(body, 100, Duration::from_millis(50), &mut memory).await.unwrap_err();
        refused.into_response().status()
    }

    #[tokio::test]
    async fn a_body_that_does_not_end_in_time_is_408_however_it_trickles() {
        let silent = stream::pending::<io::Result<Bytes>>();
        assert_eq!(status(Body::from_stream(silent)).await, StatusCode::REQUEST_TIMEOUT);
        let trickle = stream::repeat(()).then(|()| async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            io::Result::Ok(Bytes::from_static(b" "))
        });
        assert_eq!(status(Body::from_stream(trickle)).await, StatusCode::REQUEST_TIMEOUT);
    }

    #[tokio::test]
    async fn a_body_for_which_there_is_no_memory_is_503_and_gives_back_what_it_had() {
        let pool = Pool::new(8, 4);
        let holder = Some([10, 0, 0, 1].into());
        let part = || Ok::<_, io::Error>(Bytes::from_static(b"123"));
        let mut memory = pool.take(holder, 0).unwrap();
        let body = Body::from_stream(stream::iter([part(), part()]));
        let refused = bytes(body, 100, BODY_TIMEOUT, &mut memory).await.unwrap_err();
        assert_eq!(refused.into_response().status(), StatusCode::SERVICE_UNAVAILABLE);
        drop(memory);
        assert_eq!(pool.taken(), 0);
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_400() {
        let broken = stream::iter([Ok(Bytes::from_static(b"{")), Err(io::Error::other("gone"))]);
        assert_eq!(status(Body::from_stream(broken)).await, StatusCode::BAD_REQUEST);
    }
}
