//! The bodies of limits of disks.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

/// The limits of a disk. Null: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Limits {
    /// Bytes that the disk may take in the store: its blocks with data, and the layers that it alone needs.
    pub quota: Option<u64>,
    /// Requests a second, reads and changes together.
    pub iops: Option<u64>,
    /// Reads a second.
    pub read_iops: Option<u64>,
    /// Requests a second that change the disk.
    pub write_iops: Option<u64>,
    /// Bytes a second, read and written together.
    pub bandwidth: Option<u64>,
    /// Bytes a second that are read.
    pub read_bandwidth: Option<u64>,
    /// Bytes a second that are written.
    pub write_bandwidth: Option<u64>,
    /// For how many milliseconds the disk may save up what it does not use; null: 100.
    pub burst_ms: Option<u32>,
}

/// New limits of a disk. A key that is missing leaves the limit as it is; null removes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SetLimits {
    /// Bytes that the disk may take in the store: its blocks with data, and the layers that it alone needs. It may be less
    /// than the disk takes: the disk then gets no new space until it takes less.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 4096)]
    pub quota: Option<Option<u64>>,
    /// Requests a second, reads and changes together.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub iops: Option<Option<u64>>,
    /// Reads a second.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub read_iops: Option<Option<u64>>,
    /// Requests a second that change the disk.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub write_iops: Option<Option<u64>>,
    /// Bytes a second, read and written together, 64 KiB at least.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 65536)]
    pub bandwidth: Option<Option<u64>>,
    /// Bytes a second that are read, 64 KiB at least.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 65536)]
    pub read_bandwidth: Option<Option<u64>>,
    /// Bytes a second that are written, 64 KiB at least.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 65536)]
    pub write_bandwidth: Option<Option<u64>>,
    /// For how many milliseconds the disk may save up what it does not use: 1 to 3,600,000. Null: 100.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 3_600_000)]
    pub burst_ms: Option<Option<u32>>,
}

impl SetLimits {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A key that is present, with its value or null.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(input: D) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(input).map(Some)
}
