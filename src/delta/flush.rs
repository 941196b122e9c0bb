//! Making what was written durable: which words a flush takes, in which order data and records are synced, and what
//! becomes of words whose flush failed. docs/design.md, "Flush", has the steps.
//!
//! What must hold: the data file is synced before a record claims its blocks (D12), and words that were taken are durable
//! or given back, however the flush ends.

use std::cell::Cell;
use std::io;
use std::sync::atomic::Ordering;

use super::commit::{Commit, SYNCING_DATA, Target};
use super::guard::scopeguard;
use super::map::Take;
use super::pieces::Piece;
use super::{Delta, DeltaError};
use crate::format::BLOCK;
use crate::format::layout::DELTAS;
use crate::io::MediumFile;
use crate::mutant::{Mutant, limit};

/// A map file is rewritten when it is larger than this and than four times its first record.
const REWRITE: u64 = 256 << 10;
/// Blocks that are read and written again at once.
const REDO_BLOCKS: usize = 64;

/// Whether the caller has the whole range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whole {
    /// It has.
    Held,
    /// It has none of it.
    Free,
}

/// Words that a flush has taken: durable, or given back, however the flush ends.
pub(super) struct Taken<'a> {
    delta: &'a Delta,
    /// Where they are, in order.
    pages: Vec<u32>,
    durable: bool,
}

impl<'a> Taken<'a> {
    /// All that are dirty.
    pub(super) fn of(delta: &'a Delta) -> Self {
        let mut taken = Self { delta, pages: Vec::new(), durable: false };
        delta.map.mark(&mut taken.pages);
        taken
    }

    fn end(mut self, result: Result<(), DeltaError>) -> Result<(), DeltaError> {
        self.durable = result.is_ok();
        result
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.durable {
            self.delta.map.done(&self.pages);
            return;
        }
        self.delta.unsynced.store(true, Ordering::Release);
        if !Mutant::WordsNotRestored.is_active() {
            self.delta.map.failed(&self.pages);
        }
    }
}

impl Delta {
    /// Makes everything durable that was completed before the call.
    ///
    /// # Errors
    /// After a failed sync the error epoch has grown: what was written since the last flush may be lost. ENOSPC
    /// while appending to the map file is not such a failure, the flush can be asked for again.
    pub fn flush(&self) -> Result<(), DeltaError> {
        self.redo_lost(Whole::Free)?;
        self.flush_joined()
    }

    /// Writes again what a failed sync may have lost, so that the next record claims no block whose bytes are not
    /// there. The page cache still has the bytes, but the kernel takes them for written.
    ///
    /// # Errors
    /// What the storage says; the next flush tries again.
    pub(super) fn redo_lost(&self, whole: Whole) -> Result<(), DeltaError> {
        let lost = self.lost.load(Ordering::Acquire);
        if lost == self.redone.load(Ordering::Acquire) || Mutant::LostNotRewritten.is_active() {
            return Ok(());
        }
        let failed = DeltaError::io("writing again what a failed sync may have lost");
        let redo = || -> io::Result<()> {
            let Some(data) = self.data.read().clone() else { return Ok(()) };
            // Read before the words: what is written from here on is dirty in the kernel by itself.
            for (first, end) in self.map.pages().flat_map(|page| self.map.unflushed_data(page)) {
                for from in (first..end).step_by(REDO_BLOCKS) {
                    let to = end.min(from + REDO_BLOCKS as u64);
                    let _range = (whole == Whole::Free).then(|| self.ranges.lock(from, to));
                    let mut bytes = vec![0; ((to - from) * BLOCK) as usize];
                    let got = data.read_at(&mut bytes, from * BLOCK)?;
                    data.write_at(&bytes[..got], from * BLOCK)?;
                }
            }
            Ok(())
        };
        redo().map_err(failed)?;
        self.unsynced.store(true, Ordering::Release);
        // Not for a sync that failed meanwhile.
        self.redone.fetch_max(lost, Ordering::AcqRel);
        Ok(())
    }

