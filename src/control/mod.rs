//! The control socket: HTTP/1.1 with JSON under `/v1/`. Its file mode lets only root and the daemon's user connect.
//!
//! A route decodes a request, calls the store or the work on bases, and encodes the answer. The bodies are in [`wire`],
//! the mapping of errors is in `error`. What must hold:
//! - A request that waits delays no other request (`pool`).
//! - Connections are bounded, and clients that send nothing keep no other client out (`connections`).
//! - A route sees the daemon around the worker only through [`Daemon`].
//! - The description that `/v1/openapi.json` answers with (`openapi`) has every route; a test compares both.

mod bases;
mod changes;
pub mod clients;
mod clouds;
mod connections;
mod disks;
mod encryption;
mod error;
mod events;
mod extents;
mod idempotency;
mod jobs;
mod kept;
mod limits;
mod listing;
mod maps;
pub mod metrics;
pub mod notify;
mod openapi;
pub mod page;
mod pool;
mod pools;
pub mod report;
mod servers;
mod snapshots;
mod stats;
mod status;
#[cfg(test)]
mod tests;
mod traces;
mod trash;
pub mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, FromRef};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub use self::openapi::document;

use self::error::{ApiError, Cause, Name};
use self::notify::Notifications;
use self::pool::{JobKind, PoolError, Pools};
use self::report::Report;
use crate::bases::Bases;
use crate::config::Config;
use crate::disks::DiskJobs;
use crate::events::Events;
use crate::io::{LiveArena, priority};
use crate::serve::Service;
use crate::store::Store;

/// Waits until a configured TCP address is free. Returns a socket that listens there.
pub type WaitForAddress = Box<dyn FnOnce() -> io::Result<OwnedFd> + Send>;

/// The daemon around the worker, as the routes see it. Both calls return before the operation is complete.
pub trait Daemon: Send + Sync {
    /// Tells the daemon to stop.
    ///
    /// # Errors
    /// When the request cannot be sent to the supervisor.
    fn stop(&self) -> io::Result<()>;

    /// Tells the daemon to upgrade to the program at an absolute path, or to the installed one.
    ///
    /// # Errors
    /// When the request cannot be sent to the supervisor.
    fn upgrade(&self, program: Option<PathBuf>) -> io::Result<()>;
}

/// The state that requests on the control socket use.
#[derive(Clone)]
pub struct Control {
    /// The store.
    pub store: Arc<Store>,
    /// The service of the mount; `status` reads its counters of waiting requests.
    pub service: Service,
    /// The daemon around this worker.
    pub daemon: Arc<dyn Daemon>,
    /// The configuration in force.
    pub config: Config,
    /// The live maps, when they are in an arena.
    pub arena: Option<LiveArena>,
    /// Process of the supervisor.
    pub supervisor_pid: u32,
    /// The supervisor's report on its workers.
    pub report: Arc<Mutex<Report>>,
    /// When the mount was made; nanoseconds since the epoch.
    pub since_ns: i64,
    /// The restrictions in force on this worker.
    pub confinement: wire::Confinement,
    /// The kernel, and the promises that it does not allow.
    pub kernel: wire::Kernel,
    /// The events of bases and caches.
    pub events: Events,
    /// The work on bases.
    pub bases: Bases,
    /// The work on disks.
    pub disk_jobs: DiskJobs,
    /// The jobs that clients do.
    pub clients: Arc<clients::ClientJobs>,
    /// Counters of delivered events.
    pub notifications: Arc<Notifications>,
    /// How long the end of the socket waits for them.
    pub last_deliveries: Duration,
    /// When this worker began to serve; nanoseconds since the epoch.
    pub serving_since_ns: i64,
    /// Why a configured status page is not served now.
    pub page_trouble: Arc<Mutex<Option<String>>>,
    /// Why other hosts are not served although that is configured.
    pub export_trouble: Option<String>,
    /// Why configured metrics are not served at their address now.
    pub metrics_trouble: Arc<Mutex<Option<String>>>,
}

impl FromRef<Control> for Events {
    fn from_ref(control: &Control) -> Self {
        control.events.clone()
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

/// Threads for requests that may wait.
static POOLS: LazyLock<Pools> = LazyLock::new(Pools::new);

/// Runs a job that may wait for the store or for the files of a base, off the socket's own thread.
async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Answer<T> {
    in_pool(JobKind::Work, job).await.map(Json)
}

/// Runs a job that only reads memory. It has threads of its own, which no other job can occupy.
async fn quick<T: Send + 'static>(job: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Answer<T> {
    in_pool(JobKind::Query, job).await.map(Json)
}

async fn in_pool<T: Send + 'static>(
    kind: JobKind,
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match POOLS.run(kind, job).await {
        Ok(done) => done,
        Err(PoolError::Full) => Err(ApiError::new(
            Cause::Overloaded,
            "too many commands hang, for example on the files of a base whose filesystem is gone; find the base with \
             `plyfs base ls`, and try again when the commands have ended",
        )),
        Err(PoolError::Panicked) => {
            Err(ApiError::new(Cause::Io, "the request failed by an internal error; see the daemon's log"))
        }
    }
}

async fn no_such_resource() -> ApiError {
    ApiError::new(Cause::NotFound, "there is no such resource; see /v1/openapi.json")
}

