//! Errors of the catalogue.

use std::io;

use thiserror::Error;

use crate::disk::DiskError;
use crate::format::FormatError;
use crate::source::{SourceError, SourceErrorKind};

/// The error of a failed operation on the store. The message has the object, the cause and the remedy.
#[derive(Debug, Error)]
pub enum StoreError {
    /// No such disk or base.
    #[error(
        "{object}: there is no {noun} of that name; {}see `plyfs {}`",
        meant(object, noun),
        lister(object, noun)
    )]
    NotFound {
        /// `disk NAME` or `base NAME`.
        object: String,
        /// The noun of the command that lists them.
        noun: &'static str,
    },
    /// The name is taken.
    #[error("{object}: exists already; choose another name or remove it first")]
    Exists {
        /// `disk NAME` or `base NAME`.
        object: String,
    },
    /// A trashed disk cannot have its name back.
    #[error(
        "{object}: the name is taken; restore it under another one: plyfs trash restore {number} --as NAME"
    )]
    Taken {
        /// `disk NAME`.
        object: String,
        /// Number of the trashed disk.
        number: u64,
    },
    /// There is no such disk in the trash.
    #[error("trashed disk number {number}: it is not in the trash; see `plyfs trash ls`")]
    NotInTrash {
        /// Number of the disk.
        number: u64,
    },
    /// Another object needs it.
    #[error("{object}: still needed by {users}; remove those first")]
    InUse {
        /// `base NAME`.
        object: String,
        /// The objects that need it.
        users: String,
    },
    /// The disk was removed and can be restored.
    #[error("disk {name}: it is in the trash; restore it with: plyfs trash restore {number}")]
    Trashed {
        /// The name that it had.
        name: String,
        /// Its number.
        number: u64,
    },
    /// The request is invalid.
    #[error("{object}: {why}")]
    Invalid {
        /// The object of the request.
        object: String,
        /// The cause and the remedy.
        why: String,
    },
    /// The operation is not possible with this kind of object.
    #[error("{object}: {why}")]
    Unsupported {
        /// The object of the request.
        object: String,
        /// The cause and the remedy.
        why: String,
    },
    /// A file of the store cannot be understood.
    #[error("{file}: {source}; restore it from a backup, or see `plyfs check`")]
    Damaged {
        /// Which file.
        file: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A record that may affect the request cannot be read now.
    #[error("{object}: {why}")]
    Unread {
        /// The object of the request.
        object: String,
        /// Which record, and the remedy.
        why: String,
    },
    /// The pool with the files of the object cannot be used.
    #[error("{object}: {why}")]
    PoolGone {
        /// The object of the request.
        object: String,
        /// Which pool, the cause and the remedy.
        why: String,
    },
    /// Disks that could not be closed.
    #[error("{}", not_closed(disks))]
    NotClosed {
        /// The error of each disk.
        disks: Vec<String>,
    },
    /// The base is not what was registered.
    #[error("{object}: {why}")]
    BaseChanged {
        /// `base NAME`.
        object: String,
        /// What changed, and the remedy.
        why: String,
    },
    /// The keys of an encrypted disk are not here.
    #[error("{object}: locked: {why}; correct that, then try `plyfs disk unlock`")]
    Locked {
        /// `disk NAME`.
        object: String,
        /// The cause.
        why: String,
    },
    /// A base's source failed.
    #[error("{object}: {source}")]
    Source {
        /// `base NAME`.
        object: String,
        /// What is wrong.
        source: SourceError,
    },
    /// An attached disk failed.
    #[error("{object}: {source}")]
    Disk {
        /// `disk NAME`.
        object: String,
        /// What is wrong.
        source: DiskError,
    },
    /// The storage failed.
    #[error("{object}: {operation}: {source}")]
    Io {
        /// The object of the request.
        object: String,
        /// The operation that failed.
        operation: &'static str,
        /// The error of the storage.
        source: io::Error,
    },
}

/// What went wrong, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// No such disk or base.
    NotFound,
    /// The name is taken.
    Exists,
    /// Another object needs it.
    InUse,
    /// The request is invalid, or the source refuses it.
    Invalid,
    /// The operation is not possible with this kind of object.
    Unsupported,
    /// A file of the store cannot be understood.
    Damaged,
    /// The image is not what was registered.
    Changed,
    /// The storage failed.
    Io,
}

/// The command that lists what there is.
fn lister(object: &str, noun: &str) -> String {
    match object.strip_prefix("snapshot ").and_then(|name| name.split_once('@')) {
        Some((disk, _)) => format!("disk snapshots {disk}"),
        None => format!("{noun} ls"),
    }
}

/// The tip for the name of a file in the mount in place of a disk's or base's name.
fn meant(object: &str, noun: &str) -> String {
    let name = object.strip_prefix(noun).and_then(|name| name.trim_start().strip_suffix(".raw"));
    name.map_or_else(String::new, |name| format!("did you mean {name}? or "))
}

/// Disks that one message names.
const NAMED: usize = 8;

fn not_closed(disks: &[String]) -> String {
    let more = disks.len().saturating_sub(NAMED);
    let named = disks.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join("; ");
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{} of the disks could not be closed durably: {named}{more}", disks.len())
}

impl StoreError {
    pub(crate) fn io(object: impl Into<String>, operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        let object = object.into();
        move |source| Self::Io { object, operation, source }
    }

    /// The request is invalid.
    pub fn invalid(object: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { object: object.into(), why: why.into() }
    }

    /// What went wrong, for programs.
    pub fn kind(&self) -> StoreErrorKind {
        match self {
            Self::NotFound { .. } | Self::NotInTrash { .. } | Self::Trashed { .. } => {
                StoreErrorKind::NotFound
            }
            Self::Exists { .. } | Self::Taken { .. } => StoreErrorKind::Exists,
            Self::InUse { .. } => StoreErrorKind::InUse,
            Self::Invalid { .. } | Self::Locked { .. } => StoreErrorKind::Invalid,
            Self::Unsupported { .. } => StoreErrorKind::Unsupported,
            Self::Damaged { .. } => StoreErrorKind::Damaged,
            Self::BaseChanged { .. } => StoreErrorKind::Changed,
            Self::Source { source, .. } => match source.kind() {
                SourceErrorKind::Changed => StoreErrorKind::Changed,
                SourceErrorKind::Io => StoreErrorKind::Io,
                _ => StoreErrorKind::Invalid,
            },
            Self::Disk { .. } | Self::Io { .. } | Self::Unread { .. } => StoreErrorKind::Io,
            Self::PoolGone { .. } | Self::NotClosed { .. } => StoreErrorKind::Io,
        }
    }

    /// The error number that a system call reports.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound { .. } | Self::NotInTrash { .. } | Self::Trashed { .. } => libc::ENOENT,
            Self::Exists { .. } | Self::Taken { .. } => libc::EEXIST,
            Self::InUse { .. } => libc::EBUSY,
            Self::Invalid { .. } => libc::EINVAL,
            Self::Locked { .. } => libc::ENOKEY,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            Self::Disk { source, .. } => source.errno(),
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => libc::ENOSPC,
                _ => libc::EIO,
            },
            Self::Damaged { .. } | Self::BaseChanged { .. } | Self::Source { .. } => libc::EIO,
            Self::Unread { .. } | Self::PoolGone { .. } | Self::NotClosed { .. } => libc::EIO,
        }
    }
}
