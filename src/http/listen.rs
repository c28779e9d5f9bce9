//! The accept loop: connection cap, deadlines for slow peers, small send buffers, graceful drain.
//! axum's own loop installs no timer, so a slow client would hold its connection for ever.

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};
use tower::ServiceExt;

use super::{
    deadline::{Busy, Deadlines},
    watched::OnDrop,
};

/// After a failed accept (out of file descriptors, say) the loop rests this long.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// What requests get after the drain deadline to send their last event.
const LAST_WORDS: Duration = Duration::from_secs(1);
const BACKLOG: u32 = 1024;
/// hyper takes no smaller buffer.
const BUFFER_BYTES_MIN: usize = 8192;

/// Limits of the accept loop.
#[derive(Debug, Clone, PartialEq)]
pub struct ListenOptions {
    /// Open connections; further ones wait in the kernel's backlog.
    pub connections_max: usize,
    /// From a request's first byte to the end of its head.
    pub head_timeout: Duration,
    /// How long a connection may idle between requests.
    pub keep_alive_timeout: Duration,
    /// How long a write may wait for the client to read.
    pub write_stall_timeout: Duration,
    /// How long requests in flight may go on after the shutdown signal.
    pub drain_timeout: Duration,
    /// Kernel send buffer: what a client that does not read can have waiting for it.
    pub send_buffer_bytes: u32,
    /// Header fields of a request.
    pub headers_max: usize,
    /// Bytes of a request's head.
    pub head_bytes_max: usize,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            head_timeout: Duration::from_secs(5),
            keep_alive_timeout: Duration::from_secs(75),
            write_stall_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            send_buffer_bytes: 64 * 1024,
            headers_max: 64,
            head_bytes_max: 32 * 1024,
        }
    }
}

/// How far the server is on its way down. Shared by the accept loop and the routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Requests are taken.
    Serving,
    /// New requests are refused, running ones finish.
    Draining,
    /// Running ones are told to end now.
    Ending,
}

/// The stage, settable and awaitable.
#[derive(Debug, Clone)]
pub struct Lifecycle(Arc<watch::Sender<Stage>>);

impl Default for Lifecycle {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Stage::Serving)))
    }
}

impl Lifecycle {
    /// Moves on to `stage`, never back.
    pub fn advance(&self, stage: Stage) {
        self.0.send_if_modified(|now| {
            let forward = stage > *now;
            *now = stage.max(*now);
            forward
        });
    }

    /// Where the server is.
    pub fn stage(&self) -> Stage {
        *self.0.borrow()
    }

    /// Waits until `stage` is reached.
    pub async fn reached(&self, stage: Stage) {
        let mut receiver = self.0.subscribe();
        if receiver.wait_for(|now| *now >= stage).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// How the drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every request finished.
    Clean,
    /// The deadline passed; this many connections were cut.
    Cut(usize),
}

/// Binds `address` with the send buffer of `options`: accepted sockets inherit it.
///
/// # Errors
/// What the system says: address in use, not permitted.
pub fn bind(address: SocketAddr, options: &ListenOptions) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(options.send_buffer_bytes)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves `router` until `shutdown` completes, then drains. `lifecycle` is the one the router's state holds.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    lifecycle: Lifecycle,
    shutdown: impl Future<Output = ()>,
    options: &ListenOptions,
) -> Drained {
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(options.connections_max));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            (stream, permit) = accept(&listener, &permits) => {
                let connection = connection(stream, router.clone(), options, &graceful);
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    lifecycle.advance(Stage::Draining);
    drain(graceful, connections, lifecycle, options.drain_timeout).await
}

async fn drain(
    graceful: GracefulShutdown,
    mut connections: JoinSet<()>,
    lifecycle: Lifecycle,
    timeout: Duration,
) -> Drained {
    tracing::info!(connections = connections.len(), "draining");
    let mut finished = pin!(graceful.shutdown());
    if tokio::time::timeout(timeout, &mut finished).await.is_ok() {
        return Drained::Clean;
    }
    lifecycle.advance(Stage::Ending);
    if tokio::time::timeout(LAST_WORDS, &mut finished).await.is_err() {
        tracing::warn!("connections cut after the drain deadline");
    }
    while connections.try_join_next().is_some() {}
    let cut = connections.len();
    connections.shutdown().await;
    Drained::Cut(cut)
}

/// The next connection, once there is room for it.
async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { std::future::pending().await };
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Serves one connection to its end.
fn connection(
    stream: TcpStream,
    router: Router,
    options: &ListenOptions,
    graceful: &GracefulShutdown,
) -> impl Future<Output = ()> + use<> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let busy = Busy::default();
    let stream = Deadlines::new(stream, busy.clone(), options.head_timeout, options.write_stall_timeout);
    let service = service_fn(move |request| answer(router.clone(), request, busy.clone()));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.keep_alive_timeout)
        .max_headers(options.headers_max)
        .max_header_size(options.head_bytes_max)
        .max_buf_size(options.head_bytes_max.max(BUFFER_BYTES_MIN))
        .serve_connection(TokioIo::new(stream), service);
    let connection = graceful.watch(connection);
    async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection ended early");
        }
    }
}

async fn answer(router: Router, request: Request<Incoming>, busy: Busy) -> Result<Response, std::convert::Infallible> {
    busy.begin();
    let response = router.oneshot(request.map(Body::new)).await?;
    Ok(response.map(|body| Body::new(OnDrop::new(body, move || busy.end()))))
}
