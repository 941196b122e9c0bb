//! Delta over base, seen as one raw file.
//!
//! The only place that knows both. Calls here may wait for a disk or, through the base, for a network; the
//! `_now` variants never do. What is needed of the base is read before a range of the delta is locked.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use crate::base::{Base, BaseError, Completion};
use crate::cache::Touch;
use crate::delta::{Delta, DeltaError, Durability, Edges, Mapping, WriteSpace};
use crate::format::{BLOCK, MAX_DISK_SIZE};
use crate::trace::Tap;

/// Largest readahead in bytes.
const READAHEAD: u64 = 512 << 10;

/// An operation on a disk that failed.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The delta.
    #[error("{0}")]
    Delta(#[from] DeltaError),
    /// The base.
    #[error("{0}")]
    Base(#[from] BaseError),
    /// A flush failed since the handle was opened.
    #[error("a flush failed since the disk was opened; open it again to write")]
    Poisoned,
    /// Past the largest size.
    #[error("the disk would be larger than 64 TiB")]
    TooLarge,
}

impl DiskError {
    /// The error number that a system call reports: ENOSPC stays ENOSPC, everything unexpected is EIO.
    ///
    /// An error that only says that something has to come first ([`DiskError::completion`]) has none; EIO stands for it.
    pub fn errno(&self) -> i32 {
        match self {
            Self::TooLarge => libc::EFBIG,
            Self::Delta(DeltaError::Io { source, .. }) => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => libc::ENOSPC,
                Some(libc::EFBIG) => libc::EFBIG,
                _ => libc::EIO,
            },
            _ => libc::EIO,
        }
    }
}

impl DiskError {
    /// When to run the operation again, of an error that is no failure: bytes of the base have to be fetched first.
    /// Nothing was changed (D36).
    pub fn completion(&self) -> Option<&Completion> {
        match self {
            Self::Base(error) => error.completion(),
            Self::Delta(_) | Self::Poisoned | Self::TooLarge => None,
        }
    }
}

/// A disk that is attached.
pub struct Disk {
    delta: Delta,
    base: Option<Arc<Base>>,
    tap: Option<Arc<Tap>>,
    /// Where the last read ended, and how far readahead has grown.
    stream_end: AtomicU64,
    stream_window: AtomicU64,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("delta", &self.delta).finish_non_exhaustive()
    }
}

/// Which kind of extent to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE.
    Hole,
}

impl Disk {
    /// Puts a delta over a base, or over nothing.
    pub fn new(delta: Delta, base: Option<Arc<Base>>) -> Self {
        let (stream_end, stream_window) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
        Self { delta, base, tap: None, stream_end, stream_window }
    }

    /// With somebody who may want to know what is read from the base.
    #[must_use]
    pub fn tapped(self, tap: Arc<Tap>) -> Self {
        Self { tap: Some(tap), ..self }
    }

    /// What is read from the base is noted before it is here: the order of asking is what a trace is about.
    fn note(&self, offset: u64, len: usize) {
        if let Some(tap) = &self.tap {
            tap.note(offset, len as u64);
        }
    }

    /// The write layer, for its size, times and errors.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    /// Whether what falls through is read from a file of this host, with nothing to decode.
    pub fn is_plain(&self) -> bool {
        self.base.as_ref().is_none_or(|base| base.is_plain())
    }

