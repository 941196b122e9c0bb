//! The client of the control socket: HTTP/1.1 with JSON on `<store>/control.sock`.
//!
//! A thousand calls of the command line in a row must be cheap: a call is one thread, one connection and one request.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::http::request::Builder;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::error::CliError;
use super::retry::{self, Key};
use crate::control::wire::IDEMPOTENCY_KEY;
use crate::daemon::connect_within;
use crate::format::layout::CONTROL_SOCKET;

/// The size of `sun_path` in a socket address, with its final zero.
const SUN_PATH: usize = 108;
const LONGEST_LINE: usize = 1 << 20;
/// The time limit of a request that the daemon answers from memory. A request that takes longer went to a worker that
/// does not run. Once the supervisor knows that, it answers the next request itself.
const PROMPT: Duration = Duration::from_secs(4);
/// How long a command repeats a request that timed out.
const RETRY_LIMIT: Duration = Duration::from_secs(20);

pub(super) struct Client {
    runtime: Runtime,
    store: PathBuf,
    socket: PathBuf,
}

/// The refusal of a daemon of any version: a `wire::ErrorBody` whose kind this command may not know.
#[derive(Deserialize)]
struct AnyRefusal {
    error: AnyReason,
}

#[derive(Deserialize)]
struct AnyReason {
    #[serde(default)]
    kind: Value,
    message: String,
}

/// Decodes an answer as one of the API's bodies.
///
/// # Errors
/// `InvalidAnswer` when the answer is not that body.
pub(super) fn read<T: DeserializeOwned>(answer: &Value, action: &str) -> Result<T, CliError> {
    T::deserialize(answer).map_err(|error| CliError::InvalidAnswer {
        action: action.to_owned(),
        problem: format!("the daemon's answer does not fit this command ({error})"),
    })
}

