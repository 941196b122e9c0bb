//! The bodies of pools.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A directory that is to be a pool. `plyfs pool add` has prepared it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddPool {
    /// Name of the pool.
    pub name: String,
    /// Absolute path of its directory.
    pub dir: String,
}

/// A pool: a directory with the data files and maps of disks.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Pool {
    /// Its name; `default` is the directory of the store.
    pub name: String,
    /// Its directory.
    pub dir: String,
    /// Its state.
    pub state: PoolState,
    /// Why it is not available.
    pub error: Option<String>,
    /// Size of its filesystem in bytes; null while it is not available.
    pub total_bytes: Option<u64>,
    /// Bytes of that filesystem that plyfs may use.
    pub available_bytes: Option<u64>,
    /// Bytes that are kept back there for metadata.
    pub reserve_held_bytes: Option<u64>,
    /// Number of disks that need it.
    pub disk_count: u64,
    /// Names of the disks whose own delta lies there. Empty in lists.
    pub disks: Vec<String>,
    /// Names of the disks of which only layers lie there. Empty in lists.
    pub layers_of: Vec<String>,
}

/// The state of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolState {
    /// It can be used.
    #[default]
    Ok,
    /// Writes to its disks that need space are refused.
    Full,
    /// Its disks are not served; `error` says why.
    Unavailable,
}

/// Another worker takes over, which uses the pools that are there then.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PoolChange {
    /// Name of the pool.
    pub name: String,
    /// Number of the takeover: `upgrade` of `status` has its progress under this number.
    pub upgrade: u64,
}
