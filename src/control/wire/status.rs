//! The bodies of the daemon's status, and how they follow from the daemon's own counters.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::report;
use super::{Events, rfc3339};
use crate::cache::CacheStats;
use crate::fetch::kept::DiskCacheStats;

/// The daemon, its caches, and its problems.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Status {
    /// Version of the worker.
    pub version: String,
    /// The mount point.
    pub mount: String,
    /// Directory of the store.
    pub store: String,
    /// Process of the supervisor.
    pub supervisor_pid: Option<u32>,
    /// Process of the worker that serves.
    pub worker_pid: Option<u32>,
    /// Workers that were told to take over, this one included.
    pub worker_starts: u64,
    /// Version of the supervisor.
    pub supervisor_version: String,
    /// How the last workers ended, the oldest first.
    pub worker_ends: Vec<WorkerEnd>,
    /// Milliseconds by which the last start was delayed, because workers kept ending soon.
    pub back_off_ms: u64,
    /// The standby worker.
    pub standby: Standby,
    /// The last upgrade.
    pub upgrade: Option<Upgrade>,
    /// Panics of requests that the worker survived.
    pub caught_panics: u64,
    /// Seconds since the mount was made.
    pub uptime_seconds: i64,
    /// The number of bases.
    #[schema(value_type = u64)]
    pub bases: Option<u64>,
    /// The number of disks.
    #[schema(value_type = u64)]
    pub disks: Option<u64>,
    /// The number of disks that are or were recently in use.
    pub attached_disks: u64,
    /// Names of disks that refuse writes, because a flush failed.
    pub disks_refusing_writes: Vec<String>,
    /// Names of pools that are not available: their disks are not served.
    pub unavailable_pools: Vec<String>,
    /// Names of the disks that have no room in their quotas for what their clients wrote last.
    pub disks_at_quota: Vec<String>,
    /// The filesystem of the store.
    pub space: Space,
    /// The maps of disks in memory.
    pub live_maps: LiveMaps,
    /// The indexes of layers in memory.
    pub layer_indexes: LayerIndexes,
    /// Disks without a name that a client still has open.
    pub unlinked_disks: u64,
    /// Disks in the trash.
    pub trashed_disks: u64,
    /// Bytes of the store that are free once the trash is empty, as measured some seconds ago.
    pub trashed_bytes: u64,
    /// Records that are damaged.
    pub damaged: Vec<DamagedFile>,
    /// Records that could not be read. The daemon tries again.
    pub unread: Vec<DamagedFile>,
    /// The caches.
    #[schema(value_type = Cache)]
    pub cache: Option<Cache>,
    /// Bases whose reads wait for a server.
    pub waiting: Vec<Trouble>,
    /// Requests of the kernel.
    pub requests: Requests,
    /// Bases whose readers get errors.
    pub failing: Vec<Trouble>,
    /// The restrictions in force on the worker.
    #[schema(value_type = Confinement)]
    pub confinement: Option<Confinement>,
    /// The kernel, and what plyfs cannot promise on it.
    #[schema(value_type = Kernel)]
    pub kernel: Option<Kernel>,
    /// Counters of events.
    pub events: Events,
    /// The status page; null without `[page] listen`.
    pub page: Option<Listener>,
    /// The metrics at their own address; null without `[metrics] listen`.
    pub metrics: Option<Listener>,
    /// Where other hosts get cached blocks; null without `[export] http`.
    pub export: Option<Listener>,
    /// Since when the worker does not answer.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_not_answering_since: Option<String>,
    /// Why the worker does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_not_answering_why: Option<String>,
}

/// The supervisor's answer in place of a worker that does not answer. Its keys are those of [`Status`].
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SilentStatus {
    /// Version of the supervisor.
    pub version: String,
    /// The mount point.
    pub mount: String,
    /// Directory of the store.
    pub store: String,
    /// Process of the supervisor.
    pub supervisor_pid: u32,
    /// Version of the supervisor.
    pub supervisor_version: String,
    /// Process of the worker.
    pub worker_pid: u32,
    /// Workers that were told to take over, this one included.
    pub worker_starts: u64,
    /// Since when the worker does not answer.
    #[schema(format = DateTime)]
    pub worker_not_answering_since: String,
    /// Why the worker does not answer.
    pub worker_not_answering_why: String,
    /// How the last workers ended, the oldest first.
    pub worker_ends: Vec<WorkerEnd>,
    /// The standby worker.
    pub standby: Standby,
    /// Seconds since the mount was made.
    pub uptime_seconds: i64,
    /// Null: only the worker knows.
    pub bases: Option<u64>,
    /// Null: only the worker knows.
    pub disks: Option<u64>,
    /// Null: only the worker knows.
    pub cache: Option<Cache>,
}

