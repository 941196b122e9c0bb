//! Makes written data durable: which words a flush takes, in which order it syncs data and records, and what becomes of
//! the words of a failed flush. docs/design.md, "Flush", has the steps.
//!
//! What must hold: the data file is synced before a record claims its blocks (D12). However a flush ends, the words
//! that it took are either durable or restored.

use std::cell::Cell;
use std::io;
use std::sync::atomic::Ordering;

use super::commit::{MapFileState, SYNCING_DATA, Target};
use super::guard::scopeguard;
use super::map::Take;
use super::record_builder::RecordBuilder;
use super::{Delta, DeltaError};
use crate::format::BLOCK;
use crate::format::layout::DELTAS;
use crate::io::MediumFile;
use crate::mutant::{Mutant, limit};

/// A map file is rewritten when it is larger than this, and larger than four times its first record.
const REWRITE: u64 = 256 << 10;
/// Blocks that are read and written again at a time.
const REDO_BLOCKS: usize = 64;

/// Whether the caller holds the lock on the whole range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WholeRange {
    /// The caller holds it.
    Held,
    /// The caller holds no part of it.
    NotHeld,
}

/// Where the words of a flush go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// To the end of the map file.
    Append,
    /// All words to a new map file. `carries`: whether its records may carry blocks.
    NewFile { carries: bool },
}

/// The words that a flush has taken. However the flush ends, they are either durable or restored.
pub(super) struct TakenWords<'a> {
    delta: &'a Delta,
    /// The pages that contain them, in order.
    pages: Vec<u32>,
    durable: bool,
}

impl<'a> TakenWords<'a> {
    /// Takes all dirty words.
    pub(super) fn take(delta: &'a Delta) -> Self {
        let mut taken = Self { delta, pages: Vec::new(), durable: false };
        delta.map.take_dirty(&mut taken.pages);
        taken
    }

    /// Pages with words that were taken.
    pub(super) fn pages(&self) -> &[u32] {
        &self.pages
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    fn finish(mut self, result: Result<(), DeltaError>) -> Result<(), DeltaError> {
        self.durable = result.is_ok();
        result
    }
}

impl Drop for TakenWords<'_> {
    fn drop(&mut self) {
        if self.durable {
            self.delta.map.mark_durable(&self.pages);
            return;
        }
        self.delta.unsynced.store(true, Ordering::Release);
        self.delta.written.note_any();
        if Mutant::WordsNotRestored.is_active() {
            self.delta.map.mark_durable(&self.pages);
        } else {
            self.delta.map.restore(&self.pages);
        }
    }
}

impl Delta {
    /// Makes everything durable that was completed before the call.
    ///
    /// # Errors
    /// After a failed sync the error epoch has grown: writes since the last flush may be lost. ENOSPC while appending
    /// to the map file loses nothing, and the caller may flush again.
    pub fn flush(&self) -> Result<(), DeltaError> {
        self.rewrite_lost_data(WholeRange::NotHeld)?;
        self.flush_joined()
    }

