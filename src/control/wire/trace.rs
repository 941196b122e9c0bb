//! The bodies of traces.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The trace of a base. When it cannot be read, `error` says why, and the keys after it are absent.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Trace {
    /// Name of the base.
    pub base: String,
    /// Number of the base.
    pub base_id: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Why it cannot be read.
    pub error: Option<String>,
    /// Name of the base on which it was recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recorded_on: Option<String>,
    /// When it was recorded.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recorded: Option<String>,
    /// Bytes of the virtual disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The image that it belongs to; null when that is not known.
    #[schema(value_type = Option<Origin>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<Option<Origin>>,
    /// The number of its entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entries: Option<u64>,
    /// Bytes that the boot read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Milliseconds from the first read to the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u32>,
    /// Requests that a prefetch sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch_ranges: Option<u64>,
    /// Bytes that a prefetch fetches, with the gaps that are too small for separate requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch_bytes: Option<u64>,
    /// Whether it fits the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<bool>,
    /// Name of the disk whose recording ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Whether that disk is being recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recording: Option<bool>,
}

/// The image that a trace belongs to, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Digest of the image.
    Sha256(String),
    /// Digest of the image.
    Sha512(String),
    /// Hash of the validators of the server's object.
    Validator(String),
}

/// The bytes of a trace file, see docs/format.md.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
pub struct TraceFile(pub Vec<u8>);

/// A recording that has begun.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Recording {
    /// Name of the disk.
    pub disk: String,
    /// Name of the base whose trace it becomes.
    pub base: String,
    /// Always true: the disk is being recorded.
    pub recording: bool,
}
