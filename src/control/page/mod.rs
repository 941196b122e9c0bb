//! The status page: read-only routes and static files for browsers, on a listener of its own.
//!
//! What must hold:
//! - Only the routes of `routes` can be reached, all of them GET: no client of the page changes anything (D72).
//! - A slow or hostile client costs `CONNECTIONS` connections, `REQUESTS` requests and one thread at most, each for a
//!   bounded time. Guests notice nothing.
//! - A page of another site reads nothing: no CORS headers, and a host name that is not this listener's own is refused,
//!   so that a name that an attacker lets resolve to this host (DNS rebinding) leads nowhere (`origin`).
//! - The page requests nothing from anywhere else: all files are part of the program, and the content security policy
//!   allows only them.

mod assets;
mod origin;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::error::{ApiError, Cause};
use super::{Control, WaitForAddress, bases, disks, maps, no_such_method, no_such_resource, stats, status};
use crate::config::PageAddress;
use crate::io::priority;

/// Connections at a time. More wait in the socket.
const CONNECTIONS: usize = 32;
/// Requests for data that are worked on at a time. More wait.
const REQUESTS: usize = 4;
/// How long clients may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// To send a request; also how long an idle connection stays.
    header: Duration,
    /// A request for data, with its wait for others.
    answer: Duration,
    /// A connection. A browser makes another one.
    connection: Duration,
    /// The last answer of a connection, after that.
    last_answer: Duration,
}

const LIMITS: Limits = Limits {
    header: Duration::from_secs(10),
    answer: Duration::from_secs(10),
    connection: Duration::from_secs(60),
    last_answer: Duration::from_secs(10),
};

/// The pause after a connection that could not be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// The most bytes that a request may have.
const LONGEST_REQUEST: usize = 16 << 10;
const MOST_HEADERS: usize = 64;