    /// Writes again what a failed sync may have lost, so that the next record claims no block whose bytes are not on
    /// the medium. The page cache still has the bytes, but the kernel considers them written.
    ///
    /// # Errors
    /// Errors of the storage; the next flush tries again.
    pub(super) fn rewrite_lost_data(&self, whole: WholeRange) -> Result<(), DeltaError> {
        let lost = self.lost.load(Ordering::Acquire);
        if lost == self.redone.load(Ordering::Acquire) || Mutant::LostNotRewritten.is_active() {
            return Ok(());
        }
        let failed = DeltaError::io("writing again what a failed sync may have lost");
        let redo = || -> io::Result<()> {
            let Some(shown) = self.data.read().clone() else { return Ok(()) };
            // The stored bytes, for which no key is needed.
            let data = shown.stored().unwrap_or_else(|| shown.clone());
            let lock = |from, to| (whole == WholeRange::NotHeld).then(|| self.ranges.lock(from, to));
            // Carried blocks are durable by the map file alone, and their words are not marked.
            let carried = self.commit.lock().carry.blocks.clone();
            // Read before the words: the kernel marks all later writes dirty itself.
            let unflushed = self.map.unflushed_pages().flat_map(|page| self.map.unflushed_data(page));
            for (first, end) in unflushed {
                for from in (first..end).step_by(REDO_BLOCKS) {
                    let to = end.min(from + REDO_BLOCKS as u64);
                    let _range = lock(from, to);
                    let mut bytes = vec![0; ((to - from) * BLOCK) as usize];
                    let got = data.read_at(&mut bytes, from * BLOCK)?;
                    data.write_at(&bytes[..got], from * BLOCK)?;
                }
            }
            // Last: a word that is not flushed may have carried blocks too.
            for block in carried {
                let _range = lock(block, block + 1);
                self.redo_carried(&*shown, block)?;
            }
            Ok(())
        };
        redo().map_err(failed)?;
        self.unsynced.store(true, Ordering::Release);
        // A sync that failed meanwhile is not covered.
        self.redone.fetch_max(lost, Ordering::AcqRel);
        Ok(())
    }

    /// As [`Delta::flush`], for a caller that holds the whole range and has called [`Delta::rewrite_lost_data`].
    pub(super) fn flush_joined(&self) -> Result<(), DeltaError> {
        let errno = |error: &DeltaError| match error {
            DeltaError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EIO,
        };
        let of_another =
            |errno| DeltaError::io("flush of a concurrent caller")(io::Error::from_raw_os_error(errno));
        self.gate.join(|| self.flush_alone(), errno, of_another)
    }

    fn flush_alone(&self) -> Result<(), DeltaError> {
        let mut commit = self.commit.lock();
        commit.refuse_retired()?;
        if commit.sealed {
            return Ok(());
        }
        self.refuse_lost()?;
        let words = commit.tail - commit.carry.bytes;
        let large = words > limit(REWRITE, 1 << 10).max(4 * commit.base_len).max(commit.size_allowance);
        let full =
            commit.rewrite || large || commit.carry.is_full(commit.base_len) || commit.carry.is_wished();
        let carries = commit.carry.allowed || commit.carry.is_wished();
        let how = if full { How::NewFile { carries } } else { How::Append };
        match self.flush_words(&mut commit, how) {
            Err(error) if error.is_full() && !commit.rewrite && full => {
                // An append takes less space than a new file, and the old file is as good.
                commit.size_allowance = commit.tail * 2;
                self.flush_words(&mut commit, How::Append)
            }
            other => other,
        }
    }

    fn flush_words(&self, commit: &mut MapFileState, how: How) -> Result<(), DeltaError> {
        let early =
            Mutant::DirtyNoteClearedFirst.is_active().then(|| self.unsynced.swap(false, Ordering::AcqRel));
        Mutant::DirtyNoteClearedFirst.widen_race();
        let mut taken = TakenWords::take(self);
        // Read after the words and before the sync: no word lies above the size, and the sync covers what growth did to
        // the file.
        let now = || (self.size(), self.overlap());
        let bounds = now();
        // Taken after the words, and before a sync that replaces the notes.
        let written = self.written.take();
        let any = written.as_ref().is_some_and(|blocks| !blocks.is_empty());
        if how == How::Append && self.may_carry(commit, bounds, any) {
            if !any && written.is_some() && taken.is_empty() {
                // Nothing was written since the last flush, which may have left the data file without a sync.
                let result = self.sync_inherited(commit);
                return taken.finish(result);
            }
            let carried = written.map_or(Ok(false), |blocks| self.carry(commit, &taken, blocks));
            if !matches!(carried, Ok(false)) {
                return taken.finish(carried.map(|_| ()));
            }
        }
        // Read after the words: a writer sets this flag before its word, so the sync below covers the data of every
        // word taken.
        let was_unsynced = early.unwrap_or_else(|| self.unsynced.swap(false, Ordering::AcqRel));
        let result = (|| {
            if Mutant::MapBeforeData.is_active() {
                self.journal(commit, bounds, now, &mut taken, how)?;
            }
            let is_carrying = !commit.carry.blocks.is_empty();
            if was_unsynced || is_carrying {
                self.sync_written()?;
            }
            // With carried blocks the record says that the data file was synced (D96).
            let settled = !is_carrying || Mutant::CarriedNotSettled.is_active();
            if taken.is_empty() && bounds == commit.bounds && !commit.rewrite && settled && how == How::Append
            {
                return self.sync_inherited(commit);
            }
            self.journal(commit, bounds, now, &mut taken, how)
        })();
        taken.finish(result)
    }

