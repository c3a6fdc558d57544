//! The load client: one thread, epoll, as many connections as the descriptors allow.
//!
//! It costs less CPU than any server under test, and allocates nothing for a message. What happens is in
//! its [`Tally`]. It fails at the first connection that is refused or lost and at the first answer that
//! is no success, unless it is told to go on ([`Client::tolerant`], [`Client::returning`]).

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use mio::{Events, Interest, Poll, Token};

use crate::{
    link::{Desk, Link, State},
    machine::Timer,
    mix::Mix,
    script::Script,
    tally::{self, Tally},
};

/// Connections being opened at once; more would overflow the server's backlog and wait for a resend.
pub(crate) const OPENING: usize = 128;
/// Time for one more connection to get ready.
const STALLED: Duration = Duration::from_secs(20);
/// Connections from one source address; the kernel has some 28,000 ports for each.
const PER_SOURCE: usize = 20_000;
const TURN: Duration = Duration::from_millis(20);
/// The longest pause between attempts to come back, as the protocol asks of clients.
const LONGEST_BACKOFF: u32 = 30_000;
const TIMER: Token = Token(usize::MAX);

/// When requests are sent.
enum Pace {
    /// As soon as one is answered, on every connection.
    Closed(usize),
    /// At fixed times, whatever the answers do.
    Open { start: Instant, rate: f64, sent: u64, turn: usize, timer: Timer },
}

pub(crate) struct Client {
    servers: Vec<SocketAddr>,
    script: Script,
    poll: Poll,
    events: Events,
    buffer: Vec<u8>,
    links: Vec<Option<Link>>,
    /// Indices of `links` that are none, and of those that ended in this turn.
    free: Vec<usize>,
    ended: Vec<(usize, anyhow::Error)>,
    pace: Pace,
    pub(crate) tally: Tally,
    packages: usize,
    ready: usize,
    opening: usize,
    connects: usize,
    /// Connections that come back: when, whose, and after how many attempts.
    waiting: BinaryHeap<Reverse<(Instant, usize, u32)>>,
    tolerant: bool,
    returning: bool,
    deaf: bool,
    /// Connections that may be on their way at once.
    at_once: usize,
    /// New connections a second.
    connect_rate: Option<f64>,
}

