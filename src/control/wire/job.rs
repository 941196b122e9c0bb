//! The bodies of the routes on jobs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{WorkKind, WorkState};

/// A job: work on a whole base, which continues without the client that began it.
///
/// A hydration continues in the next worker, under the same identifier. A verification ends with its worker. A worker
/// lists what it did itself: of each base the last job of each kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Job {
    /// Its identifier: the kind and the base or disk, such as `hydrate-debian`.
    pub id: String,
    /// The kind of work.
    pub kind: WorkKind,
    /// The base; empty for work on a disk.
    pub base: String,
    /// The disk; null for work on a base.
    pub disk: Option<String>,
    /// Its state.
    pub state: WorkState,
    /// Bytes that were fetched, or compared.
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
