//! The control socket: HTTP/1.1 with JSON under `/v1/`. Its file mode lets only root and the daemon's user in.

mod bases;
mod events;
mod kept;
mod room;
mod servers;
#[cfg(test)]
mod tests;
mod traces;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use axum::body::Bytes;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRef, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Notify;

use self::room::{Kind, Refused, Rooms};
use super::channel::{Channel, FromWorker};
use super::hydrate::Hydrations;
use super::report::{Report, Upgrade, UpgradeState};
use super::sources::HostSources;
use super::unavailable::{end, rfc3339};
use crate::config::Config;
use crate::disk::DiskError;
use crate::events::Events;
use crate::fuse::Node;
use crate::fuse::kernel::KernelNotifier;
use crate::io::{LiveArena, sys};
use crate::sandbox::confine::InForce;
use crate::serve::purge::{Users, purge_unused};
use crate::serve::{Service, Waiters, guard};
use crate::store::{DiskNode, NewDisk, Store, StoreError};

/// What the control socket's requests work on.
#[derive(Clone)]
pub struct Control {
    /// The store.
    pub store: Arc<Store>,
    /// For what waits.
    pub service: Service,
    /// To tell the kernel of changes that did not come through it.
    pub notifier: Arc<KernelNotifier>,
    /// To ask the supervisor for the end.
    pub channel: Arc<Channel>,
    /// The configuration in force.
    pub config: Config,
    /// The live maps, when they are in an arena.
    pub arena: Option<LiveArena>,
    /// For `status`.
    pub supervisor_pid: u32,
    /// What the supervisor knows of its workers.
    pub report: Arc<Mutex<Report>>,
    /// For `status`.
    pub since_ns: i64,
    /// For `status`.
    pub confinement: InForce,
    /// What happens to bases and caches.
    pub events: Events,
    /// Where bases come from.
    pub sources: Arc<HostSources>,
    /// Work on whole bases.
    pub hydrations: Hydrations,
    /// When this worker began to serve.
    pub serving_since_ns: i64,
}

impl FromRef<Control> for Events {
    fn from_ref(control: &Control) -> Self {
        control.events.clone()
    }
}

/// An error as the socket reports it.
struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let kind = error.kind();
        let status = match kind {
            "not_found" => StatusCode::NOT_FOUND,
            "exists" | "in_use" => StatusCode::CONFLICT,
            "invalid" | "unsupported" => StatusCode::BAD_REQUEST,
            _ if error.errno() == libc::ENOSPC => StatusCode::INSUFFICIENT_STORAGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, kind, message: error.to_string() }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

impl ApiError {
    fn invalid(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, kind: "invalid", message: message.into() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({"error": {"kind": self.kind, "message": self.message}});
        (self.status, Json(body)).into_response()
    }
}

type Answer = Result<Json<Value>, ApiError>;

/// Threads for what may wait.
static ROOMS: LazyLock<Rooms> = LazyLock::new(Rooms::new);

/// Runs what may wait for the store, or for the files of a base, away from the socket's own thread.
async fn blocking(job: impl FnOnce() -> Result<Value, ApiError> + Send + 'static) -> Answer {
    in_room(Kind::Work, job).await
}

/// Runs what waits for memory only, whatever else hangs.
async fn quick(job: impl FnOnce() -> Result<Value, ApiError> + Send + 'static) -> Answer {
    in_room(Kind::Question, job).await
}

