//! Delta over base, seen as one raw file.
//!
//! This module alone knows both. Calls may wait for a disk or, through the base, for a network; the `_now` variants
//! never do. Bytes of the base are read before a range of the delta is locked.

pub mod map;
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
use crate::stats::{Origin, Origins};
use crate::trace::Tap;

/// Largest readahead in bytes.
const READAHEAD: u64 = 512 << 10;

/// The error of a failed operation on a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The delta failed.
    #[error("{0}")]
    Delta(#[from] DeltaError),
    /// The base failed.
    #[error("{0}")]
    Base(#[from] BaseError),
    /// A flush failed since the handle was opened.
    #[error("a flush failed since the disk was opened; open it again to write")]
    Poisoned,
    /// The disk would exceed the largest size.
    #[error("the disk would be larger than 64 TiB")]
    TooLarge,
}

impl DiskError {
    /// The error number that a system call reports: ENOSPC stays ENOSPC, everything unexpected is EIO.
    ///
    /// An error that only says that something has to come first ([`DiskError::completion`]) has none; EIO stands for
    /// it.
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
    /// The completion after which the operation can run again, if this is no failure: bytes of the base must be fetched
    /// first. Nothing was changed (D36).
    pub fn completion(&self) -> Option<&Completion> {
        match self {
            Self::Base(error) => error.completion(),
            Self::Delta(_) | Self::Poisoned | Self::TooLarge => None,
        }
    }
}

/// An attached disk.
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

    /// Reports reads of the base to `tap`, for traces.
    #[must_use]
    pub fn with_tap(self, tap: Arc<Tap>) -> Self {
        Self { tap: Some(tap), ..self }
    }

    /// Reports a read of the base before its bytes are here: a trace has the order of the requests.
    fn record_read(&self, offset: u64, len: usize) {
        if let Some(tap) = &self.tap {
            tap.note(offset, len as u64);
        }
    }

    /// The write layer, for its size, times and errors.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    /// Whether blocks that fall through are read from a file of this host, without decoding.
    pub fn is_plain(&self) -> bool {
        self.base.as_ref().is_none_or(|base| base.is_plain())
    }

    /// Whether no part of a range was written, so that all of it falls through to the base.
    pub fn falls_through(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len).min(self.size());
        offset < end && self.base.is_some() && self.delta.extent(offset, end) == (Mapping::Base, end)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.delta.size()
    }

    /// How many of the `len` bytes at `offset` exist.
    fn clip(&self, offset: u64, len: usize) -> usize {
        self.size().saturating_sub(offset).min(len as u64) as usize
    }

    fn touch(&self, offset: u64) -> Touch {
        // A sequential reader that returns to the block where it stopped uses the block once, not twice.
        let last = self.stream_end.load(Ordering::Relaxed);
        if last == offset && !offset.is_multiple_of(BLOCK) { Touch::Repeat } else { Touch::Use }
    }

    /// Reads from memory only. Returns where the bytes came from, fewer than asked for at the end of the disk; `None`
    /// when the read would wait.
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Origins> {
        let len = self.clip(offset, buf.len());
        let end = offset + len as u64;
        let touch = self.touch(offset);
        let mut origins = Origins::default();
        let mut at = offset;
        while at < end {
            let (mapping, stop) = self.delta.extent(at, end);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            let (done, origin) = match (mapping, &self.base) {
                (Mapping::Data, _) => (self.delta.read_now(part, at), Origin::Delta),
                (Mapping::Base, Some(base)) => {
                    self.record_read(at, part.len());
                    (base.read_now(at, part, touch), Origin::Memory)
                }
                _ => {
                    part.fill(0);
                    (true, Origin::Zero)
                }
            };
            if !done {
                return None;
            }
            origins.add(origin, part.len());
            at = stop;
        }
        self.stream_end.store(end, Ordering::Relaxed);
        Some(origins)
    }

    /// Fills `buf` from `offset`; fewer bytes only at the end of the disk. Returns where they came from.
    ///
    /// # Errors
    /// Errors of the storage of the delta or base. A read never invents bytes.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<Origins, DiskError> {
        let len = self.clip(offset, buf.len());
        let end = offset + len as u64;
        let readahead = self.update_readahead(offset, end);
        let mut missing: Option<BaseError> = None;
        let mut origins = Origins::default();
        let mut at = offset;
        while at < end {
            let (mapping, stop) = self.delta.extent(at, end);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            match (mapping, &self.base) {
                (Mapping::Data, _) => {
                    self.delta.read(part, at)?;
                    origins.add(Origin::Delta, part.len());
                }
                // `read_now` ran before and counted what it found.
                (Mapping::Base, Some(base)) => {
                    self.record_read(at, part.len());
                    match base.read(at, part, Touch::Repeat, readahead) {
                        Ok(from) => origins.join(from),
                        // All missing parts are requested together.
                        Err(error) => missing = Some(BaseError::join(missing, error)?),
                    }
                }
                _ => {
                    part.fill(0);
                    origins.add(Origin::Zero, part.len());
                }
            }
            at = stop;
        }
        match missing {
            Some(error) => Err(error.into()),
            None => Ok(origins),
        }
    }

    /// Notes a read and returns how many bytes to read ahead: 0 until reads are sequential.
    fn update_readahead(&self, offset: u64, end: u64) -> u32 {
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
            self.record_read(block * BLOCK, below);
            base.read(block * BLOCK, &mut out[..below], Touch::Use, 0)?;
        }
        Ok(out)
    }

    fn check_epoch(&self, epoch: u64) -> Result<(), DiskError> {
        // The epoch in a handle has 16 bits.
        if self.delta.error_epoch() & 0xffff == epoch & 0xffff { Ok(()) } else { Err(DiskError::Poisoned) }
    }

    /// Writes `bytes` at `offset`. A write past the end grows the disk. `epoch` is the disk's error epoch at the time
    /// of the handle's open.
    ///
    /// # Errors
    /// [`DiskError::Poisoned`] after a failed flush; errors of the storage. After a failed write each block has its old
    /// or its new content.
    pub fn write(&self, offset: u64, bytes: &[u8], epoch: u64) -> Result<(), DiskError> {
        self.write_with(offset, bytes, WriteSpace::Free, epoch)
    }

    fn write_with(&self, offset: u64, bytes: &[u8], space: WriteSpace, epoch: u64) -> Result<(), DiskError> {
        self.check_epoch(epoch)?;
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > MAX_DISK_SIZE) {
            return Err(DiskError::TooLarge);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let len = bytes.len() as u64;
        let mut edges = Edges { space, ..Edges::default() };
        // A block never starts to fall through again, so this ends: it repeats at most once for each edge, when the
        // disk's end moved in between.
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

    /// Makes a range read as zeros, and frees its space. The size does not change; past the end nothing happens.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn zero(&self, offset: u64, len: u64, epoch: u64) -> Result<(), DiskError> {
        self.check_epoch(epoch)?;
        // Up to the end of the disk as it is now. If the disk grows meanwhile, later writes stay.
        while !self.zero_below(self.size(), offset, len, epoch)? {}
        Ok(())
    }

    /// Zeros the part of a range below `size`. Returns false, with only a part done, when the disk's size is not `size`
    /// any more.
    fn zero_below(&self, size: u64, offset: u64, len: u64, epoch: u64) -> Result<bool, DiskError> {
        let end = offset.saturating_add(len).min(size);
        if offset >= end {
            return Ok(true);
        }
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let whole_first = offset.div_ceil(BLOCK);
        // The last block of the disk counts as whole when it is zeroed up to the end of the disk.
        let whole_end = if end == size { last + 1 } else { end / BLOCK };
        if whole_first >= whole_end {
            // No whole block: parts of one or two blocks.
            let border = ((first + 1) * BLOCK).min(end);
            self.zero_part(offset, border, epoch)?;
            self.zero_part(border, end, epoch)?;
            return Ok(true);
        }
        // Whole blocks first: they free space, and partial blocks may need some.
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

    /// Zeros part of one block.
    fn zero_part(&self, from: u64, to: u64, epoch: u64) -> Result<(), DiskError> {
        if from >= to || self.delta.is_zero(from / BLOCK) {
            return Ok(());
        }
        self.write_with(from, &vec![0; (to - from) as usize], WriteSpace::Reserved, epoch)
    }

    /// Reserves space for a range, and with [`Grow::Yes`] grows the disk to hold it.
    ///
    /// # Errors
    /// ENOSPC when there is not enough.
    pub fn allocate(&self, offset: u64, len: u64, grow: Grow, epoch: u64) -> Result<(), DiskError> {
        self.check_epoch(epoch)?;
        let end = offset.checked_add(len).filter(|end| *end <= MAX_DISK_SIZE).ok_or(DiskError::TooLarge)?;
        self.delta.allocate(offset, len)?;
        self.grow(end, grow)
    }

    /// With [`Grow::Yes`], grows the disk to `end` if it is smaller.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn grow(&self, end: u64, grow: Grow) -> Result<(), DiskError> {
        if end > MAX_DISK_SIZE {
            return Err(DiskError::TooLarge);
        }
        if grow == Grow::Yes && end > self.size() {
            self.delta.resize(end, Durability::Flush)?;
        }
        Ok(())
    }

    /// Changes the size. Durable at return.
    ///
    /// # Errors
    /// Errors of the storage; the size is then unchanged.
    pub fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.resize_for(size, 0)
    }

    /// As [`Disk::resize`], for a request that the kernel may send again; it changes the size once. `token` identifies
    /// the request, 0: none.
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
    /// Errors of the storage; see [`Delta::flush`].
    pub fn flush(&self, epoch: u64) -> Result<(), DiskError> {
        self.check_epoch(epoch)?;
        self.delta.flush()?;
        // An earlier flush may have failed meanwhile. It included this caller's writes, and a second sync proves
        // nothing.
        self.check_epoch(epoch)
    }

    /// The next data or hole at or after `offset`, as in lseek(2); `None` is ENXIO.
    ///
    /// # Errors
    /// Errors of the base's storage.
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
    /// Errors of the storage.
    pub fn allocated(&self) -> io::Result<u64> {
        self.delta.allocated()
    }
}

/// Whether an allocation past the end grows the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grow {
    /// As fallocate(2) without FALLOC_FL_KEEP_SIZE.
    Yes,
    /// As fallocate(2) with FALLOC_FL_KEEP_SIZE.
    No,
}
