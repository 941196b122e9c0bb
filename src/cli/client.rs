//! The client of the control socket: HTTP/1.1 with JSON on `<store>/control.sock`.
//!
//! A thousand calls of the CLI in a row have to be cheap, so a call is one thread, one connection, one request.

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

use super::again::{self, Key};
use super::error::CliError;
use crate::control::wire::IDEMPOTENCY_KEY;
use crate::daemon::connect_within;
use crate::format::layout::CONTROL_SOCKET;

/// `sun_path` of a socket address, with the zero at its end.
const SUN_PATH: usize = 108;
const LONGEST_LINE: usize = 1 << 20;
/// How long a connection may take that is answered by what is in memory. One that takes longer was taken by a worker
/// that does not run; the supervisor, once it knows that, answers the next one.
const PROMPTLY: Duration = Duration::from_secs(4);
/// How long a command goes on to ask when it is not answered promptly.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Client {
    runtime: Runtime,
    store: PathBuf,
    socket: PathBuf,
}

/// A refusal as a daemon of any version says it: `wire::ErrorBody` whose kind may be one that is not known here.
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

/// Reads an answer as one of the API's bodies.
///
/// # Errors
/// When it is not one.
pub(super) fn read<T: DeserializeOwned>(answer: &Value, action: &str) -> Result<T, CliError> {
    T::deserialize(answer).map_err(|error| CliError::Answer {
        action: action.to_owned(),
        problem: format!("the daemon's answer is not the one of this command ({error})"),
    })
}

impl Client {
    /// A client of the daemon on `store`, an absolute path. Nothing is connected yet.
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

    /// Asks, again when the connection breaks. `action` names what is done, on which object, for errors: "create disk
    /// vm1".
    pub(super) fn get(&self, path: &str, action: &str) -> Result<Value, CliError> {
        again::repeat(|| self.request(Method::GET, path, String::new(), action))
    }

    /// As [`get`](Self::get), but says at once that no worker serves, and why; and in bounded time, that there is no
    /// answer at all.
    pub(super) fn get_now(&self, path: &str, action: &str) -> Result<Value, CliError> {
        self.promptly(action, || {
            again::until_answered(|| self.request_within(PROMPTLY, Method::GET, path, action))
        })
    }

    /// As [`post`](Self::post), for what is answered at once and may be said twice.
    pub(super) fn post_now(&self, path: &str, action: &str) -> Result<Value, CliError> {
        self.promptly(action, || again::repeat(|| self.request_within(PROMPTLY, Method::POST, path, action)))
    }

    /// Asks once, and gives up after `limit`.
    pub(super) fn get_within(&self, limit: Duration, path: &str, action: &str) -> Result<Value, CliError> {
        self.request_within(limit, Method::GET, path, action)
    }

    /// Asks until there is an answer, or it has taken too long.
    fn promptly(&self, action: &str, ask: impl Fn() -> Result<Value, CliError>) -> Result<Value, CliError> {
        let begun = Instant::now();
        loop {
            match ask() {
                Err(CliError::Late { .. }) if begun.elapsed() < PATIENCE => {}
                Err(CliError::Late { .. }) => {
                    let waited = humantime::format_duration(Duration::from_secs(begun.elapsed().as_secs()));
                    return Err(self.late(action, &waited.to_string()));
                }
                done => return done,
            }
        }
    }

    fn late(&self, action: &str, waited: &str) -> CliError {
        CliError::Late { action: action.to_owned(), socket: self.socket.clone(), waited: waited.to_owned() }
    }

    /// Sends once; `Transport` leaves open whether it was done.
    pub(super) fn post(&self, path: &str, body: &impl Serialize, action: &str) -> Result<Value, CliError> {
        let body = serde_json::to_string(body).map_err(|error| self.transport(action, error.to_string()))?;
        self.request(Method::POST, path, body, action)
    }

    /// As [`post`](Self::post), of a creation: with the same key it can be sent again.
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

    /// Asks for a file, again when the connection breaks.
    pub(super) fn get_bytes(&self, path: &str, action: &str) -> Result<Vec<u8>, CliError> {
        let get = || {
            let (status, body) = self.exchange(Method::GET, path, Bytes::new(), action)?;
            // An error is JSON, as everywhere.
            if status.is_success() {
                Ok(body.to_vec())
            } else {
                answer(status, &body, action).map(|_| Vec::new())
            }
        };
        again::repeat(get)
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

    /// Gets an answer of lines and gives each to `line`, as it comes, until the answer ends or `line` fails.
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
                    let problem = "the daemon's answer has a line without an end".to_owned();
                    return Err(CliError::Answer { action: action.to_owned(), problem });
                }
            }
            Ok(())
        })
    }

    /// Whether a daemon accepts connections. Only "nobody is there" counts as no.
    pub(super) fn is_listening(&self) -> bool {
        !matches!(self.connect_within(Some(PROMPTLY)), Err(CliError::NoDaemon { .. }))
    }

    fn request(&self, method: Method, path: &str, body: String, action: &str) -> Result<Value, CliError> {
        let (status, body) = self.exchange(method, path, Bytes::from(body), action)?;
        answer(status, &body, action)
    }

    /// As [`request`](Self::request), but `Late` when it takes longer than `limit`.
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
            // Connections that were never taken fill the socket's queue.
            Err(CliError::Connect { source, .. }) if source.kind() == ErrorKind::WouldBlock => {
                return Err(self.late(action, ""));
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
            None => Err(self.late(action, "")),
        }
    }

    /// The connection broke.
    pub(super) fn transport(&self, action: &str, message: String) -> CliError {
        CliError::Transport { action: action.to_owned(), socket: self.socket.clone(), message }
    }

    fn connect(&self) -> Result<UnixStream, CliError> {
        self.connect_within(None)
    }

    fn connect_within(&self, limit: Option<Duration>) -> Result<UnixStream, CliError> {
        // Blocking, because a connect that does not block fails when the daemon's backlog is full.
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
    // A socket address is too small for this path; by way of the open directory it is not.
    let dir = std::fs::File::open(store)?;
    let path = format!("/proc/self/fd/{}/{CONTROL_SOCKET}", dir.as_raw_fd());
    connect_within(Path::new(&path), limit)
}

type Broken = Box<dyn std::error::Error + Send + Sync>;

async fn exchange(stream: UnixStream, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), Broken> {
    let (status, body) = begin(stream, request).await?;
    Ok((status, body.collect().await?.to_bytes()))
}

/// Sends the request and gets the head of the answer. The connection ends with the body.
async fn begin(stream: UnixStream, request: Request<Full<Bytes>>) -> Result<(StatusCode, Incoming), Broken> {
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
        return serde_json::from_slice(body).map_err(|error| CliError::Answer {
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
            CliError::Answer { action: action.to_owned(), problem: problem.trim_end().to_owned() }
        }
    })
}
