//! Where the bytes of a base come from.
//!
//! [`Source`] is the narrow line between a base and its origin, so that a base neither knows nor cares
//! whether its bytes lie in a file or behind a network. What must hold for every source:
//! - It serves one immutable object, named by its [`Identity`] when it was opened. If the object turns out to
//!   have changed, every read from then on fails with [`SourceErrorKind::Changed`]; bytes of two versions are
//!   never mixed.
//! - It never writes.

mod aligned;
pub mod file;
mod open;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) use aligned::AlignedBuf;
pub use file::FileSource;
pub use open::{OpenHere, OpenImage, Opened};

/// Says whether an object is still the one that was registered.
///
/// Compared while reading: size and modification time. Device and inode tell one file from another when it is
/// opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// Bytes.
    pub size: u64,
    /// Modification time, whole seconds since 1970.
    pub mtime_s: i64,
    /// Modification time, nanoseconds within the second.
    pub mtime_ns: u32,
    /// Device number of the filesystem.
    pub device: u64,
    /// Inode number on that filesystem.
    pub inode: u64,
}

impl Identity {
    /// The same content as far as metadata can tell: size and modification time.
    pub fn same_content(&self, other: &Self) -> bool {
        self.size == other.size && self.mtime_s == other.mtime_s && self.mtime_ns == other.mtime_ns
    }

    /// All of it, to tell identities apart within this machine's memory; no format for disks.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self { size, mtime_s, mtime_ns, device, inode } = *self;
        let words = [size, mtime_s as u64, u64::from(mtime_ns), device, inode];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// One immutable object that bytes can be read from, by any number of threads at once.
pub trait Source: Send + Sync {
    /// Fills `buf` with the bytes from `offset` on, any alignment. Returns how many there were, which is less
    /// than `buf.len()` only at the end of the object. May wait for a disk or a network.
    ///
    /// # Errors
    /// `Changed` when the object is not the one that was opened any more (then nothing in `buf` may be used),
    /// `Io` when reading failed.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError>;

    /// Bytes.
    fn size(&self) -> u64;

    /// What was opened.
    fn identity(&self) -> &Identity;

    /// The first offset at or after `offset` that may hold data, or none up to the end. A source that knows
    /// no holes is all data.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError>;

    /// The first offset at or after `offset` that is in a hole; the end of the object counts as one.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn next_hole(&self, offset: u64) -> Result<u64, SourceError>;

    /// Whether the object is still the one that was opened.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn check(&self) -> Result<(), SourceError>;
}

/// What kind of failure, for callers that decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceErrorKind {
    /// There is nothing at the path.
    NotFound,
    /// A directory, device, FIFO or socket.
    NotAFile,
    /// The daemon may not read it.
    Permission,
    /// It has no bytes, so it cannot be a disk.
    Empty,
    /// It lies on the daemon's own mount.
    OwnMount,
    /// It lies outside the directories that the files of bases have to be in.
    Outside,
    /// It is not the object any more that was opened.
    Changed,
    /// Anything else that the system reported.
    Io,
}

/// A failure of a source. The message is complete in itself (what failed, on which path, why, what to do), so
/// `std::error::Error::source` adds nothing; the system's error is at [`io_error`](Self::io_error).
#[derive(Debug, thiserror::Error)]
pub struct SourceError {
    kind: SourceErrorKind,
    path: PathBuf,
    operation: &'static str,
    io: Option<io::Error>,
}

impl SourceError {
    /// `operation` completes "cannot ... the path", as "open" or "read".
    pub fn new(kind: SourceErrorKind, operation: &'static str, path: &Path) -> Self {
        Self { kind, path: path.to_owned(), operation, io: None }
    }

    /// With the kind that follows from the system's error.
    pub fn from_io(operation: &'static str, path: &Path, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => SourceErrorKind::Permission,
            _ => SourceErrorKind::Io,
        };
        Self { kind, path: path.to_owned(), operation, io: Some(error) }
    }

    pub fn kind(&self) -> SourceErrorKind {
        self.kind
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the system reported, if it was the system that failed.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.io.as_ref()
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "cannot {} {}: ", self.operation, self.path.display())?;
        let (why, advice) = match self.kind {
            SourceErrorKind::NotFound => ("no such file", "check the path as the daemon sees it"),
            SourceErrorKind::NotAFile => ("it is not a regular file", "give the path of an image file"),
            SourceErrorKind::Permission => {
                ("permission denied", "let the daemon's user read the file and search its directories")
            }
            SourceErrorKind::Empty => {
                ("it is empty", "an image has at least one byte; check that the copy is complete")
            }
            SourceErrorKind::OwnMount => {
                ("it lies on this daemon's own mount", "give a file of another filesystem")
            }
            SourceErrorKind::Outside => (
                "it lies outside the directories for bases",
                "move the file, or name its directory in [security] base_dirs and restart the daemon",
            ),
            SourceErrorKind::Changed => (
                "its size or modification time is not what it was when it was opened",
                "a base must never change; restore the original file, or add the new one as a new base",
            ),
            SourceErrorKind::Io => {
                if let Some(error) = &self.io {
                    write!(out, "{error}; ")?;
                }
                return write!(out, "check the disk and the filesystem that it lies on");
            }
        };
        write!(out, "{why}; {advice}")
    }
}
