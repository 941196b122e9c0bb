//! What can go wrong in a delta.

use std::io;

use thiserror::Error;

use crate::format::FormatError;
use crate::io::is_full;

/// An operation on a delta that failed.
#[derive(Debug, Error)]
pub enum DeltaError {
    /// The storage said no. ENOSPC stays ENOSPC.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the storage said.
        source: io::Error,
    },
    /// Durable state is damaged.
    #[error("{file} is damaged: {source}")]
    Damaged {
        /// Which file of the store.
        file: String,
        /// In which way.
        source: FormatError,
    },
    /// The data file does not have what the map says it has.
    #[error("{file} has {has} bytes, the map needs more than {needs}: it was cut or is missing")]
    DataMissing {
        /// Which file of the store.
        file: String,
        /// Its length.
        has: u64,
        /// Start of the last block that should be in it.
        needs: u64,
    },
    /// Memory of a worker of another version.
    #[error(
        "the live map of disk number {disk} has layout {has}, this plyfs knows {knows}; start the version that made it"
    )]
    LiveLayout {
        /// Number of the disk.
        disk: u64,
        /// Its layout.
        has: u64,
        /// The layout of this version.
        knows: u64,
    },
    /// A partial write found a block that falls through to the base, and was not given the base's bytes.
    #[error("the base's bytes of a partly written block are missing")]
    NeedBase,
}

impl DeltaError {
    /// Whether space was missing: nothing was lost, and asking again may help.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }

    pub(super) fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }
}
