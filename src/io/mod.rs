//! Files: positioned reads and writes, punches, syncs; memory that outlives the worker; all system calls that the
//! standard library has no safe word for.
//!
//! [`Medium`] is the fault seam: everything durable is written through it, so that a test can count the syncs,
//! lose what was not synced, and fail any call.

pub mod confine;
mod host;
#[cfg(feature = "daemon")]
pub mod interrupts;
mod live;
mod live_arena;
mod live_store;
mod mapping;
mod prefault;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
pub mod sys;
#[cfg(test)]
mod tests;
#[cfg(feature = "daemon")]
pub mod unanswered;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use host::HostMedium;
pub use live::{LIVE_PAGE_WORDS, LiveFile, LiveHeader, MapUse};
pub use live_arena::{ArenaIdentity, LiveArena, MapBounds};
pub use live_store::{LiveDir, LiveStore};
pub use prefault::PrefaultingAllocator;

use crate::sabotage::{Sabotage, sabotaged};

/// Whether a file may be made by opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// It has to be there.
    Existing,
    /// It has to be there, and is not written to: its filesystem may be read-only.
    ToRead,
    /// It is made, with mode 0600, when it is not there.
    Create,
}

/// A directory tree that holds durable state. Names are relative to its root, with `/` between the parts.
pub trait Medium: Send + Sync {
    /// Opens a file for reading and, unless `how` is [`Open::ToRead`], for writing. Reading it writes nothing: not the time
    /// of access either, which would wait for a journal that hangs.
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>>;
    /// Renames over whatever has the new name; durable after [`Medium::sync_dir`] of the directory.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file; durable after [`Medium::sync_dir`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the entries of a directory durable.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
    /// Bytes that a file takes on its filesystem; none when there is no such file.
    fn allocated(&self, name: &str) -> io::Result<Option<u64>> {
        match self.open(name, Open::Existing) {
            Ok(file) => file.allocated().map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
    /// What tells a file from all that had or will have its name; none when that cannot be said.
    fn stamp(&self, _name: &str) -> io::Result<Option<Stamp>> {
        Ok(None)
    }
    /// Names of the files in a directory.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// Makes a directory, with mode 0700, unless it is there.
    fn make_dir(&self, dir: &str) -> io::Result<()>;
    /// Whether its files live in memory, so that writing to them never waits.
    fn never_waits(&self) -> bool;
    /// Bytes in all, and bytes that may still be written.
    fn space(&self) -> io::Result<Space>;
    /// Where it is, for messages.
    fn root(&self) -> PathBuf;
}

/// What tells a file from others under its name: each of them is another inode, or was changed at another time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Inode number, which may be used again.
    pub inode: u64,
    /// Last change of the inode, nanoseconds since the epoch.
    pub changed_ns: i64,
    /// Bytes.
    pub len: u64,
}

/// Space of a filesystem in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// In all.
    pub total: u64,
    /// Not used.
    pub free: u64,
    /// Usable by whoever asks.
    pub available: u64,
}

/// A file on a [`Medium`].
pub trait MediumFile: Send + Sync {
    /// Fills `buf` from `offset`; fewer bytes only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// As `read_at`, when that needs no waiting; `None` otherwise.
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>>;
    /// Whether memory has all of a range, so that [`read_now`](Self::read_now) of it asks nothing of the disk. A read of what
    /// is not there may begin to read ahead before it gives up, and wait for a disk that hangs.
    fn is_in_memory(&self, _offset: u64, _len: u64) -> bool {
        true
    }
    /// Writes all of `buf` or fails; space for it is certain when it returns.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// As `write_at`, for a little that may have space kept back for it: the zeros of a discard.
    fn write_reserved(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }
    /// fdatasync(2): the data and the size survive power loss.
    fn sync_data(&self) -> io::Result<()>;
    /// Bytes of the file.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// The first byte at or after `offset` that may be something else than a hole; none up to the end.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.len()?).then_some(offset))
    }
    /// Cuts or extends the file.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Gives back the space of a range, which reads zeros from then on.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves space for a range without changing what is read, or the length.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Bytes that the file takes on its filesystem.
    fn allocated(&self) -> io::Result<u64>;
    /// Whether a write of a range needs no new space; false also when nobody knows.
    fn has_space(&self, _offset: u64, _len: u64) -> io::Result<bool> {
        Ok(false)
    }
    /// Device and inode number.
    fn identity(&self) -> io::Result<(u64, u64)>;
}

/// Whether an operation failed because the filesystem, or what the user may have of it, is used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Reads a whole file that is expected to be small.
///
/// # Errors
/// As `read_at`; `InvalidData` when it is larger than `limit` bytes.
pub fn read_whole(file: &dyn MediumFile, limit: u64) -> io::Result<Vec<u8>> {
    let len = file.len()?;
    if len > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{len} bytes, more than the {limit} it may have"),
        ));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    let got = file.read_at(&mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// Replaces the file `dir/name` durably: new bytes beside it, sync, rename, sync of the directory.
pub fn replace(medium: &dyn Medium, dir: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    stage(medium, dir, name, bytes)?;
    if sabotaged(Sabotage::DirectoryNotSynced) {
        return Ok(());
    }
    medium.sync_dir(dir)
}

/// As [`replace`] without the last step, for several files that one sync of the directory makes durable.
pub fn stage(medium: &dyn Medium, dir: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    let staged = format!("{dir}/{name}.tmp");
    let put = || {
        let file = medium.open(&staged, Open::Create)?;
        file.set_len(0)?;
        file.write_at(bytes, 0)?;
        if !sabotaged(Sabotage::RenameBeforeSync) {
            file.sync_data()?;
        }
        drop(file);
        medium.rename(&staged, &format!("{dir}/{name}"))
    };
    put().inspect_err(|_| {
        // Space that is missing already; a left-over has no meaning.
        let _ = medium.remove(&staged);
    })
}
