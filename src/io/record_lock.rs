//! Record locks of fcntl(2), which Python's programs take on their lock files.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::sys;

/// A write lock of fcntl(2) on all of a file, held by its open file description, without waiting. False when another
/// process holds one. It excludes the record locks of processes, and has nothing to do with flock(2).
pub fn try_record_lock(file: &File) -> io::Result<bool> {
    match set(file, libc::F_WRLCK) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives back the lock of [`try_record_lock`]. To close the file is not enough while a process that was forked meanwhile
/// has its description too.
pub fn unlock_record(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK)
}

fn set(file: &File, kind: i32) -> io::Result<()> {
    // SAFETY: all fields are numbers, for which zeros are values.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence) = (kind as i16, libc::SEEK_SET as i16);
    // SAFETY: the kernel reads the structure during the call.
    sys::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }.into()).map(drop)
}
