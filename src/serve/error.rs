//! Why the work of a request does not succeed: it fails with an error number, which every frontend can pass to its
//! caller, or it waits for bytes and runs again.
//!
//! What must hold: an I/O error is logged where it arises, with its object and cause, because the number alone tells an
//! operator neither.

use super::{Target, log};
use crate::base::{BaseError, Completion};
use crate::disk::DiskError;
use crate::store::{DiskNode, StoreError};

/// Why a request failed: a number of errno(3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(i32);

impl Errno {
    pub const EINTR: Self = Self(libc::EINTR);
    pub const EIO: Self = Self(libc::EIO);
    pub const ESTALE: Self = Self(libc::ESTALE);

    pub const fn new(number: i32) -> Self {
        Self(number)
    }
}

impl From<Errno> for i32 {
    fn from(errno: Errno) -> Self {
        errno.0
    }
}

/// Why the work of a request stopped.
pub(super) enum Stop {
    /// It failed.
    Errno(Errno),
    /// It must run again.
    Wait(Completion),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl Stop {
    /// The error number, for work that needs no bytes of a base.
    pub fn errno(self) -> Errno {
        match self {
            Self::Errno(errno) => errno,
            Self::Wait(_) => Errno::EIO,
        }
    }
}

pub(super) fn fail(error: &StoreError) -> Errno {
    let errno = Errno(error.errno());
    if errno == Errno::EIO {
        log::failed(None, error);
    }
    errno
}

pub(super) fn fail_disk(node: &DiskNode, operation: &'static str, error: &DiskError) -> Stop {
    if let Some(completion) = error.completion() {
        return Stop::Wait(completion.clone());
    }
    let errno = Errno(error.errno());
    if errno == Errno::EIO {
        log::failed_on_disk(node.id(), &node.name(), operation, error);
    }
    Stop::Errno(errno)
}

pub(super) fn fail_base(base: u64, error: &BaseError) -> Stop {
    if let Some(completion) = error.completion() {
        return Stop::Wait(completion.clone());
    }
    log::failed(Some(Target::Base(base)), error);
    Stop::Errno(Errno::EIO)
}