/// The answer of `/v1/status`.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum AnyStatus {
    /// A worker serves.
    Serving(Box<Status>),
    /// The worker does not answer.
    Silent(Box<SilentStatus>),
}

/// How a worker ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct WorkerEnd {
    /// When it ended.
    #[schema(format = DateTime)]
    pub at: String,
    /// Its process.
    pub pid: u32,
    /// Why it ended.
    pub why: String,
    /// Milliseconds from its take-over to its end.
    pub served_ms: u64,
}

/// The standby worker, which takes over when the serving one ends.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Standby {
    /// Its process; null when there is no standby worker.
    pub pid: Option<u32>,
    /// Whether it is prepared to take over.
    pub prepared: bool,
    /// Why the last standby worker could not be started.
    pub problem: Option<String>,
}

/// An upgrade.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Upgrade {
    /// 1 for the first since the mount was made.
    pub number: u64,
    /// Its progress.
    pub state: UpgradeState,
    /// The new program.
    pub program: String,
    /// Version of the old worker.
    pub from: String,
    /// Version of the new worker, once it is known.
    pub to: Option<String>,
    /// Why it failed, or which part of it failed.
    pub why: Option<String>,
    /// When it began, or when it ended.
    #[schema(format = DateTime)]
    pub at: String,
}

/// The progress of an upgrade.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeState {
    /// Under way.
    #[default]
    Running,
    /// The new version serves.
    Done,
    /// The old version serves.
    Failed,
}

impl UpgradeState {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// The filesystem of the store.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Space {
    /// Bytes in all; null when the filesystem does not report them.
    pub total_bytes: Option<u64>,
    /// Bytes that the daemon can use.
    pub available_bytes: Option<u64>,
    /// Bytes that the daemon wants to reserve for metadata.
    pub reserve_bytes: u64,
    /// Bytes that are reserved now.
    pub reserve_held_bytes: u64,
    /// Whether writes that need space are refused.
    pub full: bool,
}

/// The maps of disks in memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LiveMaps {
    /// Their file; null when each disk has its own.
    pub path: Option<String>,
    /// Bytes that the maps take.
    pub bytes: Option<u64>,
    /// Bytes that the maps may take.
    pub limit_bytes: Option<u64>,
    /// Bytes that the map of one disk may take.
    pub disk_limit_bytes: Option<u64>,
    /// How often the maps moved to a new file because the old name was removed.
    pub moves: u64,
    /// Why the maps would not survive the supervisor, or which data an earlier daemon lost.
    pub problem: Option<String>,
}

/// The indexes of layers in memory.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LayerIndexes {
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes of those that the daemon could not write to the store.
    pub unwritten_bytes: u64,
    /// Bytes of these above which snapshots and clones of disks in use are refused.
    pub unwritten_limit_bytes: u64,
}

/// Where the daemon serves operators, beside the control socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Listener {
    /// A URL, or the path of a Unix socket.
    pub listen: String,
    /// Why it is not served there; null while it is.
    pub trouble: Option<String>,
}

/// A file of the store that is damaged or cannot be read.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DamagedFile {
    /// Its name in the store.
    pub file: String,
    /// The damage, or the error of the read.
    pub error: String,
}

/// A base whose reads wait or fail.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Trouble {
    /// Name of the base.
    pub base: String,
    /// Since when they do.
    #[schema(format = DateTime)]
    pub since: String,
    /// Why they do.
    pub why: String,
}

/// Requests of the kernel that wait for the bytes of bases, and counters of those that failed since the worker began.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Requests {
    /// Requests that wait.
    pub waiting: u64,
    /// Bytes of writes that wait.
    pub waiting_bytes: u64,
    /// Requests that wait and whose process is watched: they end when it does.
    pub watched: u64,
    /// Requests that were refused because too many waited.
    pub refused: u64,
    /// Requests that ended because of a signal, or with their process.
    pub interrupted: u64,
    /// Requests that wait for their turn under the limits of their disks; not among `waiting`.
    pub throttled: u64,
    /// Bytes of their writes.
    pub throttled_bytes: u64,
}

