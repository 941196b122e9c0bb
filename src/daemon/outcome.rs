//! How a daemon ended, in a small file in the store. `plyfs stop` reads it, because it is not the daemon's parent and
//! gets no exit status.
//!
//! What must hold: from its start on the file says that the daemon runs, and before it releases the lock the file says
//! how it ended. When the lock is free and the file still says "running", the daemon was killed. Recording the end
//! takes no new space: it overwrites the record of the start.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::control::report::reason;
use crate::format::layout::OUTCOME;
use crate::io::sys;

/// The size of the file. Blanks fill it up.
const BYTES: usize = 4096;

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Process of the supervisor.
    pub pid: u32,
    /// When its mount was made, nanoseconds since the epoch.
    pub since_ns: i64,
    /// The pid namespace of its processes, as the inode of `/proc/PID/ns/pid`; 0 when that is unknown.
    #[serde(default)]
    pub pid_namespace: u64,
    /// How it ended; `None` while it runs.
    pub end: Option<End>,
}

/// How a daemon ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// All data is durable, and the mount is gone.
    Clean,
    /// The end failed, for this reason.
    Failed(String),
}

/// The pid namespace of this process; 0 when it is unknown.
pub(super) fn pid_namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |meta| meta.ino())
}

impl Outcome {
    /// The outcome that the last daemon of a store recorded, if any.
    pub fn read(store: &Path) -> Option<Self> {
        let bytes = fs::read(store.join(OUTCOME)).ok().filter(|bytes| bytes.len() <= BYTES)?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Records that this daemon runs.
    pub fn begin(store: &Path, since_ns: i64) {
        Self { pid: sys::pid(), since_ns, pid_namespace: pid_namespace(), end: None }.write(store);
    }

    /// Records how this daemon ends.
    pub fn end<E: std::fmt::Display>(store: &Path, since_ns: i64, result: &Result<(), E>) {
        let end = match result {
            Ok(()) => End::Clean,
            Err(error) => End::Failed(reason(&error.to_string())),
        };
        Self { pid: sys::pid(), since_ns, pid_namespace: pid_namespace(), end: Some(end) }.write(store);
    }

    /// Writes the file. A failure is only logged, because only the answer of `plyfs stop` depends on it.
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
            tracing::warn!(
                %error,
                file = OUTCOME,
                "cannot record the outcome; `plyfs stop` cannot tell how this daemon ended"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_of_the_end_overwrites_that_of_the_start() {
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(Outcome::read(dir.path()), None);
        Outcome::begin(dir.path(), 7);
        let running = Outcome { pid: sys::pid(), since_ns: 7, pid_namespace: pid_namespace(), end: None };
        assert_ne!(running.pid_namespace, 0);
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