/// Headers of every answer.
const HEADERS: [(HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// The requests for data that are worked on.
#[derive(Clone)]
struct Work {
    room: Arc<Semaphore>,
    longest: Duration,
}

/// How clients reach the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// Browsers of this host, or others: the host name is checked.
    Browsers,
    /// A Unix socket, which no browser opens by itself.
    Socket,
}

/// The socket of the page.
pub enum PageSocket {
    /// It listens.
    Bound(OwnedFd),
    /// Another program has its TCP address.
    Taken(WaitForAddress),
}

impl PageSocket {
    /// Why there is no page yet.
    pub fn trouble(socket: Option<&Self>) -> Option<String> {
        let what_now = match socket {
            Some(Self::Bound(_)) => return None,
            Some(Self::Taken(_)) => "plyfs tries again",
            None => "then restart the daemon",
        };
        Some(format!("the address could not be bound; free it or change [page] listen; {what_now}"))
    }

    /// The socket that listens, once the address is free.
    async fn get(self) -> io::Result<OwnedFd> {
        match self {
            Self::Bound(socket) => Ok(socket),
            Self::Taken(wait) => tokio::task::spawn_blocking(wait).await.map_err(io::Error::other)?,
        }
    }
}

/// The routes for data: those that change nothing, and open no disk.
fn routes(control: Control) -> Router {
    Router::new()
        .route("/v1/status", get(status::status))
        .route("/v1/bases", get(bases::list))
        .route("/v1/bases/{name}/map", get(maps::base))
        .route("/v1/disks", get(disks::list))
        .route("/v1/disks/{name}/map", get(maps::disk))
        .route("/v1/stats", get(stats::stats))
        .with_state(control)
}

/// All that the listener serves.
fn router(data: Router, reach: Reach, limits: Limits) -> Router {
    let work = Work { room: Arc::new(Semaphore::new(REQUESTS)), longest: limits.answer };
    let router = data
        .layer(from_fn_with_state(work, bounded))
        .merge(assets::routes())
        .fallback(no_such_resource)
        .method_not_allowed_fallback(no_such_method)
        .layer(from_fn(only_reads));
    let router = match reach {
        Reach::Browsers => router.layer(from_fn(origin::check)),
        Reach::Socket => router,
    };
    router.layer(from_fn(with_headers))
}

/// Refuses every method that might change something, whatever the routes.
async fn only_reads(request: Request, next: Next) -> Response {
    match *request.method() {
        Method::GET | Method::HEAD => next.run(request).await,
        _ => ApiError::new(Cause::NotAllowed, "the status page only reads; use the control socket")
            .into_response(),
    }
}

async fn with_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Bounds the requests for data. A request goes on to its end even when its client has gone: the work behind it cannot
/// be taken back, and must count as long as it lasts.
async fn bounded(State(Work { room, longest }): State<Work>, request: Request, next: Next) -> Response {
    let work = async {
        // The semaphore is never closed.
        let turn = room.acquire_owned().await.ok();
        let answer = tokio::spawn(async move {
            let answer = next.run(request).await;
            drop(turn);
            answer
        });
        answer.await.unwrap_or_else(|_| {
            ApiError::new(Cause::Io, "the request failed by an internal error; see the daemon's log")
                .into_response()
        })
    };
    timeout(longest, work).await.unwrap_or_else(|_| {
        let why = "the daemon does not answer in time, for example because the files of a base hang; find the base with \
                   `plyfs base ls`";
        ApiError::new(Cause::Overloaded, why).into_response()
    })
}

/// Serves the page on a thread of its own, until the process ends.
///
/// # Errors
/// When the thread or its runtime cannot be created.
pub fn spawn(control: Control, socket: PageSocket) -> io::Result<()> {
    let address = control.config.page.address().map_err(io::Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2 * REQUESTS)
        .thread_name("page")
        .build()?;
    let trouble = control.page_trouble.clone();
    let data = routes(control);
    let served = async move {
        let listener = socket.get().await?;
        if trouble.lock().take().is_some() {
            tracing::info!("the status page is served now");
        }
        match address {
            Some(PageAddress::Tcp(_)) => {
                serve_tcp(listener, router(data, Reach::Browsers, LIMITS), LIMITS).await
            }
            Some(PageAddress::Unix(_)) => {
                serve_unix(listener, router(data, Reach::Socket, LIMITS), LIMITS).await
            }
            None => Ok(()),
        }
    };
    let serve = move || {
        priority::background();
        if let Err(error) = runtime.block_on(served) {
            tracing::error!(%error, "cannot serve the status page; disks are served without it");
        }
    };
    std::thread::Builder::new().name("page".into()).spawn(serve).map(drop)
}

async fn serve_tcp(listener: OwnedFd, router: Router, limits: Limits) -> io::Result<()> {
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    accept_all(|| async { listener.accept().await.map(|(stream, _)| stream) }, router, limits).await;
    Ok(())
}

async fn serve_unix(listener: OwnedFd, router: Router, limits: Limits) -> io::Result<()> {
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    accept_all(|| async { listener.accept().await.map(|(stream, _)| stream) }, router, limits).await;
    Ok(())
}

/// Accepts connections for ever, each once there is room for it.
async fn accept_all<S, F>(accept: impl Fn() -> F, router: Router, limits: Limits)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = io::Result<S>>,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let place = room.clone().acquire_owned().await.ok();
        match accept().await {
            Ok(stream) => {
                let router = router.clone();
                drop(tokio::spawn(async move {
                    connection(stream, router, limits).await;
                    drop(place);
                }));
            }
            // Out of descriptors, or the client has gone already.
            Err(_) => sleep(ACCEPT_RETRY).await,
        }
    }
}

/// Serves one connection, for a bounded time.
async fn connection<S>(stream: S, router: Router, limits: Limits)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header)
            .max_headers(MOST_HEADERS)
            .max_buf_size(LONGEST_REQUEST)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
    );
    // A connection that breaks is its client's matter.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = sleep(limits.connection) => connection.as_mut().graceful_shutdown(),
    }
    let _ = timeout(limits.last_answer, connection).await;
}
