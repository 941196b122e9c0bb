//! Errors of a delta.

use std::io;

use thiserror::Error;

use crate::format::FormatError;
use crate::io::is_full;

/// The error of a failed operation on a delta.
#[derive(Debug, Error)]
pub enum DeltaError {
    /// The storage failed. ENOSPC stays ENOSPC.
    #[error("{operation}: {source}")]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// The error of the storage.
        source: io::Error,
    },
    /// Durable state is damaged.
    #[error("{file} is damaged: {source}")]
    Damaged {
        /// Which file of the store.
        file: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The data file is shorter than the map says.
    #[error(
        "{file} has {has} bytes, but the map needs more than {needs}: the file was truncated or is missing"
    )]
    DataMissing {
        /// Which file of the store.
        file: String,
        /// Its length.
        has: u64,
        /// Start of the last block that the map says is in it.
        needs: u64,
    },
    /// The live map was made by a worker of another version.
    #[error(
        "the live map of disk number {disk} has layout {has}, but this plyfs reads layout {knows}; start the version that made it"
    )]
    LiveLayout {
        /// Number of the disk.
        disk: u64,
        /// Its layout.
        has: u64,
        /// The layout of this version.
        knows: u64,
    },
    /// A partial write met a block that falls through to the base, and the caller did not pass the base's bytes.
    #[error("the base's bytes of a partly written block are missing")]
    NeedBase,
}

impl DeltaError {
    /// Whether the cause is a lack of space: nothing was lost, and a retry may succeed.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }

    pub(crate) fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }
}
