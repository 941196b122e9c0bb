//! Routes on the daemon: its status, stop, upgrade.

use std::path::PathBuf;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;

use super::report::{self, Report, UpgradeState};
use super::wire::{
    AnyStatus, Cache, DamagedFile, LayerIndexes, Listener, LiveMaps, Requests, Space, Standby, Status, Stop,
    Stopping, Upgrade, UpgradeBegun, UpgradeTo, WorkerEnd,
};
use super::{Answer, ApiError, Cause, Control, events, quick};
use crate::config::PageAddress;
use crate::io::{LiveArena, sys};
use crate::serve::{Waiters, guard};
use crate::store::MemorySums;

/// Show the daemon
///
/// Answered from memory, even while other requests hang.
#[utoipa::path(
    get,
    path = "/v1/status",
    tag = "daemon",
    operation_id = "status",
    responses(
        (status = 200, description = "The status; `SilentStatus` while the worker does not answer.", body = AnyStatus)
    )
)]
pub(super) async fn status(State(c): State<Control>) -> Answer<AnyStatus> {
    quick(move || Ok(AnyStatus::Serving(Box::new(c.status())))).await
}

/// Stop the daemon
///
/// The request returns at once; then the daemon flushes, unmounts and ends. The daemon refuses it while clients have
/// disks open, unless `force` is set: their later requests fail.
#[utoipa::path(
    post,
    path = "/v1/stop",
    tag = "daemon",
    operation_id = "stop",
    request_body = Option<Stop>,
    responses((status = 200, description = "The daemon has the request.", body = Stopping))
)]
pub(super) async fn stop(State(c): State<Control>, body: Result<Bytes, BytesRejection>) -> Answer<Stopping> {
    let body = body?;
    let Stop { force } = match body.is_empty() {
        true => Stop::default(),
        false => serde_json::from_slice(&body).map_err(|e| ApiError::invalid(e.to_string()))?,
    };
    if !force {
        let named = c.store.disks_after(0);
        let removed = c.store.unlinked().into_iter().chain(c.store.trashed());
        c.refuse_in_use(named.into_iter().chain(removed).collect()).await?;
    }
    quick(move || {
        c.daemon.stop().map_err(supervisor_unreachable)?;
        Ok(Stopping { stopping: true })
    })
    .await
}

/// Upgrade the daemon
///
/// The request only begins the upgrade. `status` has its progress, under a number that is one higher than before.
#[utoipa::path(
    post,
    path = "/v1/upgrade",
    tag = "daemon",
    operation_id = "upgrade",
    request_body = Option<UpgradeTo>,
    responses(
        (status = 200, description = "The upgrade has begun.", body = UpgradeBegun),
        (status = 202, description = "The upgrade has begun; no worker serves at the moment.", body = UpgradeBegun)
    )
)]
pub(super) async fn upgrade(
    State(c): State<Control>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<UpgradeBegun> {
    let body = body?;
    let target: Option<UpgradeTo> = match body.is_empty() {
        true => None,
        false => serde_json::from_slice(&body).map_err(|e| ApiError::invalid(e.to_string()))?,
    };
    let program = target.and_then(|target| target.program).map(PathBuf::from);
    quick(move || {
        if program.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(ApiError::invalid("program is a relative path; give an absolute path"));
        }
        Ok(UpgradeBegun { number: c.begin_upgrade(program)? })
    })
    .await
}

fn supervisor_unreachable(error: std::io::Error) -> ApiError {
    ApiError::new(Cause::Io, format!("cannot reach the supervisor: {error}; see the daemon's log"))
}

impl Control {
    /// Begins a takeover by another worker of this version. Returns its number among the upgrades.
    pub(super) fn begin_takeover(&self) -> Result<u64, ApiError> {
        // The file may have been replaced since: then it is an upgrade to the installed version.
        self.begin_upgrade(
            std::env::current_exe().ok().filter(|program| program.is_absolute() && program.exists()),
        )
    }

    fn begin_upgrade(&self, program: Option<PathBuf>) -> Result<u64, ApiError> {
        let mut report = self.report.lock();
        if report.upgrade.as_ref().is_some_and(|u| u.state == UpgradeState::Running) {
            return Err(ApiError::new(Cause::InUse, "an upgrade is under way; wait for its end"));
        }
        let number = report.upgrade.as_ref().map_or(0, |u| u.number) + 1;
        let shown = program.clone().unwrap_or_default();
        self.daemon.upgrade(program).map_err(supervisor_unreachable)?;
        // Until the supervisor reports the progress, this entry keeps a second client from waiting for this upgrade as
        // if it were its own.
        let version = env!("CARGO_PKG_VERSION").to_owned();
        report.upgrade = Some(report::Upgrade {
            number,
            state: UpgradeState::Running,
            program: shown,
            from: version,
            to: None,
            why: None,
            at_ns: sys::now_ns(),
        });
        Ok(number)
    }

