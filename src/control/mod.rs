//! The control socket: HTTP/1.1 with JSON under `/v1/`. Its file mode lets only root and the daemon's user in.
//!
//! A route decodes a request, calls the store or what works on bases, and encodes the answer; the bodies are in
//! [`wire`], the mapping of errors in `error`. What must hold:
//! - A request that waits keeps no other one waiting (`room`).
//! - Of the daemon around the worker a route sees [`Daemon`] and nothing else.
//! - Every route is in the description that `/v1/openapi.json` answers with (`openapi`); a test compares both.

mod bases;
mod disks;
mod error;
mod events;
mod kept;
mod once;
mod openapi;
pub mod report;
mod room;
mod servers;
mod status;
#[cfg(test)]
mod tests;
mod traces;
pub mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use axum::extract::{DefaultBodyLimit, FromRef};
use axum::routing::{get, post};
use axum::{Json, Router};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub use self::openapi::document;

use self::error::{ApiError, Cause, Name};
use self::report::Report;
use self::room::{Kind, Refused, Rooms};
use crate::bases::Bases;
use crate::config::Config;
use crate::events::Events;
use crate::fuse::kernel::KernelNotifier;
use crate::fuse::promises::Protocol;
use crate::io::LiveArena;
use crate::serve::Service;
use crate::store::Store;

/// The daemon around the worker, as the routes see it. Neither call waits for what it begins.
pub trait Daemon: Send + Sync {
    /// Has the daemon end.
    ///
    /// # Errors
    /// When it cannot be told.
    fn stop(&self) -> io::Result<()>;

    /// Has the program at an absolute path take over, or the one that is installed now.
    ///
    /// # Errors
    /// When the daemon cannot be told.
    fn upgrade(&self, program: Option<PathBuf>) -> io::Result<()>;
}

/// What the control socket's requests work on.
#[derive(Clone)]
pub struct Control {
    /// The store.
    pub store: Arc<Store>,
    /// For what waits.
    pub service: Service,
    /// To tell the kernel of changes that did not come through it.
    pub notifier: Arc<KernelNotifier>,
    /// The daemon around this worker.
    pub daemon: Arc<dyn Daemon>,
    /// The configuration in force.
    pub config: Config,
    /// The live maps, when they are in an arena.
    pub arena: Option<LiveArena>,
    /// Process of the supervisor.
    pub supervisor_pid: u32,
    /// What the supervisor knows of its workers.
    pub report: Arc<Mutex<Report>>,
    /// When the mount was made; nanoseconds since the epoch.
    pub since_ns: i64,
    /// What of least privilege is in force.
    pub confinement: wire::Confinement,
    /// What the kernel offers.
    pub protocol: Protocol,
    /// Its release.
    pub kernel_release: String,
    /// What happens to bases and caches.
    pub events: Events,
    /// What is done with bases.
    pub bases: Bases,
    /// When this worker began to serve; nanoseconds since the epoch.
    pub serving_since_ns: i64,
}

impl FromRef<Control> for Events {
    fn from_ref(control: &Control) -> Self {
        control.events.clone()
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

/// Threads for what may wait.
static ROOMS: LazyLock<Rooms> = LazyLock::new(Rooms::new);

/// Runs what may wait for the store, or for the files of a base, away from the socket's own thread.
async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Answer<T> {
    in_room(Kind::Work, job).await.map(Json)
}

/// Runs what waits for memory only, whatever else hangs.
async fn quick<T: Send + 'static>(job: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Answer<T> {
    in_room(Kind::Question, job).await.map(Json)
}

async fn in_room<T: Send + 'static>(
    kind: Kind,
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match ROOMS.run(kind, job).await {
        Ok(done) => done,
        Err(Refused::Full) => Err(ApiError::new(
            Cause::Overloaded,
            "too many commands hang, as those on the files of a base whose filesystem is gone do; see `plyfs base ls`, \
             and try again when they have ended",
        )),
        Err(Refused::Ended) => Err(ApiError::new(Cause::Io, "the request ended early")),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

async fn unknown() -> ApiError {
    ApiError::new(Cause::NotFound, "there is no such resource")
}

async fn no_such_method() -> ApiError {
    ApiError::new(Cause::NotAllowed, "the resource has no such method; see /v1/openapi.json")
}

/// All routes.
fn router(control: Control) -> Router {
    Router::new()
        .route("/v1/status", get(status::status))
        .route("/v1/bases", get(bases::list).post(bases::add))
        .route("/v1/bases/{name}", get(bases::show).delete(bases::remove))
        .route("/v1/bases/{name}/fail", post(servers::fail))
        .route("/v1/bases/{name}/set", post(servers::set))
        .route("/v1/bases/{name}/pin", post(kept::pin))
        .route("/v1/bases/{name}/evict", post(kept::evict))
        .route("/v1/bases/{name}/hydrate", post(kept::hydrate))
        .route("/v1/bases/{name}/verify", post(kept::verify))
        .route("/v1/disks", get(disks::list).post(disks::create))
        .route("/v1/disks/{name}", get(disks::show).delete(disks::remove))
        .route("/v1/disks/{name}/resize", post(disks::resize))
        .route("/v1/bases/{name}/trace", get(traces::show).delete(traces::remove))
        .route("/v1/bases/{name}/trace/file", get(traces::export).put(traces::import))
        .route("/v1/traces", get(traces::list))
        .route("/v1/disks/{name}/trace", post(traces::record).delete(traces::stop))
        .route("/v1/events", get(events::events))
        .route("/v1/openapi.json", get(openapi::openapi))
        .route("/v1/stop", post(status::stop))
        .route("/v1/upgrade", post(status::upgrade))
        .fallback(unknown)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(control)
}

/// Serves the socket on a thread of its own, until `drain` is notified: then requests that have begun are answered,
/// new ones wait in the socket, and `drained` is called.
///
/// # Errors
/// When the thread or its runtime cannot be made.
pub fn spawn(
    control: Control,
    listener: OwnedFd,
    drain: Arc<Notify>,
    drained: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let runtime = Rooms::runtime()?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let sources = control.bases.sources().clone();
    let bus = control.events.clone();
    let ticked = control.clone();
    let router = router(control);
    let run = move || {
        runtime.block_on(async {
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => {
                    let ticking = [
                        tokio::spawn(events::tick(bus.clone(), sources)),
                        tokio::spawn(traces::tick(ticked)),
                    ];
                    events::serve_until(listener, router, drain, bus).await;
                    ticking.iter().for_each(tokio::task::JoinHandle::abort);
                    drained();
                }
                Err(error) => tracing::error!(%error, "the control socket is not served"),
            }
        });
    };
    std::thread::Builder::new().name("control".into()).spawn(run).map(drop)
}
