//! How a daemon ended, for `plyfs stop`, which is no parent of it: a small file in the store.
//!
//! What must hold: the file says that a daemon runs from its start on, and how it ended before its lock is gone. One that
//! still says "running" then is of a daemon that was killed. The end takes no new space: it is written over the beginning.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::control::report::reason;
use crate::format::layout::OUTCOME;
use crate::io::sys;

/// The file always has so many bytes, with blanks behind what it says.
const BYTES: usize = 4096;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Process of the supervisor.
    pub pid: u32,
    /// When its mount was made, nanoseconds since the epoch.
    pub since_ns: i64,
    /// How it ended; none while it runs.
    pub end: Option<End>,
}

/// How a daemon ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Everything is durable, the mount is gone.
    Clean,
    /// Why not.
    Failed(String),
}

impl Outcome {
    /// What the last daemon of a store left, when it left anything.
    pub fn read(store: &Path) -> Option<Self> {
        let bytes = fs::read(store.join(OUTCOME)).ok().filter(|bytes| bytes.len() <= BYTES)?;
        serde_json::from_slice(&bytes).ok()
    }

    /// This daemon runs.
    pub fn begin(store: &Path, since_ns: i64) {
        Self { pid: sys::pid(), since_ns, end: None }.write(store);
    }

    /// This daemon is about to end.
    pub fn end<E: std::fmt::Display>(store: &Path, since_ns: i64, result: &Result<(), E>) {
        let end = match result {
            Ok(()) => End::Clean,
            Err(error) => End::Failed(reason(&error.to_string())),
        };
        Self { pid: sys::pid(), since_ns, end: Some(end) }.write(store);
    }

    /// A failure is a line in the log: nothing but the answer of `plyfs stop` depends on it.
    fn write(&self, store: &Path) {
        let put = || -> io::Result<()> {
            let mut bytes = serde_json::to_vec(self)?;
            bytes.resize(BYTES, b' ');
            let mut options = File::options();
            options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let file = options.open(store.join(OUTCOME))?;
            file.write_all_at(&bytes, 0)?;
            file.set_len(BYTES as u64)
        };
        if let Err(error) = put() {
            tracing::warn!(%error, file = OUTCOME, "plyfs stop will not be told how this daemon ended");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_written_over_the_beginning() {
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(Outcome::read(dir.path()), None);
        Outcome::begin(dir.path(), 7);
        let running = Outcome { pid: sys::pid(), since_ns: 7, end: None };
        assert_eq!(Outcome::read(dir.path()), Some(running.clone()));
        let long = "a disk could not be closed; ".repeat(1000);
        Outcome::end(dir.path(), 7, &Err(&long));
        let Some(Outcome { end: Some(End::Failed(why)), .. }) = Outcome::read(dir.path()) else {
            panic!("it failed");
        };
        assert!(long.starts_with(why.trim_end_matches("...")));
        Outcome::end(dir.path(), 7, &Ok::<(), io::Error>(()));
        assert_eq!(Outcome::read(dir.path()), Some(Outcome { end: Some(End::Clean), ..running }));
        assert_eq!(fs::metadata(dir.path().join(OUTCOME)).expect("there").len(), BYTES as u64);
    }
}
