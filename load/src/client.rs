//! The load client: one thread, epoll, as many connections as the descriptors allow.
//!
//! It costs less CPU than any server under test, and allocates nothing for a message. Every method
//! fails when a connection is refused or lost, or when an answer is not a success.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use mio::{Events, Interest, Poll, Token};

use crate::{
    link::Link,
    script::{Package, Script},
};

/// Connections being opened at once; more would overflow the server's backlog and wait for a resend.
const OPENING: usize = 128;
/// Time for one more connection to get ready.
const STALLED: Duration = Duration::from_secs(20);
/// Connections from one source address; the kernel has some 28,000 ports for each.
const PER_SOURCE: usize = 20_000;
const TURN: Duration = Duration::from_millis(20);

pub(crate) struct Client {
    server: SocketAddr,
    script: Script,
    poll: Poll,
    events: Events,
    buffer: Vec<u8>,
    links: Vec<Link>,
    ready: usize,
}

impl Client {
    pub(crate) fn new(server: SocketAddr, tokens: &[String]) -> anyhow::Result<Self> {
        Ok(Self {
            server,
            script: Script::new(server, tokens),
            poll: Poll::new().context("cannot make an epoll instance")?,
            events: Events::with_capacity(1024),
            buffer: vec![0; 64 * 1024],
            links: Vec::new(),
            ready: 0,
        })
    }

    /// Changes what requests ask for; those in flight stay as they are.
    pub(crate) fn ask_for(&mut self, package: Package) {
        self.script.ask_for(package);
    }

    /// Opens `count` more connections and waits until all are authenticated.
    pub(crate) fn open(&mut self, count: usize) -> anyhow::Result<()> {
        let wanted = self.links.len() + count;
        let mut progress = Instant::now();
        while self.ready < wanted {
            while self.links.len() < wanted && self.links.len() - self.ready < OPENING {
                self.connect()?;
            }
            let before = self.ready;
            self.turn(TURN)?;
            if self.ready > before {
                progress = Instant::now();
            }
            ensure!(
                progress.elapsed() < STALLED,
                "{} of {wanted} connections are open, and no other within {STALLED:?}",
                self.ready
            );
        }
        Ok(())
    }

    /// Keeps `in_flight` requests going on every connection; returns the number of answers.
    ///
    /// What is in flight at the end is answered in the next call.
    pub(crate) fn run(&mut self, in_flight: usize, duration: Duration) -> anyhow::Result<u64> {
        self.keep_in_flight(in_flight)?;
        let end = Instant::now() + duration;
        let mut answered = 0;
        while Instant::now() < end {
            answered += self.turn(TURN)?;
        }
        Ok(answered)
    }

    /// Keeps one request going on every connection; returns how long each took.
    ///
    /// None may be in flight before: it would seem quick.
    pub(crate) fn latencies(&mut self, duration: Duration) -> anyhow::Result<Vec<Duration>> {
        self.keep_in_flight(1)?;
        let start = Instant::now();
        // An answer is the moment at which the next request is sent.
        let mut sent = vec![start; self.links.len()];
        let mut latencies = Vec::new();
        while start.elapsed() < duration {
            self.turn_with(TURN, |link, _| {
                let now = Instant::now();
                latencies.push(now - sent[link]);
                sent[link] = now;
            })?;
        }
        Ok(latencies)
    }

    /// Keeps the connections open and answers pings.
    pub(crate) fn hold(&mut self, duration: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            self.turn(TURN)?;
        }
        Ok(())
    }

    fn keep_in_flight(&mut self, in_flight: usize) -> anyhow::Result<()> {
        for (index, link) in self.links.iter_mut().enumerate() {
            link.keep_in_flight(in_flight, &self.script)
                .with_context(|| format!("connection {index}"))?;
        }
        Ok(())
    }

    fn connect(&mut self) -> anyhow::Result<()> {
        let index = self.links.len();
        let source = u8::try_from(1 + index / PER_SOURCE).context("too many connections")?;
        let source = IpAddr::V4(Ipv4Addr::new(127, 0, 0, source));
        let link = Link::connect(self.server, source, index);
        let mut link = link.with_context(|| format!("cannot connect from {source}"))?;
        // mio's events are edge-triggered: being writable all the time costs no wake-ups.
        self.poll
            .registry()
            .register(&mut link.socket, Token(index), Interest::READABLE | Interest::WRITABLE)
            .context("cannot register a socket")?;
        self.links.push(link);
        Ok(())
    }

    /// Waits for events and handles them; returns the number of answers.
    fn turn(&mut self, timeout: Duration) -> anyhow::Result<u64> {
        let mut all = 0;
        self.turn_with(timeout, |_, answered| all += answered)?;
        Ok(all)
    }

    /// The same, and tells which connection got how many.
    fn turn_with(
        &mut self,
        timeout: Duration,
        mut answers: impl FnMut(usize, u64),
    ) -> anyhow::Result<()> {
        match self.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            polled => polled.context("cannot wait for sockets")?,
        }
        for event in &self.events {
            let index = event.token().0;
            let link = &mut self.links[index];
            let was_ready = link.is_ready();
            link.advance(event, &self.script, &mut self.buffer)
                .with_context(|| format!("connection {index}"))?;
            self.ready += usize::from(link.is_ready() && !was_ready);
            let answered = link.take_answered();
            if answered > 0 {
                answers(index, answered);
            }
        }
        Ok(())
    }
}
