//! The bodies of disks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{KeyReference, Layer, Limits, SetLimits};

/// New disks, all of one size on one base. The request has at least one name.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDisks {
    /// Name of a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Names of disks; they follow `name`.
    #[serde(default)]
    pub names: Vec<String>,
    /// Name of the base; without one the disks are blank.
    #[serde(default)]
    pub base: Option<String>,
    /// What the disks are clones of, in place of a base: `DISK`, as it is now, or `DISK@SNAPSHOT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Bytes of each disk, 1 at least. By default the size of the base, or of what the disks are clones of.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub size: Option<u64>,
    /// Name of the pool of their data. By default the pool of what they are clones of, else `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Limits of each disk. A disk that is a clone has none of its origin.
    #[serde(default, skip_serializing_if = "SetLimits::is_empty")]
    pub limits: SetLimits,
    /// Where the secret is with which the disks are encrypted. By default they are not. Clones of an encrypted disk must
    /// be encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<KeyReference>,
}

/// The new size of a disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Bytes, 1 at least. A smaller size discards the data beyond it.
    #[schema(minimum = 1)]
    pub size: u64,
    /// Whether the size may be smaller than the present one. By default such a request is refused, because data is
    /// lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shrink: bool,
}

/// A disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Disk {
    /// Number in the store, never used again.
    pub id: u64,
    /// Its file in the mount.
    pub path: String,
    /// Its name.
    pub name: String,
    /// Name of its base; null for a blank disk, and while the record of the base cannot be read.
    pub base: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes that its delta takes in the store, without the layers below it.
    pub delta_bytes: u64,
    /// Name of the pool of its delta.
    pub pool: String,
    /// Names of all pools that it and its snapshots need: also those of its layers.
    pub needs_pools: Vec<String>,
    /// Number of its snapshots.
    pub snapshots: u64,
    /// The sealed layers below it and its snapshots, the lowest first. Empty in lists.
    pub layers: Vec<Layer>,
    /// Bytes of its map in memory; 0 while the disk is not in use.
    pub map_bytes: u64,
    /// Permission bits, octal.
    pub mode: String,
    /// User id of the owner.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// When it was created.
    #[schema(format = DateTime)]
    pub created: String,
    /// When its contents changed last.
    #[schema(format = DateTime)]
    pub modified: String,
    /// Where its secret is, `file PATH` or `command NAME`; null when it is not encrypted.
    pub key: Option<String>,
    /// Its state.
    pub state: DiskState,
    /// Why it has failed.
    pub error: Option<String>,
    /// Why it refuses writes: a flush failed and no client has opened the disk since.
    pub refuses_writes: Option<String>,
    /// Handles that clients have open; null when clients may have opened some under an earlier worker, which this one
    /// cannot count.
    pub open_handles: Option<u64>,
    /// Identifier of the job that is under way on it; null when there is none.
    pub job: Option<String>,
    /// Its limits.
    pub limits: Limits,
    /// Bytes that count against the quota; null without one.
    pub quota_used: Option<u64>,
    /// Whether a write was refused because of the quota, and there is no room for it yet.
    pub at_quota: bool,
    /// Requests that wait for their turn under the limits now.
    pub throttled: u64,
}

/// How a job on a disk runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Most bytes per second that are read for it; without it there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
}

/// The pool that a disk is moved to.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// Name of the pool.
    pub pool: String,
    /// Most bytes per second that are read for it; without it there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
}

/// The base that a disk is put on.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rebase {
    /// Name of the base.
    pub base: String,
    /// Most bytes per second that are read for it; without it there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Compare nothing: what was never written shows the new base.
    #[serde(default, rename = "unsafe", skip_serializing_if = "std::ops::Not::not")]
    pub is_unsafe: bool,
    /// With `unsafe`: put the disk on the base although a client has it open.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// The state of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// It works.
    #[default]
    Ok,
    /// A flush has failed since the disk came into use.
    HadErrors,
    /// It cannot be used; `error` says why.
    Failed,
    /// It cannot be used until its secret can be read; `error` says why.
    Locked,
}

/// The removed objects.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Removed {
    /// Their names.
    pub removed: Vec<String>,
}
