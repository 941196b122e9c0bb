//! Events and counters of bases.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One line of `/v1/events`. Keys that make no sense for the event are not there.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Event {
    /// When.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// What happened.
    #[schema(value_type = EventName)]
    pub event: String,
    /// Name of the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Bytes of the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// In how many pieces; of `lost`, how many events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Why: a word for traffic, a sentence for all else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Since when, for what lasts.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// From 1, one higher for each event of a worker; of `following`, that of the last event before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    /// Process of the worker that tells it.
    pub worker: u32,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum EventName {
    /// A client follows from here on, and misses nothing.
    #[serde(rename = "following")]
    Following,
    /// The client reads too slowly: `count` events were dropped here.
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
    /// The source is not what was registered.
    #[serde(rename = "base.changed")]
    BaseChanged,
    /// Reads wait for the server.
    #[serde(rename = "base.waiting")]
    BaseWaiting,
    /// They do not wait any more.
    #[serde(rename = "base.resumed")]
    BaseResumed,
    /// All of the base is in the store.
    #[serde(rename = "base.hydrated")]
    BaseHydrated,
    /// The cache in the store keeps nothing new.
    #[serde(rename = "cache.degraded")]
    CacheDegraded,
    /// It does again.
    #[serde(rename = "cache.recovered")]
    CacheRecovered,
    /// A trace was recorded.
    #[serde(rename = "trace.recorded")]
    TraceRecorded,
}

/// Counters of events, since the worker began.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Events {
    /// When the worker began to serve.
    #[schema(format = DateTime)]
    pub since: String,
    /// Events so far.
    pub emitted: u64,
    /// Events that listeners lost.
    pub lost: u64,
    /// Clients that follow.
    pub listeners: u64,
    /// Traffic of each base.
    pub bases: Vec<BaseTraffic>,
}

/// How many bytes of a base were found, fetched and evicted.
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
    /// Bytes of them all.
    pub bytes: u64,
}
