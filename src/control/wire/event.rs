//! The bodies of events, and of the counters of bases.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One line of `/v1/events`. It omits the keys that do not apply to the event.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Event {
    /// When it happened.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// Its name.
    #[schema(value_type = EventName)]
    pub event: String,
    /// Name of the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Name of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Bytes that the event is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The number of pieces; for `lost`, the number of events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// The reason: a word for traffic, a sentence for other events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When the condition began, for an event about a condition that lasts.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// The number of the event. The events of a worker are numbered from 1; `following` has the number of the event
    /// before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    /// Process of the worker that reports it.
    pub worker: u32,
}

/// The name of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum EventName {
    /// A client follows from here on, and misses no event.
    #[serde(rename = "following")]
    Following,
    /// The client reads too slowly: `count` events are missing here.
    #[serde(rename = "lost")]
    Lost,
    /// A worker began to serve.
    #[serde(rename = "worker.started")]
    WorkerStarted,
    /// Bytes were in a cache.
    #[serde(rename = "base.hit")]
    BaseHit,
    /// Bytes were fetched.
    #[serde(rename = "base.miss")]
    BaseMiss,
    /// Bytes left a cache.
    #[serde(rename = "base.evict")]
    BaseEvict,
    /// The source failed.
    #[serde(rename = "base.error")]
    BaseError,
    /// The source has another object than the registered one.
    #[serde(rename = "base.changed")]
    BaseChanged,
    /// Reads wait for the server.
    #[serde(rename = "base.waiting")]
    BaseWaiting,
    /// Reads no longer wait for the server.
    #[serde(rename = "base.resumed")]
    BaseResumed,
    /// All of the base is in the store.
    #[serde(rename = "base.hydrated")]
    BaseHydrated,
    /// A base that nothing needed was removed.
    #[serde(rename = "base.removed")]
    BaseRemoved,
    /// The cache in the store keeps no new blocks.
    #[serde(rename = "cache.degraded")]
    CacheDegraded,
    /// The cache in the store keeps new blocks again.
    #[serde(rename = "cache.recovered")]
    CacheRecovered,
    /// A trace was recorded.
    #[serde(rename = "trace.recorded")]
    TraceRecorded,
    /// A disk has no room in its quota for what its client wrote; `bytes` is the quota.
    #[serde(rename = "disk.full")]
    DiskFull,
    /// A disk has room in its quota again.
    #[serde(rename = "disk.room")]
    DiskRoom,
}

/// Counters of events, since the worker began to serve.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Events {
    /// When the worker began to serve.
    #[schema(format = DateTime)]
    pub since: String,
    /// Events so far.
    pub emitted: u64,
    /// Events that clients lost because they read too slowly.
    pub lost: u64,
    /// Clients that follow events.
    pub listeners: u64,
    /// Traffic of each base.
    pub bases: Vec<BaseTraffic>,
}

/// The bytes of a base that were found in a cache, fetched and evicted.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BaseTraffic {
    /// Name of the base.
    pub base: String,
    /// Found, by cache: `memory`, `disk`.
    pub hit: BTreeMap<String, Total>,
    /// Fetched, by purpose: `demand`, `readahead`, `prefetch`, `hydrate`.
    pub miss: BTreeMap<String, Total>,
    /// Evicted, by reason: `space`, `free_space`, `bases`, `asked`, `corrupt`, `stale`.
    pub evict: BTreeMap<String, Total>,
}

/// A counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Total {
    /// Pieces.
    pub count: u64,
    /// Bytes of all pieces.
    pub bytes: u64,
}