async fn in_room(kind: Kind, job: impl FnOnce() -> Result<Value, ApiError> + Send + 'static) -> Answer {
    match ROOMS.run(kind, job).await {
        Ok(done) => done.map(Json),
        Err(Refused::Full) => Err(ApiError {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "busy",
            message: "too many commands hang, as those on the files of a base whose filesystem is gone do; see `plyfs \
                      base ls`, and try again when they have ended"
                .into(),
        }),
        Err(Refused::Ended) => Err(ApiError {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "io",
            message: "the request ended early".into(),
        }),
    }
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex<const N: usize>(what: &str, text: &str) -> Result<[u8; N], ApiError> {
    let bad = || ApiError::invalid(format!("{what} is not {} hexadecimal digits", 2 * N));
    let mut out = [0; N];
    if text.len() != 2 * N || !text.is_ascii() {
        return Err(bad());
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
    }
    Ok(out)
}

impl Control {
    /// With what is wrong with it: it is attached to find out.
    fn disk(&self, node: &DiskNode) -> Value {
        let problem = node.problem();
        self.shown(node, problem.as_deref())
    }

    /// One of many: those that are not used are not attached for it.
    fn listed(&self, node: &DiskNode) -> Value {
        self.shown(node, node.known_problem().as_deref())
    }

    fn shown(&self, node: &DiskNode, problem: Option<&str>) -> Value {
        let name = node.name();
        let a = node.attributes();
        let attached = node.peek();
        let poisoned = attached.as_ref().is_some_and(|d| d.delta().error_epoch() > 0);
        let refuses = attached.as_ref().and_then(|d| d.delta().refuses_writes());
        let state = if problem.is_some() {
            "failed"
        } else if poisoned {
            "had_errors"
        } else {
            "ok"
        };
        json!({
            "id": node.id(),
            "path": self.config.mount.join(format!("disks/{name}.raw")),
            "name": name,
            "base": node.base_name(),
            "size": a.size,
            "delta_bytes": a.allocated,
            "map_bytes": attached.as_ref().map_or(0, |d| d.delta().map_memory()),
            "mode": format!("{:04o}", a.mode),
            "uid": a.uid,
            "gid": a.gid,
            "created": rfc3339(a.created_ns),
            "modified": rfc3339(a.modified_ns),
            "state": state,
            "error": problem,
            "refuses_writes": refuses,
        })
    }

    fn tell_supervisor(&self, message: &FromWorker) -> Result<(), ApiError> {
        self.channel.send(message).map_err(|e| ApiError {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "io",
            message: format!("the supervisor does not hear: {e}"),
        })
    }

    /// Of the store's filesystem. It is full when writes that need space are refused.
    fn space(&self) -> Value {
        // Asked first: it fills up what it can.
        let reserve = self.store.reserve();
        let space = self.store.space().ok();
        json!({
            "total_bytes": space.map(|s| s.total),
            "available_bytes": space.map(|s| s.available),
            "reserve_bytes": reserve.wanted,
            "reserve_held_bytes": reserve.held,
            "full": reserve.full,
        })
    }

    /// Requests of the kernel that wait for the bytes of bases, and what became of others since the worker began.
    fn requests(&self) -> Value {
        let Waiters { requests, bytes, watched, refused, interrupted } = self.service.waiters();
        json!({
            "waiting": requests,
            "waiting_bytes": bytes,
            "watched": watched,
            "refused": refused,
            "interrupted": interrupted,
        })
    }

    fn live_maps(&self, report: &Report) -> Value {
        let bounds = self.arena.as_ref().map(LiveArena::bounds);
        json!({
            "path": report.live.path,
            "bytes": self.arena.as_ref().and_then(|arena| arena.memory().ok()),
            "limit_bytes": bounds.map(|b| b.total),
            "disk_limit_bytes": bounds.map(|b| b.per_disk),
            "moves": report.live.moves,
            "problem": report.live.problem,
        })
    }

    fn status(&self) -> Value {
        let bases = self.store.bases().len();
        let disks = self.store.disks_after(0);
        let attached = self.store.attached();
        let refusing = |d: &Arc<DiskNode>| d.peek().is_some_and(|d| d.delta().refuses_writes().is_some());
        let refusing: Vec<String> = attached.iter().filter(|d| refusing(d)).map(|d| d.name()).collect();
        let report = self.report.lock().clone();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "mount": self.config.mount,
            "store": self.config.store,
            "supervisor_pid": self.supervisor_pid,
            "worker_pid": sys::pid(),
            "worker_starts": report.worker_starts,
            "supervisor_version": report.supervisor_version,
            "worker_ends": report.ends.iter().map(end).collect::<Vec<_>>(),
            "back_off_ms": report.back_off_ms,
            "standby": {
                "pid": report.standby.pid,
                "prepared": report.standby.prepared,
                "problem": report.standby.problem,
            },
            "upgrade": report.upgrade.as_ref().map(upgrade_json),
            "caught_panics": guard::panics(),
            "uptime_seconds": (sys::now_ns() - self.since_ns) / 1_000_000_000,
            "bases": bases,
            "disks": disks.len(),
            "attached_disks": attached.len(),
            "disks_refusing_writes": refusing,
            "space": self.space(),
            "live_maps": self.live_maps(&report),
            "unlinked_disks": self.store.unlinked().len(),
            "damaged": self.store.damaged().iter().map(|(file, error)| json!({
                "file": file, "error": error.to_string(),
            })).collect::<Vec<_>>(),
            "unread": self.store.unread().iter().map(|record| json!({
                "file": record.file, "error": record.error,
            })).collect::<Vec<_>>(),
            "cache": self.cache(),
            "waiting": self.waiting(),
            "requests": self.requests(),
            "failing": self.failing(),
            "confinement": self.confinement,
            "events": events::summary(&self.events, self.serving_since_ns),
        })
    }
}

