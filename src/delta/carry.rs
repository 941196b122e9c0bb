//! Flushes that carry the written blocks in the map file, instead of syncing the data file first.
//!
//! A flush of a few blocks then waits for one sync of the medium, of a file whose size and extents do not change, in place
//! of two. A start puts the carried blocks into the data file (docs/format.md, "Carried blocks").
//!
//! What must hold: a flush carries every block that was written since the last flush, or syncs the data file (D97). Once the
//! data file was synced while the map file has carried blocks, a record says so before the flush is answered: a start
//! would put older bytes over those that were synced (D96).

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Instant;

use parking_lot::Mutex;

use super::commit::MapFileState;
use super::flush::TakenWords;
use super::guard::scopeguard;
use super::map::{LiveMap, Take};
use super::record_builder::RecordBuilder;
use super::{Delta, DeltaError};
use crate::format::BLOCK;
use crate::format::journal::{Carried, Journal, MOST_CARRIED, Record, State, WORD_BLOCKS, WordSink};
use crate::format::layout::data_path;
use crate::io::MediumFile;
use crate::mutant::{Mutant, limit};

/// A map file is replaced when its records that carry blocks take more bytes, and more than its first records: a large
/// map is not written anew for a few blocks.
const LARGEST: u64 = 4 << 20;
/// Flushes that could have carried what was written, before the map file is replaced by one whose records may.
const WISHES: u64 = 4;
/// Flushes of overwritten blocks that are carried in turn. Then the data file is synced, and further ones write each block
/// once.
const OVERWRITES: u64 = 8;
/// Seconds after which the data file is synced with what was carried. Before the kernel writes it by itself and marks it
/// clean even when the medium refuses it: a sync reports that while the page cache still has the bytes.
const OLD: u64 = 5;

/// The blocks that were written since the last flush, when they are few.
///
/// A writer notes its blocks after their bytes and before their words. A flush takes the words first and the notes second.
/// So the notes have the blocks of all words taken, but for those that an earlier flush took, which carried or synced
/// their bytes.
#[derive(Debug)]
pub(super) struct WrittenBlocks {
    noted: Mutex<Vec<u64>>,
    /// More were written than are noted.
    more: AtomicBool,
}

impl WrittenBlocks {
    /// Of a delta that an earlier worker may have written.
    pub fn unknown() -> Self {
        Self { noted: Mutex::default(), more: AtomicBool::new(true) }
    }

    /// Notes that blocks `first..end` were written. The caller has set `unsynced`.
    pub fn note(&self, first: u64, end: u64) {
        // `unsynced` is seen by all before the mark is read. Otherwise a flush could clear the mark after that and not yet
        // see `unsynced`: it would sync nothing, and the next one would carry the words without their blocks.
        fence(Ordering::SeqCst);
        // A flush that clears the mark from here on syncs the data file afterwards, with the bytes of this writer.
        if self.more.load(Ordering::Acquire) {
            return;
        }
        let mut noted = self.noted.lock();
        for block in first..end.min(first + MOST_CARRIED as u64 + 1) {
            if !noted.contains(&block) {
                if noted.len() == MOST_CARRIED {
                    self.more.store(true, Ordering::Release);
                    return;
                }
                noted.push(block);
            }
        }
    }

    /// Notes that any blocks may have been written, or that the data file changed in another way.
    pub fn note_any(&self) {
        self.more.store(true, Ordering::Release);
    }

    /// Takes the blocks, in order; `None` when they are too many. The caller of the latter syncs the data file next.
    pub fn take(&self) -> Option<Vec<u64>> {
        let mut noted = self.noted.lock();
        let mut blocks = std::mem::take(&mut *noted);
        if self.more.swap(false, Ordering::AcqRel) {
            // The mark is cleared before the caller looks at `unsynced`: see `note`.
            fence(Ordering::SeqCst);
            return None;
        }
        drop(noted);
        if Mutant::WrittenBlockForgotten.is_active() {
            blocks.pop();
        }
        blocks.sort_unstable();
        Some(blocks)
    }
}

/// What a map file carries.
#[derive(Debug, Default)]
pub(super) struct CarryState {
    /// Whether records of the map file may carry blocks.
    pub allowed: bool,
    /// Blocks that the data file was not synced with.
    pub blocks: BTreeSet<u64>,
    /// Since when there are such blocks.
    since: Option<Instant>,
    /// Bytes of the records that carry blocks.
    pub bytes: u64,
    /// Flushes that could have carried their blocks if the map file allowed that.
    wishes: u64,
    /// Flushes in turn that carried only blocks whose words did not change.
    overwrites: u64,
}

