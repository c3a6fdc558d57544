//! The TCP stream of an HTTP connection, which ends when its client makes no progress, and lets an early
//! answer arrive.
//!
//! hyper reads and writes through it. An upgrade takes the bare TCP stream out again.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};

use crate::connection::pace::Pace;

/// Time for a client to send the head of a request: of the first since it has connected, of a later one since its
/// first byte. What arrives of a body behind an early answer counts as such a byte.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// An answer that comes before its request has arrived is lost if the socket is closed with unread input: the
/// peer's kernel drops it at the reset. So input is dropped here until the client is done: bounded by the time
/// between two reads, by the time and the bytes of all.
const LINGER_PAUSE: Duration = Duration::from_secs(2);
const LINGER: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 64 << 20;

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Between two requests.
    pub(super) keep_alive: Duration,
    /// For a KiB a second to be written, while something waits.
    pub(super) write: Duration,
    /// For a request, from its head to the end of its answer.
    pub(super) request: Duration,
}

/// What the stream has to know of the request that is answered on it. Written by the service.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    /// A request was read, and its answer has not begun.
    answering: AtomicBool,
    /// When a request began, unless the stream has seen it.
    begun: Mutex<Option<Instant>>,
    /// The last request has a body, of which some may be on its way when the answer is out.
    has_body: AtomicBool,
    /// The answer is a stream: it takes as long as it takes.
    endless: AtomicBool,
}

impl Exchange {
    /// The head of a request was read.
    pub(super) fn begin(&self, has_body: bool) {
        self.has_body.store(has_body, Relaxed);
        self.endless.store(false, Relaxed);
        *self.lock() = Some(Instant::now());
        self.answering.store(true, Relaxed);
    }

    /// The head of the answer is there.
    pub(super) fn answer(&self, endless: bool) {
        self.endless.store(endless, Relaxed);
        self.answering.store(false, Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A TCP stream with deadlines.
pub(super) struct Stream {
    tcp: TcpStream,
    exchange: Arc<Exchange>,
    patience: Patience,
    /// When the head has to be there that is being read; none between requests.
    head: Option<Instant>,
    /// When the answer that is being written has to be out.
    end: Instant,
    reading: Timer,
    writing: Timer,
    /// Bytes so far.
    written: u64,
    /// Set by a write that has to wait, until nothing waits any more.
    pace: Option<Pace>,
    lingering: Option<Lingering>,
}

/// What is dropped after the last answer.
struct Lingering {
    end: Instant,
    bytes: usize,
}

/// A timer that is made when it is first waited for.
#[derive(Default)]
struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Ready at the deadline, which may have moved since the last poll.
    fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx)
    }
}

impl Stream {
    pub(super) fn new(tcp: TcpStream, exchange: Arc<Exchange>, patience: Patience) -> Self {
        let now = Instant::now();
        Self {
            tcp,
            exchange,
            patience,
            head: Some(now + HEAD_TIMEOUT),
            end: now + patience.request,
            reading: Timer::default(),
            writing: Timer::default(),
            written: 0,
            pace: None,
            lingering: None,
        }
    }

    pub(super) fn into_tcp(self) -> TcpStream {
        self.tcp
    }

    /// Looks whether a request has begun: its head is there, and its answer has a deadline.
    fn look(&mut self) {
        let begun = self.exchange.lock().take();
        if let Some(begun) = begun {
            self.head = None;
            self.end = begun + self.patience.request;
        }
    }

    /// Whether a write that waits has waited too long, or its client is too slow.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.look();
        let endless = self.exchange.endless.load(Relaxed);
        loop {
            let now = Instant::now().into_std();
            let pace = *self.pace.get_or_insert(Pace::new(now, self.written));
            let looked_at = Instant::from_std(pace.since + self.patience.write);
            let deadline = if endless { looked_at } else { looked_at.min(self.end) };
            ready!(self.writing.poll(cx, deadline));
            let over = !endless && Instant::now() >= self.end;
            if over || pace.is_slow(Instant::now().into_std(), self.written) {
                break;
            }
            self.pace = None;
        }
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its answer"))
    }

    /// The outcome of a write, unless it has waited too long.
    fn written(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match polled {
            Poll::Ready(Ok(bytes)) => self.written += bytes as u64,
            Poll::Ready(Err(_)) => {}
            Poll::Pending => return self.poll_stalled(cx).map(Err),
        }
        polled
    }

    /// Reads and drops what still arrives, within bounds.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scrap = [std::mem::MaybeUninit::uninit(); 8192];
        let now = Instant::now();
        let lingering =
            self.lingering.get_or_insert(Lingering { end: now + LINGER, bytes: LINGER_BYTES });
        loop {
            let mut buffer = ReadBuf::uninit(&mut scrap);
            match Pin::new(&mut self.tcp).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => return Poll::Ready(()),
                Poll::Ready(Ok(())) => {
                    lingering.bytes = lingering.bytes.saturating_sub(buffer.filled().len());
                    if lingering.bytes == 0 {
                        return Poll::Ready(());
                    }
                    self.reading = Timer::default();
                }
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        let pause = match &self.reading.0 {
            Some(sleep) => sleep.deadline(),
            None => now + LINGER_PAUSE,
        };
        let end = lingering.end;
        self.reading.poll(cx, pause.min(end))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.tcp).poll_read(cx, buffer);
        this.look();
        if this.exchange.answering.load(Relaxed) {
            // The routes bound the time of a body and of the answer.
            return polled;
        }
        if polled.is_ready() {
            if buffer.filled().len() > before {
                this.head.get_or_insert_with(|| Instant::now() + HEAD_TIMEOUT);
            }
            this.reading = Timer::default();
            return polled;
        }
        let deadline = this.head.unwrap_or_else(|| match &this.reading.0 {
            Some(sleep) => sleep.deadline(),
            None => Instant::now() + this.patience.keep_alive,
        });
        ready!(this.reading.poll(cx, deadline));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no request arrived in time")))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write(cx, bytes);
        self.written(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write_vectored(cx, slices);
        self.written(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Asked for once all is written.
        self.pace = None;
        self.writing = Timer::default();
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            self.look();
            ready!(Pin::new(&mut self.tcp).poll_shutdown(cx))?;
            let unread = self.exchange.has_body.load(Relaxed) || self.head.is_some();
            if !unread {
                return Poll::Ready(Ok(()));
            }
            self.reading = Timer::default();
        }
        self.poll_linger(cx).map(Ok)
    }
}