impl Client {
    /// Connections go to the servers in turn.
    pub(crate) fn new(
        servers: Vec<SocketAddr>,
        script: Script,
        packages: usize,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            servers,
            script,
            poll: Poll::new().context("cannot make an epoll instance")?,
            events: Events::with_capacity(1024),
            buffer: vec![0; 64 * 1024],
            links: Vec::new(),
            free: Vec::new(),
            ended: Vec::new(),
            pace: Pace::Closed(0),
            tally: Tally::new(packages),
            packages,
            ready: 0,
            opening: 0,
            connects: 0,
            waiting: BinaryHeap::new(),
            tolerant: false,
            returning: false,
            deaf: false,
            at_once: OPENING,
            connect_rate: None,
        })
    }

    /// Counts what fails and goes on.
    pub(crate) fn tolerant(mut self) -> Self {
        self.tolerant = true;
        self
    }

    /// Connects anew what was lost, refused or told to leave, as the protocol asks of clients.
    pub(crate) fn returning(mut self) -> Self {
        self.returning = true;
        self.tolerant()
    }

    /// Reads nothing once a connection is ready.
    pub(crate) fn deaf(mut self) -> Self {
        self.deaf = true;
        self.returning()
    }

    /// Opens so many connections at once, and no more than `rate` a second.
    pub(crate) fn opening(mut self, at_once: usize, rate: Option<f64>) -> Self {
        self.at_once = at_once;
        self.connect_rate = rate;
        self
    }

    /// Changes what requests ask for; those in flight stay as they are.
    pub(crate) fn ask_for(&mut self, mix: &Mix) -> anyhow::Result<()> {
        self.script.ask_for(mix)?;
        self.packages = mix.parts().len();
        self.forget();
        Ok(())
    }

    /// Begins a new tally.
    pub(crate) fn forget(&mut self) {
        self.tally = Tally::new(self.packages);
    }

    /// Ends a warm-up: what went wrong in it is not forgotten.
    pub(crate) fn forget_answers(&mut self) {
        let Tally { refused, failed, lost, .. } =
            std::mem::replace(&mut self.tally, Tally::new(self.packages));
        self.tally = Tally { refused, failed, lost, ..Tally::new(self.packages) };
    }

    /// Connections that are authenticated.
    pub(crate) fn ready(&self) -> usize {
        self.ready
    }

    /// The name of whoever came last, as the server knows it.
    pub(crate) fn user(&self) -> &str {
        &self.tally.user
    }

    /// Whether nobody is left, and nobody comes back.
    pub(crate) fn is_deserted(&self) -> bool {
        self.ready == 0 && self.opening == 0 && self.waiting.is_empty()
    }

    /// Opens `count` more connections and waits until all are authenticated, or have failed.
    pub(crate) fn open(&mut self, count: usize) -> anyhow::Result<()> {
        self.open_watched(count, |_| {})
    }

    /// The same, and shows itself in between.
    pub(crate) fn open_watched(
        &mut self,
        count: usize,
        mut watch: impl FnMut(&mut Self),
    ) -> anyhow::Result<()> {
        let (start, mut opened) = (Instant::now(), 0);
        let mut progress = (start, self.ready);
        while opened < count || self.opening > 0 || !self.waiting.is_empty() {
            let due = self.connect_rate.map_or(count, |rate| {
                ((start.elapsed().as_secs_f64() * rate) as usize + 1).min(count)
            });
            while opened < due && self.opening < self.at_once {
                self.connect(self.connects, 0)?;
                opened += 1;
            }
            self.turn(if opened < count { Duration::from_millis(1) } else { TURN })?;
            watch(self);
            if self.ready > progress.1 || opened < due {
                progress = (Instant::now(), self.ready);
            }
            ensure!(
                progress.0.elapsed() < STALLED,
                "{} connections are open, {} are not, and no other is within {STALLED:?}",
                self.ready,
                self.opening + self.waiting.len()
            );
        }
        Ok(())
    }

    /// Keeps `in_flight` requests going on every connection; returns the number of answers.
    ///
    /// What is in flight at the end is answered in the next call.
    pub(crate) fn run(&mut self, in_flight: usize, duration: Duration) -> anyhow::Result<u64> {
        self.keep_in_flight(in_flight)?;
        self.go_on(duration)
    }

    /// From now on sends `rate` requests a second over all connections, while it goes on.
    pub(crate) fn send_at(&mut self, rate: f64) -> anyhow::Result<()> {
        self.keep_in_flight(0)?;
        let gap = Duration::from_secs_f64(1.0 / rate);
        let timer = Timer::start(gap, self.poll.registry(), TIMER)?;
        self.pace = Pace::Open { start: Instant::now(), rate, sent: 0, turn: 0, timer };
        Ok(())
    }

    /// Requests that should have been sent by now and were not.
    pub(crate) fn overdue(&self) -> u64 {
        match &self.pace {
            Pace::Closed(_) => 0,
            Pace::Open { start, rate, sent, .. } => {
                ((start.elapsed().as_secs_f64() * rate) as u64).saturating_sub(*sent)
            }
        }
    }

    /// Goes on as it was told; returns the number of answers.
    pub(crate) fn go_on(&mut self, duration: Duration) -> anyhow::Result<u64> {
        let before = self.tally.answers();
        let end = Instant::now() + duration;
        loop {
            let now = Instant::now();
            if now >= end {
                return Ok(self.tally.answers() - before);
            }
            self.send_due(now)?;
            self.turn(TURN.min(end - now))?;
        }
    }

    /// Keeps the connections open and answers pings.
    pub(crate) fn hold(&mut self, duration: Duration) -> anyhow::Result<()> {
        self.go_on(duration).map(drop)
    }

    /// Cuts the first `count` connections off without a word; a returning client connects them anew.
    pub(crate) fn cut(&mut self, count: usize) {
        let open =
            |(index, link): (usize, &Option<Link>)| link.as_ref()?.is_ready().then_some(index);
        let open: Vec<_> = self.links.iter().enumerate().filter_map(open).take(count).collect();
        let now = Instant::now();
        for index in open {
            let Some(link) = self.links[index].take() else { continue };
            self.free.push(index);
            self.ready -= 1;
            if self.returning {
                self.waiting.push(Reverse((now, link.user, 0)));
            }
        }
    }

    fn keep_in_flight(&mut self, in_flight: usize) -> anyhow::Result<()> {
        self.pace = Pace::Closed(in_flight);
        let now = Instant::now();
        for index in 0..self.links.len() {
            let Some(link) = &mut self.links[index] else { continue };
            if link.is_ready() {
                let mut desk = Desk { script: &mut self.script, tally: &mut self.tally, now };
                if let Err(error) = link.keep_in_flight(in_flight, &mut desk) {
                    self.end(index, &error, now)?;
                }
            }
        }
        Ok(())
    }

    /// Sends what is due, each on the next connection that has room.
    fn send_due(&mut self, now: Instant) -> anyhow::Result<()> {
        let count = self.links.len();
        let Pace::Open { start, rate, sent, turn, .. } = &mut self.pace else { return Ok(()) };
        let mut full = 0;
        while full < count {
            let due = *start + Duration::from_secs_f64(*sent as f64 / *rate);
            if due > now {
                break;
            }
            *turn = (*turn + 1) % count;
            let Some(link) = &mut self.links[*turn] else {
                full += 1;
                continue;
            };
            let mut desk = Desk { script: &mut self.script, tally: &mut self.tally, now };
            match link.send(due, &mut desk) {
                Ok(true) => (*sent, full) = (*sent + 1, 0),
                Ok(false) => full += 1,
                Err(error) => {
                    self.ended.push((*turn, error));
                    full += 1;
                }
            }
        }
        self.bury(now)
    }

    fn connect(&mut self, user: usize, attempts: u32) -> anyhow::Result<()> {
        let server = self.servers[self.connects % self.servers.len()];
        self.connects += 1;
        let index = self.free.pop().unwrap_or(self.links.len());
        let source = match server.ip().is_loopback() && server.is_ipv4() {
            true => {
                let source =
                    u8::try_from(1 + index / PER_SOURCE).context("too many connections")?;
                Some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, source)))
            }
            false => None,
        };
        let link = Link::connect(server, source, user, self.deaf);
        let mut link = link.with_context(|| format!("cannot connect to {server}"))?;
        link.attempts = attempts;
        if let Pace::Closed(in_flight) = self.pace {
            link.set_in_flight(in_flight, self.script.wire);
        }
        // mio's events are edge-triggered: being writable all the time costs no wake-ups.
        self.poll
            .registry()
            .register(&mut link.socket, Token(index), Interest::READABLE | Interest::WRITABLE)
            .context("cannot register a socket")?;
        if index == self.links.len() {
            self.links.push(None);
        }
        self.links[index] = Some(link);
        self.opening += 1;
        Ok(())
    }

    /// Waits for events and handles them.
    fn turn(&mut self, timeout: Duration) -> anyhow::Result<()> {
        match self.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            polled => polled.context("cannot wait for sockets")?,
        }
        for event in &self.events {
            if let (TIMER, Pace::Open { timer, .. }) = (event.token(), &self.pace) {
                timer.go_on();
            }
            let index = event.token().0;
            let Some(Some(link)) = self.links.get_mut(index) else { continue };
            let (was, now) = (link.state, Instant::now());
            let mut desk = Desk { script: &mut self.script, tally: &mut self.tally, now };
            if let Err(error) = link.advance(event, &mut desk, &mut self.buffer) {
                self.ended.push((index, error));
            }
            if link.state == was {
                continue;
            }
            if link.state == State::Ready {
                (self.ready, self.opening) = (self.ready + 1, self.opening - 1);
            } else if let Some(pause) = link.take_drain() {
                self.ready -= usize::from(was == State::Ready);
                self.opening -= usize::from(was == State::Authenticating);
                if self.returning {
                    self.waiting.push(Reverse((now + pause, link.user, 0)));
                }
            }
        }
        if !self.tolerant && !self.tally.refused.is_empty() {
            self.tally.ensure_flawless()?;
        }
        let now = Instant::now();
        self.bury(now)?;
        while let Some(Reverse((due, user, attempts))) = self.waiting.peek().copied()
            && due <= now
            && self.opening < self.at_once
        {
            self.waiting.pop();
            self.connect(user, attempts)?;
        }
        Ok(())
    }

    /// Ends what failed in this turn.
    fn bury(&mut self, now: Instant) -> anyhow::Result<()> {
        while let Some((index, error)) = self.ended.pop() {
            self.end(index, &error, now)?;
        }
        Ok(())
    }

    fn end(&mut self, index: usize, error: &anyhow::Error, now: Instant) -> anyhow::Result<()> {
        let Some(link) = self.links[index].take() else { return Ok(()) };
        self.free.push(index);
        ensure!(self.tolerant, "connection {index}: {error:#}");
        let tally = &mut self.tally;
        tally.unanswered += link.open_requests();
        match link.state {
            State::Ready => {
                self.ready -= 1;
                tally::count(&mut tally.lost, &format!("{error:#}"));
            }
            // As it was told; its successor waits already.
            State::Leaving => return Ok(()),
            _ => {
                self.opening -= 1;
                tally::count(&mut tally.failed, &format!("{error:#}"));
            }
        }
        if self.returning {
            // Another server may be there; once all have refused, it waits.
            let round = link.attempts / self.servers.len().max(1) as u32;
            let longest = 1000_u32.saturating_mul(1 << round.min(10)).min(LONGEST_BACKOFF);
            let at_once = (link.attempts + 1) % self.servers.len() as u32 != 0;
            let pause = if at_once { 0 } else { fastrand::u32(0..longest) };
            let due = now + Duration::from_millis(pause.into());
            self.waiting.push(Reverse((due, link.user, link.attempts + 1)));
        }
        Ok(())
    }
}
