//! The write layer of one disk: a data file with the disk's own offsets, and a map of two bits a block.
//!
//! What must hold: a block is `Data` only after its bytes are in the data file (D8); the durable map claims only what
//! the data file durably has (D12); the map is the only truth, holes of the data file mean nothing; a block that was
//! `Zero` or `Data` below the overlap never falls through to the base again (D9).

mod commit;
mod error;
mod flush;
mod gate;
mod guard;
mod map;
mod open;
mod pieces;
mod ranges;
mod recovery;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use commit::Commit;
pub use commit::RootStore;
pub use error::DeltaError;
use flush::Whole;
use gate::FlushGate;
use guard::scopeguard;
use map::{LiveMap, blocks_for};
use ranges::RangeLock;

use crate::format::BLOCK;
use crate::format::journal::State;
use crate::format::layout::{DELTAS, data_path};
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, LiveStore, MapUse, Medium, MediumFile, Open, sys};
use crate::sabotage::{Sabotage, linger, sabotaged};

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

/// What a disk's record says of its delta.
#[derive(Debug, Clone, Copy)]
pub struct DeltaSpec {
    /// Number of the disk.
    pub disk: u64,
    /// Bytes, when no map file has another word.
    pub size: u64,
    /// Bytes that fall through, when no map file has another word.
    pub overlap: u64,
    /// Last modification in nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Where the durable map is.
    pub root: MapRoot,
}

/// What a delta stands on.
#[derive(Clone)]
pub struct Footing {
    /// The store.
    pub medium: Arc<dyn Medium>,
    /// Where live maps are.
    pub live: Arc<dyn LiveStore>,
    /// Keeps the root of this disk's durable map.
    pub roots: Arc<dyn RootStore>,
}

/// The base's bytes of the blocks at both ends of a write that covers them partly.
#[derive(Debug, Default)]
pub struct Edges {
    /// Of the first block.
    pub head: Option<Box<[u8]>>,
    /// Of the last block, when that is another one.
    pub tail: Option<Box<[u8]>>,
    /// Which space the write may take.
    pub space: WriteSpace,
}

/// Which space a write may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteSpace {
    /// What is free.
    #[default]
    Free,
    /// What the store keeps back too: it is a part of a discard.
    Reserved,
}