impl CarryState {
    /// Of a map file that was read.
    pub fn of<M: WordSink>(journal: &Journal<M>) -> Self {
        let blocks: BTreeSet<u64> = journal.carried.keys().copied().collect();
        let since = (!blocks.is_empty()).then(Instant::now);
        Self { allowed: journal.header.carries, blocks, since, bytes: journal.carrying, ..Self::default() }
    }

    /// Of a new map file.
    pub fn new(allowed: bool) -> Self {
        Self { allowed, ..Self::default() }
    }

    /// Whether the map file should be replaced by one whose records may carry blocks.
    pub fn is_wished(&self) -> bool {
        // A map file that is written anew has all words, and would hide this fault.
        let stays = Mutant::WordsNotRestored.is_active();
        !self.allowed && self.wishes >= limit(WISHES, 0) && !stays
    }

    /// Whether the map file has to be replaced. `base_len`: bytes of its first records, which a new file has at least.
    pub fn is_full(&self, base_len: u64) -> bool {
        self.bytes > limit(LARGEST, 24 << 10).max(base_len)
    }

    /// The data file was synced, and a record says so.
    pub fn settle(&mut self) {
        self.blocks.clear();
        self.since = None;
        self.overwrites = 0;
    }

    fn is_old(&self) -> bool {
        self.since.is_some_and(|since| since.elapsed().as_secs() >= limit(OLD, u64::MAX))
    }

    /// Time passes.
    #[cfg(test)]
    pub fn age(&mut self) {
        self.since = self.since.and_then(|since| since.checked_sub(std::time::Duration::from_secs(OLD)));
    }
}

impl Delta {
    /// Whether a flush of the words taken may carry the blocks written, whatever these are. `any`: there are some, and not
    /// too many.
    pub(super) fn may_carry(&self, commit: &mut MapFileState, bounds: (u64, u64), any: bool) -> bool {
        let is_plain = commit.file.is_some()
            && !commit.rewrite
            && bounds == commit.bounds
            && !self.unlisted.load(Ordering::Acquire);
        if is_plain && any && !commit.carry.allowed {
            commit.carry.wishes += 1;
        }
        is_plain && commit.carry.allowed && !commit.carry.is_full(commit.base_len) && !commit.carry.is_old()
    }

    /// Syncs the data file with blocks that were carried a while ago, or that the storage refused since. Flushes again soon
    /// after a failed sync: until what that may have lost is written again, memory may drop it. To be called every second or
    /// so; may wait for the storage.
    ///
    /// # Errors
    /// As [`Delta::flush`].
    pub fn settle_old(&self) -> Result<(), DeltaError> {
        // A flush that runs settles them itself.
        let commit = self.commit.try_lock();
        let is_due = commit.is_some_and(|commit| commit.carry.is_old() || self.is_refused(&commit));
        if is_due || self.has_lost() { self.flush() } else { Ok(()) }
    }

    /// Whether the storage refused what the kernel wrote of the data file by itself while blocks are carried: a failed sync.
    fn is_refused(&self, commit: &MapFileState) -> bool {
        let data = self.data.read().clone().filter(|_| !commit.carry.blocks.is_empty() && !self.has_lost());
        data.is_some_and(|data| self.check_written_back(&*data).is_err())
    }

    /// What is carried is old from now on.
    #[cfg(test)]
    pub fn age_carried(&self) {
        self.commit.lock().carry.age();
    }

