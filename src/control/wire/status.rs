//! The daemon at a glance.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Events;

/// The daemon, its caches, and what is wrong.
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
    /// Milliseconds that the last start was put off, because workers kept ending soon.
    pub back_off_ms: u64,
    /// The worker that waits to take over.
    pub standby: Standby,
    /// The last upgrade.
    pub upgrade: Option<Upgrade>,
    /// Panics of requests that the worker survived.
    pub caught_panics: u64,
    /// Seconds since the mount was made.
    pub uptime_seconds: i64,
    /// How many bases there are.
    #[schema(value_type = u64)]
    pub bases: Option<u64>,
    /// How many disks there are.
    #[schema(value_type = u64)]
    pub disks: Option<u64>,
    /// How many disks are in use or were lately.
    pub attached_disks: u64,
    /// Names of disks that refuse writes, because a flush failed.
    pub disks_refusing_writes: Vec<String>,
    /// The filesystem of the store.
    pub space: Space,
    /// The maps of disks in memory.
    pub live_maps: LiveMaps,
    /// Disks without a name that a client still has open.
    pub unlinked_disks: u64,
    /// Records that are damaged.
    pub damaged: Vec<DamagedFile>,
    /// Records that could not be read, and are tried again.
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
    /// What of least privilege is in force.
    #[schema(value_type = Confinement)]
    pub confinement: Option<Confinement>,
    /// The kernel, and what plyfs cannot promise on it.
    #[schema(value_type = Kernel)]
    pub kernel: Option<Kernel>,
    /// Counters of events.
    pub events: Events,
    /// Since when the worker does not answer.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_not_answering_since: Option<String>,
    /// Why the worker does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_not_answering_why: Option<String>,
}

/// What the supervisor answers in place of a worker that does not answer. Keys are those of [`Status`].
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
    /// The worker that waits to take over.
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

/// What `/v1/status` answers.
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
    /// When.
    #[schema(format = DateTime)]
    pub at: String,
    /// Its process.
    pub pid: u32,
    /// Why.
    pub why: String,
    /// Milliseconds from taking over to the end.
    pub served_ms: u64,
}

/// The worker that waits to take over.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Standby {
    /// Its process, when there is one.
    pub pid: Option<u32>,
    /// Whether it has nothing left to do before it takes over.
    pub prepared: bool,
    /// Why the last one could not be started.
    pub problem: Option<String>,
}

/// An upgrade.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Upgrade {
    /// 1 for the first since the mount was made.
    pub number: u64,
    /// How far it is.
    pub state: UpgradeState,
    /// The program.
    pub program: String,
    /// Version of the worker before.
    pub from: String,
    /// Version of the new worker, once it is known.
    pub to: Option<String>,
    /// Why it failed, or what of it could not be done.
    pub why: Option<String>,
    /// When it began, or when it ended.
    #[schema(format = DateTime)]
    pub at: String,
}

/// How far an upgrade is.
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
    /// As answers show it.
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
    /// Bytes in all; null when the filesystem does not say.
    pub total_bytes: Option<u64>,
    /// Bytes that the daemon can use.
    pub available_bytes: Option<u64>,
    /// Bytes that are to be kept back for metadata.
    pub reserve_bytes: u64,
    /// Bytes that are kept back now.
    pub reserve_held_bytes: u64,
    /// Whether writes that need space are refused.
    pub full: bool,
}

/// The maps of disks in memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LiveMaps {
    /// Their file; null when there is one for each disk.
    pub path: Option<String>,
    /// Bytes that they take.
    pub bytes: Option<u64>,
    /// Bytes that they may take.
    pub limit_bytes: Option<u64>,
    /// Bytes that the map of one disk may take.
    pub disk_limit_bytes: Option<u64>,
    /// How often the file moved, because its name was gone.
    pub moves: u64,
    /// Why they would not outlive the supervisor, or what an earlier daemon lost.
    pub problem: Option<String>,
}

/// A file of the store that is damaged or cannot be read.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DamagedFile {
    /// Its name in the store.
    pub file: String,
    /// In which way.
    pub error: String,
}

/// A base that waits or fails.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Trouble {
    /// Name of the base.
    pub base: String,
    /// Since when.
    #[schema(format = DateTime)]
    pub since: String,
    /// Why.
    pub why: String,
}

/// Requests of the kernel that wait for the bytes of bases, and what became of others since the worker began.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Requests {
    /// Requests that wait.
    pub waiting: u64,
    /// Bytes of writes that wait.
    pub waiting_bytes: u64,
    /// Requests that wait and end with their process.
    pub watched: u64,
    /// Requests that were refused, because too many waited.
    pub refused: u64,
    /// Requests that ended with a signal, or with their process.
    pub interrupted: u64,
}

/// The memory cache, and the one in the store.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Cache {
    /// Bytes that the memory cache may take.
    pub memory_limit: u64,
    /// Bytes that it takes.
    pub memory_used: u64,
    /// Blocks that were found.
    pub hits: u64,
    /// Blocks that had to be got.
    pub misses: u64,
    /// Blocks that came in.
    pub insertions: u64,
    /// Blocks that went, to make room.
    pub evictions: u64,
    /// Blocks that were taken over from an earlier worker.
    pub adopted_blocks: u64,
    /// Blocks of an earlier worker that were not sound.
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
    /// Files of bases of which something is kept, or that are pinned.
    pub bases: u64,
    /// Blocks that were found.
    pub hits: u64,
    /// Blocks that were not found.
    pub misses: u64,
    /// Blocks that came in.
    pub insertions: u64,
    /// Blocks that went.
    pub evictions: u64,
    /// Blocks that did not match their sums.
    pub corrupt_blocks: u64,
    /// Reads that the storage failed.
    pub read_errors: u64,
    /// Writes, syncs and punches that the storage failed.
    pub write_errors: u64,
    /// Whether all that an earlier worker left is known; until then `used_bytes` is an estimate.
    pub indexed: bool,
    /// Why nothing new is kept.
    pub degraded: Option<String>,
    /// Files that cannot be read now, and why.
    pub unreadable: Vec<String>,
}

/// What of least privilege is in force.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Confinement {
    /// Capabilities that are left.
    pub capabilities: Vec<String>,
    /// `full`, `partial (...)` or `off (why)`.
    pub landlock: String,
    /// `on`, `log` or `off (why)`.
    pub seccomp: String,
    /// `on` or `off`.
    pub core_dumps: String,
    /// Whether all memory is locked; null when the daemon does not say.
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

/// The daemon is about to end.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Stopping {
    /// True.
    pub stopping: bool,
}

/// Which program takes over.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpgradeTo {
    /// Absolute path; without it the one that the daemon was started from.
    #[serde(default)]
    pub program: Option<String>,
}

/// An upgrade has begun; `status` says how it goes.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct UpgradeBegun {
    /// Its number in `upgrade` of `status`.
    pub number: u64,
}
