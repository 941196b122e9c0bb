//! Every metric: its name, kind, labels and meaning, each said once. docs/metrics.md is made from it.
//!
//! Names follow the conventions of Prometheus: a prefix, what is measured, and the base unit. A counter is exposed with
//! the suffix `_total`.

/// The kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows while the worker lives.
    Counter,
    /// It grows and shrinks.
    Gauge,
    /// Counts of observations, by size.
    Histogram,
}

/// The unit of a metric. The name ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricUnit {
    /// A plain number.
    None,
    Seconds,
    Bytes,
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name in the code.
    pub id: &'static str,
    /// Its name without prefix, unit and suffix.
    pub name: &'static str,
    pub kind: MetricKind,
    pub unit: MetricUnit,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it is, without a full stop at the end.
    pub help: &'static str,
}

/// The prefix of all names.
pub const PREFIX: &str = "plyfs";
/// The value of the labels `disk`, `base` and `server` for all that have no series of their own. No name begins like it.
pub const OTHER: &str = "_other";

impl Metric {
    /// The name in the query language.
    pub fn exposed(&self) -> String {
        let suffix = if self.kind == MetricKind::Counter { "_total" } else { "" };
        format!("{}{suffix}", self.family())
    }

    /// The name of the family, which a counter exposes with a suffix.
    pub fn family(&self) -> String {
        let unit = match self.unit {
            MetricUnit::None => "",
            MetricUnit::Seconds => "_seconds",
            MetricUnit::Bytes => "_bytes",
        };
        format!("{PREFIX}_{}{unit}", self.name)
    }
}

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal $unit:ident [$($label:literal),*] $help:literal;)*) => {
        $(
            pub static $id: Metric = Metric {
                id: stringify!($id),
                name: $name,
                kind: MetricKind::$kind,
                unit: MetricUnit::$unit,
                labels: &[$($label),*],
                help: $help,
            };
        )*

        /// All metrics, in the order of the exposition.
        pub static METRICS: &[&Metric] = &[$(&$id),*];
    };
}