    fn status(&self) -> Status {
        let attached = self.store.attached();
        let report = self.report.lock().clone();
        let damaged = self.store.damaged();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mount: self.config.mount.display().to_string(),
            store: self.config.store.display().to_string(),
            supervisor_pid: Some(self.supervisor_pid),
            worker_pid: Some(sys::pid()),
            worker_starts: report.worker_starts,
            supervisor_version: report.supervisor_version.clone(),
            worker_ends: report.ends.iter().map(WorkerEnd::from).collect(),
            back_off_ms: report.back_off_ms,
            standby: Standby::from(&report.standby),
            upgrade: report.upgrade.as_ref().map(Upgrade::from),
            caught_panics: guard::panics(),
            uptime_seconds: (sys::now_ns() - self.since_ns) / 1_000_000_000,
            bases: Some(self.store.bases().len() as u64),
            disks: Some(self.store.disk_count() as u64),
            attached_disks: attached.len() as u64,
            disks_refusing_writes: self.refusing(&attached),
            unavailable_pools: self.store.unavailable_pools(),
            disks_at_quota: self.store.disks_at_quota().iter().map(|disk| disk.name()).collect(),
            space: self.space(),
            live_maps: self.live_maps(&report),
            layer_indexes: self.layer_indexes(),
            unlinked_disks: self.store.unlinked().len() as u64,
            trashed_disks: self.store.trashed().len() as u64,
            trashed_bytes: self.store.trash_bytes(),
            damaged: damaged
                .iter()
                .map(|(file, error)| DamagedFile { file: file.clone(), error: error.to_string() })
                .collect(),
            unread: self
                .store
                .unread()
                .into_iter()
                .map(|record| DamagedFile { file: record.file, error: record.error })
                .collect(),
            cache: Some(self.cache()),
            waiting: self.waiting(),
            requests: self.requests(),
            failing: self.failing(),
            confinement: Some(self.confinement.clone()),
            kernel: Some(self.kernel.clone()),
            events: events::summary(&self.events, self.serving_since_ns),
            page: self.page(),
            metrics: self.config.metrics.address().map(|address| Listener {
                listen: format!("http://{address}/metrics"),
                trouble: self.metrics_trouble.lock().clone(),
            }),
            export: self.config.export.http.clone().map(|listen| Listener {
                listen: format!("plyfs://{listen}"),
                trouble: self.export_trouble.clone(),
            }),
            worker_not_answering_since: None,
            worker_not_answering_why: None,
        }
    }

    fn page(&self) -> Option<Listener> {
        // The configuration is validated.
        let listen = match self.config.page.address().ok()?? {
            PageAddress::Tcp(address) => format!("http://{address}/"),
            PageAddress::Unix(path) => path.display().to_string(),
        };
        Some(Listener { listen, trouble: self.page_trouble.lock().clone() })
    }

    /// The space of the store's filesystem. `full` means that writes that need space are refused.
    pub(super) fn space(&self) -> Space {
        // Before the space is measured, because this call fills up the reserve as far as possible.
        let reserve = self.store.reserve();
        let space = self.store.space().ok();
        Space {
            total_bytes: space.map(|s| s.total),
            available_bytes: space.map(|s| s.available),
            reserve_bytes: reserve.wanted,
            reserve_held_bytes: reserve.held,
            full: reserve.full,
        }
    }

    fn requests(&self) -> Requests {
        let Waiters { requests, bytes, watched, refused, interrupted, throttled, throttled_bytes } =
            self.service.waiters();
        Requests {
            waiting: requests as u64,
            waiting_bytes: bytes as u64,
            watched: watched as u64,
            refused,
            interrupted,
            throttled: throttled as u64,
            throttled_bytes: throttled_bytes as u64,
        }
    }

    pub(super) fn live_maps(&self, report: &Report) -> LiveMaps {
        let bounds = self.arena.as_ref().map(LiveArena::bounds);
        LiveMaps {
            path: report.live.path.as_ref().map(|path| path.display().to_string()),
            bytes: self.arena.as_ref().and_then(|arena| arena.memory().ok()),
            limit_bytes: bounds.map(|b| b.total),
            disk_limit_bytes: bounds.map(|b| b.per_disk),
            moves: report.live.moves,
            problem: report.live.problem.clone(),
        }
    }

    pub(super) fn layer_indexes(&self) -> LayerIndexes {
        let MemorySums { bytes, unwritten, limit } = self.store.index_memory();
        LayerIndexes { bytes, unwritten_bytes: unwritten, unwritten_limit_bytes: limit }
    }

    /// The memory cache, and the one of fetched blocks.
    fn cache(&self) -> Cache {
        Cache::new(self.store.cache().stats(), self.bases.sources().cache().stats())
    }
}
