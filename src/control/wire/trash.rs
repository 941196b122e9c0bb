//! The bodies of the trash, of what stands on bases and layers, and of the removal of unused bases.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A disk in the trash.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TrashedDisk {
    /// Number in the store, never used again.
    pub id: u64,
    /// The name that it had. Several disks in the trash may have had one name.
    pub name: String,
    /// Name of its base; null for a blank disk, and while the record of the base cannot be read.
    pub base: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of the store that are free when it is purged. Layers that another disk needs do not count.
    pub bytes: u64,
    /// Number of its snapshots, which are restored and purged with it.
    pub snapshots: u64,
    /// When it was removed.
    #[schema(format = DateTime)]
    pub removed: String,
    /// From when on the daemon purges it.
    #[schema(format = DateTime)]
    pub purge_after: String,
    /// Handles that clients have open; null when clients may have opened some under an earlier worker.
    pub open_handles: Option<u64>,
}

/// How a disk is restored.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreDisk {
    /// Its new name. By default the one that it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// What stands on a base, or shares layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChildKind {
    /// A disk.
    #[default]
    Disk,
    /// A snapshot of a disk.
    Snapshot,
    /// A disk in the trash, with its snapshots.
    Trashed,
    /// A removed disk that a client has open.
    Removed,
}

/// A disk or snapshot on a base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BaseChild {
    /// `DISK` or `DISK@SNAPSHOT`.
    pub name: String,
    /// Number of the disk or snapshot.
    pub id: u64,
    /// What it is.
    pub kind: ChildKind,
}

/// A disk that shares layers of another.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskChild {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u64,
    /// What it is.
    pub kind: ChildKind,
    /// Names of the snapshots of the other disk that show the layer on which it stands. Empty when it was made of the disk
    /// as it was then, or when the snapshot was removed.
    pub on: Vec<String>,
    /// How many layers both need.
    pub layers: u64,
    /// Bytes that these layers take in the store, once.
    pub bytes: u64,
}

/// Which unused bases are removed.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneBases {
    /// Only find out which bases would be removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Only bases that nothing has needed for this many seconds. By default all unused bases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than_seconds: Option<u64>,
}

/// Unused bases that were removed, or would be.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PrunedBases {
    /// Whether they were only found.
    pub dry_run: bool,
    /// The bases, the least recently used first.
    pub bases: Vec<PrunedBase>,
    /// Bytes of the store that this frees in all.
    pub bytes: u64,
}

/// An unused base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PrunedBase {
    /// Its name.
    pub name: String,
    /// Bytes of the store that its removal frees. The image itself stays.
    pub bytes: u64,
    /// When it was needed last.
    #[schema(format = DateTime)]
    pub last_used: String,
    /// Why it could not be removed.
    pub error: Option<String>,
}
