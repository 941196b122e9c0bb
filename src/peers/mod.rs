//! Cached blocks of bases for other hosts, by HTTP: `--export-http`. `source::http::peer` is the other end.
//!
//! What must hold:
//! - Guests come first: one thread for the network and two for the cache's disk, all of lower priority. Connections,
//!   answers in memory and bytes per second are bounded; above a bound a host is refused, and asks another place (D121).
//! - A host that is slow, hostile or many takes at most half of each bound, each connection for a bounded time.
//! - Only bytes go out that `bases::lend` gives (D120). There is no list of what is here: a host has to know the digest.
//!
//! The supervisor binds the address once, and all workers share the socket. So an upgrade or a crash refuses no
//! connection, and a confined worker needs no right to bind.

mod answer;
mod share;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, TcpListener as StdListener};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout};

use self::share::Share;
use crate::bases::sources::HostSources;
use crate::io::priority;
use crate::store::Store;

/// Connections at a time. A further one is closed at once.
const CONNECTIONS: usize = 128;
/// Answers in memory at a time, 512 KiB each at most.
const ANSWERS: usize = 64;
/// Threads that wait for the cache's disk.
const READERS: usize = 2;
/// How long an idle connection stays, and a request takes to come.
const IDLE: Duration = Duration::from_secs(20);
/// How long a connection lasts, and then its last answer.
const LIFETIME: Duration = Duration::from_secs(60);
const LAST_ANSWER: Duration = Duration::from_secs(15);
/// Bytes of a request.
const LONGEST_REQUEST: usize = 16 << 10;
const MOST_HEADERS: usize = 64;
/// The pause after a connection could not be accepted, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(500);

/// What requests use.
struct Exporter {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    answers: Arc<Share>,
    /// Bytes per second.
    rate: Option<u64>,
    /// When the bytes so far have been sent at this rate.
    free_at: Mutex<Instant>,
    /// Runs reads of the cache.
    disk: Handle,
}

/// Serves cached blocks on a thread of its own, until the process ends. `rate`: most bytes per second.
///
/// # Errors
/// When the thread or its runtime cannot be created.
pub fn spawn(
    listener: OwnedFd,
    store: Arc<Store>,
    sources: Arc<HostSources>,
    rate: Option<u64>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(READERS)
        .thread_name("peers")
        .on_thread_start(priority::background)
        .build()?;
    let listener = StdListener::from(listener);
    listener.set_nonblocking(true)?;
    let serve = move || {
        priority::background();
        let exporter = Arc::new(Exporter {
            store,
            sources,
            answers: Share::new(ANSWERS),
            rate,
            free_at: Mutex::new(Instant::now()),
            disk: runtime.handle().clone(),
        });
        runtime.block_on(async {
            match TcpListener::from_std(listener) {
                Ok(listener) => accept(listener, exporter).await,
                Err(error) => {
                    tracing::error!(%error, "cannot serve other hosts; disks are served without it")
                }
            }
        });
    };
    std::thread::Builder::new().name("peers".into()).spawn(serve).map(drop)
}

async fn accept(listener: TcpListener, exporter: Arc<Exporter>) {
    let places = Share::new(CONNECTIONS);
    loop {
        let Ok((stream, from)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        // Without a place the connection is dropped, which closes it.
        if let Some(place) = places.take(from.ip()) {
            let exporter = exporter.clone();
            drop(tokio::spawn(async move {
                converse(stream, from.ip(), exporter).await;
                drop(place);
            }));
        }
    }
}

/// Serves one connection, for a bounded time.
async fn converse(stream: TcpStream, from: IpAddr, exporter: Arc<Exporter>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request: Request<Incoming>| {
        let exporter = exporter.clone();
        async move { Ok::<_, Infallible>(answer::answer(request, from, exporter).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_headers(MOST_HEADERS)
            .max_buf_size(LONGEST_REQUEST)
            .serve_connection(TokioIo::new(stream), service)
    );
    // A connection that breaks is its client's matter.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = sleep(LIFETIME) => connection.as_mut().graceful_shutdown(),
    }
    let _ = timeout(LAST_ANSWER, connection).await;
}