async fn no_such_method() -> ApiError {
    ApiError::new(Cause::NotAllowed, "the resource has no such method; see /v1/openapi.json")
}

/// All routes.
fn router(control: Control) -> Router {
    Router::new()
        .route("/v1/status", get(status::status))
        .route("/v1/stats", get(stats::stats))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/bases", get(bases::list).post(bases::add))
        .route("/v1/bases/{name}", get(bases::show).delete(bases::remove))
        .route("/v1/bases/{name}/map", get(maps::base))
        .route("/v1/bases/{name}/fail", post(servers::fail))
        .route("/v1/bases/{name}/set", post(servers::set))
        .route("/v1/bases/{name}/pin", post(kept::pin))
        .route("/v1/bases/{name}/evict", post(kept::evict))
        .route("/v1/bases/{name}/hydrate", post(kept::hydrate))
        .route("/v1/bases/{name}/verify", post(kept::verify))
        .route("/v1/bases/{name}/children", get(trash::of_base))
        .route("/v1/clouds", get(clouds::list))
        .route("/v1/clouds/{name}/images", get(clouds::images))
        .route("/v1/prune", post(trash::prune))
        .route("/v1/trash", get(trash::list))
        .route("/v1/trash/{id}", delete(trash::purge))
        .route("/v1/trash/{id}/restore", post(trash::restore))
        .route("/v1/disks/{name}/children", get(trash::of_disk))
        .route("/v1/disks", get(disks::list).post(disks::create))
        .route("/v1/disks/{name}", get(disks::show).delete(disks::remove))
        .route("/v1/disks/{name}/map", get(maps::disk))
        .route("/v1/disks/{name}/extents", get(extents::changed))
        .route("/v1/disks/{name}/resize", post(disks::resize))
        .route("/v1/disks/{name}/flatten", post(changes::flatten))
        .route("/v1/disks/{name}/rebase", post(changes::rebase))
        .route("/v1/disks/{name}/compact", post(changes::compact))
        .route("/v1/disks/{name}/move", post(changes::relocate))
        .route("/v1/disks/{name}/limits", post(limits::set))
        .route("/v1/disks/{name}/unlock", post(encryption::unlock))
        .route("/v1/disks/{name}/rekey", post(encryption::rekey))
        .route("/v1/disks/{name}/shred", post(encryption::shred))
        .route("/v1/disks/{name}/rollback", post(snapshots::roll_back))
        .route("/v1/disks/{name}/snapshots", get(snapshots::list).post(snapshots::take))
        .route("/v1/disks/{name}/snapshots/{snapshot}", delete(snapshots::remove))
        .route("/v1/bases/{name}/trace", get(traces::show).delete(traces::remove))
        .route("/v1/bases/{name}/trace/file", get(traces::export).put(traces::import))
        .route("/v1/traces", get(traces::list))
        .route("/v1/disks/{name}/trace", post(traces::record).delete(traces::stop))
        .route("/v1/pools", get(pools::list).post(pools::add))
        .route("/v1/pools/{name}", get(pools::show).delete(pools::remove))
        .route("/v1/pools/{name}/attach", post(pools::attach))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{id}", get(jobs::show).put(clients::announce).delete(clients::end))
        .route("/v1/jobs/{id}/hold", post(clients::hold))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/events", get(events::events))
        .route("/v1/openapi.json", get(openapi::openapi))
        .route("/v1/stop", post(status::stop))
        .route("/v1/upgrade", post(status::upgrade))
        .fallback(no_such_resource)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(control)
}

/// Serves the socket on a thread of its own until `drain` is notified. Then it answers the requests that have begun,
/// and calls `drained`. New requests wait in the socket.
///
/// # Errors
/// When the thread or its runtime cannot be created.
pub fn spawn(
    control: Control,
    listener: OwnedFd,
    drain: Arc<Notify>,
    drained: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let runtime = Pools::runtime()?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let sources = control.bases.sources().clone();
    let (bus, deliveries) = (control.events.clone(), control.last_deliveries);
    let (tick_control, clients) = (control.clone(), control.clients.clone());
    let router = router(control);
    let run = move || {
        // Commands that take a processor, such as endless lists of many disks, leave it to requests of guests.
        priority::background();
        runtime.block_on(async {
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => {
                    let ticking = [
                        tokio::spawn(events::tick(bus.clone(), sources)),
                        tokio::spawn(traces::tick(tick_control.clone())),
                        tokio::spawn(clients::tick(tick_control.clone())),
                        tokio::spawn(limits::tick(tick_control)),
                    ];
                    // Requests that hold jobs end before the others are waited for.
                    let draining = Arc::new(Notify::new());
                    let begins = draining.clone();
                    let closing = tokio::spawn(async move {
                        drain.notified().await;
                        clients.close();
                        begins.notify_one();
                    });
                    events::serve_until(listener, router, draining, bus, deliveries).await;
                    closing.abort();
                    ticking.iter().for_each(tokio::task::JoinHandle::abort);
                    drained();
                }
                Err(error) => tracing::error!(
                    %error,
                    "cannot serve the control socket; commands have no answer until another worker takes over"
                ),
            }
        });
    };
    std::thread::Builder::new().name("control".into()).spawn(run).map(drop)
}
