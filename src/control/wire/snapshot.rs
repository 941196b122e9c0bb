//! The bodies of snapshots and layers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A new snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// Its name.
    pub name: String,
}

/// The snapshot to which a disk returns.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Name of the snapshot.
    pub snapshot: String,
    /// Roll back although a client has the disk open.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// A snapshot of a disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Snapshot {
    /// Number in the store, never used again.
    pub id: u64,
    /// Name of the disk.
    pub disk: String,
    /// Its name.
    pub name: String,
    /// Bytes that the disk had.
    pub size: u64,
    /// Bytes in the store that its removal would free.
    pub only_bytes: u64,
    /// When it was taken.
    #[schema(format = DateTime)]
    pub created: String,
}

/// A sealed layer below a disk or below one of its snapshots.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Layer {
    /// Number in the store, never used again.
    pub id: u64,
    /// Bytes that its data takes in the store.
    pub bytes: u64,
    /// How many other disks need it.
    pub shared_by: u64,
    /// Names of the snapshots of this disk that stand on it directly.
    pub snapshots: Vec<String>,
}
