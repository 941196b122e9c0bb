//! Messages between the supervisor and its workers, over a socket pair that keeps message borders.
//!
//! Supervisor and worker may be of different versions while an upgrade is under way. What [`Start`] says of
//! `protocol` and `channel` never changes; the rest belongs to the protocol of that number. Fields that are added
//! later have a default, fields that are not known are ignored.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::callers::{Answered, Asked};
use crate::config::Config;
use crate::control::Daemon;
use crate::control::report::Report;
use crate::fuse::promises::Protocol;
use crate::io::sys;

/// Environment variable that carries the [`Start`] of a worker.
pub const START_ENV: &str = "PLYFS_WORKER";
/// Number of the protocol that is spoken here; a release that raises it still speaks the one before, so that an
/// upgrade in steps never needs the mount to end.
pub const PROTOCOL: u32 = 1;
/// Longest message in bytes.
const LONGEST: usize = 64 << 10;

/// What a worker is told when it is started.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// Number of the protocol.
    pub protocol: u32,
    /// This worker's end of the channel.
    pub channel: RawFd,
    /// The daemon's configuration.
    pub config: Config,
    /// /dev/fuse, mounted and past FUSE_INIT.
    pub fuse: RawFd,
    /// What the kernel offers. A supervisor of 0.1.0 serves only kernels that offer all.
    #[serde(default)]
    pub offers: Protocol,
    /// Where the worker lists the requests that it has read and not answered, when the kernel cannot send them again.
    #[serde(default)]
    pub unanswered: Option<RawFd>,
    /// The control socket, listening.
    pub listener: RawFd,
    /// The store's lock, held.
    pub lock: RawFd,
    /// Memory of the block cache, which outlives workers.
    pub cache: RawFd,
    /// The arena of live maps, which outlives workers. A supervisor of 0.1.0 has none: live maps are files by name.
    #[serde(default)]
    pub live: Option<RawFd>,
    /// The supervisor.
    pub supervisor_pid: u32,
    /// When the mount was made, nanoseconds since the epoch.
    pub since_ns: i64,
    /// Whether the worker looks at the store before it calls itself prepared: it is of another version.
    pub probe: bool,
    /// Whether it says what this machine does not offer: the first one.
    #[serde(default)]
    pub warn: bool,
    /// Whether the supervisor understands `Closed`.
    #[serde(default)]
    pub hears_closed: bool,
}

/// From the worker to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    /// Everything that needs no store is done.
    Prepared {
        /// Its version.
        version: String,
        /// Newest hand-over (`super::handover`) that a supervisor of that version reads.
        #[serde(default)]
        hand_over: u32,
        /// Whether it answers `Ping`.
        #[serde(default)]
        answers: bool,
    },
    /// The answer to `Ping`.
    Alive,
    /// The store is closed and its lock let go of; this process is about to end.
    Closed,
    /// Requests are being served.
    Ready,
    /// An operator asked for the end.
    Stop,
    /// An operator asked for the program at this path, or for the one that is installed now.
    Upgrade(Option<PathBuf>),
    /// Requests of the control socket have been answered, new ones wait.
    Drained,
    /// All requests of the kernel that were read have been answered, new ones wait.
    Paused,
    /// Which processes are ending? Only to a supervisor that says in its report that it answers.
    Callers(Asked),
    /// The worker cannot start, could not close the store, or panicked.
    Failed(String),
}

/// From the supervisor to the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSupervisor {
    /// Take over: no other worker runs.
    Activate {
        /// For `status`.
        report: Report,
        /// Nobody can have anything open: the mount was made a moment ago.
        fresh_mount: bool,
    },
    /// Something of this changed.
    Report(Report),
    /// Say `Alive`. Only to one that said that it answers.
    Ping,
    /// Which processes are ending. Only to one that asked.
    Callers(Answered),
    /// Answer the requests of the control socket that have begun, take no new ones, say `Drained`.
    Drain,
    /// Answer the requests of the kernel that were read, read no new ones, say `Paused`. Only to one whose hand-over knows
    /// it (`super::handover`).
    Pause,
    /// Read requests of the kernel again. Only to one that was told to pause.
    GoOn,
    /// Close the store and exit, although files are open.
    Finish,
}

/// One end.
#[derive(Debug)]
pub struct Channel(pub OwnedFd);

/// A worker's end: its control socket has the supervisor stop or upgrade.
impl Daemon for Channel {
    fn stop(&self) -> io::Result<()> {
        self.send(&FromWorker::Stop)
    }

    fn upgrade(&self, program: Option<PathBuf>) -> io::Result<()> {
        self.send(&FromWorker::Upgrade(program))
    }
}

impl Channel {
    /// Sends one message; never waits.
    ///
    /// # Errors
    /// When the other end is gone or has not read for long, or the message is longer than 64 KiB.
    pub fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > LONGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        sys::send_now(self.0.as_fd(), &bytes)
    }

    /// Waits for one message; `None` when the other end is gone.
    pub fn receive<T: for<'a> Deserialize<'a>>(&self) -> io::Result<Option<T>> {
        let mut bytes = vec![0; LONGEST];
        let got = sys::read(self.0.as_fd(), &mut bytes)?;
        if got == 0 { Ok(None) } else { Ok(Some(serde_json::from_slice(&bytes[..got])?)) }
    }
}