    /// Leaves nothing in the map file that only this version can read: no record of it carries blocks any more. Without
    /// space for another file, the last record of this one says that the data file was synced. The caller has flushed, and
    /// nothing is written meanwhile.
    ///
    /// # Errors
    /// As [`Delta::flush`].
    pub(super) fn settle(&self, commit: &mut MapFileState) -> Result<(), DeltaError> {
        if !commit.carry.allowed {
            return Ok(());
        }
        self.refuse_lost()?;
        match self.flush_words(commit, How::NewFile { carries: false }) {
            // As in a flush. After a failure nothing is carried.
            Err(error) if error.is_full() && !commit.rewrite => self.flush_words(commit, How::Append),
            other => other,
        }
    }

    /// Syncs the data file, and its directory entry when the file is new.
    fn sync_written(&self) -> Result<(), DeltaError> {
        if !Mutant::DataNotSynced.is_active()
            && let Some(data) = self.data.read().clone()
        {
            self.sync_data(&*data)?;
            self.list_data()?;
        }
        Ok(())
    }

    /// Makes the directory entry of a new data file durable, once.
    fn list_data(&self) -> Result<(), DeltaError> {
        if self.unlisted.swap(false, Ordering::AcqRel) && !Mutant::DirectoryEntryNotSynced.is_active() {
            self.delta_io.medium.sync_dir(DELTAS).map_err(|e| {
                self.unlisted.store(true, Ordering::Release);
                self.poison("syncing the directory of the data file", e)
            })?;
        }
        Ok(())
    }

    /// Journals a size at once. The caller holds the whole range.
    pub(super) fn commit_size(
        &self,
        commit: &mut MapFileState,
        size: u64,
        overlap: u64,
    ) -> Result<(), DeltaError> {
        commit.refuse_retired()?;
        self.refuse_lost()?;
        if commit.rewrite {
            // The first map file has the whole map, and the data that it claims must be synced.
            let mut taken = TakenWords::take(self);
            let result = self.sync_for_rewrite();
            let cut = (size, overlap);
            let how = How::NewFile { carries: commit.carry.allowed };
            let result = result.and_then(|()| self.journal(commit, cut, || cut, &mut taken, how));
            return taken.finish(result);
        }
        if size > commit.bounds.0 || !commit.carry.blocks.is_empty() {
            // The record says that the data file was synced (D96). And: the disk shrinks after growth that was not flushed. For that growth the data file was cut to the old end.
            // The cut must be durable before a record claims a larger size.
            self.sync_for_rewrite()?;
        }
        self.write_record(commit, &mut Target::Append, (size, overlap), RecordBuilder::default())
    }

    fn sync_for_rewrite(&self) -> Result<(), DeltaError> {
        match self.data.read().clone() {
            Some(data) => self.sync_data(&*data),
            None => Ok(()),
        }
    }

    fn sync_data(&self, data: &dyn MediumFile) -> Result<(), DeltaError> {
        self.syncs("syncing the data file", || data.sync_data())
    }

    /// Fails as a sync when the storage refused what the kernel wrote of the data file by itself.
    pub(super) fn check_written_back(&self, data: &dyn MediumFile) -> Result<(), DeltaError> {
        self.syncs("writing to the data file", || data.check_written_back())
    }

