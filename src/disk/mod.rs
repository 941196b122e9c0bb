//! Delta over base, seen as one raw file.
//!
//! This module alone knows both. Calls may wait for a disk or, through the base, for a network; the `_now` variants
//! never do. Bytes of the base are read before a range of the delta is locked.

mod below;
pub mod changes;
mod frozen;
pub mod map;
mod show;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};
use thiserror::Error;

pub use below::Below;
use below::{BaseUse, Progress};
pub use frozen::Frozen;
pub use show::{Ground, Shown};

use crate::base::{Base, BaseError, Completion};
use crate::cache::Touch;
use crate::delta::{Delta, DeltaError, Durability, Edges, Mapping, WriteSpace};
use crate::format::{BLOCK, MAX_DISK_SIZE};
use crate::layers::LayerError;
use crate::mutant::Mutant;
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
    /// A layer below the delta failed.
    #[error("{0}")]
    Layer(#[from] LayerError),
    /// The disk's delta was sealed: the call belongs to the disk that took its place.
    #[error("the disk has a new delta; the caller tries again with it")]
    Sealed,
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
            Self::Delta(_) | Self::Layer(_) | Self::Sealed | Self::Poisoned | Self::TooLarge => None,
        }
    }
}

/// An attached disk.
pub struct Disk {
    delta: Arc<Delta>,
    below: Below,
    /// Whether the delta was sealed. Calls that change the disk hold it shared.
    sealed: Arc<RwLock<bool>>,
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
        Self::over(Arc::new(delta), Below::only(base))
    }

    /// Puts a delta over layers and a base.
    pub fn over(delta: Arc<Delta>, below: Below) -> Self {
        let (stream_end, stream_window) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
        Self { delta, below, sealed: Arc::default(), tap: None, stream_end, stream_window }
    }

    /// The same delta over other layers, which have the same bytes.
    #[must_use]
    pub fn over_same(&self, below: Below) -> Self {
        let disk = Self::over(self.delta.clone(), below);
        Self { sealed: self.sealed.clone(), tap: self.tap.clone(), ..disk }
    }

    /// Seals the delta: waits for the calls that change it, and lets `replace` put another disk in the place of this one.
    /// From then on such calls fail with [`DiskError::Sealed`] here. When `replace` fails, nothing has changed.
    ///
    /// # Errors
    /// Errors of `replace`.
    pub fn seal<T, E>(&self, replace: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut sealed = self.sealed.write();
        let done = replace()?;
        *sealed = true;
        Ok(done)
    }

    /// To be held by each call while it changes the disk, but not while it waits for the base.
    fn change(&self) -> Result<RwLockReadGuard<'_, bool>, DiskError> {
        let sealed = self.sealed.read();
        if *sealed { Err(DiskError::Sealed) } else { Ok(sealed) }
    }

    fn change_with<T>(&self, change: impl FnOnce(&Delta) -> Result<T, DeltaError>) -> Result<T, DiskError> {
        let _change = self.change()?;
        Ok(change(&self.delta)?)
    }

    /// What lies below the delta.
    pub fn below(&self) -> &Below {
        &self.below
    }

    /// Reports reads of the base to `tap`, for traces.
    #[must_use]
    pub fn with_tap(self, tap: Arc<Tap>) -> Self {
        Self { tap: Some(tap), ..self }
    }

    /// Reports no reads of the base any more.
    #[must_use]
    pub fn without_tap(self) -> Self {
        Self { tap: None, ..self }
    }

    /// The write layer, for its size, times and errors.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }

    /// Whether blocks that fall through are read from a file of this host, without decoding.
    pub fn is_plain(&self) -> bool {
        self.below.base.as_ref().is_none_or(|base| base.is_plain())
    }

    /// Whether no part of a range was written, so that all of it falls through to the base.
    pub fn falls_through(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len).min(self.size());
        let is_base = self.below.base.is_some() && !self.below.has_layers();
        offset < end && is_base && self.delta.extent(offset, end) == (Mapping::Base, end)
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
        let by = BaseUse { touch: self.touch(offset), readahead: 0, tap: self.tap.as_ref() };
        let mut origins = Origins::default();
        let mut at = offset;
        while at < end {
            let (mapping, stop) = self.delta.extent(at, end);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            let len = part.len();
            match mapping {
                Mapping::Data => {
                    if !self.delta.read_now(part, at) {
                        return None;
                    }
                    origins.add(Origin::Delta, len);
                }
                Mapping::Base => {
                    if !self.below.read_now(at, part, &by, &mut origins) {
                        return None;
                    }
                }
                Mapping::Zero => {
                    part.fill(0);
                    origins.add(Origin::Zero, len);
                }
            }
            at = stop;
        }
        self.stream_end.store(end, Ordering::Relaxed);
        Some(origins)
    }

    /// Fills `buf` from `offset`; fewer bytes only at the end of the disk. Returns where they came from.
    ///
    /// # Errors
    /// Errors of the storage of the delta, of layers or of the base. A read never invents bytes.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<Origins, DiskError> {
        let len = self.clip(offset, buf.len());
        let end = offset + len as u64;
        let readahead = self.update_readahead(offset, end);
        // `read_now` ran before and counted the use of what it found.
        let by = BaseUse { touch: Touch::Repeat, readahead, tap: self.tap.as_ref() };
        let mut progress = Progress::default();
        let mut at = offset;
        while at < end {
            let (mapping, stop) = self.delta.extent(at, end);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            match mapping {
                Mapping::Data => {
                    self.delta.read(part, at)?;
                    progress.origins.add(Origin::Delta, part.len());
                }
                Mapping::Base => self.below.read(at, part, &by, &mut progress)?,
                Mapping::Zero => {
                    part.fill(0);
                    progress.origins.add(Origin::Zero, part.len());
                }
            }
            at = stop;
        }
        match progress.missing {
            Some(error) => Err(error.into()),
            None => Ok(progress.origins),
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

    /// The bytes of a block that fall through, zeros past the overlap.
    fn block_below(&self, block: u64) -> Result<Box<[u8]>, DiskError> {
        let mut out = vec![0; BLOCK as usize].into_boxed_slice();
        let below = self.delta.overlap().saturating_sub(block * BLOCK).min(BLOCK) as usize;
        let by = BaseUse { touch: Touch::Use, readahead: 0, tap: self.tap.as_ref() };
        let mut progress = Progress::default();
        self.below.read(block * BLOCK, &mut out[..below], &by, &mut progress)?;
        if let Some(error) = progress.missing {
            return Err(error.into());
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
                edges.head = Some(self.block_below(offset / BLOCK)?);
            }
            if tail && edges.tail.is_none() {
                edges.tail = Some(self.block_below((offset + len - 1) / BLOCK)?);
            }
            // Not held while the base is read: a sealing waits for the holders, and later calls for the sealing.
            let _change = self.change()?;
            self.check_epoch(epoch)?;
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
            if !self.change_with(|delta| delta.zero_to_end(whole_first, size))? {
                return Ok(false);
            }
            self.zero_part(offset, whole_first * BLOCK, epoch)?;
            return Ok(true);
        }
        self.change_with(|delta| delta.zero_blocks(whole_first, whole_end))?;
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
        let _change = self.change()?;
        self.check_epoch(epoch)?;
        let end = offset.checked_add(len).filter(|end| *end <= MAX_DISK_SIZE).ok_or(DiskError::TooLarge)?;
        self.delta.allocate(offset, len)?;
        self.grow_held(end, grow)
    }

    /// With [`Grow::Yes`], grows the disk to `end` if it is smaller.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn grow(&self, end: u64, grow: Grow) -> Result<(), DiskError> {
        let _change = self.change()?;
        self.grow_held(end, grow)
    }

    fn grow_held(&self, end: u64, grow: Grow) -> Result<(), DiskError> {
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
        let _change = self.change()?;
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
        if !Mutant::PendingNotFlushed.is_active() {
            self.flush_pending()?;
        }
        self.delta.flush()?;
        // No lock is held while a flush runs, so that a sealing need not wait for it. The new delta may have writes that
        // this caller saw complete.
        drop(self.change()?);
        // An earlier flush may have failed meanwhile. It included this caller's writes, and a second sync proves
        // nothing.
        self.check_epoch(epoch)
    }

    /// Flushes what was written before a sealing that is under way. A caller of [`Disk::flush`] may have written it.
    fn flush_pending(&self) -> Result<(), DeltaError> {
        for delta in self.below.pending.iter().rev() {
            let before = delta.error_epoch();
            let flushed = delta.flush();
            // What was lost belongs to the handles of this disk.
            self.delta.fail_with(delta, before);
            flushed?;
        }
        Ok(())
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
            let found = match (mapping, what) {
                (Mapping::Data, _) => (what == Seek::Data).then_some(at),
                (Mapping::Base, Seek::Data) => self.below.next_data(at, stop)?,
                (Mapping::Base, Seek::Hole) => self.below.next_hole(at, stop)?,
                (Mapping::Zero, _) => (what == Seek::Hole).then_some(at),
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
