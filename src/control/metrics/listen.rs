//! The metrics on a TCP address.
//!
//! What must hold: a scraper that is slow, hostile or many keeps only other scrapers from their metrics. So the thread is
//! its own, connections are few, and each ends after `LIFETIME` whatever it does.
//!
//! A worker may not bind an address once it is confined. So each worker binds it before, also the standby worker: the
//! address is shared (SO_REUSEPORT), and of the sockets that are bound to it only the one that listens gets connections.
//! While another program has the address, a helper process waits for it (`sandbox::binder`).

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::MAKER;
use crate::control::{Control, WaitForAddress};
use crate::io::priority;

/// Most connections at a time. A further one is closed at once.
const CONNECTIONS: usize = 8;
/// How long a connection lasts, with the answer.
const LIFETIME: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 16;
/// Bytes of a request.
const LONGEST_REQUEST: usize = 16 << 10;
/// The pause after a connection could not be accepted, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(500);

enum Socket {
    /// It is bound and does not listen yet.
    Bound(TcpSocket),
    /// The address is taken, for this reason.
    Taken(String, WaitForAddress),
}

/// The socket of metrics, before its worker serves.
pub struct MetricsSocket {
    socket: Socket,
    address: SocketAddr,
}

fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Binds an address, and listens there. The process has a single thread.
///
/// # Errors
/// As [`MetricsSocket::bind`].
pub fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async { bind(address)?.listen(BACKLOG)?.into_std() }).map(OwnedFd::from)
}

impl MetricsSocket {
    /// Binds the address, which other workers of this daemon may have bound. When it cannot be bound, `wait` waits until
    /// it can.
    ///
    /// # Errors
    /// Those of `wait`.
    pub fn bind(address: SocketAddr, wait: impl FnOnce() -> io::Result<WaitForAddress>) -> io::Result<Self> {
        let socket = match bind(address) {
            Ok(socket) => Socket::Bound(socket),
            Err(error) => Socket::Taken(error.to_string(), wait()?),
        };
        Ok(Self { socket, address })
    }

    /// Its descriptor, once it is bound.
    pub fn descriptor(&self) -> Option<RawFd> {
        match &self.socket {
            Socket::Bound(socket) => Some(socket.as_raw_fd()),
            Socket::Taken(..) => None,
        }
    }

    /// Serves the metrics on a thread of its own, as long as the process lives.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be created.
    pub fn serve(self, control: Control) -> io::Result<()> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build()?;
        let Self { socket, address } = self;
        let run = move || {
            priority::background();
            runtime.block_on(async {
                match get(socket, address, &control).await {
                    Ok(listener) => {
                        *control.metrics_trouble.lock() = None;
                        accept(listener, control).await;
                    }
                    Err(error) => {
                        let why = format!("{error}; restart the daemon");
                        tracing::error!(why, %address, "cannot serve metrics");
                        *control.metrics_trouble.lock() = Some(why);
                    }
                }
            });
        };
        std::thread::Builder::new().name("metrics".into()).spawn(run).map(drop)
    }
}

/// The socket that listens, once the address is free.
async fn get(socket: Socket, address: SocketAddr, control: &Control) -> io::Result<TcpListener> {
    let (error, wait) = match socket {
        Socket::Bound(socket) => return socket.listen(BACKLOG),
        Socket::Taken(error, wait) => (error, wait),
    };
    let why = format!("{error}; free the address or change [metrics] listen; plyfs tries again");
    tracing::error!(why, %address, "metrics are not served yet; disks are served all the same");
    *control.metrics_trouble.lock() = Some(why);
    let listener = tokio::task::spawn_blocking(wait).await.map_err(io::Error::other)??;
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    tracing::info!(%address, "metrics are served");
    TcpListener::from_std(listener)
}

async fn accept(listener: TcpListener, control: Control) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        // Without a place the connection is dropped, which closes it.
        if let Ok(place) = places.clone().try_acquire_owned() {
            let control = control.clone();
            tokio::spawn(async move {
                let _ = timeout(LIFETIME, converse(stream, control)).await;
                drop(place);
            });
        }
    }
}

async fn converse(stream: TcpStream, control: Control) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let control = control.clone();
        async move { Ok::<_, Infallible>(answer(&request, &control).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LIFETIME)
        .max_buf_size(LONGEST_REQUEST)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A scraper that breaks off harms only itself.
    let _ = connection.await;
}

async fn answer<B>(request: &Request<B>, control: &Control) -> Response<Full<Bytes>> {
    let status = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => StatusCode::OK,
        (_, "/metrics") => StatusCode::METHOD_NOT_ALLOWED,
        _ => StatusCode::NOT_FOUND,
    };
    let texts = if status == StatusCode::OK { MAKER.texts(control).await } else { None };
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let (status, media, text) = match (status, &texts) {
        (_, Some(texts)) => {
            let (media, text) = texts.choose(accept);
            (status, media, text.to_owned())
        }
        (StatusCode::OK, None) => {
            (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the metrics are not ready in time\n".to_owned())
        }
        (status, None) => (status, "text/plain", "the metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(media));
    response
}
