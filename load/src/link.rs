//! One connection of the load client: connect, upgrade, authenticate, then requests in slots.
//!
//! [`Client`](crate::client::Client) owns the links and says when their sockets are ready; what they
//! send is the [`Script`]'s, and what came of it goes into the [`Tally`]. An error ends the link.

use std::{
    io::{self, Read as _, Write as _},
    mem,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use memchr::memmem;
use mio::{event::Event, net::TcpStream};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::{
    frame::{self, Frame},
    http,
    script::{self, Script, Wire},
    tally::{self, Tally},
};

/// What a link needs of its client while it works.
pub(crate) struct Desk<'a> {
    pub(crate) script: &'a mut Script,
    pub(crate) tally: &'a mut Tally,
    pub(crate) now: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Connecting,
    Upgrading,
    Authenticating,
    Ready,
    /// Told to reconnect: it waits for its answers, and asks nothing new.
    Leaving,
}

/// A request under way.
#[derive(Clone, Copy)]
struct Slot {
    /// Its index in the mix.
    package: u8,
    since: Instant,
}

pub(crate) struct Link {
    pub(crate) socket: TcpStream,
    /// Which token it authenticates with.
    pub(crate) user: usize,
    pub(crate) state: State,
    started: Instant,
    /// The beginning of a frame whose rest has not come yet.
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    /// A bit for each slot whose answer is awaited.
    busy: u64,
    slots: Vec<Slot>,
    /// Slots to keep busy.
    in_flight: usize,
    /// How often its user has tried in vain.
    pub(crate) attempts: u32,
    /// When it was told to come back.
    drain: Option<Duration>,
    /// It reads nothing once it is ready: a slow consumer.
    deaf: bool,
}

