//! Messages between the supervisor and its workers, over a socket pair that preserves message boundaries.
//!
//! Supervisor and worker may be of different versions during an upgrade. The fields `protocol` and `channel` of
//! [`Start`] never change; the others belong to the protocol of that number. A field that a later version adds has a
//! default. A reader ignores fields that it does not know.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::callers::{CallersQuery, CallersReply};
use crate::config::Config;
use crate::control::Daemon;
use crate::control::report::Report;
use crate::fuse::promises::Protocol;
use crate::io::sys;

/// Environment variable that carries the [`Start`] of a worker.
pub const START_ENV: &str = "PLYFS_WORKER";
/// Number of this version's protocol. A release that raises it still speaks the one before, so that an upgrade release
/// by release never has to end the mount.
pub const PROTOCOL: u32 = 1;
/// Longest message in bytes.
const LONGEST: usize = 64 << 10;

/// The parameters of a worker's start.
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
    /// The socket of the status page, listening, when there is one.
    #[serde(default)]
    pub page: Option<RawFd>,
    /// The socket for other hosts, listening, when there is one.
    #[serde(default)]
    pub export: Option<RawFd>,
    /// The store's lock, held.
    pub lock: RawFd,
    /// Memory of the block cache, which survives workers.
    pub cache: RawFd,
    /// The arena of live maps, which survives workers. A supervisor of 0.1.0 has none: its live maps are named files.
    #[serde(default)]
    pub live: Option<RawFd>,
    /// Process of the supervisor.
    pub supervisor_pid: u32,
    /// When the mount was made, nanoseconds since the epoch.
    pub since_ns: i64,
    /// Whether the worker checks that it can read the store before it is prepared. True for a worker of another
    /// version.
    pub probe: bool,
    /// Whether the worker logs which features this host lacks. True for the first worker.
    #[serde(default)]
    pub warn: bool,
    /// Whether the supervisor knows `Closed`.
    #[serde(default)]
    pub hears_closed: bool,
}

/// A message from the worker to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    /// The worker is prepared: it has done all work that needs no store.
    Prepared {
        /// Its version.
        version: String,
        /// Newest format of a hand-over (`super::handover`) that a supervisor of that version reads.
        #[serde(default)]
        hand_over: u32,
        /// Whether the worker answers `Ping`.
        #[serde(default)]
        answers: bool,
    },
    /// The answer to `Ping`.
    Alive,
    /// The worker has closed the store and released its lock. The process is about to end.
    Closed,
    /// The worker serves requests.
    Ready,
    /// An operator requested the end of the daemon.
    Stop,
    /// An operator requested an upgrade to the program at this path, or to the installed one.
    Upgrade(Option<PathBuf>),
    /// The worker has answered the requests on the control socket that had begun. New ones wait.
    Drained,
    /// The worker has answered the requests of the kernel that it had read. New ones wait.
    Paused,
    /// Asks which processes are ending. Only for a supervisor whose report announces that it answers.
    Callers(CallersQuery),
    /// The worker cannot start, could not close the store, or panicked.
    Failed(String),
}

/// A message from the supervisor to the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSupervisor {
    /// Take over: no other worker runs.
    Activate {
        /// The report for `status`.
        report: Report,
        /// Whether the mount is new, so that no client can have a file open.
        fresh_mount: bool,
    },
    /// The report has changed.
    Report(Report),
    /// Answer with `Alive`. Only for a worker that announced that it answers.
    Ping,
    /// Which processes are ending. Only for a worker that asked.
    Callers(CallersReply),
    /// Answer the requests on the control socket that have begun, accept no new ones, then send `Drained`.
    Drain,
    /// Answer the requests of the kernel that were read, read no new ones, then send `Paused`. Only for a worker of hand-over
    /// 3 or later (`super::handover`).
    Pause,
    /// Read requests of the kernel again. Only for a worker that was told to pause.
    Continue,
    /// Close the store and exit, although files are open.
    Finish,
}

/// One end of the socket pair.
#[derive(Debug)]
pub struct Channel(pub OwnedFd);

/// A worker's end: the routes of the control socket pass stop and upgrade to the supervisor over it.
impl Daemon for Channel {
    fn stop(&self) -> io::Result<()> {
        self.send(&FromWorker::Stop)
    }

    fn upgrade(&self, program: Option<PathBuf>) -> io::Result<()> {
        self.send(&FromWorker::Upgrade(program))
    }
}

impl Channel {
    /// Sends one message. It never waits.
    ///
    /// # Errors
    /// When the other end is gone, when its queue is full because it does not read, or when the message is longer than
    /// 64 KiB.
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
