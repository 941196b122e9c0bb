//! What is exported: bytes, and the extents in which they are.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::{Content, ExportError, Extent};
use crate::io::sys;

/// A disk that does not change.
pub trait Input {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`. The range is inside the disk.
    ///
    /// # Errors
    /// When the bytes cannot be read.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), ExportError>;

    /// Where the bytes from `offset` on come from, and where that extent ends. `offset` is inside the disk.
    ///
    /// # Errors
    /// When that cannot be told.
    fn extent(&self, offset: u64) -> Result<(Content, u64), ExportError>;
}

/// A file, with its holes as zeros.
#[derive(Debug)]
pub struct FileInput {
    file: File,
    size: u64,
}

impl FileInput {
    /// All of a file.
    ///
    /// # Errors
    /// When its length cannot be read.
    pub fn new(file: File) -> Result<Self, ExportError> {
        let size = file.metadata().map_err(|source| ExportError::Read { offset: 0, source })?.len();
        Ok(Self { file, size })
    }
}

impl Input for FileInput {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.file.read_exact_at(buf, offset).map_err(|source| ExportError::Read { offset, source })
    }

    fn extent(&self, offset: u64) -> Result<(Content, u64), ExportError> {
        let failed = |source| ExportError::Read { offset, source };
        let data = sys::next_data(self.file.as_fd(), offset).map_err(failed)?.unwrap_or(self.size);
        if data > offset {
            return Ok((Content::Zero, data.min(self.size)));
        }
        let hole = sys::next_hole(self.file.as_fd(), offset).map_err(failed)?.unwrap_or(self.size);
        Ok((Content::Data, hole.min(self.size).max(offset + 1)))
    }
}

/// A file of which a list says what is not in the backing image.
#[derive(Debug)]
pub struct ListedInput {
    file: FileInput,
    /// Runs in order that do not overlap.
    extents: Vec<Extent>,
}

impl ListedInput {
    /// `extents`: what differs from the backing image, in order. All else is `Backing`.
    pub fn new(file: FileInput, extents: Vec<Extent>) -> Self {
        Self { file, extents }
    }
}

impl Input for ListedInput {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.file.read(buf, offset)
    }

    fn extent(&self, offset: u64) -> Result<(Content, u64), ExportError> {
        let size = self.size();
        let at = self.extents.partition_point(|extent| extent.offset + extent.len <= offset);
        Ok(match self.extents.get(at) {
            Some(extent) if extent.offset <= offset => {
                (extent.content, (extent.offset + extent.len).min(size))
            }
            Some(extent) => (Content::Backing, extent.offset.min(size)),
            None => (Content::Backing, size),
        })
    }
}