metrics! {
    BUILD: Gauge "build_info" None ["version"] "Always 1; the version of the worker";
    MOUNTED: Gauge "mount_start_time" Seconds [] "When the mount was made, in seconds since the epoch";
    WORKER_STARTED: Gauge "worker_start_time" Seconds []
        "When the worker began to serve, in seconds since the epoch; all other counters begin at 0 then";
    WORKER_STARTS: Counter "worker_starts" None [] "Workers that began to serve since the mount was made";
    STANDBY: Gauge "standby_prepared" None [] "1 while a standby worker is prepared to take over";
    PANICS: Counter "caught_panics" None [] "Requests that panicked and were confined to themselves";

    REQUEST_DURATION: Histogram "request_duration" Seconds ["operation"]
        "Time from the arrival of a request at plyfs to its answer, for all disks and bases";
    REQUEST_ERRORS: Counter "request_errors" None ["operation"] "Requests that failed, for all disks and bases";
    REQUESTS_WAITING: Gauge "requests_waiting" None [] "Requests that wait for bytes of a base now";
    WAITING_BYTES: Gauge "requests_waiting" Bytes [] "Bytes of writes that wait for bytes of a base now";
    REQUESTS_REFUSED: Counter "requests_refused" None []
        "Requests that ended with an I/O error because too many waited";
    REQUESTS_INTERRUPTED: Counter "requests_interrupted" None []
        "Waiting requests that ended by a signal or with their process";

    COPIED: Counter "copied" Bytes ["how"]
        "Bytes that copy_file_range copied: shared (with the source), zeros (which take no space), moved (read and written)";

    DISK_OPERATIONS: Counter "disk_operations" None ["disk", "operation"] "Answered requests";
    DISK_OPERATION_TIME: Counter "disk_operations_duration" Seconds ["disk", "operation"]
        "Time that all answered requests took together";
    DISK_OPERATION_BYTES: Counter "disk_operations" Bytes ["disk", "operation"]
        "Bytes of the requests that succeeded";
    DISK_ERRORS: Counter "disk_errors" None ["disk"] "Requests that failed";
    DISK_WAITS: Counter "disk_waits" None ["disk"] "Requests that waited for bytes of the base";
    DISK_WAIT_TIME: Counter "disk_waits_duration" Seconds ["disk"] "Time that requests waited for bytes of the base";
    DISK_THROTTLED: Counter "disk_throttled" None ["disk"]
        "Requests that waited for their turn under the limits of the disk";
    DISK_THROTTLED_TIME: Counter "disk_throttled_duration" Seconds ["disk"]
        "Time that requests waited for their turn under the limits of the disk";
    DISK_READ_FROM: Counter "disk_read_from" Bytes ["disk", "origin"]
        "Bytes that reads returned, by where they came from: delta, zero, memory, disk (the persistent cache), fetched";

    BASE_OPERATIONS: Counter "base_operations" None ["base", "operation"]
        "Answered requests on the base's own file in the mount";
    BASE_OPERATION_BYTES: Counter "base_operations" Bytes ["base", "operation"]
        "Bytes of the requests on the base's own file that succeeded";
    BASE_WAITS: Counter "base_waits" None ["base"] "Requests on it and its disks that waited for its bytes";
    BASE_WAIT_TIME: Counter "base_waits_duration" Seconds ["base"]
        "Time that requests on it and its disks waited for its bytes";
    BASE_HITS: Counter "base_hits" None ["base", "cache"] "Reads that found bytes in a cache: memory, disk";
    BASE_HIT_BYTES: Counter "base_hits" Bytes ["base", "cache"] "Bytes that reads found in a cache: memory, disk";
    BASE_FETCHES: Counter "base_fetches" None ["base", "purpose"]
        "Pieces that were fetched from the source: demand, readahead, prefetch, hydrate";
    BASE_FETCHED_BYTES: Counter "base_fetches" Bytes ["base", "purpose"] "Bytes that were fetched from the source";
    BASE_EVICTED_BYTES: Counter "base_evictions" Bytes ["base", "reason"] "Bytes that left a cache";
    BASES: Gauge "bases" None [] "Registered bases";
    BASES_WAITING: Gauge "bases_waiting" None [] "Bases whose reads wait for their servers now";
    BASES_FAILING: Gauge "bases_failing" None [] "Bases whose reads get errors now";

    DISKS: Gauge "disks" None [] "Disks with a name";
    DISKS_TRASHED: Gauge "disks_trashed" None [] "Disks in the trash";
    TRASH: Gauge "trash" Bytes []
        "Bytes of the store that are free once the trash is empty, as measured some seconds ago";
    DISKS_ATTACHED: Gauge "disks_attached" None [] "Disks in use";
    DISKS_REFUSING: Gauge "disks_refusing_writes" None [] "Disks that refuse writes since a flush failed";

    DISKS_AT_QUOTA: Gauge "disks_at_quota" None []
        "Disks that have no room in their quotas for what their clients wrote last";
    QUOTA_REFUSALS: Counter "quota_refusals" None [] "Requests that found no room in the quotas of their disks";
    REQUESTS_THROTTLED: Gauge "requests_throttled" None []
        "Requests that wait for their turn under the limits of their disks now";
    LIMITS_EXCEEDED: Counter "limits_exceeded" None []
        "Requests that passed a limit of their disk at once because too many waited";

    MEMORY_CACHE_HITS: Counter "memory_cache_hits" None [] "Blocks of 4 KiB that were found in the memory cache";
    MEMORY_CACHE_MISSES: Counter "memory_cache_misses" None []
        "Blocks of 4 KiB that had to be read from a source for a reader";
    MEMORY_CACHE_EVICTIONS: Counter "memory_cache_evictions" None [] "Blocks of 4 KiB that were evicted to make room";
    MEMORY_CACHE_USED: Gauge "memory_cache_used" Bytes [] "Memory that the memory cache takes";
    MEMORY_CACHE_LIMIT: Gauge "memory_cache_limit" Bytes [] "Most memory that the memory cache takes";
    DISK_CACHE_HITS: Counter "disk_cache_hits" None [] "Blocks of 16 KiB that were found in the persistent cache";
    DISK_CACHE_MISSES: Counter "disk_cache_misses" None []
        "Blocks of 16 KiB that were not found in the persistent cache";
    DISK_CACHE_EVICTIONS: Counter "disk_cache_evictions" None [] "Blocks of 16 KiB that were evicted";
    DISK_CACHE_USED: Gauge "disk_cache_used" Bytes [] "Bytes of blocks in the persistent cache";
    DISK_CACHE_LIMIT: Gauge "disk_cache_limit" Bytes [] "Most bytes of blocks in the persistent cache";
    DISK_CACHE_ERRORS: Counter "disk_cache_errors" None ["operation"]
        "Calls of the persistent cache that its filesystem failed: read, write";
    DISK_CACHE_CORRUPT: Counter "disk_cache_corrupt_blocks" None []
        "Blocks of 16 KiB that did not match their checksums";
    COPIES_USED: Gauge "cache_copies_used" Bytes ["pool"] "Bytes of further copies of cached blocks in the pool";
    COPIES_DEGRADED: Gauge "cache_copies_degraded" None ["pool"] "1 while the pool takes no copies of cached blocks";
    DISK_CACHE_DEGRADED: Gauge "disk_cache_degraded" None [] "1 while the persistent cache keeps no new blocks";

    SERVER_REQUESTS: Counter "server_requests" None ["server"] "Requests sent to a server, with any result";
    SERVER_RETRIES: Counter "server_retries" None ["server"] "Requests to a server that repeat a failed one";
    SERVER_BYTES: Counter "server_received" Bytes ["server"] "Bytes of bodies that a server sent";
    SERVER_WAIT: Counter "server_answers_duration" Seconds ["server"]
        "Time from the sending of a request to the first bytes of its answer, or to its failure";

    SERVER_MISSES: Counter "server_misses" None ["server"] "Requests to another host that did not have the bytes";
    SERVER_WRONG: Counter "server_wrong_answers" None ["server"]
        "Answers of a server with other bytes than the proof names, or of another object";
    RELATIVE_BYTES: Counter "relatives" Bytes []
        "Bytes that came from what the host has of other bases, in place of the server: groups whose proof is the same";
    EXPORT_REQUESTS: Counter "export_requests" None ["result"]
        "Requests of other hosts for cached blocks: sent, missed, refused";
    EXPORT_BYTES: Counter "export_sent" Bytes [] "Bytes of cached blocks that other hosts were sent";

    STORE_SIZE: Gauge "store_size" Bytes [] "Size of the filesystem of the store";
    STORE_AVAILABLE: Gauge "store_available" Bytes [] "Space of that filesystem that plyfs may use";
    STORE_FULL: Gauge "store_full" None [] "1 while writes that need space are refused";
    POOL_SIZE: Gauge "pool_size" Bytes ["pool"] "Size of the filesystem of the pool";
    POOL_AVAILABLE: Gauge "pool_available" Bytes ["pool"] "Space of that filesystem that plyfs may use";
    POOL_FULL: Gauge "pool_full" None ["pool"] "1 while writes to its disks that need space are refused";
    POOL_UP: Gauge "pool_up" None ["pool"] "1 while the pool can be used; 0 while its disks are not served";
    LIVE_MAPS: Gauge "live_maps" Bytes [] "Memory that the live maps take";
    LIVE_MAPS_LIMIT: Gauge "live_maps_limit" Bytes [] "Most memory that the live maps take";
    LAYER_INDEXES: Gauge "layer_indexes" Bytes [] "Memory that the indexes of layers take";
    LAYER_INDEXES_UNWRITTEN: Gauge "layer_indexes_unwritten" Bytes []
        "Memory of the indexes of layers that could not be written to the store";

    EVENTS: Counter "events" None ["event"] "Events, by name";
    NOTIFICATIONS: Counter "notifications" None ["result"] "Events for the destinations of [notify]: delivered, dropped";
    EVENTS_LOST: Counter "events_lost" None [] "Events that clients lost because they read too slowly";
}
