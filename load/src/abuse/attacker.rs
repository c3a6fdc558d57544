//! `attack`: the process of an attacker, one thread and epoll, as hard as its core allows.
//!
//! It is a process of its own so that the scheduler can put the honest client before it: what is measured
//! there is then the server's time, not that of the tool. It is told its tokens on standard input, and says
//! on standard output what came of it.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use memchr::memmem;
use mio::{Events, Interest, Poll, Token, event::Event, net::TcpStream};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::kinds::{Kind, PER_USER, Plan, Then};
use crate::{
    frame, http, script,
    tally::{self, Reasons},
};

/// The address of every attacker; honest clients have another.
pub(crate) const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);
/// Connections that are not let in yet, at most.
const OPENING: usize = 128;
/// Bytes that one connection reads or writes before the next has its turn.
const SLICE: usize = 64 * 1024;
const TURN: Duration = Duration::from_millis(10);

#[derive(clap::Args)]
pub(crate) struct Options {
    address: SocketAddr,
    #[arg(long)]
    kind: Kind,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    connections: usize,
    /// Connections a second that it opens in place of those that have ended
    #[arg(long)]
    rate: f64,
}

/// What the process is told on its standard input.
#[derive(Serialize, Deserialize)]
pub(super) struct Tokens {
    /// One for each user.
    pub(super) users: Vec<String>,
    pub(super) expired: String,
}

/// What came of an attack.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Requests, connections that were held, or frames, whichever the attack is made of.
    pub(crate) attempts: u64,
    pub(crate) seconds: f64,
    pub(crate) connects: u64,
    /// Connections that were let in at once, at most.
    pub(crate) most_open: usize,
    /// Answers and ends, by what they were.
    pub(crate) reasons: Reasons,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let tokens = serde_json::from_reader(io::stdin()).context("tokens on standard input")?;
    crate::machine::allow_connections(options.connections)?;
    let mut attacker = Attacker::new(options, tokens)?;
    attacker.attack(Duration::from_secs_f64(options.seconds))?;
    println!("{}", serde_json::to_string(&attacker.report)?);
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connecting,
    /// The opening is sent, its answer awaited.
    Opening,
    /// Upgraded; `auth_ok` is awaited.
    Authenticating,
    /// Let in: it attacks.
    Inside,
}

struct Connection {
    socket: TcpStream,
    phase: Phase,
    /// What is being sent, and how much of it is.
    prelude: bool,
    written: usize,
    /// What came and is not understood yet.
    input: Vec<u8>,
    readable: bool,
    writable: bool,
    /// The server sends nothing more: no event comes for the end that is still to be read.
    ending: bool,
    /// Among those that have something to do.
    queued: bool,
}

struct Attacker<'a> {
    options: &'a Options,
    poll: Poll,
    plans: Vec<Plan>,
    connections: Vec<Option<Connection>>,
    /// Indices of `connections` that are none.
    free: Vec<usize>,
    /// Indices of those that have something to do.
    queue: Vec<usize>,
    buffer: Vec<u8>,
    opening: usize,
    report: Report,
}

/// Why a connection is over.
type End = String;

impl<'a> Attacker<'a> {
    fn new(options: &'a Options, tokens: Tokens) -> anyhow::Result<Self> {
        let host = options.address.to_string();
        let none = String::new();
        let users = tokens.users.len();
        let plans = if options.kind.authenticates() { users } else { 2 };
        let plan = |index| {
            let user = tokens.users.get(index % users.max(1)).unwrap_or(&none);
            options.kind.plan(index, &host, user, &tokens.expired)
        };
        let plans: Vec<_> = (0..plans.max(1)).map(plan).collect();
        Ok(Self {
            options,
            poll: Poll::new().context("cannot make an epoll instance")?,
            plans,
            connections: (0..options.connections).map(|_| None).collect(),
            free: (0..options.connections).rev().collect(),
            queue: Vec::new(),
            buffer: vec![0; SLICE],
            opening: 0,
            report: Report::default(),
        })
    }

