//! Where the bytes of a base come from.
//!
//! [`Source`] is the narrow line between a base and its origin, so that a base neither knows nor cares
//! whether its bytes lie in a file or behind a network. What must hold for every source:
//! - It serves one immutable object, named by its [`Identity`] when it was opened. If the object turns out to
//!   have changed, every read from then on fails with [`SourceErrorKind::Changed`]; bytes of two versions are
//!   never mixed.
//! - It never writes.
//! - It waits for a disk of this host at most. A source whose bytes lie behind a network says
//!   [`SourceErrorKind::NotHere`] with a [`Completion`]; whoever asked asks again when that is complete.

mod aligned;
mod completion;
pub mod file;
#[cfg(feature = "daemon")]
pub mod http;
mod location;
mod open;
mod patience;
mod remote;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub(crate) use aligned::AlignedBuf;
pub use completion::{Completer, Completion};
pub use file::FileSource;
pub use location::Location;
pub use open::{OpenHere, OpenImage, Opened};
pub use patience::{Wanted, without_files};
pub use remote::{Deliver, Fetch, Purpose, RemoteSource, Spawn, Stall, StallKind};

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

    /// Of an object that is no file of this host: `name` is its own and no other's.
    pub fn named(size: u64, name: [u8; 32]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| name[at * 8 + byte]));
        Self { size, mtime_s: word(0) as i64, mtime_ns: word(1) as u32, device: word(2), inode: word(3) }
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
    /// than `buf.len()` only at the end of the object. May wait for a disk, never for a network.
    ///
    /// # Errors
    /// `NotHere` when bytes have to be fetched first: they are under way, and [`SourceError::completion`] tells when to
    /// ask again. `Changed` when the object is not the one that was opened any more (then nothing in `buf` may be used),
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

    /// Says that these ranges will be read, each of them (start, length) in bytes. Does not wait. A source that fetches
    /// does so now, in few requests, as far as nobody does already; for others there is nothing to do.
    fn announce(&self, _ranges: &[(u64, u64)]) {}

    /// As [`announce`](Self::announce), for another purpose than a reader's. Returns when those are here that are
    /// under way now; none when all are here. Less than was asked for may be under way.
    fn prefetch(&self, _ranges: &[(u64, u64)], _purpose: Purpose) -> Option<Completion> {
        None
    }

    /// Whether a read may wait for more than the disk that the host runs on.
    fn is_remote(&self) -> bool {
        false
    }
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
    /// It has to be fetched first; see [`SourceError::completion`].
    NotHere,
    /// Its server does not let this host read it: credentials are missing or wrong, or it is not there any more.
    Denied,
    /// Its server cannot be reached, or fails, for longer than was allowed.
    Unreachable,
    /// Its server answers in a way that cannot be trusted to be the bytes that were asked for.
    Protocol,
    /// The operator gave it up: nothing is asked of its servers.
    GivenUp,
    /// Anything else that the system reported.
    Io,
}

/// A failure of a source. The message is complete in itself (what failed, on which object, why, what to do), so
/// `std::error::Error::source` adds nothing; the system's error is at [`io_error`](Self::io_error).
#[derive(Clone, Debug, thiserror::Error)]
pub struct SourceError(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: SourceErrorKind,
    /// A path, or a URL without its query and user info.
    object: String,
    operation: &'static str,
    io: Option<Arc<io::Error>>,
    /// Why, and what to do, where the kind alone does not say it.
    detail: Option<(String, String)>,
    completion: Option<Completion>,
}

impl SourceError {
    /// `operation` completes "cannot ... the path", as "open" or "read".
    pub fn new(kind: SourceErrorKind, operation: &'static str, path: &Path) -> Self {
        Self::of(kind, operation, path.display().to_string())
    }

    fn of(kind: SourceErrorKind, operation: &'static str, object: String) -> Self {
        Self(Box::new(Inner { kind, object, operation, io: None, detail: None, completion: None }))
    }

    /// With the kind that follows from the system's error.
    pub fn from_io(operation: &'static str, path: &Path, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => SourceErrorKind::Permission,
            _ => SourceErrorKind::Io,
        };
        let mut this = Self::new(kind, operation, path);
        this.0.io = Some(Arc::new(error));
        this
    }

    /// Of an object that is no file: `object` is a URL as it is shown to people ([`RemoteSource::shown`]). The message is "cannot
    /// `operation` `object`: `why`; `advice`".
    pub fn remote(
        kind: SourceErrorKind,
        operation: &'static str,
        object: impl Into<String>,
        why: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let mut this = Self::of(kind, operation, object.into());
        this.0.detail = Some((why.into(), advice.into()));
        this
    }

    /// A file that is not what it was, with the way in which it is not.
    pub fn changed(path: &str, why: &str) -> Self {
        let why = format!("it changed since it was registered: {why}");
        let advice = "put the original file back, its disks are useless on any other";
        Self::remote(SourceErrorKind::Changed, "read", path, why, advice)
    }

    /// The bytes are under way.
    pub fn not_here(object: impl Into<String>, completion: Completion) -> Self {
        let mut this = Self::of(SourceErrorKind::NotHere, "read", object.into());
        this.0.completion = Some(completion);
        this
    }

    pub fn kind(&self) -> SourceErrorKind {
        self.0.kind
    }

    /// The path, or the URL without what is secret.
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// What the system reported, if it was the system that failed.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.0.io.as_deref()
    }

    /// When to ask again, of an error that is no failure ([`SourceErrorKind::NotHere`]).
    pub fn completion(&self) -> Option<&Completion> {
        self.0.completion.as_ref()
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "cannot {} {}: ", self.0.operation, self.0.object)?;
        if let Some((why, advice)) = &self.0.detail {
            return write!(out, "{why}; {advice}");
        }
        let (why, advice) = match self.0.kind {
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
            SourceErrorKind::NotHere => ("it has to be fetched first", "wait"),
            SourceErrorKind::Denied => ("its server refuses it", "check the URL and the credentials"),
            SourceErrorKind::Unreachable => {
                ("its server cannot be reached", "check the server and the network")
            }
            SourceErrorKind::Protocol => {
                ("its server does not answer as it should", "check the server, or take another mirror")
            }
            SourceErrorKind::GivenUp => {
                ("its operator gave it up", "undo it with: plyfs base fail NAME --undo, or plyfs base set")
            }
            SourceErrorKind::Io => {
                if let Some(error) = &self.0.io {
                    write!(out, "{error}; ")?;
                }
                return write!(out, "check the disk and the filesystem that it lies on");
            }
        };
        write!(out, "{why}; {advice}")
    }
}
