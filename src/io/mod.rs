//! Files: positioned reads and writes, hole punching, syncs; memory that outlives the worker; all system calls for
//! which the standard library has no safe function.
//!
//! [`Medium`] is the fault seam: all durable state is written through it, so a test can count the syncs, lose what was
//! not synced, and fail any call.

pub mod confine;
mod host;
#[cfg(feature = "daemon")]
pub mod interrupts;
mod live;
mod live_arena;
mod live_store;
mod mapping;
pub(crate) mod prefault;
pub mod priority;
pub mod record_lock;
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

pub use host::{HostMedium, close_replaced_elsewhere};
pub use live::{LIVE_PAGE_WORDS, LiveFile, LiveHeader, MapUse};
pub use live_arena::{ArenaIdentity, LiveArena, MapBounds};
pub use live_store::{LiveDir, LiveStore};
pub use prefault::PrefaultingAllocator;

use crate::mutant::Mutant;

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// The file must exist.
    Existing,
    /// The file must exist and is only read: its filesystem may be read-only.
    ToRead,
    /// The file is created with mode 0600 if it does not exist.
    Create,
}

/// A directory tree that holds durable state. Names are relative to its root, with `/` between the parts.
pub trait Medium: Send + Sync {
    /// Opens a file for reading and, unless `how` is [`Open::ToRead`], for writing. Reading the file writes nothing,
    /// not even the time of access, which would wait for a journal that hangs.
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>>;
    /// Renames a file, over any file that has the new name. Durable after [`Medium::sync_dir`] of the directory.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file. Durable after [`Medium::sync_dir`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the entries of a directory durable.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
    /// Bytes that a file takes on its filesystem; `None` when there is no such file.
    fn allocated(&self, name: &str) -> io::Result<Option<u64>> {
        match self.open(name, Open::Existing) {
            Ok(file) => file.allocated().map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
    /// The stamp of a file, which tells it from every other file of that name; `None` when the medium has no stamps.
    fn stamp(&self, _name: &str) -> io::Result<Option<Stamp>> {
        Ok(None)
    }
    /// Names of the files in a directory.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// As [`list`](Self::list), with the stamps of the files as far as there are some.
    fn list_stamped(&self, dir: &str) -> io::Result<Vec<(String, Option<Stamp>)>> {
        let with_stamp = |name: String| {
            let stamp = self.stamp(&format!("{dir}/{name}")).ok().flatten();
            (name, stamp)
        };
        Ok(self.list(dir)?.into_iter().map(with_stamp).collect())
    }
    /// Creates a directory with mode 0700, unless it exists.
    fn make_dir(&self, dir: &str) -> io::Result<()>;
    /// Whether the files are in memory, so that writing to them never waits.
    fn never_waits(&self) -> bool;
    /// Total and free space.
    fn space(&self) -> io::Result<Space>;
    /// Path of the root, for messages.
    fn root(&self) -> PathBuf;
}

/// Tells two files of one name apart: they differ in the inode, or in the time of the last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Inode number. The filesystem may reuse it.
    pub inode: u64,
    /// Last change of the inode, nanoseconds since the epoch.
    pub changed_ns: i64,
    /// Bytes.
    pub len: u64,
}

/// Space of a filesystem in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Total bytes.
    pub total: u64,
    /// Unused bytes.
    pub free: u64,
    /// Bytes that this process may use.
    pub available: u64,
}

