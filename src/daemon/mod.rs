//! The daemon: a supervisor that mounts and keeps the mount alive, and a worker that does everything else.
//!
//! The only place that constructs and wires everything. The supervisor holds no lock, does no I/O on disks and never
//! grows; the first worker starts exactly as the hundredth does.

mod callers;
mod channel;
mod device;
mod handover;
mod home;
mod kernel;
mod leftover;
mod mount;
mod moving;
mod outcome;
mod precedence;
mod process;
mod pulse;
mod start;
mod supervisor;
mod unavailable;
mod upgrade;
mod worker;

use thiserror::Error;

pub use crate::io::sys::connect_within;
pub use handover::{resume, resumes};
pub use outcome::{End, Outcome};
pub use supervisor::serve;
pub use worker::worker_main;

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |source| ServeError::System { what, source }
}

/// Why the daemon could not start or ended badly. The text is a whole line for the operator.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The kernel is too old.
    #[error("cannot serve: {why}")]
    Kernel {
        /// Which it is, and what to do.
        why: String,
    },
    /// Something is wrong with the store.
    #[error("cannot serve store {store}: {why}")]
    Store {
        /// Its directory.
        store: String,
        /// What, and what to do.
        why: String,
    },
    /// Something is wrong with the mount point.
    #[error("cannot mount on {mount}: {why}")]
    Mount {
        /// The mount point.
        mount: String,
        /// What, and what to do.
        why: String,
    },
    /// The worker could not be started, or could not close the store.
    #[error("{why}")]
    Worker {
        /// What, and what to do.
        why: String,
    },
    /// A system call of the supervisor's failed.
    #[error("cannot serve: {what}: {source}")]
    System {
        /// Which.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
}