    /// As [`Delta::flush`], for somebody who has the whole range and has called [`Delta::redo_lost`].
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
        self.refuse_lost()?;
        let large = commit.tail > limit(REWRITE, 1 << 10).max(4 * commit.first).max(commit.patience);
        let full = commit.rewrite || large;
        match self.flush_words(&mut commit, full) {
            Err(error) if error.is_full() && !commit.rewrite && large => {
                // An append takes less space than a new file, and the old one is as good.
                commit.patience = commit.tail * 2;
                self.flush_words(&mut commit, false)
            }
            other => other,
        }
    }

    fn flush_words(&self, commit: &mut Commit, full: bool) -> Result<(), DeltaError> {
        let early =
            Mutant::DirtyNoteClearedFirst.is_active().then(|| self.unsynced.swap(false, Ordering::AcqRel));
        Mutant::DirtyNoteClearedFirst.widen_race();
        let mut taken = Taken::of(self);
        // After the words and before the sync: no word is above the size, and what growth did to the file is synced.
        let now = || (self.size(), self.overlap());
        let extent = now();
        // After the words: a word is set after this flag, so the data of every word taken is synced below.
        let was_unsynced = early.unwrap_or_else(|| self.unsynced.swap(false, Ordering::AcqRel));
        let result = (|| {
            if Mutant::MapBeforeData.is_active() {
                self.journal(commit, extent, now, &mut taken, full)?;
            }
            if was_unsynced {
                self.sync_written()?;
            }
            if taken.pages.is_empty() && extent == commit.extent && !commit.rewrite {
                return self.prove(commit);
            }
            self.journal(commit, extent, now, &mut taken, full)
        })();
        taken.end(result)
    }

    /// Syncs the data file, and its directory entry when it is new.
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
            self.footing.medium.sync_dir(DELTAS).map_err(|e| {
                self.unlisted.store(true, Ordering::Release);
                self.poison("syncing the directory of the data file", e)
            })?;
        }
        Ok(())
    }

    /// Journals a size at once; the caller has the whole range.
    pub(super) fn commit_size(&self, commit: &mut Commit, size: u64, overlap: u64) -> Result<(), DeltaError> {
        commit.refuse_retired()?;
        self.refuse_lost()?;
        if commit.rewrite {
            // The first map file has everything, and what it claims has to be synced.
            let mut taken = Taken::of(self);
            let result = self.sync_for_rewrite();
            let cut = (size, overlap);
            let result = result.and_then(|()| self.journal(commit, cut, || cut, &mut taken, true));
            return taken.end(result);
        }
        if size > commit.extent.0 {
            // A cut after growth that was not flushed: the file was cut to the old end for it, and that has to be
            // durable before a record says that there is more.
            self.sync_for_rewrite()?;
        }
        self.write_record(commit, &mut Target::Append, (size, overlap), Piece::default())
    }

    fn sync_for_rewrite(&self) -> Result<(), DeltaError> {
        match self.data.read().clone() {
            Some(data) => self.sync_data(&*data),
            None => Ok(()),
        }
    }

    fn sync_data(&self, data: &dyn MediumFile) -> Result<(), DeltaError> {
        // Also when the medium panics.
        let synced = Cell::new(false);
        let _failed = scopeguard(|| {
            if !synced.get() {
                self.lost.fetch_add(1, Ordering::AcqRel);
            }
        });
        self.sync_begins(SYNCING_DATA);
        data.sync_data().map_err(|e| self.poison("syncing the data file", e))?;
        self.sync_ended(SYNCING_DATA);
        synced.set(true);
        Ok(())
    }

    /// Nothing is journaled between a failed sync and [`Delta::redo_lost`].
    fn refuse_lost(&self) -> Result<(), DeltaError> {
        if self.lost.load(Ordering::Acquire) != self.redone.load(Ordering::Acquire)
            && !Mutant::LostNotRewritten.is_active()
        {
            let error = io::Error::from_raw_os_error(libc::EIO);
            return Err(DeltaError::io("flush after a failed one")(error));
        }
        Ok(())
    }

    /// Writes the words taken, whose data is synced, as records of bounded size; of `extent`, or of `later` when words
    /// have changed meanwhile. With `full` all words go to a new map file.
    fn journal(
        &self,
        commit: &mut Commit,
        extent: (u64, u64),
        later: impl Fn() -> (u64, u64),
        taken: &mut Taken<'_>,
        full: bool,
    ) -> Result<(), DeltaError> {
        let full = full || commit.file.is_none();
        let mut target = if full { Target::New(self.new_file(commit)?) } else { Target::Append };
        let (mut piece, mut changed) = (Piece::default(), Vec::new());
        let mut put = |page: u64, take| -> Result<(), DeltaError> {
            let (words, others) = self.map.unchanged(page, take);
            if others {
                changed.push(page as u32);
            }
            for (word, value) in words {
                if piece.is_full() {
                    self.write_record(commit, &mut target, extent, std::mem::take(&mut piece))?;
                }
                piece.add(word, value);
            }
            Ok(())
        };
        if full {
            self.map.pages().try_for_each(|page| put(page, Take::All))?;
        } else {
            taken.pages.iter().try_for_each(|page| put(u64::from(*page), Take::Changed))?;
        }
        let mut extent = extent;
        if changed.is_empty() || !piece.is_empty() {
            self.write_record(commit, &mut target, extent, std::mem::take(&mut piece))?;
        }
        // What writers have changed since: their values are kept, so this ends however fast they write.
        let (mut words, marked) = (Vec::new(), taken.pages.len());
        let mut changed = changed.into_iter().peekable();
        while let Some(page) = changed.next() {
            if taken.pages[..marked].binary_search(&page).is_err() {
                taken.pages.push(page);
            }
            self.map.retake(u64::from(page), &mut words);
            if words.len() < Piece::WORDS && changed.peek().is_some() {
                continue;
            }
            extent = later();
            if self.unsynced.swap(false, Ordering::AcqRel) {
                self.sync_written()?;
            }
            for (word, value) in words.drain(..) {
                if piece.is_full() {
                    self.write_record(commit, &mut target, extent, std::mem::take(&mut piece))?;
                }
                piece.add(word, value);
            }
            self.write_record(commit, &mut target, extent, std::mem::take(&mut piece))?;
        }
        if let Target::New(file) = target {
            self.commit_file(commit, file, extent)?;
        }
        Ok(())
    }
}
