//! HTTP as the load tools need it: whole responses, and calls that wait for theirs.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use memchr::memmem;

/// A busy server needs its time for 10,000 connections' worth of metrics or pushes.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A response at the beginning of what was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    body: std::ops::Range<usize>,
    /// Of head and body.
    pub(crate) length: usize,
}

/// Finds the first response in `bytes`; `None` while it is not whole.
pub(crate) fn parse(bytes: &[u8]) -> anyhow::Result<Option<Response>> {
    let Some(end) = memmem::find(bytes, b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end]).context("the head of a response is no text")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..5));
    let status = status.and_then(|code| code.parse().ok());
    let status: u16 = status.context("what came is no HTTP response")?;
    let start = end + 4;
    let mut length = Some(0);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse().context("a Content-Length is no number")?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            // One response at a time: its last chunk is the end of what has come.
            length = bytes.ends_with(b"\r\n0\r\n\r\n").then(|| bytes.len() - start);
        }
    }
    let whole = length.map(|length| start + length).filter(|length| *length <= bytes.len());
    Ok(whole.map(|length| Response { status, body: start..length, length }))
}

/// Where calls go: a plain HTTP server, and what it is called.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    pub(crate) host: String,
}

impl Endpoint {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, host: address.to_string() }
    }

    /// Makes a call on a connection of its own; status and body.
    pub(crate) fn call(
        &self,
        route: &str,
        token: Option<&str>,
        body: Option<&str>,
    ) -> anyhow::Result<(u16, String)> {
        self.exchange(route, token, body).with_context(|| format!("{route} of {}", self.host))
    }

    /// Makes one that has to succeed.
    pub(crate) fn ask(
        &self,
        route: &str,
        token: Option<&str>,
        body: Option<&str>,
    ) -> anyhow::Result<String> {
        let (status, answer) = self.call(route, token, body)?;
        ensure!((200..300).contains(&status), "{route} of {} is {status}: {answer}", self.host);
        Ok(answer)
    }

    fn exchange(
        &self,
        route: &str,
        token: Option<&str>,
        body: Option<&str>,
    ) -> anyhow::Result<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&self.address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut request =
            format!("{route} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.host);
        if let Some(token) = token {
            request += &format!("Authorization: Bearer {token}\r\n");
        }
        if let Some(body) = body {
            let length = body.len();
            request += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        write!(stream, "{request}\r\n{}", body.unwrap_or_default())?;
        let mut bytes = Vec::new();
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(response) = parse(&bytes)? {
                let body = String::from_utf8_lossy(&bytes[response.body]);
                return Ok((response.status, body.into_owned()));
            }
            match stream.read(&mut buffer)? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                length => bytes.extend_from_slice(&buffer[..length]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_response_is_whole_with_its_body() {
        let bytes = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\nx: y\r\n\r\n{}HTTP/1.1";
        let response = parse(bytes).unwrap().unwrap();
        assert_eq!((response.status, response.length), (201, bytes.len() - 8));
        for part in [0, 10, 30, bytes.len() - 9] {
            assert_eq!(parse(&bytes[..part]).unwrap(), None, "{part}");
        }
    }

    #[test]
    fn a_response_in_chunks_ends_with_an_empty_one() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}";
        assert_eq!(parse(head.as_bytes()).unwrap(), None);
        let whole = format!("{head}\r\n0\r\n\r\n");
        assert_eq!(parse(whole.as_bytes()).unwrap().unwrap().length, whole.len());
    }

    #[test]
    fn a_response_without_a_body_ends_with_its_head() {
        let bytes = b"HTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(parse(bytes).unwrap().unwrap().length, bytes.len());
        assert!(parse(b"SSH-2.0\r\n\r\n").is_err());
    }
}