    /// Whether nothing of a range was written: all of it is the base's.
    pub fn falls_through(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len).min(self.size());
        offset < end && self.base.is_some() && self.delta.extent(offset, end) == (Mapping::Base, end)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.delta.size()
    }

    /// How much of `len` bytes at `offset` exists.
    fn clip(&self, offset: u64, len: usize) -> usize {
        self.size().saturating_sub(offset).min(len as u64) as usize
    }

    fn touch(&self, offset: u64) -> Touch {
        // A sequential reader that comes back to the block where it stopped uses it once, not twice.
        let last = self.stream_end.load(Ordering::Relaxed);
        if last == offset && !offset.is_multiple_of(BLOCK) { Touch::Repeat } else { Touch::Use }
    }

    /// Reads what is in memory: the number of bytes, short at the end of the disk; `None` when it would wait.
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<usize> {
        let len = self.clip(offset, buf.len());
        let end = offset + len as u64;
        let touch = self.touch(offset);
        let mut at = offset;
        while at < end {
            let (mapping, stop) = self.delta.extent(at, end);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            let done = match mapping {
                Mapping::Zero => {
                    part.fill(0);
                    true
                }
                Mapping::Data => self.delta.read_now(part, at),
                Mapping::Base => match &self.base {
                    Some(base) => {
                        self.note(at, part.len());
                        base.read_now(at, part, touch)
                    }
                    None => {
                        part.fill(0);
                        true
                    }
                },
            };
            if !done {
                return None;
            }
            at = stop;
        }
        self.stream_end.store(end, Ordering::Relaxed);
        Some(len)
    }

    /// Reads `buf` from `offset`; fewer bytes only at the end of the disk.
    ///
    /// # Errors
    /// What the delta's or the base's storage says; nothing is made up.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, DiskError> {
        let len = self.clip(offset, buf.len());
        let end = offset + len as u64;
        let readahead = self.stream(offset, end);
        let mut coming: Option<BaseError> = None;
        let mut at = offset;
        while at < end {
            let (mapping, stop) = self.delta.extent(at, end);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            match (mapping, &self.base) {
                (Mapping::Data, _) => self.delta.read(part, at)?,
                // `read_now` came before and counted what it found.
                (Mapping::Base, Some(base)) => {
                    self.note(at, part.len());
                    if let Err(error) = base.read(at, part, Touch::Repeat, readahead) {
                        // All that is missing is fetched at once.
                        coming = Some(BaseError::join(coming, error)?);
                    }
                }
                _ => part.fill(0),
            }
            at = stop;
        }
        match coming {
            Some(error) => Err(error.into()),
            None => Ok(len),
        }
    }

    /// Notes a read and says how far to read ahead of it: nothing until reads follow each other.
    fn stream(&self, offset: u64, end: u64) -> u32 {
        let window = if self.stream_end.swap(end, Ordering::Relaxed) == offset {
            (self.stream_window.load(Ordering::Relaxed) * 2).clamp(64 << 10, READAHEAD)
        } else {
            0
        };
        self.stream_window.store(window, Ordering::Relaxed);
        window as u32
    }

    /// The base's bytes of a block, zeros past the overlap.
    fn base_block(&self, block: u64) -> Result<Box<[u8]>, DiskError> {
        let mut out = vec![0; BLOCK as usize].into_boxed_slice();
        let below = self.delta.overlap().saturating_sub(block * BLOCK).min(BLOCK) as usize;
        if let Some(base) = &self.base
            && below > 0
        {
            self.note(block * BLOCK, below);
            base.read(block * BLOCK, &mut out[..below], Touch::Use, 0)?;
        }
        Ok(out)
    }

    fn refuse_poisoned(&self, epoch: u64) -> Result<(), DiskError> {
        // An epoch of a handle wraps at 16 bits.
        if self.delta.error_epoch() & 0xffff == epoch & 0xffff { Ok(()) } else { Err(DiskError::Poisoned) }
    }

    /// Writes `bytes` at `offset`, growing the disk when that is past its end. `epoch` is the error epoch of the
    /// handle's open.
    ///
    /// # Errors
    /// [`DiskError::Poisoned`] after a failed flush; what the storage says. A block then reads as before or as
    /// written.
    pub fn write(&self, offset: u64, bytes: &[u8], epoch: u64) -> Result<(), DiskError> {
        self.write_with(offset, bytes, WriteSpace::Free, epoch)
    }

    fn write_with(&self, offset: u64, bytes: &[u8], space: WriteSpace, epoch: u64) -> Result<(), DiskError> {
        self.refuse_poisoned(epoch)?;
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > MAX_DISK_SIZE) {
            return Err(DiskError::TooLarge);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let len = bytes.len() as u64;
        let mut edges = Edges { space, ..Edges::default() };
        // A block never starts to fall through, so this ends: at most once more for each edge, when the disk's end
        // moved in between.
        for _ in 0..8 {
            let (head, tail) = self.delta.needs_base(offset, len);
            if head && edges.head.is_none() {
                edges.head = Some(self.base_block(offset / BLOCK)?);
            }
            if tail && edges.tail.is_none() {
                edges.tail = Some(self.base_block((offset + len - 1) / BLOCK)?);
            }
            match self.delta.write(offset, bytes, &edges) {
                Err(DeltaError::NeedBase) => {}
                other => return Ok(other?),
            }
        }
        Err(DeltaError::NeedBase.into())
    }

    /// Makes a range read as zeros and gives its space back; the size does not change, nothing happens past it.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn zero(&self, offset: u64, len: u64, epoch: u64) -> Result<(), DiskError> {
        self.refuse_poisoned(epoch)?;
        // Up to the end of the disk, but not of one that grows meanwhile: what is written there then stays.
        while !self.zero_below(self.size(), offset, len, epoch)? {}
        Ok(())
    }

    /// Zeros what of a range is below `size`; false when that is not the disk's size any more, and not all is done.
    fn zero_below(&self, size: u64, offset: u64, len: u64, epoch: u64) -> Result<bool, DiskError> {
        let end = offset.saturating_add(len).min(size);
        if offset >= end {
            return Ok(true);
        }
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let whole_first = offset.div_ceil(BLOCK);
        // The last block of the disk is whole when it is zeroed up to the end of the disk.
        let whole_end = if end == size { last + 1 } else { end / BLOCK };
        if whole_first >= whole_end {
            // No whole block: one or two parts.
            let border = ((first + 1) * BLOCK).min(end);
            self.zero_part(offset, border, epoch)?;
            self.zero_part(border, end, epoch)?;
            return Ok(true);
        }
        // First what gives space back; parts of blocks may need some.
        if end == size {
            if !self.delta.zero_to_end(whole_first, size)? {
                return Ok(false);
            }
            self.zero_part(offset, whole_first * BLOCK, epoch)?;
            return Ok(true);
        }
        self.delta.zero_blocks(whole_first, whole_end)?;
        self.zero_part(offset, whole_first * BLOCK, epoch)?;
        self.zero_part((whole_end * BLOCK).min(end), end, epoch)?;
        Ok(true)
    }

    /// Zeros a part of one block.
    fn zero_part(&self, from: u64, to: u64, epoch: u64) -> Result<(), DiskError> {
        if from >= to || self.delta.is_zero(from / BLOCK) {
            return Ok(());
        }
        self.write_with(from, &vec![0; (to - from) as usize], WriteSpace::Reserved, epoch)
    }

    /// Reserves space for a range, and grows the disk to hold it when `grow` says so.
    ///
    /// # Errors
    /// ENOSPC when there is not enough.
    pub fn allocate(&self, offset: u64, len: u64, grow: Grow, epoch: u64) -> Result<(), DiskError> {
        self.refuse_poisoned(epoch)?;
        let end = offset.checked_add(len).filter(|end| *end <= MAX_DISK_SIZE).ok_or(DiskError::TooLarge)?;
        self.delta.allocate(offset, len)?;
        self.grow(end, grow)
    }

    /// Grows the disk to `end` when it is smaller and `grow` says so.
    ///
    /// # Errors
    /// What the storage says.
    pub fn grow(&self, end: u64, grow: Grow) -> Result<(), DiskError> {
        if end > MAX_DISK_SIZE {
            return Err(DiskError::TooLarge);
        }
        if grow == Grow::Yes && end > self.size() {
            self.delta.resize(end, Durability::Flush)?;
        }
        Ok(())
    }

    /// Changes the size; durable at return.
    ///
    /// # Errors
    /// What the storage says; the size is then unchanged.
    pub fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.resize_for(size, 0)
    }

    /// As [`Disk::resize`], for a request that may be sent again; `token` stands for it, 0 for none. It changes the size
    /// once.
    ///
    /// # Errors
    /// As [`Disk::resize`].
    pub fn resize_for(&self, size: u64, token: u64) -> Result<(), DiskError> {
        if size > MAX_DISK_SIZE {
            return Err(DiskError::TooLarge);
        }
        Ok(self.delta.resize_for(size, Durability::Now, token)?)
    }

    /// Makes everything durable that was completed before the call.
    ///
    /// # Errors
    /// What the storage says; see [`Delta::flush`].
    pub fn flush(&self, epoch: u64) -> Result<(), DiskError> {
        self.refuse_poisoned(epoch)?;
        self.delta.flush()?;
        // A flush before this one may have failed meanwhile; that one had our writes, and a second sync proves nothing.
        self.refuse_poisoned(epoch)
    }

    /// The next data or hole at or after `offset`, as lseek(2); `None` is ENXIO.
    ///
    /// # Errors
    /// What the base's storage says.
    pub fn seek(&self, offset: u64, what: Seek) -> Result<Option<u64>, DiskError> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        let mut at = offset;
        while at < size {
            let (mapping, stop) = self.delta.extent(at, size);
            let found = match (mapping, &self.base) {
                (Mapping::Data, _) => (what == Seek::Data).then_some(at),
                (Mapping::Base, Some(base)) => match what {
                    Seek::Data => base.next_data(at)?.filter(|at| *at < stop),
                    Seek::Hole => Some(base.next_hole(at)?).filter(|at| *at < stop),
                },
                _ => (what == Seek::Hole).then_some(at),
            };
            if found.is_some() {
                return Ok(found);
            }
            at = stop;
        }
        Ok((what == Seek::Hole).then_some(size))
    }

    /// Bytes that the disk takes in the store.
    ///
    /// # Errors
    /// What the storage says.
    pub fn allocated(&self) -> io::Result<u64> {
        self.delta.allocated()
    }
}

/// Whether an allocation past the end makes the disk larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grow {
    /// As fallocate(2) without FALLOC_FL_KEEP_SIZE.
    Yes,
    /// With it.
    No,
}