impl Link {
    /// Starts to connect from the address `source`.
    pub(crate) fn connect(
        server: SocketAddr,
        source: Option<IpAddr>,
        user: usize,
        deaf: bool,
    ) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        // Close with a reset: the next run finds its ports free, not in TIME_WAIT.
        socket.set_linger(Some(Duration::ZERO))?;
        if deaf {
            // So that what it does not read soon waits in the server.
            socket.set_recv_buffer_size(4096)?;
        }
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
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
            started: Instant::now(),
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            busy: 0,
            slots: Vec::new(),
            in_flight: 0,
            attempts: 0,
            drain: None,
            deaf,
        })
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// What it keeps in flight once it is ready.
    pub(crate) fn set_in_flight(&mut self, in_flight: usize, wire: Wire) {
        self.in_flight = in_flight.min(wire.slots());
    }

    /// Requests whose answers are awaited.
    pub(crate) fn open_requests(&self) -> u64 {
        u64::from(self.busy.count_ones())
    }

    /// When to come back, told once.
    pub(crate) fn take_drain(&mut self) -> Option<Duration> {
        self.drain.take()
    }

    /// Sends requests until `in_flight` slots are busy, and keeps them so.
    pub(crate) fn keep_in_flight(
        &mut self,
        in_flight: usize,
        desk: &mut Desk<'_>,
    ) -> anyhow::Result<()> {
        self.in_flight = in_flight.min(desk.script.wire.slots());
        for slot in 0..self.in_flight {
            if self.busy & (1 << slot) == 0 {
                self.request(slot, desk.now, desk);
            }
        }
        self.flush()
    }

    /// Sends one request that was due at `since`, if a slot is free.
    pub(crate) fn send(&mut self, since: Instant, desk: &mut Desk<'_>) -> anyhow::Result<bool> {
        let slot = self.busy.trailing_ones() as usize;
        if !self.is_ready() || self.deaf || slot >= desk.script.wire.slots() {
            return Ok(false);
        }
        self.request(slot, since, desk);
        self.flush()?;
        Ok(true)
    }

    /// Does what the socket is ready for. `buffer` is the client's, shared by all connections.
    pub(crate) fn advance(
        &mut self,
        event: &Event,
        desk: &mut Desk<'_>,
        buffer: &mut [u8],
    ) -> anyhow::Result<()> {
        if self.state == State::Connecting {
            if let Some(error) = self.socket.take_error()? {
                return Err(error).context("cannot connect");
            }
            if !event.is_writable() {
                return Ok(());
            }
            if desk.script.wire == Wire::Rest {
                self.ready(desk);
            } else {
                self.output.extend_from_slice(desk.script.upgrade());
                self.state = State::Upgrading;
            }
        }
        if self.deaf && self.is_ready() {
            ensure!(!event.is_error(), "the server ended it");
        } else if event.is_readable() {
            self.read(desk, buffer)?;
        }
        self.flush()
    }

    fn ready(&mut self, desk: &mut Desk<'_>) {
        self.state = State::Ready;
        desk.tally.connected.saturating_record(tally::nanos(desk.now - self.started));
        for slot in 0..self.in_flight {
            self.request(slot, desk.now, desk);
        }
    }

    fn read(&mut self, desk: &mut Desk<'_>, buffer: &mut [u8]) -> anyhow::Result<()> {
        loop {
            let length = match self.socket.read(buffer) {
                Ok(0) => bail!("the server closed it without a close frame"),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot read"),
            };
            let bytes = &buffer[..length];
            if self.input.is_empty() {
                let used = self.consume(bytes, desk)?;
                self.input.extend_from_slice(&bytes[used..]);
            } else {
                let mut input = mem::take(&mut self.input);
                input.extend_from_slice(bytes);
                let used = self.consume(&input, desk)?;
                input.drain(..used);
                self.input = input;
            }
            if length < buffer.len() {
                return Ok(());
            }
        }
    }

    /// Takes all that is whole in `bytes` and says how much that was.
    fn consume(&mut self, bytes: &[u8], desk: &mut Desk<'_>) -> anyhow::Result<usize> {
        if desk.script.wire == Wire::Rest {
            return self.responses(bytes, desk);
        }
        let mut used = 0;
        if self.state == State::Upgrading {
            let Some(end) = memmem::find(bytes, b"\r\n\r\n") else { return Ok(0) };
            let head = &bytes[..end];
            ensure!(
                head.starts_with(b"HTTP/1.1 101"),
                "the upgrade was refused: {}",
                String::from_utf8_lossy(head).lines().next().unwrap_or_default()
            );
            desk.script.auth(self.user, &mut self.output);
            self.state = State::Authenticating;
            used = end + 4;
        }
        while let Some((frame, length)) = frame::decode(&bytes[used..]) {
            self.frame(&frame, desk)?;
            used += length;
        }
        Ok(used)
    }

    /// The same over REST, where a response belongs to the one request.
    fn responses(&mut self, bytes: &[u8], desk: &mut Desk<'_>) -> anyhow::Result<usize> {
        let Some(response) = http::parse(bytes)? else { return Ok(0) };
        ensure!(self.busy & 1 != 0, "an answer nobody awaits");
        if response.status < 300 {
            self.answered(0, desk);
        } else {
            self.refused(0, &format!("HTTP {}", response.status), desk);
        }
        Ok(response.length)
    }

    fn frame(&mut self, frame: &Frame<'_>, desk: &mut Desk<'_>) -> anyhow::Result<()> {
        let payload = frame.payload;
        match frame.opcode {
            frame::TEXT | frame::BINARY if self.state == State::Authenticating => {
                if memmem::find(payload, b"auth_ok").is_some() {
                    let user = script::member(payload, "user").unwrap_or_default();
                    user.clone_into(&mut desk.tally.user);
                    self.ready(desk);
                    return Ok(());
                }
                match script::member(payload, "code") {
                    Some(code) => bail!("not authenticated: {code}"),
                    None => bail!("not authenticated: {}", String::from_utf8_lossy(payload)),
                }
            }
            frame::TEXT | frame::BINARY => self.data(frame, desk)?,
            frame::PING => frame::encode(frame::PONG, payload, &mut self.output),
            frame::CLOSE => {
                let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                bail!("the server closed it with {code}");
            }
            _ => {}
        }
        Ok(())
    }

    /// An answer, a push, or a control frame of an open connection.
    fn data(&mut self, frame: &Frame<'_>, desk: &mut Desk<'_>) -> anyhow::Result<()> {
        let payload = frame.payload;
        let Some(answer) = script::answer(payload, desk.script.wire) else {
            let control = frame.opcode == frame::TEXT && payload.starts_with(br#"{"type":""#);
            if !control {
                desk.tally.push(payload, desk.now);
            } else if payload.starts_with(br#"{"type":"drain""#) {
                let millis = script::number(payload, "reconnect_after_ms")?;
                self.drain = Some(Duration::from_millis(millis));
                self.state = State::Leaving;
                desk.tally.drains += 1;
            }
            return Ok(());
        };
        ensure!(self.busy & (1 << answer.slot) != 0, "an answer nobody awaits");
        if answer.ok {
            self.answered(answer.slot, desk);
        } else {
            self.refused(answer.slot, script::member(payload, "code").unwrap_or("?"), desk);
        }
        Ok(())
    }

    fn answered(&mut self, slot: usize, desk: &mut Desk<'_>) {
        let Slot { package, since } = self.slots[slot];
        desk.tally.answer(package, desk.now.saturating_duration_since(since));
        self.free(slot, desk);
    }

    fn refused(&mut self, slot: usize, code: &str, desk: &mut Desk<'_>) {
        tally::count(&mut desk.tally.refused, code);
        self.free(slot, desk);
    }

    fn free(&mut self, slot: usize, desk: &mut Desk<'_>) {
        self.busy &= !(1 << slot);
        if slot < self.in_flight && self.is_ready() {
            self.request(slot, desk.now, desk);
        }
    }

    fn request(&mut self, slot: usize, since: Instant, desk: &mut Desk<'_>) {
        let package = desk.script.request(self.user, slot, &mut self.output);
        self.busy |= 1 << slot;
        desk.tally.sent += 1;
        let entry = Slot { package, since };
        while self.slots.len() <= slot {
            self.slots.push(entry);
        }
        self.slots[slot] = entry;
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
