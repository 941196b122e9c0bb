//! The write layer of one disk: a data file in which each block lies at its offset on the disk, and a map of two bits
//! for each block.
//!
//! What must hold: a block is `Data` only after its bytes are in the data file (D8). The durable map claims only what
//! is durable in the data file (D12). The map alone decides; holes of the data file mean nothing. A block below the
//! overlap that was `Zero` or `Data` never falls through to the base again (D9). The overlap grows only when a copy
//! shows what lies below; blocks that were not copied are hidden first (D81).

mod carry;
mod commit;
mod error;
mod flush;
mod gate;
mod guard;
mod kept;
mod load;
mod map;
mod open;
mod ranges;
mod record_builder;
mod recovery;
mod space;
pub mod survey;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use carry::WrittenBlocks;
use commit::MapFileState;
pub use commit::RootStore;
pub use error::DeltaError;
use flush::WholeRange;
use gate::FlushGate;
use guard::scopeguard;
use kept::KeptBlocks;
use map::{LiveMap, blocks_for};
use ranges::RangeLock;
use space::Space;

use crate::crypt::Cipher;
use crate::format::BLOCK;
use crate::format::journal::State;
use crate::format::layout::{DELTAS, data_path};
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, LiveStore, MapUse, Medium, MediumFile, Open, sys};
use crate::mutant::Mutant;

/// Where an extent's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// In the delta.
    Data,
    /// Nowhere: zeros.
    Zero,
    /// In the base.
    Base,
}

/// What a disk's record says about its delta.
#[derive(Debug, Clone, Copy)]
pub struct DeltaSpec {
    /// Number of the disk.
    pub disk: u64,
    /// Bytes of the disk. A map file overrides it.
    pub size: u64,
    /// Bytes from the start that fall through to the base. A map file overrides it.
    pub overlap: u64,
    /// Whether the overlap may grow ([`Delta::show_below`]).
    pub rises: bool,
    /// Last modification in nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Where the durable map is.
    pub root: MapRoot,
}

/// The storage that a delta uses.
#[derive(Clone)]
pub struct DeltaIo {
    /// The store.
    pub medium: Arc<dyn Medium>,
    /// Keeps the live maps.
    pub live: Arc<dyn LiveStore>,
    /// Keeps the root of this disk's durable map.
    pub roots: Arc<dyn RootStore>,
}

/// The base's bytes of the first and the last block of a write, where the write covers the block only in part.
#[derive(Debug, Default)]
pub struct Edges {
    /// Of the first block.
    pub head: Option<Box<[u8]>>,
    /// Of the last block, when that is not the first one.
    pub tail: Option<Box<[u8]>>,
    /// The space that the write may use.
    pub space: WriteSpace,
}

/// The space that a write may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteSpace {
    /// Free space.
    #[default]
    Free,
    /// Free space, and the store's reserve: the write is part of a discard.
    Reserved,
}

/// When a change of the size becomes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Durable when the call returns.
    Now,
    /// With the next flush.
    Flush,
}

/// The write layer of one disk.
pub struct Delta {
    spec: DeltaSpec,
    delta_io: DeltaIo,
    map: LiveMap,
    cipher: Cipher,
    data: RwLock<Option<Arc<dyn MediumFile>>>,
    ranges: RangeLock,
    commit: Mutex<MapFileState>,
    /// Bytes that the map file took when they were last read.
    map_bytes: AtomicU64,
    gate: FlushGate,
    unsynced: AtomicBool,
    /// What the next flush may carry in the map file.
    written: WrittenBlocks,
    /// What the map file has for the case that the data file loses it.
    kept: KeptBlocks,
    /// How many syncs of the data file failed, and for how many of them the lost bytes were written again.
    lost: AtomicU64,
    redone: AtomicU64,
    /// The data file's directory entry may not be durable.
    unlisted: AtomicBool,
    /// Why the last failed flush failed.
    failure: Mutex<Option<String>>,
    space: Space,
}

impl std::fmt::Debug for Delta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delta").field("disk", &self.spec.disk).finish_non_exhaustive()
    }
}

impl Delta {
    fn word(&self, word: LiveHeader) -> u64 {
        self.map.live().header(word).load(Ordering::Acquire)
    }

    fn set_word(&self, word: LiveHeader, value: u64) {
        self.map.live().header(word).store(value, Ordering::Release);
    }

