//! Errors of an export.

use std::io;

use thiserror::Error;

/// Why an export failed. The caller knows the disk and the file, and names them.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The disk cannot be read.
    #[error("reading the disk at byte {offset}: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The file or pipe cannot be written.
    #[error("{doing}: {source}")]
    Write {
        /// What was tried.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The disk or an argument does not fit the format.
    #[error("{0}")]
    Unsuitable(String),
    /// The caller ended the work.
    #[error("it was stopped")]
    Stopped,
}

impl ExportError {
    pub(super) fn writing(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { doing, source }
    }

    /// Whether the reader of a pipe is gone.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Write { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}
