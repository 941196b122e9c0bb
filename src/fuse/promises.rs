//! The parts of FUSE that a kernel offers, and the promises that plyfs cannot keep on a kernel that offers less (README,
//! "Kernels").
//!
//! FUSE_INIT tells when the mount is made, and the result holds for the life of the mount: it goes with the mount to each
//! worker and to the next version of the program.
//!
//! Source: linux/include/uapi/linux/fuse.h, "Changelog"; linux/fs/fuse/file.c of the versions named here.

use serde::{Deserialize, Serialize};

/// Minor protocol number of the oldest kernel that is served: Linux 5.14.
pub const OLDEST: u32 = 34;
/// Linux 5.16: FOPEN_NOFLUSH.
const NOFLUSH: u32 = 35;
/// FOPEN_PARALLEL_DIRECT_WRITES is of Linux 6.2, which speaks 7.38. So does Debian's 6.1, which lacks it: only a higher
/// number, of Linux 6.6, proves it.
const PARALLEL_DIRECT_WRITES: u32 = 39;
const MAYBE_PARALLEL_DIRECT_WRITES: u32 = 38;

/// The FUSE protocol of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protocol {
    /// The kernel's minor protocol number; the major one is 7.
    pub minor: u32,
    /// FUSE_HAS_RESEND, Linux 6.9.
    pub resend: bool,
    /// FUSE_DIRECT_IO_ALLOW_MMAP, Linux 6.6.
    pub shared_mmap: bool,
}

/// All that is used: what a mount has that a version made which demanded it.
impl Default for Protocol {
    fn default() -> Self {
        Self { minor: 40, resend: true, shared_mmap: true }
    }
}

/// A promise that a kernel may not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// Requests in flight outlive a worker.
    Resend,
    /// mmap(2), shared, of a file of the mount.
    SharedMmap,
    /// Direct writes to one file at the same time.
    ParallelWrites,
    /// close(2) waits for no write.
    Close,
}

impl Promise {
    /// As `status` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resend => "resend",
            Self::SharedMmap => "shared_mmap",
            Self::ParallelWrites => "parallel_writes",
            Self::Close => "close",
        }
    }

    /// The first Linux that offers it.
    pub fn since(self) -> &'static str {
        match self {
            Self::Resend => "6.9",
            Self::SharedMmap => "6.6",
            Self::ParallelWrites => "6.2",
            Self::Close => "5.16",
        }
    }

    /// The behaviour without it.
    pub fn instead(self) -> &'static str {
        match self {
            Self::Resend => "requests in flight end with EIO when a worker dies; an upgrade waits for them",
            Self::SharedMmap => "a shared mmap of a disk or base fails with ENODEV",
            Self::ParallelWrites => "the kernel passes on one write of a disk at a time",
            Self::Close => "the close of a file waits for writes to it",
        }
    }
}

impl Protocol {
    /// Whether FOPEN_PARALLEL_DIRECT_WRITES is asked for. A kernel that lacks it ignores it.
    pub fn may_write_in_parallel(self) -> bool {
        self.minor >= MAYBE_PARALLEL_DIRECT_WRITES
    }

    /// The promises that the kernel does not allow.
    pub fn missing(self) -> Vec<Promise> {
        let promises = [
            (self.resend, Promise::Resend),
            (self.shared_mmap, Promise::SharedMmap),
            (self.minor >= PARALLEL_DIRECT_WRITES, Promise::ParallelWrites),
            (self.minor >= NOFLUSH, Promise::Close),
        ];
        promises.into_iter().filter(|(kept, _)| !kept).map(|(_, promise)| promise).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_lacks_what_came_after_it() {
        let lacks = |minor, shared_mmap, resend| -> Vec<&str> {
            let missing = Protocol { minor, resend, shared_mmap }.missing();
            missing.into_iter().map(Promise::name).collect()
        };
        // Linux 6.9, 6.8, 6.1, 5.15.
        assert!(lacks(40, true, true).is_empty());
        assert_eq!(lacks(39, true, false), ["resend"]);
        assert_eq!(lacks(38, false, false), ["resend", "shared_mmap", "parallel_writes"]);
        assert_eq!(lacks(37, false, false), ["resend", "shared_mmap", "parallel_writes"]);
        assert_eq!(lacks(34, false, false), ["resend", "shared_mmap", "parallel_writes", "close"]);
        assert!(Protocol::default().missing().is_empty());
    }
}