    /// Number of its files and of its live map.
    pub fn number(&self) -> u64 {
        self.spec.disk
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.word(LiveHeader::Size)
    }

    /// Bytes from the start that fall through to the base where the disk was not written.
    pub fn overlap(&self) -> u64 {
        self.word(LiveHeader::Overlap)
    }

    /// Number of failed flushes. A handle that was opened before the last failure may not write.
    pub fn error_epoch(&self) -> u64 {
        self.word(LiveHeader::ErrorEpoch)
    }

    /// Notes that a client opened the disk. This client may write, whatever failed before.
    pub fn opened(&self) {
        self.set_word(LiveHeader::OpenedEpoch, self.error_epoch());
    }

    /// Why the disk refuses writes until it is opened again; `None` when it accepts them.
    pub fn refuses_writes(&self) -> Option<String> {
        if self.error_epoch() == self.word(LiveHeader::OpenedEpoch) {
            return None;
        }
        let why = self.failure.lock().clone();
        Some(format!(
            "a flush failed: {}",
            why.as_deref().unwrap_or("under an earlier worker; its log has the cause")
        ))
    }

    /// Last modification in nanoseconds since the epoch.
    pub fn modified_ns(&self) -> i64 {
        self.word(LiveHeader::Modified) as i64
    }

    /// Sets the time of the last modification.
    pub fn set_modified_ns(&self, at: i64) {
        self.set_word(LiveHeader::Modified, at as u64);
    }

    fn touch(&self) {
        self.set_modified_ns(sys::now_ns());
    }

    /// Bytes that the delta takes in the store. While a flush runs, the map file counts with its last known size.
    pub fn allocated(&self) -> io::Result<u64> {
        let data = self.data.read().clone();
        // A caller that only asks does not wait for a sync.
        if let Some(commit) = self.commit.try_lock() {
            self.map_bytes.store(commit.allocated(), Ordering::Relaxed);
        }
        let map = self.map_bytes.load(Ordering::Relaxed);
        Ok(data.map_or(Ok(0), |d| d.allocated())? + map)
    }

    /// Bytes of memory that the live map takes.
    pub fn map_memory(&self) -> u64 {
        self.map.live().memory()
    }

    /// Does for a large live map what no request should wait for: notes which pages an earlier worker left dirty, and
    /// merges up to `most` runs of pages (D66). Returns how many runs it tried.
    pub fn tend_map(&self, most: usize) -> usize {
        self.map.note_inherited();
        self.map.live().merge_pages(most)
    }

    /// Mapping at `offset`, and the end of its extent, at most `end`. The result is sound without a lock until the I/O
    /// is done (D5).
    pub fn extent(&self, offset: u64, end: u64) -> (Mapping, u64) {
        let overlap = self.overlap();
        let (state, blocks_end) = self.map.run(offset / BLOCK, end.div_ceil(BLOCK));
        let run_end = (blocks_end * BLOCK).min(end);
        match state {
            State::Data => (Mapping::Data, run_end),
            State::Zero => (Mapping::Zero, run_end),
            State::Unmapped if offset < overlap => (Mapping::Base, run_end.min(overlap)),
            State::Unmapped => (Mapping::Zero, run_end),
        }
    }

