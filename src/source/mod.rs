//! Where the bytes of a base come from.
//!
//! [`Source`] is the only interface of a base to its bytes: a base does not know whether they lie in a file or behind a
//! network. What must hold for every source:
//! - It serves one immutable object, with the [`Identity`] that the object had when it was opened. When the object has
//!   changed, every later read fails with [`SourceErrorKind::Changed`]; a reader never gets bytes of two versions.
//! - It never writes.
//! - A read waits for a disk of this host at most. A source behind a network answers [`SourceErrorKind::NotHere`] with
//!   an [`Completion`]; the caller reads again when that has happened.

mod aligned;
mod completion;
mod device;
pub mod file;
mod glance_identity;
pub mod holdings;
#[cfg(feature = "daemon")]
pub mod http;
mod http_identity;
mod identity;
mod kind;
mod location;
#[cfg(feature = "daemon")]
pub mod nbd;
mod nbd_identity;
#[cfg(feature = "daemon")]
mod oci;
mod oci_identity;
mod open;
#[cfg(feature = "daemon")]
pub mod openstack;
pub mod pages;
mod patience;
mod proven;
mod proven_file;
mod provenance;
mod remote;
mod s3;
mod section;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

pub(crate) use aligned::AlignedBuf;
pub use completion::{Completer, Completion};
pub use device::{Device, lies_below, look};
pub use file::{FileIdentity, FileSource};
pub use glance_identity::GlanceIdentity;
use holdings::{AllLocal, Holdings};
pub use http_identity::HttpIdentity;
pub use identity::{Identity, KeyParts, Verdict};
#[cfg(feature = "daemon")]
pub use kind::shown;
pub use kind::{Kind, compare, key_parts};
pub use location::Location;
pub use nbd_identity::NbdIdentity;
pub use oci_identity::OciIdentity;
pub use open::{OpenHere, OpenImage, Opened};
pub use patience::{Wanted, without_files};
pub use proven::{Disproven, Parts, ProofOfRange, Prover, disproven, proven_key};
pub use proven_file::{ProofFile, ProvenFile};
pub use provenance::{Provenance, note, observe};
pub use remote::{Deliver, Fetch, Purpose, RemoteSource, Spawn, Stall, StallKind, UrlState};
pub use section::Section;

/// One immutable object, which any number of threads may read at once.
pub trait Source: Send + Sync {
    /// Fills `buf` with the bytes from `offset` on; `offset` and `buf` need no alignment. Returns the number of bytes
    /// read, which is less than `buf.len()` only at the end of the object. May wait for a disk, never for a network.
    ///
    /// # Errors
    /// `NotHere` when bytes have to be fetched first: the fetch is under way, and [`SourceError::completion`] tells when
    /// to read again. `Changed` when the object is not the one that was opened: the contents of `buf` must not be used.
    /// `Io` when reading failed.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError>;

    /// Size of the object in bytes.
    fn size(&self) -> u64;

    /// The object that was opened.
    fn identity(&self) -> &Identity;

    /// The first offset at or after `offset` that may hold data, or none when there is only a hole up to the end. A
    /// source that cannot find holes is all data.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError>;

    /// The first offset at or after `offset` that is in a hole; the end of the object counts as a hole.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn next_hole(&self, offset: u64) -> Result<u64, SourceError>;

    /// Whether the object is still the one that was opened.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn check(&self) -> Result<(), SourceError>;

    /// Announces reads of these ranges, (start, length) in bytes. Does not wait. A source that fetches begins to fetch
    /// what is neither cached nor under way, in few requests; other sources do nothing.
    fn announce(&self, _ranges: &[(u64, u64)]) {}

    /// As [`announce`](Self::announce), for another purpose than a reader's. The result happens when the bytes that are
    /// under way now are here; it is none when all bytes are here. The source may fetch only a part of the ranges.
    fn prefetch(&self, _ranges: &[(u64, u64)], _purpose: Purpose) -> Option<Completion> {
        None
    }

    /// Whether the bytes lie behind a network, so that a read may answer `NotHere`.
    fn is_remote(&self) -> bool {
        false
    }

    /// Where its bytes are now.
    fn holdings(&self) -> Box<dyn Holdings + '_> {
        Box::new(AllLocal)
    }
}

/// The kind of a failure, for callers that decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceErrorKind {
    /// The path leads to no file.
    NotFound,
    /// A directory, character device, FIFO or socket.
    NotAFile,
    /// The daemon may not read it.
    Permission,
    /// It has no bytes, so it cannot be a disk.
    Empty,
    /// It lies on the daemon's own mount.
    OwnMount,
    /// It lies outside the directories for files of bases.
    Outside,
    /// A block device that something else holds.
    InUse,
    /// The object differs from the one that was opened.
    Changed,
    /// The bytes have to be fetched first; see [`SourceError::completion`].
    NotHere,
    /// The server refuses: credentials are missing or wrong, or the object is gone.
    Denied,
    /// The server cannot be reached, or fails, for longer than the deadline.
    Unreachable,
    /// The answer does not prove that it has the requested bytes.
    Protocol,
    /// The operator gave the base up: its servers get no requests.
    GivenUp,
    /// Any other error of the system.
    Io,
}

/// A failure of a source. The message is complete: it has operation, object, cause and remedy. So
/// `std::error::Error::source` is empty; the system's error is at [`io_error`](Self::io_error).
#[derive(Clone, Debug, thiserror::Error)]
pub struct SourceError(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: SourceErrorKind,
    /// A path, or a URL without its query and user info.
    object: String,
    operation: &'static str,
    io: Option<Arc<io::Error>>,
    /// Cause and remedy, where the kind alone does not say them.
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

    /// With the message "cannot `operation` `object`: `why`; `advice`". `object` is a path, or a URL without secrets
    /// ([`RemoteSource::shown`]).
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

    /// Of a file that is not the one that was registered; `why` says how it differs.
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

    /// The path, or the URL without secrets.
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// The error of the system, if there was one.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.0.io.as_deref()
    }

    /// When to read again, after [`SourceErrorKind::NotHere`], which is no failure.
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
            SourceErrorKind::NotAFile => {
                ("it is not a regular file or block device", "give the path of an image file or block device")
            }
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
            SourceErrorKind::InUse => ("something else holds it", "end what holds it"),
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
                ("its server's answer breaks the protocol", "check the server, or use another mirror")
            }
            SourceErrorKind::GivenUp => {
                ("its operator gave it up", "undo it with: plyfs base fail NAME --undo, or: plyfs base set")
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
