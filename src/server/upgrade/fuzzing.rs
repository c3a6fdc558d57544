//! Requests for `/web` in any bytes, read by hyper as the server has it: who is let in asked for it as RFC 6455
//! wants it, and nothing that follows the request is lost.

use std::{
    cell::RefCell,
    convert::Infallible,
    future::Future,
    pin::pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use axum::http::{HeaderValue, Response, header::HeaderName};
use futures_util::FutureExt;
use http_body_util::Empty;
use hyper::{
    body::{Bytes, Incoming},
    service::service_fn,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{super::accept::http, *};

/// Polls of a connection whose client has sent all it will. hyper wakes itself up to read on.
const POLLS: usize = 10_000;
/// Bytes of the answers that the client's side holds.
const ANSWERS: usize = 1 << 20;

/// The bytes of an HTTP connection.
pub(crate) fn upgrade(input: &[u8]) {
    let (mut client, server) = duplex(ANSWERS.max(input.len() + 1));
    let sent = client.write_all(input).now_or_never();
    sent.expect("there is room").expect("the server is there");
    client.shutdown().now_or_never().expect("at once").expect("once");

    let accepted = Rc::new(RefCell::new(None));
    let service = service_fn(|request| {
        let answer = answer(request, &accepted);
        async { Ok::<_, Infallible>(answer) }
    });
    let connection = http().serve_connection(TokioIo::new(server), service).with_upgrades();
    // What is wrong with the request is in the answer.
    drop(finished(connection));
    let Some(upgrade) = accepted.take() else { return };
    let Ok(upgraded) = finished(upgrade) else { return };
    let parts = upgraded.downcast::<TokioIo<DuplexStream>>();
    let parts = parts.expect("it is the connection that was accepted");
    let (mut behind, mut stream) = (parts.read_buf.to_vec(), parts.io.into_inner());
    let read = stream.read_to_end(&mut behind).now_or_never();
    read.expect("the client has ended").expect("memory can be read");
    let head = input.strip_suffix(&*behind).expect("what came behind the request is there");
    assert!(head.ends_with(b"\r\n\r\n") || head.ends_with(b"\n\n") || head.ends_with(b"\n\r\n"));
}

fn finished<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..POLLS {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
    unreachable!("a connection whose client has ended does not end")
}

/// As [`web`] answers, without what depends on the server's state.
fn answer(
    mut request: Request<Incoming>,
    accepted: &RefCell<Option<OnUpgrade>>,
) -> Response<Empty<Bytes>> {
    let answer = |status| {
        let mut response = Response::new(Empty::new());
        *response.status_mut() = status;
        response
    };
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers();
    if !is_upgrade(request.method(), headers) {
        return answer(StatusCode::UPGRADE_REQUIRED);
    }
    let Ok(key) = accept_key(&request) else { return answer(StatusCode::BAD_REQUEST) };
    is_as_the_standard_wants_it(headers, &key);
    let query = Query::of(request.uri());
    is_asked_for(request.uri().query().unwrap_or_default(), headers, &query);
    let (Ok(_), Some(upgrade)) = (format(&query), upgrade) else {
        return answer(StatusCode::BAD_REQUEST);
    };
    *accepted.borrow_mut() = Some(upgrade);
    let mut response = answer(StatusCode::SWITCHING_PROTOCOLS);
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    response
}

fn is_as_the_standard_wants_it(headers: &HeaderMap, accept: &str) {
    let values = |name: HeaderName| {
        let values = headers.get_all(name).iter();
        values.map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase())
    };
    assert!(values(header::UPGRADE).any(|value| value.contains("websocket")));
    assert!(values(header::CONNECTION).any(|value| value.contains("upgrade")));
    assert_eq!(values(header::SEC_WEBSOCKET_VERSION).next().as_deref(), Some("13"));
    let key = headers.get(header::SEC_WEBSOCKET_KEY).expect("an accepted request has a key");
    assert!(key.len() == 24 && key.as_bytes().ends_with(b"=="), "{key:?}");
    assert_eq!(accept, derive_accept_key(key.as_bytes()));
}

/// The format and the token are those that the client wrote, and a token in the header comes first.
fn is_asked_for(text: &str, headers: &HeaderMap, query: &Query<'_>) {
    let written = |name: &str| text.split('&').any(|pair| pair.split('=').next() == Some(name));
    match format(query) {
        Ok(Format::Json) => {}
        Ok(Format::Protobuf) => assert!(query.get("format") == Some("protobuf")),
        Err(msg) => assert!(msg.contains("json and protobuf"), "{msg}"),
    }
    assert!(!written("format") || query.get("format").is_some());
    let (with, without) =
        (authorization(headers, query, true), authorization(headers, query, false));
    match headers.get(header::AUTHORIZATION) {
        Some(value) => {
            let text = value.to_str().unwrap_or_default();
            assert_eq!((with.as_deref(), without.as_deref()), (Some(text), Some(text)));
        }
        None => {
            assert_eq!(without, None, "a query has no token where none may stand in it");
            let any = query.get("token").or_else(|| query.get("Authorization"));
            assert_eq!(with.is_some(), any.is_some());
        }
    }
}