    fn syncs(
        &self,
        operation: &'static str,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), DeltaError> {
        // This also runs when the medium panics.
        let synced = Cell::new(false);
        let _failed = scopeguard(|| {
            if !synced.get() {
                self.lost.fetch_add(1, Ordering::AcqRel);
            }
        });
        self.sync_begins(SYNCING_DATA);
        sync().map_err(|e| self.poison(operation, e))?;
        self.sync_ended(SYNCING_DATA);
        synced.set(true);
        Ok(())
    }

    /// Whether a failed sync may have lost what was not written again yet.
    pub(super) fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire) != self.redone.load(Ordering::Acquire)
    }

    /// Refuses to journal between a failed sync and [`Delta::rewrite_lost_data`].
    fn refuse_lost(&self) -> Result<(), DeltaError> {
        if self.has_lost() && !Mutant::LostNotRewritten.is_active() {
            let error = io::Error::from_raw_os_error(libc::EIO);
            return Err(DeltaError::io("flush after a failed flush")(error));
        }
        Ok(())
    }

    /// Writes the words taken, whose data is synced, as records of bounded size. The records have `bounds`, or `later`
    /// once words have changed meanwhile. To a new file all words go.
    fn journal(
        &self,
        commit: &mut MapFileState,
        bounds: (u64, u64),
        later: impl Fn() -> (u64, u64),
        taken: &mut TakenWords<'_>,
        how: How,
    ) -> Result<(), DeltaError> {
        let carries = match how {
            How::NewFile { carries } => Some(carries),
            How::Append => commit.file.is_none().then_some(false),
        };
        let full = carries.is_some();
        let mut target = match carries {
            Some(carries) => Target::New(self.new_file(commit, carries)?),
            None => Target::Append,
        };
        // An appended record counts by itself. One with a larger overlap comes behind all words that hide something below
        // it. A new file counts as a whole.
        let before = if full { u64::MAX } else { commit.bounds.1 };
        let first = |(size, overlap): (u64, u64)| (size, overlap.min(before));
        let (mut builder, mut changed) = (RecordBuilder::default(), Vec::new());
        let mut put = |page: u64, take| -> Result<(), DeltaError> {
            let (words, others) = self.map.unchanged(page, take);
            if others {
                changed.push(page as u32);
            }
            for (word, value) in words {
                if builder.is_full() {
                    self.write_record(commit, &mut target, first(bounds), std::mem::take(&mut builder))?;
                }
                builder.add(word, value);
            }
            Ok(())
        };
        if full {
            self.map.pages().try_for_each(|page| put(page, Take::All))?;
        } else {
            taken.pages.iter().try_for_each(|page| put(u64::from(*page), Take::Changed))?;
        }
        let mut bounds = bounds;
        if changed.is_empty() || !builder.is_empty() {
            self.write_record(commit, &mut target, first(bounds), std::mem::take(&mut builder))?;
        }
        // Words that writers have changed since are taken with their values, so this ends however fast they write.
        let (mut words, marked) = (Vec::new(), taken.pages.len());
        let mut changed = changed.into_iter().peekable();
        while let Some(page) = changed.next() {
            if taken.pages[..marked].binary_search(&page).is_err() {
                taken.pages.push(page);
            }
            self.map.retake(u64::from(page), &mut words);
            if words.len() < RecordBuilder::WORDS && changed.peek().is_some() {
                continue;
            }
            bounds = later();
            if self.unsynced.swap(false, Ordering::AcqRel) {
                self.sync_written()?;
            }
            for (word, value) in words.drain(..) {
                if builder.is_full() {
                    self.write_record(commit, &mut target, first(bounds), std::mem::take(&mut builder))?;
                }
                builder.add(word, value);
            }
            self.write_record(commit, &mut target, first(bounds), std::mem::take(&mut builder))?;
        }
        if first(bounds) != bounds {
            self.write_record(commit, &mut target, bounds, RecordBuilder::default())?;
        }
        if let Target::New(file) = target {
            self.commit_file(commit, file, bounds)?;
        }
        Ok(())
    }
}
