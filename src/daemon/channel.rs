//! Messages between the supervisor and its worker, over a socket pair that keeps message borders.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::io::sys;

/// Environment variable that carries the [`Start`] of a worker.
pub const START_ENV: &str = "PLYFS_WORKER";

/// What a worker is told when it is started.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// The daemon's configuration.
    pub config: Config,
    /// /dev/fuse, mounted and past FUSE_INIT.
    pub fuse: RawFd,
    /// This worker's end of the channel.
    pub channel: RawFd,
    /// The control socket, listening.
    pub listener: RawFd,
    /// The store's lock, held.
    pub lock: RawFd,
    /// The supervisor.
    pub supervisor_pid: u32,
    /// Workers started so far, this one included.
    pub worker_starts: u64,
    /// When the supervisor started, nanoseconds since the epoch.
    pub since_ns: i64,
}

/// From the worker to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    /// Requests are being served.
    Ready,
    /// An operator asked for the end.
    Stop,
    /// The worker cannot start, or could not close the store.
    Failed(String),
}

/// From the supervisor to the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSupervisor {
    /// Close the store and exit, although files are open.
    Finish,
}

/// One end.
#[derive(Debug)]
pub struct Channel(pub OwnedFd);

impl Channel {
    /// Sends one message.
    pub fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.truncate(60_000);
        sys::write(self.0.as_fd(), &bytes)
    }

    /// Waits for one message; `None` when the other end is gone.
    pub fn receive<T: for<'a> Deserialize<'a>>(&self) -> io::Result<Option<T>> {
        let mut bytes = vec![0; 64 << 10];
        let got = sys::read(self.0.as_fd(), &mut bytes)?;
        if got == 0 { Ok(None) } else { Ok(Some(serde_json::from_slice(&bytes[..got])?)) }
    }
}