    fn attack(&mut self, duration: Duration) -> anyhow::Result<()> {
        let (start, mut events) = (Instant::now(), Events::with_capacity(1024));
        while start.elapsed() < duration {
            self.open(start)?;
            let timeout = if self.queue.is_empty() { TURN } else { Duration::ZERO };
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                polled => polled.context("cannot wait for sockets")?,
            }
            for event in &events {
                self.note(event);
            }
            for index in std::mem::take(&mut self.queue) {
                self.serve(index);
            }
        }
        self.report.seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Opens as many as are wanted and may be under way. While the server lets them in that is as fast as it
    /// goes; those it has ended are replaced at the rate.
    fn open(&mut self, start: Instant) -> anyhow::Result<()> {
        let replaced = start.elapsed().as_secs_f64() * self.options.rate;
        // A connection that fails at once is not tried again in the same turn.
        for _ in 0..OPENING {
            let open = self.connections.len() - self.free.len();
            let ended = self.report.connects - open as u64;
            if self.opening >= OPENING || ended as f64 > replaced {
                return Ok(());
            }
            let Some(index) = self.free.pop() else { return Ok(()) };
            self.report.connects += 1;
            match self.connect(index) {
                Ok(connection) => {
                    self.connections[index] = Some(connection);
                    self.opening += 1;
                    self.report.attempts += u64::from(self.options.kind.then() == Then::Hold);
                }
                Err(error) => {
                    tally::count(
                        &mut self.report.reasons,
                        &format!("not connected: {}", error.kind()),
                    );
                    self.free.push(index);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn connect(&self, index: usize) -> io::Result<Connection> {
        let server = self.options.address;
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        // Close with a reset: ports are free at once.
        socket.set_linger(Some(Duration::ZERO))?;
        if !self.options.kind.reads() {
            socket.set_recv_buffer_size(4096)?;
        }
        if server.ip().is_loopback() && server.is_ipv4() {
            socket.bind(&SocketAddr::new(IpAddr::V4(SOURCE), 0).into())?;
        }
        match socket.connect(&server.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => {
                return Err(error);
            }
            _ => {}
        }
        let mut socket = TcpStream::from_std(socket.into());
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut socket, Token(index), interest)?;
        Ok(Connection {
            socket,
            phase: Phase::Connecting,
            prelude: false,
            written: 0,
            input: Vec::new(),
            readable: false,
            writable: false,
            ending: false,
            queued: false,
        })
    }

    fn note(&mut self, event: &Event) {
        let index = event.token().0;
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        connection.ending |= event.is_read_closed();
        connection.readable |= event.is_readable() || connection.ending;
        connection.writable |= event.is_writable();
        if !self.options.kind.reads() && (event.is_error() || event.is_write_closed()) {
            connection.writable = true;
        }
        if !connection.queued {
            connection.queued = true;
            self.queue.push(index);
        }
    }

    /// Gives a connection its turn; one that has more to do is queued again.
    fn serve(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::take) else {
            return;
        };
        let was_opening = connection.phase != Phase::Inside;
        let plan = plan(self.options.kind, index) % self.plans.len();
        let mut turn = Turn {
            kind: self.options.kind,
            plan: &self.plans[plan],
            connection,
            report: &mut self.report,
            buffer: &mut self.buffer,
        };
        let ended = turn.go();
        let mut connection = turn.connection;
        let inside = connection.phase == Phase::Inside;
        self.opening -= usize::from(was_opening && (inside || ended.is_err()));
        if let Err(reason) = ended {
            tally::count(&mut self.report.reasons, &reason);
            self.free.push(index);
            return;
        }
        connection.queued = connection.has_more(self.options.kind);
        if connection.queued {
            self.queue.push(index);
        }
        self.connections[index] = Some(connection);
        if was_opening && inside {
            let open = self.connections.len() - self.free.len() - self.opening;
            self.report.most_open = self.report.most_open.max(open);
        }
    }
}

/// The plan of a connection, before it begins anew with the first: a user has `PER_USER` connections, and
/// those of nobody differ by parity.
fn plan(kind: Kind, index: usize) -> usize {
    if kind.authenticates() { index / PER_USER } else { index }
}

impl Connection {
    fn has_more(&self, kind: Kind) -> bool {
        let sends = self.phase == Phase::Inside && kind.then() == Then::Flood;
        self.readable && kind.reads() || self.writable && sends
    }
}

/// One connection at work.
struct Turn<'a> {
    kind: Kind,
    plan: &'a Plan,
    connection: Connection,
    report: &'a mut Report,
    buffer: &'a mut [u8],
}

impl Turn<'_> {
    fn go(&mut self) -> Result<(), End> {
        if self.connection.phase == Phase::Connecting {
            if let Ok(Some(error)) = self.connection.socket.take_error() {
                return Err(format!("not connected: {}", error.kind()));
            }
            if !self.connection.writable {
                return Ok(());
            }
            let upgrades = self.kind.upgrades();
            self.connection.phase = if upgrades { Phase::Opening } else { Phase::Inside };
        }
        if self.kind.reads() && self.connection.readable {
            self.read()?;
        }
        if self.connection.writable {
            self.write()?;
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), End> {
        match self.connection.socket.read(self.buffer) {
            Ok(0) => Err("closed".to_owned()),
            Ok(length) => {
                self.connection.readable = length == self.buffer.len() || self.connection.ending;
                self.connection.input.extend_from_slice(&self.buffer[..length]);
                self.understand()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.connection.readable = false;
                Ok(())
            }
            Err(error) => Err(broken(&error)),
        }
    }

    /// Takes all that is whole of what came.
    fn understand(&mut self) -> Result<(), End> {
        if self.connection.phase == Phase::Opening {
            if !self.connection.input.starts_with(b"HTTP/1.1 101") {
                return self.answered();
            }
            let Some(end) = memmem::find(&self.connection.input, b"\r\n\r\n") else {
                return Ok(());
            };
            self.connection.input.drain(..end + 4);
            self.connection.phase = match self.kind.authenticates() {
                true => Phase::Authenticating,
                false => Phase::Inside,
            };
        }
        if self.kind.upgrades() { self.frames() } else { self.answered() }
    }

    /// An answer over HTTP: the next is asked for, or the connection has had what it can get.
    fn answered(&mut self) -> Result<(), End> {
        let Ok(response) = http::parse(&self.connection.input) else {
            return Err("no HTTP".to_owned());
        };
        let Some(response) = response else { return Ok(()) };
        self.report.attempts += u64::from(self.kind.then() == Then::Ask);
        let head = self.connection.input[..response.length].to_ascii_lowercase();
        let closes = memmem::find(&head, b"\r\nconnection: close").is_some();
        self.connection.input.drain(..response.length);
        let reason = format!("HTTP {}", response.status);
        if self.kind.then() != Then::Ask || closes || response.status == 101 {
            return Err(reason);
        }
        tally::count(&mut self.report.reasons, &reason);
        self.connection.written = 0;
        Ok(())
    }

    fn frames(&mut self) -> Result<(), End> {
        let input = std::mem::take(&mut self.connection.input);
        let mut used = 0;
        while let Some((frame, length)) = frame::decode(&input[used..]) {
            used += length;
            match frame.opcode {
                frame::CLOSE => {
                    let code =
                        frame.payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    return Err(format!("close {code}"));
                }
                frame::TEXT => self.text(frame.payload),
                _ => {}
            }
        }
        self.connection.input = input;
        self.connection.input.drain(..used);
        Ok(())
    }

    fn text(&mut self, payload: &[u8]) {
        if let Some(code) = script::member(payload, "code") {
            tally::count(&mut self.report.reasons, code);
        } else if self.connection.phase == Phase::Authenticating {
            self.connection.phase = Phase::Inside;
            self.connection.written = 0;
            self.connection.prelude = !self.plan.prelude.is_empty();
        }
    }

    fn write(&mut self) -> Result<(), End> {
        let flood = self.connection.phase == Phase::Inside && self.kind.then() == Then::Flood;
        let mut left = SLICE;
        while left > 0 {
            let bytes = match (flood, self.connection.prelude) {
                (true, true) => &self.plan.prelude,
                (true, false) => &self.plan.repeat,
                _ => &self.plan.opening,
            };
            let rest = &bytes[self.connection.written..];
            if rest.is_empty() {
                if !flood {
                    return Ok(());
                }
                (self.connection.prelude, self.connection.written) = (false, 0);
                continue;
            }
            match self.connection.socket.write(&rest[..rest.len().min(left)]) {
                Ok(written) => {
                    if flood && !self.connection.prelude {
                        let units = |bytes: usize| (bytes / self.plan.unit) as u64;
                        let before = self.connection.written;
                        self.report.attempts += units(before + written) - units(before);
                    }
                    self.connection.written += written;
                    left -= written;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.connection.writable = false;
                    return Ok(());
                }
                // What the server said before it closed tells more.
                Err(error) if self.kind.reads() => return self.last_words(&error),
                Err(error) => return Err(broken(&error)),
            }
        }
        Ok(())
    }

    /// Reads what is left on a connection that takes nothing more.
    fn last_words(&mut self, error: &io::Error) -> Result<(), End> {
        loop {
            self.read()?;
            if !self.connection.readable {
                return Err(broken(error));
            }
        }
    }
}

fn broken(error: &io::Error) -> End {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => "reset".to_owned(),
        other => other.to_string(),
    }
}
