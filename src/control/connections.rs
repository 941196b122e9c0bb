//! The connections of a listener, in a bounded number.
//!
//! Why: each connection has a descriptor, and disks need descriptors too. What must hold:
//! - At most [`MAX_CONNECTIONS`] are open. A new one replaces the one that has waited longest for its client: for a
//!   request, or for the rest of one. So clients that send nothing keep no other client out.
//! - A connection is not replaced from the moment its request is complete until the answer is sent. When all connections
//!   are in that state, a new one is refused with an error that says so.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::serve::{IncomingStream, Listener};
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{Notify, Semaphore};

use super::wire::{ErrorBody, ErrorKind};

/// Most connections of a listener that may be open.
pub(super) const MAX_CONNECTIONS: usize = 512;
/// Connections above the bound that are being refused at a time. Others are closed without an answer.
const REFUSALS: usize = 16;
/// How long a client that is refused has to send its request. An answer before that may be lost.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// For its client.
    Client(Instant),
    /// For the daemon: a request is complete, and its answer is not sent yet.
    Answer,
}

/// One connection, as its requests see it.
#[derive(Clone)]
pub(super) struct Connection {
    phase: Arc<Mutex<Phase>>,
    replaced: Arc<Notify>,
}

impl Connection {
    fn new() -> Self {
        Self { phase: Arc::new(Mutex::new(Phase::Client(Instant::now()))), replaced: Arc::new(Notify::new()) }
    }
}

/// All connections of a listener.
#[derive(Default)]
struct Connections {
    open: HashMap<u64, Connection>,
    last: u64,
}

impl Connections {
    /// Adds a connection. `None` when there are too many, and none of them waits for its client.
    fn add(&mut self, limit: usize) -> Option<(u64, Connection)> {
        if self.open.len() >= limit {
            let waiting =
                self.open.iter().filter_map(|(number, connection)| match *connection.phase.lock() {
                    Phase::Client(since) => Some((since, *number)),
                    Phase::Answer => None,
                });
            let (_, oldest) = waiting.min()?;
            if let Some(connection) = self.open.remove(&oldest) {
                connection.replaced.notify_one();
            }
        }
        self.last += 1;
        let connection = Connection::new();
        self.open.insert(self.last, connection.clone());
        Some((self.last, connection))
    }
}

/// A listener whose open connections are bounded.
pub(super) struct BoundedListener<L> {
    listener: L,
    connections: Arc<Mutex<Connections>>,
    refusals: Arc<Semaphore>,
    limit: usize,
}

impl<L> BoundedListener<L> {
    /// At most `limit` connections of `listener`.
    pub fn new(listener: L, limit: usize) -> Self {
        Self { listener, connections: Arc::default(), refusals: Arc::new(Semaphore::new(REFUSALS)), limit }
    }

    fn refuse<Io: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, mut client: Io) {
        let Ok(permit) = self.refusals.clone().try_acquire_owned() else { return };
        let answer = refusal(self.limit);
        tokio::spawn(async move {
            let refused = async {
                // A client that still writes when the connection is closed does not read the answer.
                let _ = client.read(&mut [0; 4096]).await;
                client.write_all(answer.as_bytes()).await?;
                client.shutdown().await
            };
            // A client that does not take the answer is closed without it.
            let _ = tokio::time::timeout(REFUSAL_TIMEOUT, refused).await;
            drop(permit);
        });
    }
}

/// The answer to a connection above the bound.
fn refusal(limit: usize) -> String {
    let message = format!(
        "{limit} connections are open and all their requests are being answered; see which processes have them with \
         `ss -xp`, and try again when they have ended; to stop the daemon, send its supervisor SIGTERM"
    );
    // Text always encodes.
    let body = serde_json::to_string(&ErrorBody::new(ErrorKind::Busy, message)).unwrap_or_default();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: \
         close\r\n\r\n{body}",
        body.len()
    )
}

impl<L: Listener> Listener for BoundedListener<L> {
    type Io = BoundedIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (io, address) = self.listener.accept().await;
            let added = self.connections.lock().add(self.limit);
            let Some((number, connection)) = added else {
                self.refuse(io);
                continue;
            };
            let replaced = Box::pin(connection.replaced.clone().notified_owned());
            let all = self.connections.clone();
            return (BoundedIo { io, connection, replaced, number, all }, address);
        }
    }

    fn local_addr(&self) -> io::Result<L::Addr> {
        self.listener.local_addr()
    }
}

/// The stream of a connection. It ends when another connection replaces this one.
pub(super) struct BoundedIo<Io> {
    io: Io,
    connection: Connection,
    replaced: Pin<Box<tokio::sync::futures::OwnedNotified>>,
    number: u64,
    all: Arc<Mutex<Connections>>,
}

impl<Io> Drop for BoundedIo<Io> {
    fn drop(&mut self) {
        self.all.lock().open.remove(&self.number);
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for BoundedIo<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if read.is_pending() && self.replaced.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        read
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for BoundedIo<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl<L: Listener> Connected<IncomingStream<'_, BoundedListener<L>>> for Connection {
    fn connect_info(stream: IncomingStream<'_, BoundedListener<L>>) -> Self {
        stream.io().connection.clone()
    }
}

/// Sets the phase of a connection back when an answer is sent, or is not going to be.
struct AnswerGuard(Connection);

impl Drop for AnswerGuard {
    fn drop(&mut self) {
        *self.0.phase.lock() = Phase::Client(Instant::now());
    }
}

/// The body of a request. Its end completes the request.
struct RequestBody {
    body: Body,
    connection: Connection,
}

impl RequestBody {
    fn complete(&self) {
        *self.connection.phase.lock() = Phase::Answer;
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if matches!(frame, Poll::Ready(None)) || self.body.is_end_stream() {
            self.complete();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer. The answer counts as sent when the server drops it.
struct AnswerBody {
    body: Body,
    _guard: AnswerGuard,
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

async fn follow_phases(request: Request, next: Next) -> Response {
    let Some(ConnectInfo(connection)) = request.extensions().get::<ConnectInfo<Connection>>().cloned() else {
        return next.run(request).await;
    };
    let guard = AnswerGuard(connection.clone());
    let request = request.map(|body| {
        let body = RequestBody { body, connection };
        if body.is_end_stream() {
            body.complete();
        }
        Body::new(body)
    });
    let answer = next.run(request).await;
    answer.map(|body| Body::new(AnswerBody { body, _guard: guard }))
}

/// Serves `router` on at most `limit` connections of `listener`. Ends when `drain` does and all requests that have begun
/// are answered.
pub(super) async fn serve<L: Listener<Addr: std::fmt::Debug>>(
    listener: L,
    limit: usize,
    router: Router,
    drain: impl Future<Output = ()> + Send + 'static,
) {
    let router = router.layer(from_fn(follow_phases));
    let service = router.into_make_service_with_connect_info::<Connection>();
    // It has no errors: a listener retries its own.
    let _ = axum::serve(BoundedListener::new(listener, limit), service).with_graceful_shutdown(drain).await;
}

#[cfg(test)]
mod tests;