    /// Carries `blocks` and the words taken in a record. Returns false, with nothing done, when the data file has to be
    /// synced instead.
    pub(super) fn carry(
        &self,
        commit: &mut MapFileState,
        taken: &TakenWords<'_>,
        blocks: Vec<u64>,
    ) -> Result<bool, DeltaError> {
        let is_enough = commit.carry.overwrites >= limit(OVERWRITES, 2);
        if taken.is_empty() && (commit.carry.blocks.is_empty() || is_enough) {
            // One sync, of the data file, does as much and writes each block once.
            return Ok(false);
        }
        // This also runs when the medium panics. It changes nothing once the record is durable.
        let _undo = scopeguard(|| self.kept.give_up());
        let Some(carried) = self.read_carried(blocks, commit.bounds.0)? else { return Ok(false) };
        // A word is also taken when it stays as it was and a carried block of it was written again.
        let is_overwritten = |word: u64| {
            carried.blocks.iter().any(|b| b / WORD_BLOCKS == word && commit.carry.blocks.contains(b))
        };
        let (mut builder, mut is_new) = (RecordBuilder::default(), false);
        for page in taken.pages() {
            let (words, others) = self.map.unchanged(u64::from(*page), Take::Changed);
            if others {
                return Ok(false);
            }
            for (word, value) in words {
                if builder.is_full() {
                    return Ok(false);
                }
                is_new |= !is_overwritten(word);
                builder.add(word, value);
            }
        }
        if !is_new && is_enough {
            return Ok(false);
        }
        let (size, overlap) = commit.bounds;
        let runs = builder.into_runs();
        let record = Record { size, overlap, modified_ns: self.modified_ns(), runs, carried: Some(carried) };
        let bytes = record.encode(commit.nonce, commit.seq);
        if !self.write_zeros_ahead(commit, bytes.len())? {
            return Ok(false);
        }
        self.append(commit, &bytes)?;
        commit.carry.bytes += bytes.len() as u64;
        commit.carry.overwrites = if is_new { 0 } else { commit.carry.overwrites + 1 };
        if let (Some(carried), Some(file)) = (record.carried, &commit.file) {
            self.kept.keep(file, carried.places(commit.tail));
            commit.carry.blocks.extend(carried.blocks);
        }
        if !commit.carry.blocks.is_empty() {
            commit.carry.since.get_or_insert_with(Instant::now);
        }
        Ok(true)
    }

    /// The stored bytes of whole blocks; `None` when one of them is being written, or cannot be carried.
    ///
    /// # Errors
    /// As a failed sync when the data file may have lost one.
    fn read_carried(&self, blocks: Vec<u64>, size: u64) -> Result<Option<Carried>, DeltaError> {
        let Some(data) = self.data.read().clone() else { return Ok(None) };
        let data = data.stored().unwrap_or(data);
        let mut bytes = vec![0; blocks.len() * BLOCK as usize];
        for (block, bytes) in blocks.iter().zip(bytes.chunks_exact_mut(BLOCK as usize)) {
            if (block + 1) * BLOCK > size {
                return Ok(None);
            }
            // Tried only: the holder of a range may wait for the lock that this flush holds.
            let Some(_range) = self.ranges.try_lock(*block, block + 1) else { return Ok(None) };
            self.kept.begin(*block);
            let Ok(got) = data.read_at(bytes, block * BLOCK) else { return Ok(None) };
            if got < bytes.len() || !Carried::may_carry(bytes) {
                return Ok(None);
            }
        }
        // After they were read: the kernel notes the failure before it drops the bytes (D122).
        self.check_written_back(&*data)?;
        Ok(Some(Carried { blocks, bytes }))
    }
}

/// Puts carried blocks into the data file, when the live map was filled from the map file.
///
/// # Errors
/// Errors of the storage. Another call continues.
pub(super) fn place_carried(
    delta: u64,
    journal: &Journal<()>,
    (live, map): (&LiveMap, &dyn MediumFile),
    data: Option<&dyn MediumFile>,
) -> Result<(), DeltaError> {
    let fail = DeltaError::io("writing carried blocks to the data file");
    // Others were discarded or cut off since.
    let is_data = |block: &u64| live.state(*block) == State::Data;
    let mut blocks =
        journal.carried.iter().map(|(block, at)| (*block, *at)).filter(|(b, _)| is_data(b)).peekable();
    if blocks.peek().is_none() || Mutant::CarriedNotPlaced.is_active() {
        return Ok(());
    }
    let Some(data) = data else {
        let needs = blocks.map(|(block, _)| block * BLOCK).max().unwrap_or(0);
        return Err(DeltaError::DataMissing { file: data_path(delta), has: 0, needs });
    };
    // The stored bytes, for which no key is needed.
    let stored = data.stored();
    let data = stored.as_deref().unwrap_or(data);
    let mut place = || -> io::Result<()> {
        let mut bytes = vec![0; BLOCK as usize];
        for (block, at) in blocks.by_ref() {
            if map.read_at(&mut bytes, at)? < bytes.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            data.write_reserved(&bytes, block * BLOCK)?;
        }
        Ok(())
    };
    place().map_err(fail)
}
