//! The supervisor's report on its workers. The supervisor sends it to each worker, which shows it in `plyfs status`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The number of worker ends that a report holds.
const ENDS: usize = 16;
/// Most bytes of a reason. It is bounded because one message carries the whole report.
const LONGEST_REASON: usize = 1024;

/// The supervisor's report on its workers. Times are nanoseconds since the epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Version of the supervisor.
    pub supervisor_version: String,
    /// Whether the supervisor can tell a worker which processes are ending (D55).
    pub answers_callers: bool,
    /// Workers that were told to take over, this one included.
    pub worker_starts: u64,
    /// How the last workers ended, oldest first.
    pub ends: Vec<End>,
    /// Why the worker before the next one ended without having delivered its last events; `None` when it was told to end
    /// or there was none.
    pub cut_off: Option<String>,
    /// Milliseconds by which the last start was delayed, because workers kept ending soon.
    pub back_off_ms: u64,
    /// The standby worker.
    pub standby: Standby,
    /// The last upgrade.
    pub upgrade: Option<Upgrade>,
    /// The arena of live maps.
    pub live: LiveMaps,
}

/// Where the live maps are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveMaps {
    /// Path of the arena; `None` when the maps are files of a version without an arena.
    pub path: Option<PathBuf>,
    /// Why the maps would not survive the supervisor, or which data an earlier daemon lost.
    pub problem: Option<String>,
    /// How often the arena moved to a new file because its old name was removed.
    pub moves: u64,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When it ended.
    pub at_ns: i64,
    /// Its process.
    pub pid: u32,
    /// Why it ended.
    pub why: String,
    /// Milliseconds from its take-over to its end.
    pub served_ms: u64,
}

/// The standby worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standby {
    /// Its process; `None` when there is no standby worker.
    pub pid: Option<u32>,
    /// Whether it is prepared to take over.
    pub prepared: bool,
    /// Why the last standby worker could not be started.
    pub problem: Option<String>,
}

/// An upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// 1 for the first since the mount was made.
    pub number: u64,
    /// Its progress.
    pub state: UpgradeState,
    /// The new program.
    pub program: PathBuf,
    /// Version of the old worker.
    pub from: String,
    /// Version of the new worker, once that has announced it.
    pub to: Option<String>,
    /// Why it failed, or which part of it failed.
    pub why: Option<String>,
    /// When it began, or when it ended.
    pub at_ns: i64,
}

/// The progress of an upgrade.
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

/// Makes a reason fit into a message: one line of at most `LONGEST_REASON` bytes and an ellipsis.
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
    /// Records how a worker ended.
    pub fn record_end(&mut self, end: End) {
        self.ends.push(end);
        let surplus = self.ends.len().saturating_sub(ENDS);
        self.ends.drain(..surplus);
    }
}
