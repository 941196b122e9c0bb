//! The bodies of counters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{BaseTraffic, Total};

/// Counters of requests, since the worker began to serve.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Stats {
    /// When the worker began to serve. The counters of an earlier worker are gone with it.
    #[schema(format = DateTime)]
    pub since: String,
    /// Process of the worker. When it is another one, all counters began at 0 again.
    pub worker: u32,
    /// All disks together, with those that were removed.
    pub all_disks: Counters,
    /// The disks that were used since, by number.
    pub disks: Vec<DiskStats>,
    /// The bases, by number.
    pub bases: Vec<BaseStats>,
}

/// The counters of a disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskStats {
    /// Number in the store.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Name of its base; null for a blank disk, and while the record of the base cannot be read.
    pub base: Option<String>,
    /// Its counters.
    pub counters: Counters,
}

/// The counters of a base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BaseStats {
    /// Number in the store.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The requests on its own file in the mount. Waits are those of the requests on its disks, too.
    pub counters: Counters,
    /// Its bytes that were found in a cache, fetched and evicted, for all of its disks.
    pub traffic: BaseTraffic,
}

/// Counters of requests. A request counts when it is answered.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Counters {
    /// Requests, by kind: `read`, `write`, `discard`, `zero`, `reserve`, `flush`, `seek`, `open`, `attributes`, `change`,
    /// `copy`. A kind without requests is missing.
    pub operations: BTreeMap<String, OperationStats>,
    /// Where the bytes of reads came from: `delta`, `zero`, `memory`, `disk`, `fetched`. The bytes add up to those that
    /// reads returned. An origin without bytes is missing.
    pub read_from: BTreeMap<String, Total>,
    /// Requests that waited for bytes of a base.
    pub waits: u64,
    /// Nanoseconds that they waited.
    pub waited_ns: u64,
    /// Requests that ended with an I/O error because too many waited.
    pub refused: u64,
    /// Requests that waited for their turn under the limits of their disk.
    pub throttled: u64,
    /// Nanoseconds that they waited.
    pub throttled_ns: u64,
}

/// The requests of one kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct OperationStats {
    /// Answered requests, also those that failed.
    pub count: u64,
    /// Bytes of the requests that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Requests that ended because their caller got a signal or ended.
    pub interrupted: u64,
    /// Nanoseconds of all answered requests, from their arrival at plyfs to their answer.
    pub latency_ns: u64,
    /// How many requests took how long: the buckets that have requests.
    pub latency: Vec<LatencyBucket>,
}

/// The requests of one range of latencies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LatencyBucket {
    /// The longest latency of the bucket in microseconds, a power of two; the bucket before it ends at half of that. Null
    /// for the last bucket, which has no end.
    pub up_to_us: Option<u64>,
    /// Requests.
    pub count: u64,
}
