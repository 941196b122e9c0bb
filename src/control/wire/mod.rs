//! The bodies of `/v1`. The daemon's answers, the command line that reads them and the description in
//! `/v1/openapi.json` use the same types, so they cannot differ.
//!
//! What must hold:
//! - Keys are only ever added. A reader ignores keys that it does not know, and takes a default for a key that a daemon
//!   of another version omits: answers derive `serde(default)`.
//! - A request refuses keys that it does not know (`deny_unknown_fields`): a misspelt option is an error.
//! - Sizes are bytes, times are RFC 3339 in UTC, unless the name of a key says otherwise.
//! - No body contains a secret: URLs come without query and user info.

mod base;
mod cloud;
mod disk;
mod encryption;
mod error;
mod event;
mod extent;
mod job;
mod limits;
mod map;
mod pool;
mod snapshot;
mod stats;
mod status;
mod trace;
mod trash;

pub use base::{
    AddBase, Backing, Base, BaseState, Below, Evict, Evicted, Fail, Format, FurtherCopy, Hydrate, Identity,
    Pin, Server, SetUrls, Work, WorkKind, WorkState,
};
pub use cloud::{Cloud, CloudImage};
pub use disk::{Change, CreateDisks, Disk, DiskState, Move, Rebase, Removed, Resize};
pub use encryption::{KeyReference, Shred};
pub use error::{ErrorBody, ErrorKind, Refusal};
pub use event::{BaseTraffic, Event, EventName, Events, Total};
pub use extent::{DiskExtent, DiskExtents, ExtentContent};
pub use job::{ClientJob, HELD_SNAPSHOT, Job};
pub use limits::{Limits, SetLimits};
pub use map::{BaseMap, DiskMap, PlaceBytes};
pub use pool::{AddPool, Pool, PoolChange, PoolState};
pub use snapshot::{Layer, Rollback, Snapshot, TakeSnapshot};
pub use stats::{BaseStats, Counters, DiskStats, LatencyBucket, OperationStats, Stats};
pub use status::{
    AnyStatus, Cache, Confinement, DamagedFile, DiskCache, Kernel, LayerIndexes, Listener, LiveMaps,
    MissingPromise, Requests, SilentStatus, Space, Standby, Status, Stop, Stopping, Trouble, Upgrade,
    UpgradeBegun, UpgradeState, UpgradeTo, WorkerEnd,
};
pub use trace::{Origin, Recording, Trace, TraceFile};
pub use trash::{
    BaseChild, ChildKind, DiskChild, PruneBases, PrunedBase, PrunedBases, RestoreDisk, TrashedDisk,
};

use std::time::{Duration, SystemTime};

/// The header of a creation that a client may send again. The same key means the same creation.
pub const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// The text of a time in answers; `ns` counts from the epoch.
pub fn rfc3339(ns: i64) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(ns.max(0) as u64);
    humantime::format_rfc3339_nanos(at).to_string()
}

/// The text of a time in answers, to the millisecond.
pub fn rfc3339_millis(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}
