//! The bodies of the routes on jobs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{WorkKind, WorkState};

/// The beginning of the name of a snapshot that a client takes for its job; 16 hexadecimal digits follow. The daemon
/// removes it when the client is gone.
pub const HELD_SNAPSHOT: &str = "plyfs-export-held-";

/// A job: work on a whole base, which continues without the client that began it, or a copy that a client makes.
///
/// A hydration continues in the next worker, under the same identifier. A verification ends with its worker. A worker
/// lists what it did itself: of each base the last job of each kind. An export or import is listed while its client
/// makes it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Job {
    /// Its identifier: the kind and the base or disk, such as `hydrate-debian`; of a client's copy with a number.
    pub id: String,
    /// The kind of work.
    pub kind: WorkKind,
    /// The base; empty for work on a disk.
    pub base: String,
    /// The disk; null for work on a base.
    pub disk: Option<String>,
    /// Its state.
    pub state: WorkState,
    /// Bytes that were fetched, compared or copied.
    pub bytes: u64,
    /// Bytes in all.
    pub total: u64,
    /// Percent of the bytes.
    pub percent: f64,
    /// Bytes per second since this worker began it.
    pub rate: u64,
    /// Seconds until all bytes are fetched, or compared, at this rate; null when nothing tells.
    pub seconds_left: Option<u64>,
    /// Whether the digest matches; null without a digest, and before the comparison.
    pub digest_matches: Option<bool>,
    /// Why it failed, waits or was cancelled.
    pub error: Option<String>,
    /// When this worker began it.
    #[schema(format = DateTime)]
    pub began: String,
    /// When it ended; null while it is under way.
    #[schema(format = DateTime)]
    pub ended: Option<String>,
    /// Whether it continues the work of an earlier worker.
    pub resumed: bool,
}

/// A copy that a client makes.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClientJob {
    /// `export` or `import`.
    pub kind: WorkKind,
    /// The disk.
    pub disk: String,
    /// The snapshot that the client takes for it: `plyfs-export-held-` and 16 hexadecimal digits.
    pub snapshot: Option<String>,
    /// Bytes that are copied.
    pub bytes: u64,
    /// Bytes in all.
    pub total: u64,
}