/// The memory cache and the cache in the store.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Cache {
    /// Bytes that the memory cache may take.
    pub memory_limit: u64,
    /// Bytes that it takes.
    pub memory_used: u64,
    /// Blocks that were found.
    pub hits: u64,
    /// Blocks that were not found.
    pub misses: u64,
    /// Blocks that were inserted.
    pub insertions: u64,
    /// Blocks that were evicted to make room.
    pub evictions: u64,
    /// Blocks that were adopted from an earlier worker.
    pub adopted_blocks: u64,
    /// Blocks of an earlier worker that were rejected, because they failed a check.
    pub adopted_rejected: u64,
    /// The cache in the store.
    #[schema(value_type = DiskCache)]
    pub disk: Option<DiskCache>,
}

/// The cache of fetched blocks in the store.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskCache {
    /// Bytes that it may take.
    pub limit_bytes: u64,
    /// Bytes that it takes.
    pub used_bytes: u64,
    /// Files of bases that have data in it or are pinned.
    pub bases: u64,
    /// Blocks that were found.
    pub hits: u64,
    /// Blocks that were not found.
    pub misses: u64,
    /// Blocks that were inserted.
    pub insertions: u64,
    /// Blocks that were evicted.
    pub evictions: u64,
    /// Blocks that did not match their checksums.
    pub corrupt_blocks: u64,
    /// Reads that failed in the storage.
    pub read_errors: u64,
    /// Writes, syncs and hole punches that failed in the storage.
    pub write_errors: u64,
    /// Whether the blocks of earlier workers are indexed. Until then `used_bytes` is an estimate.
    pub indexed: bool,
    /// Why no new blocks are kept.
    pub degraded: Option<String>,
    /// Files that cannot be read now, and why.
    pub unreadable: Vec<String>,
}

/// The restrictions in force on the worker.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Confinement {
    /// Capabilities that the worker keeps.
    pub capabilities: Vec<String>,
    /// Landlock: `full`, `partial (...)` or `off (why)`.
    pub landlock: String,
    /// The filter of system calls: `on`, `log` or `off (why)`.
    pub seccomp: String,
    /// Core dumps: `on` or `off`.
    pub core_dumps: String,
    /// Whether all memory is locked; null when the daemon does not report it.
    #[schema(value_type = bool)]
    pub memory_locked: Option<bool>,
}

/// The kernel, and what plyfs cannot promise on it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Kernel {
    /// Its release.
    pub release: String,
    /// The FUSE protocol of the mount.
    pub fuse: String,
    /// Promises that it does not allow, as the README lists them.
    pub missing: Vec<MissingPromise>,
}

/// A promise that the kernel does not allow.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MissingPromise {
    /// `resend`, `shared_mmap`, `parallel_writes` or `close`.
    pub promise: String,
    /// The first Linux that allows it.
    pub since: String,
    /// What happens instead.
    pub instead: String,
}

/// The answer to `stop`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Stopping {
    /// Always true: the daemon is stopping.
    pub stopping: bool,
}

/// How the daemon stops.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Whether it stops although clients have disks open. By default it refuses that.
    #[serde(default)]
    pub force: bool,
}

/// The program of an upgrade.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpgradeTo {
    /// Absolute path. By default the path that the daemon was started from.
    #[serde(default)]
    pub program: Option<String>,
}

/// An upgrade that has begun; `status` has its progress.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct UpgradeBegun {
    /// Its number in `upgrade` of `status`.
    pub number: u64,
}

impl Cache {
    /// The counters of both caches.
    pub fn new(memory: CacheStats, disk: DiskCacheStats) -> Self {
        let CacheStats {
            memory_limit,
            memory_used,
            hits,
            misses,
            insertions,
            evictions,
            adopted_blocks,
            adopted_rejected,
        } = memory;
        Self {
            memory_limit,
            memory_used,
            hits,
            misses,
            insertions,
            evictions,
            adopted_blocks,
            adopted_rejected,
            disk: Some(DiskCache::from(disk)),
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
        Self {
            number: upgrade.number,
            state: match upgrade.state {
                report::UpgradeState::Running => UpgradeState::Running,
                report::UpgradeState::Done => UpgradeState::Done,
                report::UpgradeState::Failed => UpgradeState::Failed,
            },
            program: upgrade.program.display().to_string(),
            from: upgrade.from.clone(),
            to: upgrade.to.clone(),
            why: upgrade.why.clone(),
            at: rfc3339(upgrade.at_ns),
        }
    }
}
