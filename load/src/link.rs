//! One connection of the load client: connect, upgrade, authenticate, then requests in slots.
//!
//! [`Client`](crate::client::Client) owns the links and says when their sockets are ready; what they
//! send is the [`Script`]'s. A link fails on the first answer that is not as it should be.

use std::{
    io::{self, Read as _, Write as _},
    mem,
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use memchr::memmem::{self, Finder};
use mio::{event::Event, net::TcpStream};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::{
    frame::{self, Frame},
    script::{self, Script},
};

static STATUS_OK: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(r#""status_code":0"#));

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Upgrading,
    Authenticating,
    Ready,
}

pub(crate) struct Link {
    pub(crate) socket: TcpStream,
    /// Which token it authenticates with.
    user: usize,
    state: State,
    /// The beginning of a frame whose rest has not come yet.
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    /// A bit for each slot whose answer is awaited.
    busy: u64,
    /// Slots to keep busy.
    in_flight: usize,
    /// Answers since `take_answered`.
    answered: u64,
}

impl Link {
    /// Starts to connect from the address `source`.
    pub(crate) fn connect(server: SocketAddr, source: IpAddr, user: usize) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        // Close with a reset: the next run finds its ports free, not in TIME_WAIT.
        socket.set_linger(Some(Duration::ZERO))?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        match socket.connect(&server.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => {
                return Err(error);
            }
            _ => {}
        }
        Ok(Self {
            socket: TcpStream::from_std(socket.into()),
            user,
            state: State::Connecting,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            busy: 0,
            in_flight: 0,
            answered: 0,
        })
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    pub(crate) fn take_answered(&mut self) -> u64 {
        mem::take(&mut self.answered)
    }

    /// Sends requests until `in_flight` slots are busy, and keeps them so.
    pub(crate) fn keep_in_flight(
        &mut self,
        in_flight: usize,
        script: &Script,
    ) -> anyhow::Result<()> {
        self.in_flight = in_flight;
        for slot in 0..in_flight {
            if self.busy & (1 << slot) == 0 {
                self.request(slot, script);
            }
        }
        self.flush()
    }

    /// Does what the socket is ready for. `buffer` is the client's, shared by all connections.
    pub(crate) fn advance(
        &mut self,
        event: &Event,
        script: &Script,
        buffer: &mut [u8],
    ) -> anyhow::Result<()> {
        if self.state == State::Connecting {
            if let Some(error) = self.socket.take_error()? {
                return Err(error).context("cannot connect");
            }
            if !event.is_writable() {
                return Ok(());
            }
            self.output.extend_from_slice(script.upgrade());
            self.state = State::Upgrading;
        }
        if event.is_readable() {
            self.read(script, buffer)?;
        }
        self.flush()
    }

    fn read(&mut self, script: &Script, buffer: &mut [u8]) -> anyhow::Result<()> {
        loop {
            let length = match self.socket.read(buffer) {
                Ok(0) => bail!("the server closed it without a close frame"),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot read"),
            };
            let bytes = &buffer[..length];
            if self.input.is_empty() {
                let used = self.consume(bytes, script)?;
                self.input.extend_from_slice(&bytes[used..]);
            } else {
                let mut input = mem::take(&mut self.input);
                input.extend_from_slice(bytes);
                let used = self.consume(&input, script)?;
                input.drain(..used);
                self.input = input;
            }
            if length < buffer.len() {
                return Ok(());
            }
        }
    }

    /// Takes all that is whole in `bytes` and says how much that was.
    fn consume(&mut self, bytes: &[u8], script: &Script) -> anyhow::Result<usize> {
        let mut used = 0;
        if self.state == State::Upgrading {
            let Some(end) = memmem::find(bytes, b"\r\n\r\n") else { return Ok(0) };
            let head = &bytes[..end];
            ensure!(
                head.starts_with(b"HTTP/1.1 101"),
                "the upgrade was refused: {}",
                String::from_utf8_lossy(head).lines().next().unwrap_or_default()
            );
            self.output.extend_from_slice(script.auth(self.user));
            self.state = State::Authenticating;
            used = end + 4;
        }
        while let Some((frame, length)) = frame::decode(&bytes[used..]) {
            self.frame(&frame, script)?;
            used += length;
        }
        Ok(used)
    }

    fn frame(&mut self, frame: &Frame<'_>, script: &Script) -> anyhow::Result<()> {
        let text = || String::from_utf8_lossy(frame.payload);
        match frame.opcode {
            frame::TEXT | frame::BINARY if self.state == State::Authenticating => {
                let ok = memmem::find(frame.payload, b"auth_ok").is_some();
                ensure!(ok, "not authenticated: {}", text());
                self.state = State::Ready;
            }
            frame::TEXT | frame::BINARY => {
                // Without a slot it is a push or a control frame.
                let Some(slot) = script::slot(frame.payload) else { return Ok(()) };
                let ok = STATUS_OK.find(frame.payload).is_some();
                ensure!(ok, "a request was refused: {}", text());
                ensure!(self.busy & (1 << slot) != 0, "an answer nobody awaits: {}", text());
                self.busy &= !(1 << slot);
                self.answered += 1;
                if slot < self.in_flight {
                    self.request(slot, script);
                }
            }
            frame::PING => frame::encode(frame::PONG, frame.payload, &mut self.output),
            frame::CLOSE => {
                let code =
                    frame.payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                bail!("the server closed it with {code}");
            }
            _ => {}
        }
        Ok(())
    }

    fn request(&mut self, slot: usize, script: &Script) {
        self.busy |= 1 << slot;
        script.request(slot, &mut self.output);
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        while self.written < self.output.len() {
            match self.socket.write(&self.output[self.written..]) {
                Ok(written) => self.written += written,
                // A later event says that there is room again.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot write"),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }
}
