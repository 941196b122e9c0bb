//! The daemon: a supervisor that mounts and keeps the mount alive, and a worker that does everything else.
//!
//! Only this module constructs and connects the parts. What must hold: the supervisor takes no lock of the code below,
//! does no I/O on disks, and its memory does not grow; the first worker starts exactly as the hundredth does.

mod callers;
mod channel;
mod descriptors;
mod device;
mod export_socket;
mod handover;
mod heartbeat;
mod home;
mod kernel;
mod keys;
mod leftover;
mod lock;
mod metrics_socket;
mod mount;
mod outcome;
mod page_socket;
mod pool;
mod preload;
mod process;
mod relocation;
mod retention;
mod start;
mod supervisor;
mod unavailable;
mod upgrade;
mod upkeep;
mod worker;

use thiserror::Error;

pub use crate::io::sys::connect_within;
pub use handover::{is_resuming, resume};
pub use outcome::{End, Outcome};
pub use pool::prepare_pool;
pub use supervisor::serve;
pub use worker::worker_main;

fn system(operation: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |source| ServeError::System { operation, source }
}

/// Why the daemon could not start, or failed at its end. The text is a complete line for the operator.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The kernel is too old.
    #[error("cannot serve: {why}")]
    Kernel {
        /// The kernel, and the remedy.
        why: String,
    },
    /// The store cannot be used.
    #[error("cannot serve store {store}: {why}")]
    Store {
        /// Its directory.
        store: String,
        /// Cause and remedy.
        why: String,
    },
    /// The mount point cannot be used.
    #[error("cannot mount on {mount}: {why}")]
    Mount {
        /// The mount point.
        mount: String,
        /// Cause and remedy.
        why: String,
    },
    /// The worker could not be started, or could not close the store.
    #[error("{why}")]
    Worker {
        /// Cause and remedy.
        why: String,
    },
    /// A system call of the supervisor failed.
    #[error("cannot serve: {operation}: {source}")]
    System {
        /// The operation that failed.
        operation: &'static str,
        /// Its error.
        source: std::io::Error,
    },
}
