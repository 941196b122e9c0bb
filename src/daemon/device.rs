//! The device that a worker reads requests from, on a kernel that cannot send them to the next worker.
//!
//! On Linux 6.9 and later all workers share the descriptor of the mount, and what a dead worker had read is sent again.
//! Before, each worker has a descriptor of its own of the same connection (FUSE_DEV_IOC_CLONE): the kernel keeps what was
//! read from it apart, and ends those requests, and no others, when its last copy is closed. The supervisor has a copy,
//! through which it ends with EIO the requests that the dead worker's table lists, and those near to them (D64). What must hold:
//! - No request that a dead worker had read stays without an end: the few that are missed so are ended by the kernel, with
//!   ECONNABORTED.
//! - The mount, open files and requests that no worker had read yet are not touched.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::fuse::kernel;
use crate::io::unanswered;

/// See the module.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
    table: File,
}

impl Device {
    /// Another descriptor of the connection of `mount`.
    ///
    /// # Errors
    /// When descriptors or memory run out, or the connection has ended.
    pub fn open(mount: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self { fd: unanswered::clone_device(mount)?, table: unanswered::memory()? })
    }

    /// The device of a worker that the program before has started.
    pub fn resumed(fd: OwnedFd, table: OwnedFd) -> Self {
        Self { fd, table: table.into() }
    }

    /// The descriptor that the worker reads from.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Memory for the worker's list.
    pub fn table(&self) -> BorrowedFd<'_> {
        self.table.as_fd()
    }

    /// Tells a worker that has read no request the highest number that the worker before it noted. When this fails, the
    /// kernel ends the requests that the worker reads without a note.
    pub fn begin_at(&self, highest: u64) {
        let _ = unanswered::begin_at(&self.table, highest);
    }

    /// The highest number of a request that the worker noted.
    pub fn highest(&self) -> u64 {
        unanswered::left(&self.table).map_or(0, |left| left.highest)
    }

    /// Ends the requests that the worker had read and not answered, and returns their number. None of its threads runs.
    ///
    /// # Errors
    /// When the table cannot be read; then the kernel ends them.
    pub fn fail_unanswered(&self) -> io::Result<usize> {
        let left = unanswered::left(&self.table)?;
        // The kernel knows which of these the worker had read from this descriptor, and has not answered.
        Ok(left.requests.into_iter().filter(|unique| kernel::fail(self.fd(), *unique)).count())
    }
}
