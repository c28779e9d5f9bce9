//! A socket with deadlines: a request head must arrive soon after its first byte, and a reader must go on reading.
//! hyper's own header timeout also counts the idle time between requests, so it is used for that alone.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// How many requests a connection has begun and ended, told by the service to the socket.
#[derive(Debug, Clone, Default)]
pub struct Busy(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Busy {
    /// A request head has arrived whole.
    pub fn begin(&self) {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// Its response has been produced.
    pub fn end(&self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn begun(&self) -> u64 {
        self.0.begun.load(Ordering::Relaxed)
    }

    fn inside(&self) -> bool {
        self.begun() != self.0.ended.load(Ordering::Relaxed)
    }
}

/// A stream that fails with [`io::ErrorKind::TimedOut`] when its peer is too slow.
#[derive(Debug)]
pub struct Deadlines<S> {
    stream: S,
    busy: Busy,
    /// Requests whose head is known to be whole.
    heads_seen: u64,
    head_timeout: Duration,
    stall_timeout: Duration,
    head: Option<Pin<Box<Sleep>>>,
    stall: Option<Pin<Box<Sleep>>>,
}

impl<S> Deadlines<S> {
    /// `head_timeout`: from accept or a request's first byte to the end of its head.
    /// `stall_timeout`: how long a write may wait for the peer to read.
    pub fn new(stream: S, busy: Busy, head_timeout: Duration, stall_timeout: Duration) -> Self {
        let head = Some(Box::pin(sleep(head_timeout)));
        Self { stream, busy, heads_seen: 0, head_timeout, stall_timeout, head, stall: None }
    }

    /// Starts or polls the write deadline; called when a write found no room.
    fn poll_stall<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let timeout = self.stall_timeout;
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep(timeout)));
        stall.as_mut().poll(cx).map(|()| Err(timed_out("the client stopped reading")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Deadlines<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let begun = self.busy.begun();
        if begun != self.heads_seen {
            self.heads_seen = begun;
            self.head = None;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let head_begins = buf.filled().len() > before && !self.busy.inside() && self.head.is_none();
        if head_begins {
            self.head = Some(Box::pin(sleep(self.head_timeout)));
        }
        match (read, &mut self.head) {
            (Poll::Pending, Some(head)) => head.as_mut().poll(cx).map(|()| Err(timed_out("the request head is late"))),
            (read, _) => read,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Deadlines<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, buf) {
            Poll::Pending => self.poll_stall(cx),
            ready => {
                self.stall = None;
                ready
            }
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write_vectored(cx, bufs) {
            Poll::Pending => self.poll_stall(cx),
            ready => {
                self.stall = None;
                ready
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn timed_out(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, why)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const SOON: Duration = Duration::from_millis(20);
    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_late_head_fails_the_read() {
        let (mut client, server) = duplex(64);
        let busy = Busy::default();
        let mut server = Deadlines::new(server, busy.clone(), SOON, NEVER);
        let mut bytes = [0; 16];
        client.write_all(b"GET /").await.unwrap();
        assert_eq!(server.read(&mut bytes).await.unwrap(), 5);
        assert_eq!(server.read(&mut bytes).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn inside_a_request_only_new_heads_are_timed() {
        let (mut client, server) = duplex(64);
        let busy = Busy::default();
        let mut server = Deadlines::new(server, busy.clone(), SOON, NEVER);
        let mut bytes = [0; 16];
        busy.begin();
        assert!(
            tokio::time::timeout(SOON * 4, server.read(&mut bytes)).await.is_err(),
            "a slow body is not a late head"
        );
        busy.end();
        assert!(tokio::time::timeout(SOON * 4, server.read(&mut bytes)).await.is_err(), "idle is not a late head");
        client.write_all(b"P").await.unwrap();
        assert_eq!(server.read(&mut bytes).await.unwrap(), 1);
        assert_eq!(server.read(&mut bytes).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_request_that_was_answered_at_once_has_had_its_head() {
        let (_client, server) = duplex(64);
        let busy = Busy::default();
        let mut server = Deadlines::new(server, busy.clone(), SOON, NEVER);
        busy.begin();
        busy.end();
        assert!(tokio::time::timeout(SOON * 4, server.read(&mut [0; 16])).await.is_err(), "idle is not a late head");
    }

    #[tokio::test]
    async fn a_reader_that_stops_fails_the_write() {
        let (mut client, server) = duplex(4);
        let mut server = Deadlines::new(server, Busy::default(), NEVER, SOON);
        assert_eq!(server.write_all(b"0123456789").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes).await.unwrap();
        server.write_all(b"ab").await.unwrap();
    }
}