/// A file on a [`Medium`].
pub trait MediumFile: Send + Sync {
    /// Fills `buf` from `offset`; fewer bytes only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// As `read_at`, if that needs no waiting; `None` otherwise.
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>>;
    /// Whether all of a range is in memory, so that [`read_now`](Self::read_now) of it does not touch the disk. A read
    /// of missing bytes may start readahead before it gives up, and wait for a disk that hangs.
    fn is_in_memory(&self, _offset: u64, _len: u64) -> bool {
        true
    }
    /// Writes all of `buf`, or fails. On success the bytes have their space on the medium.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// As `write_at`, for a small write that may use the store's reserve: the zeros of a discard.
    fn write_reserved(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }
    /// fdatasync(2): the data and the size survive power loss.
    fn sync_data(&self) -> io::Result<()>;
    /// Fails when the storage refused what the kernel wrote of the file by itself since the last sync: as a sync would,
    /// but without one, and waits for nothing. Each such failure is reported once, here or by a sync.
    fn check_written_back(&self) -> io::Result<()> {
        Ok(())
    }
    /// Bytes of the file.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// The first byte at or after `offset` that may lie outside of a hole; `None` when there is none.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.len()?).then_some(offset))
    }
    /// Truncates or extends the file.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Frees the space of a range, which reads as zeros from then on.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves space for a range. Changes neither the contents nor the length.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Bytes that the file takes on its filesystem.
    fn allocated(&self) -> io::Result<u64>;
    /// Whether a write of a range needs no new space. False when that is unknown.
    fn has_space(&self, _offset: u64, _len: u64) -> io::Result<bool> {
        Ok(false)
    }
    /// The file below, of which this one shows the bytes in another form.
    fn stored(&self) -> Option<Arc<dyn MediumFile>> {
        None
    }
    /// Writes whole blocks of [`stored`](Self::stored), for which no key is needed. Readers of this file see each block as
    /// before or as written.
    fn write_stored(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }
    /// Device and inode number.
    fn identity(&self) -> io::Result<(u64, u64)>;
}

/// Whether an operation failed because the filesystem is full or a quota is exhausted.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Reads a whole file, which should be small.
///
/// # Errors
/// As `read_at`; `InvalidData` when it is larger than `limit` bytes.
pub fn read_whole(file: &dyn MediumFile, limit: u64) -> io::Result<Vec<u8>> {
    let len = file.len()?;
    if len > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{len} bytes, but at most {limit} are allowed"),
        ));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    let got = file.read_at(&mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// Replaces the file `dir/name` durably: writes the new bytes beside it, syncs them, renames, and syncs the directory.
pub fn replace(medium: &dyn Medium, dir: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    stage(medium, dir, name, bytes)?;
    if Mutant::DirectoryNotSynced.is_active() {
        return Ok(());
    }
    medium.sync_dir(dir)
}

/// As [`replace`], over a file with the bytes `before`. When it is unknown which of both a power cut leaves, the name is
/// put back as far as the storage allows: the next process reads what the caller of the failed call goes on with.
pub fn replace_or_restore(
    medium: &dyn Medium,
    dir: &str,
    name: &str,
    bytes: &[u8],
    before: impl FnOnce() -> Vec<u8>,
) -> io::Result<()> {
    stage(medium, dir, name, bytes)?;
    if Mutant::DirectoryNotSynced.is_active() {
        return Ok(());
    }
    medium.sync_dir(dir).inspect_err(|_| {
        let restored = stage(medium, dir, name, &before()).and_then(|()| medium.sync_dir(dir));
        if let Err(error) = restored {
            tracing::warn!(dir, name, %error, "a record whose replacement failed cannot be put back; a restart may find either");
        }
    })
}

/// As [`replace`], without the sync of the directory: one sync makes several files durable.
pub fn stage(medium: &dyn Medium, dir: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    let staged = format!("{dir}/{name}.tmp");
    let put = || {
        let file = medium.open(&staged, Open::Create)?;
        file.set_len(0)?;
        file.write_at(bytes, 0)?;
        if !Mutant::RenameBeforeSync.is_active() {
            file.sync_data()?;
        }
        drop(file);
        medium.rename(&staged, &format!("{dir}/{name}"))
    };
    put().inspect_err(|_| {
        // Frees the space, which may be what is missing. A leftover has no meaning.
        let _ = medium.remove(&staged);
    })
}