    /// Reads an extent that is `Data`. Bytes past the end of the file are zeros.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), DeltaError> {
        let data = self.data.read().clone();
        let got = match data {
            Some(data) => data.read_at(buf, offset).map_err(DeltaError::io("reading the delta"))?,
            None => 0,
        };
        buf[got..].fill(0);
        Ok(())
    }

    /// As [`Delta::read`], if all bytes are in memory; otherwise false.
    pub fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        let data = self.data.read();
        data.as_ref().is_some_and(|data| matches!(data.read_now(buf, offset), Ok(Some(_))))
    }

    /// Whether a write of `offset..offset + len` needs the base's bytes of its first block, and of its last block.
    pub fn needs_base(&self, offset: u64, len: u64) -> (bool, bool) {
        let (end, size) = (offset + len, self.size());
        let falls_through =
            |block: u64| block * BLOCK < self.overlap() && self.map.state(block) == State::Unmapped;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let head =
            !offset.is_multiple_of(BLOCK) || (first == last && !end.is_multiple_of(BLOCK) && end < size);
        let tail = first != last && !end.is_multiple_of(BLOCK) && end < size;
        (head && falls_through(first), tail && falls_through(last))
    }

    fn open_data(&self) -> Result<Arc<dyn MediumFile>, DeltaError> {
        if let Some(data) = self.data.read().as_ref() {
            return Ok(data.clone());
        }
        let mut slot = self.data.write();
        if let Some(data) = slot.as_ref() {
            return Ok(data.clone());
        }
        let fail = DeltaError::io("creating the data file");
        let data = self.delta_io.medium.open(&data_path(self.spec.disk), Open::Create);
        let made = data.and_then(|data| Ok((data.identity()?, data)));
        let ((device, inode), data) = made.map_err(fail)?;
        let data = self.cipher.over(data);
        self.set_word(LiveHeader::Device, device);
        self.set_word(LiveHeader::Inode, inode);
        self.unlisted.store(true, Ordering::Release);
        *slot = Some(data.clone());
        Ok(data)
    }

    /// Writes `bytes` at `offset`. A write past the end extends the disk.
    ///
    /// `edges` has the base's bytes of the partly covered blocks that [`Delta::needs_base`] asked for.
    ///
    /// # Errors
    /// [`DeltaError::NeedBase`] when an edge is missing; errors of the storage. Each block then has its old content; a
    /// block that was `Data` before may have the new one.
    pub fn write(&self, offset: u64, bytes: &[u8], edges: &Edges) -> Result<(), DeltaError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.count_if_wanted();
        let end = offset + bytes.len() as u64;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let mut range = self.ranges.lock(first, last + 1);
        if end > self.size() {
            // Growth changes what lies between the old and the new end, and each growing writer moves the old end.
            drop(range);
            range = self.ranges.lock(0, u64::MAX);
        }
        let _range = range;
        let size = self.size();
        let extends = end > size;
        if extends {
            self.clear_beyond(size, end)?;
        }
        let room = self.room_for(first, last + 1, edges.space)?;
        let data = self.open_data()?;
        let wanted = match edges.space {
            WriteSpace::Free => MapUse::Write,
            WriteSpace::Reserved => MapUse::Discard,
        };
        self.map.prepare(first, last + 1, wanted).map_err(DeltaError::io("reserving memory for the map"))?;

        let mut head_fill = Vec::new();
        if !offset.is_multiple_of(BLOCK) && self.map.state(first) != State::Data {
            let mut block = self.old_block(first, edges.head.as_deref())?;
            block.truncate((offset % BLOCK) as usize);
            head_fill = block;
        }
        let mut tail_fill = Vec::new();
        if !end.is_multiple_of(BLOCK) && end < size && self.map.state(last) != State::Data {
            let edge = if last == first { edges.head.as_deref() } else { edges.tail.as_deref() };
            tail_fill = self.old_block(last, edge)?.split_off((end % BLOCK) as usize);
        }
        // One write, so that copied-up and new bytes become visible together.
        let put = |bytes: &[u8], at| {
            let done = match edges.space {
                WriteSpace::Free => data.write_at(bytes, at),
                WriteSpace::Reserved => data.write_reserved(bytes, at),
            };
            done.map_err(DeltaError::io("writing to the delta"))
        };
        let done = if head_fill.is_empty() && tail_fill.is_empty() {
            put(bytes, offset)
        } else {
            let at = offset - head_fill.len() as u64;
            let mut whole = head_fill;
            whole.extend_from_slice(bytes);
            whole.extend_from_slice(&tail_fill);
            put(&whole, at)
        };
        // A flush takes the words, then clears this flag. It is set after the data and before the words, so a flush
        // that takes the words also sees the flag.
        self.unsynced.store(true, Ordering::Release);
        self.note_written((first, last + 1), &*data);
        if done.is_err() {
            // A part of the write may be in blocks that readers see already. The next flush must include them, and so
            // must the flush after a failed one.
            (first..=last)
                .filter(|block| self.map.state(*block) == State::Data)
                .for_each(|b| self.map.mark_dirty(b));
        }
        done?;
        let late = Mutant::SizeAfterWords.is_active();
        if extends && !late {
            // Set before the words: a record never has words above its size, which replay would drop.
            self.set_word(LiveHeader::Size, end);
        }
        self.map.set(first, last + 1, State::Data);
        room.keep();
        if extends && late {
            Mutant::SizeAfterWords.widen_race();
            self.set_word(LiveHeader::Size, end);
        }
        self.touch();
        Ok(())
    }

    /// Gives a block bytes of its own where it falls through: those that it shows. `edges.head` has the base's bytes of the
    /// block. A block that was written keeps what it has, also when that happens meanwhile.
    ///
    /// # Errors
    /// As [`Delta::write`].
    pub fn own_block(&self, block: u64, edges: &Edges) -> Result<(), DeltaError> {
        self.count_if_wanted();
        let _range = self.ranges.lock(block, block + 1);
        let (at, size) = (block * BLOCK, self.size());
        if self.map.state(block) != State::Unmapped || at >= self.overlap().min(size) {
            return Ok(());
        }
        let room = self.room_for(block, block + 1, edges.space)?;
        let data = self.open_data()?;
        let prepared = self.map.prepare(block, block + 1, MapUse::Write);
        prepared.map_err(DeltaError::io("reserving memory for the map"))?;
        let mut bytes = self.old_block(block, edges.head.as_deref())?;
        bytes.truncate((size - at).min(BLOCK) as usize);
        let done = data.write_at(&bytes, at);
        self.unsynced.store(true, Ordering::Release);
        self.note_written((block, block + 1), &*data);
        done.map_err(DeltaError::io("writing to the delta"))?;
        self.map.set(block, block + 1, State::Data);
        room.keep();
        self.touch();
        Ok(())
    }

    /// The content of a block that is not `Data`.
    fn old_block(&self, block: u64, base: Option<&[u8]>) -> Result<Vec<u8>, DeltaError> {
        let overlap = self.overlap();
        let mut out = vec![0; BLOCK as usize];
        if self.map.state(block) == State::Unmapped && block * BLOCK < overlap {
            let base = base.ok_or(DeltaError::NeedBase)?;
            let below = ((overlap - block * BLOCK).min(BLOCK) as usize).min(base.len());
            out[..below].copy_from_slice(&base[..below]);
        }
        Ok(out)
    }

    /// Makes sure that no old bytes show when the disk grows from `size` to `end`. The caller holds the range.
    fn clear_beyond(&self, size: u64, end: u64) -> Result<(), DeltaError> {
        self.leaves_space(blocks_for(size), blocks_for(end));
        self.map.set(blocks_for(size), blocks_for(end), State::Unmapped);
        if Mutant::GrowthNotCut.is_active() {
            return Ok(());
        }
        if let Some(data) = self.data.read().as_ref() {
            let (last, border) = (size / BLOCK, size.next_multiple_of(BLOCK));
            let partial = border > size && self.map.state(last) == State::Data;
            let trim = || {
                if data.len()? > size {
                    data.set_len(size)?;
                }
                // From here on the data file contains all of the block in which the disk ended. Otherwise the next
                // write of this block would extend the file, and a power cut could keep the bytes and lose the length:
                // a torn block. The zeros are written, because a failed sync may lose those of a cut.
                let zeros = [0; BLOCK as usize];
                if partial { data.write_reserved(&zeros[..(border - size) as usize], size) } else { Ok(()) }
            };
            self.written.note_any();
            trim().map_err(DeltaError::io("cutting the data file"))?;
            self.unsynced.store(true, Ordering::Release);
            if partial {
                // If the next sync fails, this block is written again like the others.
                self.map.mark_dirty(last);
            }
        }
        Ok(())
    }

    /// Makes whole blocks `first..end` read as zeros, and frees their space.
    ///
    /// # Errors
    /// ENOSPC when there is no memory for the map. The blocks are then unchanged.
    pub fn zero_blocks(&self, first: u64, end: u64) -> Result<(), DeltaError> {
        if first >= end {
            return Ok(());
        }
        let _range = self.ranges.lock(first, end);
        self.zero_locked(first, end)
    }

    /// As [`Delta::zero_blocks`], up to the end of the disk and with its last block, which may be a partial one.
    /// Returns false, without a change, when the disk does not end at `size` any more.
    ///
    /// # Errors
    /// As [`Delta::zero_blocks`].
    pub fn zero_to_end(&self, first: u64, size: u64) -> Result<bool, DeltaError> {
        let end = blocks_for(size);
        // A writer that grows the disk holds the whole range, so the size is stable while this lock is held.
        let _range = self.ranges.lock(first, end.max(first + 1));
        if self.size() != size {
            return Ok(false);
        }
        if first < end {
            self.zero_locked(first, end)?;
        }
        Ok(true)
    }

    fn zero_locked(&self, first: u64, end: u64) -> Result<(), DeltaError> {
        let freed = self.data_bytes(first, end);
        self.kept.forget(first..end);
        // Above the overlap no base shows through, so `Unmapped` is enough and takes no memory.
        let hidden = blocks_for(self.overlap()).clamp(first, end);
        if hidden > first {
            let prepared = self.map.prepare(first, hidden, MapUse::Discard);
            prepared.map_err(DeltaError::io("reserving memory for the map"))?;
            self.map.set(first, hidden, State::Zero);
        }
        self.map.set(hidden, end, State::Unmapped);
        self.space.give(freed);
        if let Some(data) = self.data.read().as_ref() {
            // The map decides (D10). A filesystem that cannot punch holes only keeps the space.
            if let Err(error) = data.punch(first * BLOCK, (end - first) * BLOCK) {
                tracing::debug!(disk = self.spec.disk, %error, "the space of a discard was not freed");
            }
            self.unsynced.store(true, Ordering::Release);
        }
        self.touch();
        Ok(())
    }

    /// Lets what lies below show from `from` to `end` where nothing was written, and grows the disk to `end`. All before
    /// `from` stays as it is: `hide` says that what lies below has data between `overlap` and `from`. Returns false,
    /// without a change, when the overlap is not `overlap` any more. `from` is at or after it, and in whole blocks.
    ///
    /// # Errors
    /// ENOSPC when there is no memory for the map; errors of the storage.
    pub fn show_below(&self, overlap: u64, (from, end): (u64, u64), hide: bool) -> Result<bool, DeltaError> {
        let _range = self.ranges.lock(0, u64::MAX);
        // A flush takes the words and the overlap together: a record never has an overlap above blocks that it does not
        // hide (D81).
        let commit = self.commit.lock();
        commit.refuse_retired()?;
        let partly = !overlap.is_multiple_of(BLOCK) && self.map.state(overlap / BLOCK) == State::Unmapped;
        if self.overlap() != overlap || partly {
            return Ok(false);
        }
        let size = self.size();
        let (first, last) = (blocks_for(overlap), from / BLOCK);
        if hide && first < last {
            let prepared = self.map.prepare(first, last, MapUse::Discard);
            prepared.map_err(DeltaError::io("reserving memory for the map"))?;
        }
        if end > size {
            self.clear_beyond(size, end)?;
            self.set_word(LiveHeader::Size, end);
        }
        let mut at = first;
        while hide && at < last && !Mutant::GapNotHidden.is_active() {
            let (state, stop) = self.map.run(at, last);
            if state == State::Unmapped {
                self.map.set(at, stop, State::Zero);
            }
            at = stop;
        }
        self.set_word(LiveHeader::Overlap, end);
        self.touch();
        Ok(true)
    }

    /// Whether the map says that a block is zeros. Reads no data.
    pub fn is_zero(&self, block: u64) -> bool {
        matches!(self.extent(block * BLOCK, (block + 1) * BLOCK), (Mapping::Zero, _))
    }

    /// Reserves space for a range. Reads return the same bytes as before.
    ///
    /// # Errors
    /// ENOSPC when there is not enough.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), DeltaError> {
        let data = self.open_data()?;
        self.check_reservation(&*data, offset, len)?;
        data.allocate(offset, len).map_err(DeltaError::io("reserving space"))
    }

    /// Changes the size. Bytes that were cut off read as zeros after the disk grows again.
    ///
    /// # Errors
    /// Errors of the storage; the size is then unchanged. A shrink is always durable at return.
    pub fn resize(&self, size: u64, durability: Durability) -> Result<(), DeltaError> {
        self.resize_for(size, durability, 0)
    }

    /// As [`Delta::resize`], for a request that the kernel may send again to a later worker. `token` identifies the
    /// request, 0: none. If this request has set the size before, the call only makes the current size durable.
    ///
    /// # Errors
    /// As [`Delta::resize`].
    pub fn resize_for(&self, size: u64, durability: Durability, token: u64) -> Result<(), DeltaError> {
        let _range = self.ranges.lock(0, u64::MAX);
        self.rewrite_lost_data(WholeRange::Held)?;
        if token != 0 && self.word(LiveHeader::Resized) == token {
            return self.flush_joined();
        }
        // This also runs when the medium panics: the request then runs again.
        let done = Cell::new(false);
        let _undo = scopeguard(|| {
            if !done.get() && token != 0 {
                self.set_word(LiveHeader::Resized, 0);
            }
        });
        self.resize_held(size, durability, token)?;
        done.set(true);
        Ok(())
    }

    /// The caller holds the whole range.
    fn resize_held(&self, size: u64, durability: Durability, token: u64) -> Result<(), DeltaError> {
        let resized = || {
            if token != 0 {
                self.set_word(LiveHeader::Resized, token);
            }
        };
        let old = self.size();
        if size > old {
            self.clear_beyond(old, size)?;
            self.set_word(LiveHeader::Size, size);
            resized();
            if durability == Durability::Now {
                // This also runs when the medium panics.
                let durable = Cell::new(false);
                let _undo = scopeguard(|| {
                    if !durable.get() {
                        self.set_word(LiveHeader::Size, old);
                    }
                });
                self.flush_joined()?;
                durable.set(true);
            }
        } else if size < old {
            self.set_word(LiveHeader::PendingShrink, size + 1);
            // From here on the shrink will be completed, by the next worker if need be.
            resized();
            self.shrink(size)?;
        } else if durability == Durability::Now {
            resized();
            // The request may have been sent again: the worker that set the size may have died before the size was
            // durable.
            self.flush_joined()?;
        }
        self.touch();
        Ok(())
    }

    /// Shrinks the disk, whose pending size is noted in the live map. While the note is there, the next worker
    /// completes the shrink.
    fn shrink(&self, size: u64) -> Result<(), DeltaError> {
        // This also runs when the medium panics: a note that stays would cut off later writes.
        let _note = scopeguard(|| self.set_word(LiveHeader::PendingShrink, 0));
        self.cut(size)
    }

    /// Completes a shrink that an earlier worker began. The note stays until that is done: the live map may have a part
    /// of the change.
    fn complete_shrink(&self, size: u64) -> Result<(), DeltaError> {
        self.cut(size)?;
        self.set_word(LiveHeader::PendingShrink, 0);
        Ok(())
    }

    fn cut(&self, size: u64) -> Result<(), DeltaError> {
        // Held to the end: a flush in between would journal the old size, and words above the cut, again.
        let mut commit = self.commit.lock();
        let overlap = self.overlap().min(size);
        if !Mutant::ShrinkNotJournaled.is_active() {
            self.commit_size(&mut commit, size, overlap)?;
        }
        if Mutant::ShrinkNotExclusive.is_active() {
            drop(commit);
            Mutant::ShrinkNotExclusive.widen_race();
        }
        self.set_word(LiveHeader::Overlap, overlap);
        self.set_word(LiveHeader::Size, size);
        self.leaves_space(blocks_for(size), u64::MAX);
        self.map.clear_from(blocks_for(size));
        if let Some(data) = self.data.read().as_ref() {
            let trim = || if data.len()? > size { data.set_len(size) } else { Ok(()) };
            if let Err(error) = trim() {
                // The size says the same. A caller that grows the disk cuts the file again, or fails.
                tracing::warn!(disk = self.spec.disk, %error, "the data file of a shrunk disk was not truncated; its size in the map is right");
            }
            self.written.note_any();
            self.unsynced.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Removes everything that a disk has in the store and in memory. The disk is not in use any more.
    ///
    /// # Errors
    /// Errors of the storage. Another call continues.
    pub fn purge(medium: &dyn Medium, live: &dyn LiveStore, disk: u64) -> io::Result<()> {
        live.remove(disk)?;
        let (prefix, mut any) = (format!("{disk}."), false);
        for name in medium.list(DELTAS)?.iter().filter(|n| n.starts_with(&prefix)) {
            match medium.remove(&format!("{DELTAS}/{name}")) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => any = true,
            }
        }
        if any { medium.sync_dir(DELTAS) } else { Ok(()) }
    }
}