impl Client {
    /// A client of the daemon on `store`, an absolute path. It does not connect yet.
    pub(super) fn new(store: PathBuf) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(CliError::Runtime)?;
        let socket = store.join(CONTROL_SOCKET);
        Ok(Self { runtime, store, socket })
    }

    pub(super) fn store(&self) -> &Path {
        &self.store
    }

    /// Sends a GET, again when the connection breaks. For errors, `action` names the failed operation and its object:
    /// "cannot create disk vm1".
    pub(super) fn get(&self, path: &str, action: &str) -> Result<Value, CliError> {
        retry::repeat(|| self.request(Method::GET, path, String::new(), action))
    }

    /// As [`get`](Self::get), but fails at once when no worker serves, with the reason, and in bounded time when there
    /// is no answer.
    pub(super) fn get_now(&self, path: &str, action: &str) -> Result<Value, CliError> {
        self.retry_timeouts(action, || {
            retry::until_answered(|| self.request_within(PROMPT, Method::GET, path, action))
        })
    }

    /// As [`post`](Self::post), for a request that the daemon answers at once and that may be sent twice.
    pub(super) fn post_now<T: Serialize>(
        &self,
        path: &str,
        body: Option<&T>,
        action: &str,
    ) -> Result<Value, CliError> {
        let encoded = body.map(serde_json::to_vec).transpose();
        let body = encoded.map_err(|error| self.transport(action, error.to_string()))?.unwrap_or_default();
        let once = || {
            let request = Request::builder().method(Method::POST).uri(path);
            let (status, answered) =
                self.exchange_within(Some(PROMPT), request, Bytes::from(body.clone()), action)?;
            answer(status, &answered, action)
        };
        self.retry_timeouts(action, || retry::repeat(once))
    }

    /// Sends one GET request, and gives up after `limit`.
    pub(super) fn get_within(&self, limit: Duration, path: &str, action: &str) -> Result<Value, CliError> {
        self.request_within(limit, Method::GET, path, action)
    }

    /// Repeats a request that times out, until it has an answer or [`RETRY_LIMIT`] is over.
    fn retry_timeouts(
        &self,
        action: &str,
        request: impl Fn() -> Result<Value, CliError>,
    ) -> Result<Value, CliError> {
        let begun = Instant::now();
        loop {
            match request() {
                Err(CliError::TimedOut { .. }) if begun.elapsed() < RETRY_LIMIT => {}
                Err(CliError::TimedOut { .. }) => {
                    let waited = humantime::format_duration(Duration::from_secs(begun.elapsed().as_secs()));
                    return Err(self.timed_out(action, &waited.to_string()));
                }
                done => return done,
            }
        }
    }

    fn timed_out(&self, action: &str, waited: &str) -> CliError {
        CliError::TimedOut {
            action: action.to_owned(),
            socket: self.socket.clone(),
            waited: waited.to_owned(),
        }
    }

    /// Sends a POST once. After `Transport` it is open whether the daemon carried it out.
    pub(super) fn post(&self, path: &str, body: &impl Serialize, action: &str) -> Result<Value, CliError> {
        let body = serde_json::to_string(body).map_err(|error| self.transport(action, error.to_string()))?;
        self.request(Method::POST, path, body, action)
    }

    /// As [`post`](Self::post), for a creation: it can be sent again with the same key.
    pub(super) fn post_once(
        &self,
        path: &str,
        key: &Key,
        body: &impl Serialize,
        action: &str,
    ) -> Result<Value, CliError> {
        let body = serde_json::to_vec(body).map_err(|error| self.transport(action, error.to_string()))?;
        let request = Request::builder().method(Method::POST).uri(path).header(IDEMPOTENCY_KEY, key.text());
        let (status, body) = self.exchange_within(None, request, Bytes::from(body), action)?;
        answer(status, &body, action)
    }

    /// As [`post`](Self::post), without a body.
    pub(super) fn post_empty(&self, path: &str, action: &str) -> Result<Value, CliError> {
        self.request(Method::POST, path, String::new(), action)
    }

    /// Sends a PUT once, and gives up after `limit`.
    pub(super) fn put(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Option<Duration>,
        action: &str,
    ) -> Result<Value, CliError> {
        let body = serde_json::to_vec(body).map_err(|error| self.transport(action, error.to_string()))?;
        let request = Request::builder().method(Method::PUT).uri(path);
        let (status, body) = self.exchange_within(limit, request, Bytes::from(body), action)?;
        answer(status, &body, action)
    }

    /// Sends one DELETE, and gives up after `limit`.
    pub(super) fn delete_within(&self, limit: Duration, path: &str, action: &str) -> Result<Value, CliError> {
        self.request_within(limit, Method::DELETE, path, action)
    }

    /// Gets a file, again when the connection breaks.
    pub(super) fn get_bytes(&self, path: &str, action: &str) -> Result<Vec<u8>, CliError> {
        let get = || {
            let (status, body) = self.exchange(Method::GET, path, Bytes::new(), action)?;
            // An error is JSON here too.
            if status.is_success() {
                Ok(body.to_vec())
            } else {
                answer(status, &body, action).map(|_| Vec::new())
            }
        };
        retry::repeat(get)
    }

    /// Sends a file once.
    pub(super) fn put_bytes(&self, path: &str, bytes: Vec<u8>, action: &str) -> Result<Value, CliError> {
        let (status, body) = self.exchange(Method::PUT, path, Bytes::from(bytes), action)?;
        answer(status, &body, action)
    }

    /// As [`post`](Self::post).
    pub(super) fn delete(&self, path: &str, action: &str) -> Result<Value, CliError> {
        self.request(Method::DELETE, path, String::new(), action)
    }

    /// Gets an answer that consists of lines, and passes each to `line` as it arrives, until the answer ends or `line`
    /// fails.
    pub(super) fn lines(
        &self,
        path: &str,
        action: &str,
        mut line: impl FnMut(&str) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let stream = self.connect()?;
        let request = Request::get(path).header(header::HOST, "plyfs").body(Full::new(Bytes::new()));
        let request = request.map_err(|error| self.transport(action, error.to_string()))?;
        let lost = |error: Box<dyn std::error::Error + Send + Sync>| {
            self.transport(action, super::output::chain(error.as_ref()))
        };
        self.runtime.block_on(async {
            let mut body = match begin(stream, request).await.map_err(lost)? {
                (status, body) if status.is_success() => body,
                (status, body) => {
                    let text = body.collect().await.map_err(|error| lost(error.into()))?.to_bytes();
                    return answer(status, &text, action).map(drop);
                }
            };
            let mut rest: Vec<u8> = Vec::new();
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame.map_err(|error| lost(error.into()))?.into_data() else { continue };
                rest.extend_from_slice(&data);
                while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                    let text: Vec<u8> = rest.drain(..=end).collect();
                    line(String::from_utf8_lossy(&text).trim_end())?;
                }
                if rest.len() > LONGEST_LINE {
                    let problem = format!("the daemon's answer has a line of more than {LONGEST_LINE} bytes");
                    return Err(CliError::InvalidAnswer { action: action.to_owned(), problem });
                }
            }
            Ok(())
        })
    }

    /// Whether a daemon accepts connections. Only a socket without a listener counts as no.
    pub(super) fn is_listening(&self) -> bool {
        !matches!(self.connect_within(Some(PROMPT)), Err(CliError::NoDaemon { .. }))
    }

    fn request(&self, method: Method, path: &str, body: String, action: &str) -> Result<Value, CliError> {
        let (status, body) = self.exchange(method, path, Bytes::from(body), action)?;
        answer(status, &body, action)
    }

    /// As [`request`](Self::request), but fails with `TimedOut` when it takes longer than `limit`.
    fn request_within(
        &self,
        limit: Duration,
        method: Method,
        path: &str,
        action: &str,
    ) -> Result<Value, CliError> {
        let request = Request::builder().method(method).uri(path);
        let (status, body) = self.exchange_within(Some(limit), request, Bytes::new(), action)?;
        answer(status, &body, action)
    }

    fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        action: &str,
    ) -> Result<(StatusCode, Bytes), CliError> {
        self.exchange_within(None, Request::builder().method(method).uri(path), body, action)
    }

    fn exchange_within(
        &self,
        limit: Option<Duration>,
        request: Builder,
        body: Bytes,
        action: &str,
    ) -> Result<(StatusCode, Bytes), CliError> {
        let stream = match self.connect_within(limit) {
            // Connections that the daemon has not accepted fill the socket's queue.
            Err(CliError::Connect { source, .. }) if source.kind() == ErrorKind::WouldBlock => {
                return Err(self.timed_out(action, ""));
            }
            stream => stream?,
        };
        let transport = |message: String| self.transport(action, message);
        let mut request = request.header(header::HOST, "plyfs");
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).map_err(|error| transport(error.to_string()))?;
        let exchanged = self.runtime.block_on(async {
            let exchange = exchange(stream, request);
            match limit {
                None => Some(exchange.await),
                Some(limit) => tokio::time::timeout(limit, exchange).await.ok(),
            }
        });
        match exchanged {
            Some(done) => done.map_err(|error| transport(super::output::chain(error.as_ref()))),
            None => Err(self.timed_out(action, "")),
        }
    }

    /// The error for a connection that broke.
    pub(super) fn transport(&self, action: &str, message: String) -> CliError {
        CliError::Transport { action: action.to_owned(), socket: self.socket.clone(), message }
    }

    fn connect(&self) -> Result<UnixStream, CliError> {
        self.connect_within(None)
    }

    fn connect_within(&self, limit: Option<Duration>) -> Result<UnixStream, CliError> {
        // A blocking connect, because a non-blocking one fails when the daemon's backlog is full.
        let stream = connect(&self.socket, &self.store, limit).map_err(|source| {
            let socket = self.socket.clone();
            match source.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory => {
                    CliError::NoDaemon { store: self.store.clone(), socket, source }
                }
                ErrorKind::PermissionDenied => CliError::Denied { socket, source },
                _ => CliError::Connect { socket, source },
            }
        })?;
        stream
            .set_nonblocking(true)
            .map_err(|source| CliError::Connect { socket: self.socket.clone(), source })?;
        Ok(stream)
    }
}

