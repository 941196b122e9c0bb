//! The daemon at a glance, its end, and its upgrade.

use std::path::PathBuf;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;

use super::report::{self, Report, UpgradeState};
use super::wire::{
    AnyStatus, Cache, DamagedFile, DiskCache, Kernel, LiveMaps, MissingPromise, Requests, Space, Standby,
    Status, Stopping, Upgrade, UpgradeBegun, UpgradeTo, WorkerEnd, rfc3339,
};
use super::{Answer, ApiError, Cause, Control, events, quick};
use crate::cache::CacheStats;
use crate::fetch::kept::DiskCacheStats;
use crate::io::{LiveArena, sys};
use crate::serve::{Waiters, guard};

/// Show the daemon
///
/// Answered from memory, whatever else hangs.
#[utoipa::path(
    get,
    path = "/v1/status",
    tag = "daemon",
    operation_id = "status",
    responses(
        (status = 200, description = "How the daemon is; `SilentStatus` while the worker does not answer.", body = AnyStatus)
    )
)]
pub(super) async fn status(State(c): State<Control>) -> Answer<AnyStatus> {
    quick(move || Ok(AnyStatus::Serving(Box::new(c.status())))).await
}

/// Stop the daemon
///
/// Does not wait: the daemon flushes, unmounts and ends.
#[utoipa::path(
    post,
    path = "/v1/stop",
    tag = "daemon",
    operation_id = "stop",
    responses((status = 200, description = "It was told to stop.", body = Stopping))
)]
pub(super) async fn stop(State(c): State<Control>) -> Answer<Stopping> {
    quick(move || {
        c.daemon.stop().map_err(not_told)?;
        Ok(Stopping { stopping: true })
    })
    .await
}

/// Have another version take over
///
/// Begins an upgrade. `status` says how it goes, under a number that is one higher than before.
#[utoipa::path(
    post,
    path = "/v1/upgrade",
    tag = "daemon",
    operation_id = "upgrade",
    request_body = Option<UpgradeTo>,
    responses(
        (status = 200, description = "It has begun.", body = UpgradeBegun),
        (status = 202, description = "It has begun; no worker serves at the moment.", body = UpgradeBegun)
    )
)]
pub(super) async fn upgrade(
    State(c): State<Control>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<UpgradeBegun> {
    let body = body?;
    let wanted: Option<UpgradeTo> = match body.is_empty() {
        true => None,
        false => serde_json::from_slice(&body).map_err(|e| ApiError::invalid(e.to_string()))?,
    };
    let program = wanted.and_then(|wanted| wanted.program).map(PathBuf::from);
    quick(move || {
        if program.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(ApiError::invalid("program: give an absolute path"));
        }
        let mut report = c.report.lock();
        if report.upgrade.as_ref().is_some_and(|u| u.state == UpgradeState::Running) {
            return Err(ApiError::new(Cause::InUse, "an upgrade is under way; wait for its end"));
        }
        let number = report.upgrade.as_ref().map_or(0, |u| u.number) + 1;
        let shown = program.clone().unwrap_or_default();
        c.daemon.upgrade(program).map_err(not_told)?;
        // Until the supervisor says how it goes: a client that asks in the meantime would wait for another's.
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
        Ok(UpgradeBegun { number })
    })
    .await
}

fn not_told(error: std::io::Error) -> ApiError {
    ApiError::new(Cause::Io, format!("the supervisor does not hear: {error}"))
}

impl Control {
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
            disks: Some(self.store.disks_after(0).len() as u64),
            attached_disks: attached.len() as u64,
            disks_refusing_writes: self.refusing(&attached),
            space: self.space(),
            live_maps: self.live_maps(&report),
            unlinked_disks: self.store.unlinked().len() as u64,
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
            kernel: Some(self.kernel()),
            events: events::summary(&self.events, self.serving_since_ns),
            worker_not_answering_since: None,
            worker_not_answering_why: None,
        }
    }

    /// Of the store's filesystem. It is full when writes that need space are refused.
    fn space(&self) -> Space {
        // Asked first: it fills up what it can.
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

    fn kernel(&self) -> Kernel {
        let missing = self.protocol.missing().into_iter().map(|promise| MissingPromise {
            promise: promise.name().to_owned(),
            since: promise.since().to_owned(),
            instead: promise.instead().to_owned(),
        });
        Kernel {
            release: self.kernel_release.clone(),
            fuse: format!("7.{}", self.protocol.minor),
            missing: missing.collect(),
        }
    }

    fn requests(&self) -> Requests {
        let Waiters { requests, bytes, watched, refused, interrupted } = self.service.waiters();
        Requests {
            waiting: requests as u64,
            waiting_bytes: bytes as u64,
            watched: watched as u64,
            refused,
            interrupted,
        }
    }

    fn live_maps(&self, report: &Report) -> LiveMaps {
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

    /// The memory cache, and the one of fetched blocks.
    fn cache(&self) -> Cache {
        let CacheStats {
            memory_limit,
            memory_used,
            hits,
            misses,
            insertions,
            evictions,
            adopted_blocks,
            adopted_rejected,
        } = self.store.cache().stats();
        let disk = Some(DiskCache::from(self.bases.sources().cache().stats()));
        Cache {
            memory_limit,
            memory_used,
            hits,
            misses,
            insertions,
            evictions,
            adopted_blocks,
            adopted_rejected,
            disk,
        }
    }
}

impl From<DiskCacheStats> for DiskCache {
    fn from(stats: DiskCacheStats) -> Self {
        let DiskCacheStats {
            limit_bytes,
            used_bytes,
            bases,
            hits,
            misses,
            insertions,
            evictions,
            corrupt_blocks,
            read_errors,
            write_errors,
            indexed,
            degraded,
            unreadable,
        } = stats;
        Self {
            limit_bytes,
            used_bytes,
            bases,
            hits,
            misses,
            insertions,
            evictions,
            corrupt_blocks,
            read_errors,
            write_errors,
            indexed,
            degraded,
            unreadable,
        }
    }
}

impl From<&report::End> for WorkerEnd {
    fn from(end: &report::End) -> Self {
        Self { at: rfc3339(end.at_ns), pid: end.pid, why: end.why.clone(), served_ms: end.served_ms }
    }
}

impl From<&report::Standby> for Standby {
    fn from(standby: &report::Standby) -> Self {
        Self { pid: standby.pid, prepared: standby.prepared, problem: standby.problem.clone() }
    }
}

impl From<&report::Upgrade> for Upgrade {
    fn from(upgrade: &report::Upgrade) -> Self {
        use super::wire::UpgradeState as Shown;
        Self {
            number: upgrade.number,
            state: match upgrade.state {
                UpgradeState::Running => Shown::Running,
                UpgradeState::Done => Shown::Done,
                UpgradeState::Failed => Shown::Failed,
            },
            program: upgrade.program.display().to_string(),
            from: upgrade.from.clone(),
            to: upgrade.to.clone(),
            why: upgrade.why.clone(),
            at: rfc3339(upgrade.at_ns),
        }
    }
}
