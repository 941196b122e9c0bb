//! What the supervisor knows of its workers, for `plyfs status`: it is told to each worker, which answers the socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Ends that are kept.
const ENDS: usize = 16;
/// A reason has at most so many bytes: a message carries the whole report.
const LONGEST_REASON: usize = 1024;

/// See the module. Times are nanoseconds since the epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Version of the supervisor.
    pub supervisor_version: String,
    /// Whether the supervisor answers which processes are ending (D55).
    pub answers_callers: bool,
    /// Workers that were told to take over, this one included.
    pub worker_starts: u64,
    /// How the last ones ended, oldest first.
    pub ends: Vec<End>,
    /// Milliseconds that the last start was put off, because workers kept ending soon.
    pub back_off_ms: u64,
    /// The worker that waits to take over.
    pub standby: Standby,
    /// The last upgrade.
    pub upgrade: Option<Upgrade>,
    /// The arena of live maps.
    pub live: Live,
}

/// Where the live maps are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Live {
    /// Name of the arena; `None` when they are files that a version without an arena made.
    pub path: Option<PathBuf>,
    /// Why they would not outlive the supervisor, or what an earlier daemon lost.
    pub problem: Option<String>,
    /// How often the arena moved, because its name was gone.
    pub moves: u64,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When.
    pub at_ns: i64,
    /// Which.
    pub pid: u32,
    /// Why.
    pub why: String,
    /// Milliseconds from taking over to the end.
    pub served_ms: u64,
}

/// The worker that waits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standby {
    /// Its process, when there is one.
    pub pid: Option<u32>,
    /// It has nothing left to do before it takes over.
    pub prepared: bool,
    /// Why the last one could not be started.
    pub problem: Option<String>,
}

/// An upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// 1 for the first since the mount was made.
    pub number: u64,
    /// How far it is.
    pub state: UpgradeState,
    /// The program.
    pub program: PathBuf,
    /// Version of the worker before.
    pub from: String,
    /// Version of the new worker, once it has said so.
    pub to: Option<String>,
    /// Why it failed, or what of it could not be done.
    pub why: Option<String>,
    /// When it began, or when it ended.
    pub at_ns: i64,
}

/// How far an upgrade is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeState {
    /// Under way.
    Running,
    /// The new version serves.
    Done,
    /// The old version serves.
    Failed,
}

/// A reason that fits into a message: one line, not too long.
pub fn reason(text: &str) -> String {
    let mut out = text.trim().replace(['\n', '\r'], " ");
    if out.len() > LONGEST_REASON {
        let cut = (0..=LONGEST_REASON).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out.truncate(cut);
        out.push_str("...");
    }
    out
}

impl Report {
    /// Notes how a worker ended.
    pub fn ended(&mut self, end: End) {
        self.ends.push(end);
        let surplus = self.ends.len().saturating_sub(ENDS);
        self.ends.drain(..surplus);
    }
}