fn connect(socket: &Path, store: &Path, limit: Option<Duration>) -> std::io::Result<UnixStream> {
    if socket.as_os_str().as_bytes().len() < SUN_PATH {
        return connect_within(socket, limit);
    }
    // The path is too long for a socket address. A path through the open directory is short enough.
    let dir = std::fs::File::open(store)?;
    let path = format!("/proc/self/fd/{}/{CONTROL_SOCKET}", dir.as_raw_fd());
    connect_within(Path::new(&path), limit)
}

type TransportError = Box<dyn std::error::Error + Send + Sync>;

async fn exchange(
    stream: UnixStream,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), TransportError> {
    let (status, body) = begin(stream, request).await?;
    Ok((status, body.collect().await?.to_bytes()))
}

/// Sends the request and receives the head of the answer. The connection ends with the body.
async fn begin(
    stream: UnixStream,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Incoming), TransportError> {
    let stream = tokio::net::UnixStream::from_std(stream)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    Ok((response.status(), response.into_body()))
}

fn answer(status: StatusCode, body: &[u8], action: &str) -> Result<Value, CliError> {
    if status.is_success() {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        return serde_json::from_slice(body).map_err(|error| CliError::InvalidAnswer {
            action: action.to_owned(),
            problem: format!("the daemon's answer is not JSON ({error})"),
        });
    }
    Err(match serde_json::from_slice::<AnyRefusal>(body) {
        Ok(AnyRefusal { error }) => {
            CliError::Refused { kind: serde_json::from_value(error.kind).ok(), message: error.message }
        }
        Err(_) => {
            let text: String = String::from_utf8_lossy(body).trim().chars().take(200).collect();
            let problem = format!("the daemon answered {status} {text}");
            CliError::InvalidAnswer { action: action.to_owned(), problem: problem.trim_end().to_owned() }
        }
    })
}
