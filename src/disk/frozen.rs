//! What a snapshot shows: a disk that never changes.

use super::below::{BaseUse, Progress};
use super::{Below, DiskError, Seek};
use crate::cache::Touch;
use crate::stats::{Origin, Origins};

/// See the module.
pub struct Frozen {
    below: Below,
    size: u64,
    overlap: u64,
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frozen").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Frozen {
    /// `overlap` bytes from the start are those of `below`, the others zeros.
    pub fn new(below: Below, size: u64, overlap: u64) -> Self {
        Self { below, size, overlap }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether blocks that fall through to the base are read from a file of this host, without decoding.
    pub fn is_plain(&self) -> bool {
        self.below.base.as_ref().is_none_or(|base| base.is_plain())
    }

    /// The end of a read, and the end of what shows through.
    fn clip(&self, offset: u64, len: usize) -> (u64, u64) {
        let end = offset.saturating_add(len as u64).min(self.size).max(offset);
        (end, self.overlap.clamp(offset, end))
    }

    /// As [`Disk::read_now`](super::Disk::read_now).
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Origins> {
        let (end, border) = self.clip(offset, buf.len());
        let (through, rest) = buf[..(end - offset) as usize].split_at_mut((border - offset) as usize);
        let by = BaseUse { touch: Touch::Use, readahead: 0, tap: None };
        let mut origins = Origins::default();
        if !self.below.read_now(offset, through, &by, &mut origins) {
            return None;
        }
        rest.fill(0);
        origins.add(Origin::Zero, rest.len());
        Some(origins)
    }

    /// As [`Disk::read`](super::Disk::read); reads `readahead` bytes ahead of what is fetched.
    ///
    /// # Errors
    /// Errors of the storage of layers or of the base.
    pub fn read(&self, offset: u64, buf: &mut [u8], readahead: u32) -> Result<Origins, DiskError> {
        let (end, border) = self.clip(offset, buf.len());
        let (through, rest) = buf[..(end - offset) as usize].split_at_mut((border - offset) as usize);
        let by = BaseUse { touch: Touch::Repeat, readahead, tap: None };
        let mut progress = Progress::default();
        self.below.read(offset, through, &by, &mut progress)?;
        rest.fill(0);
        progress.origins.add(Origin::Zero, rest.len());
        progress.missing.map_or(Ok(progress.origins), |error| Err(error.into()))
    }

    /// As [`Disk::seek`](super::Disk::seek).
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn seek(&self, offset: u64, what: Seek) -> Result<Option<u64>, DiskError> {
        if offset >= self.size {
            return Ok(None);
        }
        let border = self.overlap.min(self.size);
        Ok(match what {
            Seek::Data => self.below.next_data(offset, border)?,
            Seek::Hole => Some(self.below.next_hole(offset, border)?.unwrap_or(border.max(offset))),
        })
    }
}