fn upgrade_json(upgrade: &Upgrade) -> Value {
    json!({
        "number": upgrade.number,
        "state": upgrade.state,
        "program": upgrade.program,
        "from": upgrade.from,
        "to": upgrade.to,
        "why": upgrade.why,
        "at": rfc3339(upgrade.at_ns),
    })
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct UpgradeTo {
    program: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateDisks {
    name: Option<String>,
    #[serde(default)]
    names: Vec<String>,
    base: Option<String>,
    size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    size: u64,
}

async fn status(State(c): State<Control>) -> Answer {
    quick(move || Ok(c.status())).await
}

async fn list_disks(State(c): State<Control>) -> Answer {
    blocking(move || Ok(c.store.disks_after(0).iter().map(|d| c.listed(d)).collect())).await
}

async fn create_disks(State(c): State<Control>, body: Result<Json<CreateDisks>, JsonRejection>) -> Answer {
    let Json(new) = body?;
    blocking(move || {
        let names: Vec<String> = new.name.into_iter().chain(new.names).collect();
        if names.is_empty() {
            return Err(ApiError::invalid("no name was given; give name or names"));
        }
        if new.size == Some(0) {
            return Err(ApiError::invalid(format!(
                "disk {}: a disk of 0 bytes is of no use; give a size",
                names[0]
            )));
        }
        let (uid, gid) = sys::effective_ids();
        let wanted: Vec<NewDisk> = names
            .into_iter()
            .map(|name| NewDisk { name, base: new.base.clone(), size: new.size, mode: 0o600, uid, gid })
            .collect();
        let made = c.store.create_disks(&wanted)?;
        Ok(made.iter().map(|d| c.listed(d)).collect())
    })
    .await
}

async fn show_disk(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || Ok(c.disk(&*c.store.disk(&name)?))).await
}

async fn remove_disk(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || {
        let node = c.store.unlink(&name)?;
        c.notifier.let_go(node.id());
        // Whoever has it open keeps it until the last close, of which the kernel tells.
        purge_unused(&c.store, &*c.notifier, node.id())?;
        Ok(json!({"removed": [name]}))
    })
    .await
}

async fn resize_disk(
    State(c): State<Control>,
    Path(name): Path<String>,
    body: Result<Json<Resize>, JsonRejection>,
) -> Answer {
    let Json(resize) = body?;
    blocking(move || {
        let node = c.store.disk(&name)?;
        let object = format!("disk {name}");
        if resize.size == 0 {
            return Err(ApiError::invalid(format!("{object}: a disk of 0 bytes is of no use; give a size")));
        }
        let wrap = |source: DiskError| StoreError::Disk { object: object.clone(), source };
        node.attach()?.resize(resize.size).map_err(wrap)?;
        let _ = c.notifier.refresh(Node::Disk(node.id()).ino());
        Ok(c.disk(&node))
    })
    .await
}