/// Whether a size changes the file to exactly that, or only when it is larger.
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
    footing: Footing,
    map: LiveMap,
    data: RwLock<Option<Arc<dyn MediumFile>>>,
    ranges: RangeLock,
    commit: Mutex<Commit>,
    /// What the map file took when somebody looked.
    map_bytes: AtomicU64,
    gate: FlushGate,
    unsynced: AtomicBool,
    /// How many syncs of the data file failed, and up to which of them the lost bytes were written again.
    lost: AtomicU64,
    redone: AtomicU64,
    /// The data file's directory entry may not be durable.
    unlisted: AtomicBool,
    /// How the last flush that failed did.
    failure: Mutex<Option<String>>,
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

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.word(LiveHeader::Size)
    }

    /// Bytes from the start that fall through to the base where nothing was written.
    pub fn overlap(&self) -> u64 {
        self.word(LiveHeader::Overlap)
    }

    /// Failed flushes so far; a handle opened before the last one may not write.
    pub fn error_epoch(&self) -> u64 {
        self.word(LiveHeader::ErrorEpoch)
    }

    /// Notes that somebody opened the disk, who may write, whatever failed before.
    pub fn opened(&self) {
        self.set_word(LiveHeader::OpenedEpoch, self.error_epoch());
    }

    /// Why writes are refused until the disk is opened again, when they are.
    pub fn refuses_writes(&self) -> Option<String> {
        if self.error_epoch() == self.word(LiveHeader::OpenedEpoch) {
            return None;
        }
        let why = self.failure.lock().clone();
        Some(format!(
            "a flush failed: {}",
            why.as_deref().unwrap_or("under an earlier worker, whose log says why")
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

    /// Bytes that the delta takes in the store; while a flush runs, its map file counts as it was last seen.
    pub fn allocated(&self) -> io::Result<u64> {
        let data = self.data.read().clone();
        // Whoever only looks does not wait for a sync.
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

    /// Mapping at `offset` and the end of its extent, at most `end`.
    /// Sound without a lock until the I/O is done (D5).
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

    /// Reads an extent that is `Data`; bytes that the file does not have are zeros.
    ///
    /// # Errors
    /// What the storage says.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), DeltaError> {
        let data = self.data.read().clone();
        let got = match data {
            Some(data) => data.read_at(buf, offset).map_err(DeltaError::io("reading the delta"))?,
            None => 0,
        };
        buf[got..].fill(0);
        Ok(())
    }

    /// As [`Delta::read`] when that needs no waiting; false otherwise.
    pub fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        let data = self.data.read();
        data.as_ref().is_some_and(|data| matches!(data.read_now(buf, offset), Ok(Some(_))))
    }

    /// Whether a write of `offset..offset + len` needs the base's bytes of its first and its last block.
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
        let fail = DeltaError::io("making the data file");
        let data = self.footing.medium.open(&data_path(self.spec.disk), Open::Create);
        let made = data.and_then(|data| Ok((data.identity()?, data)));
        let ((device, inode), data) = made.map_err(fail)?;
        self.set_word(LiveHeader::Device, device);
        self.set_word(LiveHeader::Inode, inode);
        self.unlisted.store(true, Ordering::Release);
        *slot = Some(data.clone());
        Ok(data)
    }

    /// Writes `bytes` at `offset`; a write past the end extends the disk.
    ///
    /// `edges` has the base's bytes of partly covered blocks, as [`Delta::needs_base`] asked for.
    ///
    /// # Errors
    /// [`DeltaError::NeedBase`] when an edge is missing; what the storage says. Then each block has its old
    /// content, or for blocks that were `Data` before, possibly the new one.
    pub fn write(&self, offset: u64, bytes: &[u8], edges: &Edges) -> Result<(), DeltaError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = offset + bytes.len() as u64;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let mut range = self.ranges.lock(first, last + 1);
        if end > self.size() {
            // Growing touches what lies between the old and the new end, and the old end moves with every grower.
            drop(range);
            range = self.ranges.lock(0, u64::MAX);
        }
        let _range = range;
        let size = self.size();
        let extends = end > size;
        if extends {
            self.forget_beyond(size, end)?;
        }
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
        // One write, so that fill and new bytes become visible as one.
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
        // A flush takes words and then clears this: set between the write and the words, it is seen with them.
        self.unsynced.store(true, Ordering::Release);
        if done.is_err() {
            // A part of it may be in blocks that are read already: the next flush, and the one after a failed one, has
            // these too.
            (first..=last)
                .filter(|block| self.map.state(*block) == State::Data)
                .for_each(|b| self.map.note(b));
        }
        done?;
        let late = sabotaged(Sabotage::SizeAfterWords);
        if extends && !late {
            // Before the words: a record never has words above its size, which replay would drop.
            self.set_word(LiveHeader::Size, end);
        }
        self.map.set(first, last + 1, State::Data);
        if extends && late {
            linger(Sabotage::SizeAfterWords);
            self.set_word(LiveHeader::Size, end);
        }
        self.touch();
        Ok(())
    }

    /// What a block that is not `Data` reads as.
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

    /// Makes sure that nothing old shows when the disk grows from `size` to `end`: whoever grows it has the range.
    fn forget_beyond(&self, size: u64, end: u64) -> Result<(), DeltaError> {
        self.map.set(blocks_for(size), blocks_for(end), State::Unmapped);
        if sabotaged(Sabotage::GrowthNotCut) {
            return Ok(());
        }
        if let Some(data) = self.data.read().as_ref() {
            let (last, border) = (size / BLOCK, size.next_multiple_of(BLOCK));
            let partial = border > size && self.map.state(last) == State::Data;
            let trim = || {
                if data.len()? > size {
                    data.set_len(size)?;
                }
                // The block in which the disk ended is in the file as a whole from here on. Otherwise its next
                // write would extend the file, and a power cut could keep the bytes and lose the length: a torn
                // block. Its zeros are written, because those of a cut may be lost with a sync that failed.
                let zeros = [0; BLOCK as usize];
                if partial { data.write_reserved(&zeros[..(border - size) as usize], size) } else { Ok(()) }
            };
            trim().map_err(DeltaError::io("cutting the data file"))?;
            self.unsynced.store(true, Ordering::Release);
            if partial {
                // When the next sync fails it is written again like the others.
                self.map.note(last);
            }
        }
        Ok(())
    }

    /// Makes whole blocks `first..end` read as zeros and gives their space back.
    ///
    /// # Errors
    /// ENOSPC when there is no memory for the map; the blocks are unchanged then.
    pub fn zero_blocks(&self, first: u64, end: u64) -> Result<(), DeltaError> {
        if first >= end {
            return Ok(());
        }
        let _range = self.ranges.lock(first, end);
        self.zero_locked(first, end)
    }

    /// As [`Delta::zero_blocks`] up to the end of the disk, with its last block though it may be a part of one, as
    /// long as the disk ends at `size`: false, and nothing is done, when it has grown or shrunk.
    ///
    /// # Errors
    /// As [`Delta::zero_blocks`].
    pub fn zero_to_end(&self, first: u64, size: u64) -> Result<bool, DeltaError> {
        let end = blocks_for(size);
        // Whoever grows the disk has all of it, so the size stays as long as any block is held.
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
        // Above the overlap nothing shines through, so forgetting is enough and costs no memory.
        let hidden = blocks_for(self.overlap()).clamp(first, end);
        if hidden > first {
            let prepared = self.map.prepare(first, hidden, MapUse::Discard);
            prepared.map_err(DeltaError::io("reserving memory for the map"))?;
            self.map.set(first, hidden, State::Zero);
        }
        self.map.set(hidden, end, State::Unmapped);
        if let Some(data) = self.data.read().as_ref() {
            // The map has the word (D10); a filesystem that cannot punch only keeps the space.
            if let Err(error) = data.punch(first * BLOCK, (end - first) * BLOCK) {
                tracing::debug!(disk = self.spec.disk, %error, "space of a discard was not given back");
            }
            self.unsynced.store(true, Ordering::Release);
        }
        self.touch();
        Ok(())
    }

    /// Whether every byte of a block reads as zero without looking at data.
    pub fn is_zero(&self, block: u64) -> bool {
        matches!(self.extent(block * BLOCK, (block + 1) * BLOCK), (Mapping::Zero, _))
    }

    /// Reserves space for a range; what is read does not change.
    ///
    /// # Errors
    /// ENOSPC when there is not enough.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), DeltaError> {
        self.open_data()?.allocate(offset, len).map_err(DeltaError::io("reserving space"))
    }

    /// Changes the size. What is cut off reads zeros when the disk grows again.
    ///
    /// # Errors
    /// What the storage says; the size is then unchanged. A shrink is always durable at return.
    pub fn resize(&self, size: u64, durability: Durability) -> Result<(), DeltaError> {
        self.resize_for(size, durability, 0)
    }

    /// As [`Delta::resize`], for a request that a next worker may be sent again; `token` stands for it, 0 for none. When
    /// it has set the size before, it only makes durable what is the size by now.
    ///
    /// # Errors
    /// As [`Delta::resize`].
    pub fn resize_for(&self, size: u64, durability: Durability, token: u64) -> Result<(), DeltaError> {
        let _range = self.ranges.lock(0, u64::MAX);
        self.redo_lost(Whole::Held)?;
        if token != 0 && self.word(LiveHeader::Resized) == token {
            return self.flush_joined();
        }
        // Also when the medium panics: the request is run again then.
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

    /// The caller has the whole range.
    fn resize_held(&self, size: u64, durability: Durability, token: u64) -> Result<(), DeltaError> {
        let resized = || {
            if token != 0 {
                self.set_word(LiveHeader::Resized, token);
            }
        };
        let old = self.size();
        if size > old {
            self.forget_beyond(old, size)?;
            self.set_word(LiveHeader::Size, size);
            resized();
            if durability == Durability::Now {
                // Also when the medium panics.
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
            // From here on it is done, by the next worker if need be.
            resized();
            self.shrink(size)?;
        } else if durability == Durability::Now {
            resized();
            // Perhaps sent again: the worker that set the size may have died before it was durable.
            self.flush_joined()?;
        }
        self.touch();
        Ok(())
    }

    /// Cuts the disk; that is noted. Until the note is gone a crash is completed by the next worker.
    fn shrink(&self, size: u64) -> Result<(), DeltaError> {
        // Also when the medium panics: a note that stays would cut what is written later.
        let _note = scopeguard(|| self.set_word(LiveHeader::PendingShrink, 0));
        self.cut(size)
    }

    /// Completes a cut that an earlier worker began. The note stays until that is done: the live map may have a part.
    fn complete_shrink(&self, size: u64) -> Result<(), DeltaError> {
        self.cut(size)?;
        self.set_word(LiveHeader::PendingShrink, 0);
        Ok(())
    }

    fn cut(&self, size: u64) -> Result<(), DeltaError> {
        // Held to the end: a flush in between would journal the old size and words above the cut again.
        let mut commit = self.commit.lock();
        let overlap = self.overlap().min(size);
        if !sabotaged(Sabotage::ShrinkNotJournaled) {
            self.commit_size(&mut commit, size, overlap)?;
        }
        if sabotaged(Sabotage::ShrinkNotAlone) {
            drop(commit);
            linger(Sabotage::ShrinkNotAlone);
        }
        self.set_word(LiveHeader::Overlap, overlap);
        self.set_word(LiveHeader::Size, size);
        self.map.clear_from(blocks_for(size));
        if let Some(data) = self.data.read().as_ref() {
            let trim = || if data.len()? > size { data.set_len(size) } else { Ok(()) };
            if let Err(error) = trim() {
                // The size says the same, and whoever grows the disk cuts again or fails.
                tracing::warn!(disk = self.spec.disk, %error, "the data file of a shrunk disk was not cut");
            }
            self.unsynced.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Removes everything that a disk has in the store and in memory. Nobody may use the disk any more.
    ///
    /// # Errors
    /// What the storage says; calling again goes on.
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
