//! The bodies of maps: where the bytes of a disk or a base are, cell by cell.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where the bytes of a disk are. The arrays have one number for each cell: bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskMap {
    /// Name of the disk.
    pub name: String,
    /// Name of its base; null for a blank disk.
    pub base: Option<String>,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of each cell; the last cell may be shorter.
    pub cell_bytes: u64,
    /// Whether all of the disk was looked at. Of a very large disk the daemon looks at one of several parts.
    pub exact: bool,
    /// Whether the disk is in use. Otherwise the map is the durable one.
    pub attached: bool,
    /// In the disk's delta.
    pub delta: Vec<u64>,
    /// Reads as zeros.
    pub zero: Vec<u64>,
    /// Of the base, in the cache in the store.
    pub cached: Vec<u64>,
    /// Of the base, requested from a server.
    pub fetching: Vec<u64>,
    /// Of the base, in a file of this host.
    pub local: Vec<u64>,
    /// Of the base, on a server only.
    pub absent: Vec<u64>,
    /// Of the base, where cannot be told without a fetch.
    pub unknown: Vec<u64>,
    /// The sums of the arrays.
    pub total: PlaceBytes,
}

/// Where the bytes of a base are. The arrays have one number for each cell: bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BaseMap {
    /// Name of the base.
    pub name: String,
    /// Bytes of its virtual disk.
    pub size: u64,
    /// Bytes of each cell; the last cell may be shorter.
    pub cell_bytes: u64,
    /// Whether all of the base was looked at. Of a very large base the daemon looks at one of several parts.
    pub exact: bool,
    /// Bytes of it in the memory cache.
    pub memory_bytes: u64,
    /// Zeros, by the image.
    pub zero: Vec<u64>,
    /// In the cache in the store.
    pub cached: Vec<u64>,
    /// Requested from a server.
    pub fetching: Vec<u64>,
    /// In a file of this host.
    pub local: Vec<u64>,
    /// On a server only.
    pub absent: Vec<u64>,
    /// Where cannot be told without a fetch.
    pub unknown: Vec<u64>,
    /// Wherever else they are: bytes in the memory cache.
    pub memory: Vec<u64>,
    /// Wherever they are: bytes that the recorded boot reads, as the base's trace says. Zeros without a trace.
    pub read: Vec<u64>,
    /// Wherever they are: bytes that plyfs prefetches at a boot, as the base's trace says. Zeros without a trace.
    pub prefetched: Vec<u64>,
    /// The sums of the arrays.
    pub total: PlaceBytes,
}

/// Bytes by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PlaceBytes {
    /// In a delta; 0 of a base.
    pub delta: u64,
    /// Zeros.
    pub zero: u64,
    /// In the cache in the store.
    pub cached: u64,
    /// Requested from a server.
    pub fetching: u64,
    /// In a file of this host.
    pub local: u64,
    /// On a server only.
    pub absent: u64,
    /// Where cannot be told without a fetch.
    pub unknown: u64,
    /// In the memory cache; 0 of a disk.
    pub memory: u64,
    /// What the recorded boot reads; 0 of a disk.
    pub read: u64,
    /// What plyfs prefetches at a boot; 0 of a disk.
    pub prefetched: u64,
}