async fn stop(State(c): State<Control>) -> Answer {
    quick(move || {
        c.tell_supervisor(&FromWorker::Stop)?;
        Ok(json!({"stopping": true}))
    })
    .await
}

/// Begins an upgrade; how it goes is told by `status`, where its number is one higher than before.
async fn upgrade(State(c): State<Control>, body: Bytes) -> Answer {
    let wanted: UpgradeTo = match body.is_empty() {
        true => UpgradeTo::default(),
        false => serde_json::from_slice(&body).map_err(|e| ApiError::invalid(e.to_string()))?,
    };
    quick(move || {
        if wanted.program.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(ApiError::invalid("program: give an absolute path"));
        }
        let mut report = c.report.lock();
        if report.upgrade.as_ref().is_some_and(|u| u.state == UpgradeState::Running) {
            let message = "an upgrade is under way; wait for its end".to_owned();
            return Err(ApiError { status: StatusCode::CONFLICT, kind: "in_use", message });
        }
        let number = report.upgrade.as_ref().map_or(0, |u| u.number) + 1;
        let program = wanted.program.clone().unwrap_or_default();
        c.tell_supervisor(&FromWorker::Upgrade(wanted.program))?;
        // Until the supervisor says how it goes: whoever asks in the meantime would wait for somebody else's.
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (state, at_ns) = (UpgradeState::Running, sys::now_ns());
        report.upgrade = Some(Upgrade { number, state, program, from: version, to: None, why: None, at_ns });
        Ok(json!({"number": number}))
    })
    .await
}

async fn unknown() -> ApiError {
    ApiError { status: StatusCode::NOT_FOUND, kind: "not_found", message: "there is no such resource".into() }
}

/// Serves the socket on a thread of its own, until `drain` is notified: then requests that have begun are answered,
/// new ones wait in the socket, and the supervisor is told.
///
/// # Errors
/// When the thread or its runtime cannot be made.
pub fn spawn(control: Control, listener: OwnedFd, drain: Arc<Notify>) -> io::Result<()> {
    let runtime = Rooms::runtime()?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    let channel = control.channel.clone();
    let sources = control.sources.clone();
    let bus = control.events.clone();
    let ticked = control.clone();
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/bases", get(bases::list).post(bases::add))
        .route("/v1/bases/{name}", get(bases::show).delete(bases::remove))
        .route("/v1/bases/{name}/fail", post(servers::fail))
        .route("/v1/bases/{name}/set", post(servers::set))
        .route("/v1/bases/{name}/pin", post(kept::pin))
        .route("/v1/bases/{name}/evict", post(kept::evict))
        .route("/v1/bases/{name}/hydrate", post(kept::hydrate))
        .route("/v1/bases/{name}/verify", post(kept::verify))
        .route("/v1/disks", get(list_disks).post(create_disks))
        .route("/v1/disks/{name}", get(show_disk).delete(remove_disk))
        .route("/v1/disks/{name}/resize", post(resize_disk))
        .route("/v1/bases/{name}/trace", get(traces::show).delete(traces::remove))
        .route("/v1/bases/{name}/trace/file", get(traces::export).put(traces::import))
        .route("/v1/traces", get(traces::list))
        .route("/v1/disks/{name}/trace", post(traces::record).delete(traces::stop))
        .route("/v1/events", get(events::events))
        .route("/v1/stop", post(stop))
        .route("/v1/upgrade", post(upgrade))
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(control);
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
                    let _ = channel.send(&FromWorker::Drained);
                }
                Err(error) => tracing::error!(%error, "the control socket is not served"),
            }
        });
    };
    std::thread::Builder::new().name("control".into()).spawn(run).map(drop)
}
