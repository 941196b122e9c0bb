//! The bodies of changed extents.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What differs between two moments of a disk, or a part of that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskExtents {
    /// Name of the disk.
    pub disk: String,
    /// Name of its base; null for a blank disk.
    pub base: Option<String>,
    /// Name of the snapshot from which it differs; null: from the base, or from nothing.
    pub since: Option<String>,
    /// Name of the snapshot that differs; null: the disk as it is now.
    pub until: Option<String>,
    /// Bytes of the disk at the later moment.
    pub size: u64,
    /// The extents in order.
    pub extents: Vec<DiskExtent>,
    /// The `start` of the next request; null: this is the last part.
    pub next: Option<u64>,
}

/// A run of bytes that differs. Two neighbours of one kind may follow each other where one answer ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskExtent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What the later moment has there.
    pub content: ExtentContent,
}

/// What an extent has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExtentContent {
    /// Data that the disk wrote. It may have the same bytes as before.
    #[default]
    Data,
    /// Zeros.
    Zero,
    /// The bytes of the base, which the earlier moment hid.
    Base,
}
