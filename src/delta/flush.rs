//! Making a delta durable: the map file, and flushes that join.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::gate::FlushGate;
use super::guard::scopeguard;
use super::map::{LiveMap, Take};
use super::pieces::{NewFile, Piece};
use super::ranges::RangeLock;
use super::recovery::{check_data, check_live, is_ours, open_map_file, replay};
use super::{Delta, DeltaError, DeltaSpec, Footing, data_name, map_name};
use crate::format::BLOCK;
use crate::format::journal::{MapHeader, Record};
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, MediumFile, Open, is_full, sys};
use crate::sabotage::{Sabotage, limit, linger, sabotaged};

/// A map file is rewritten when it is larger than this and than four times its first record.
const REWRITE: u64 = 256 << 10;
/// Zeros written ahead of the journal's end, so that an append changes no metadata of the filesystem.
const AHEAD: u64 = 16 << 10;
/// Bits of [`LiveHeader::Syncing`].
const SYNCING_DATA: u64 = 1;
const SYNCING_MAP: u64 = 2;
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

/// Keeps the root of a disk's durable map.
pub trait RootStore: Send + Sync {
    /// Durably replaces the root.
    fn commit(&self, root: MapRoot, modified_ns: i64) -> io::Result<()>;

    /// As [`RootStore::commit`], with the size that the map file has at the root's floor.
    ///
    /// # Errors
    /// As [`RootStore::commit`].
    fn commit_sized(&self, root: MapRoot, modified_ns: i64, _size: u64) -> io::Result<()> {
        self.commit(root, modified_ns)
    }
}

/// State of the map file; who has it may append.
#[derive(Default)]
pub(super) struct Commit {
    pub(super) root: MapRoot,
    /// Highest generation that a file was written for.
    pub(super) tried: u64,
    pub(super) file: Option<Arc<dyn MediumFile>>,
    pub(super) nonce: u64,
    pub(super) tail: u64,
    /// The file has zeros up to here.
    pub(super) filled: u64,
    pub(super) first: u64,
    /// The file may grow to this, because there was no space for a new one.
    pub(super) patience: u64,
    pub(super) seq: u64,
    /// The next flush writes a new map file.
    pub(super) rewrite: bool,
    /// An earlier worker may have written records that it did not sync.
    pub(super) unproven: bool,
    /// Size and overlap as the file has them.
    pub(super) extent: (u64, u64),
    /// The disk was removed: no file of it is made any more.
    pub(super) retired: bool,
}

impl Commit {
    pub(super) fn allocated(&self) -> u64 {
        self.file.as_ref().and_then(|f| f.allocated().ok()).unwrap_or(0)
    }

    fn refuse_retired(&self) -> Result<(), DeltaError> {
        let removed = || io::Error::new(io::ErrorKind::NotFound, "the disk was removed");
        if self.retired { Err(DeltaError::io("flush")(removed())) } else { Ok(()) }
    }
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
        if !sabotaged(Sabotage::WordsNotGivenBack) {
            self.delta.map.failed(&self.pages);
        }
    }
}

/// Where the records of a flush go.
enum Target {
    /// To the end of the map file, each synced before the next is written: of two that are not, a power cut may leave
    /// the later one, which would be damage.
    Append,
    /// To a new file, which counts when its root is committed.
    New(NewFile),
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the clock has to do: the nonce guards against stale bytes, not against enemies.
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => sys::now_ns() as u64,
    }
}

impl Delta {
    /// Opens the delta of a disk: by its live map after a crash of the worker, by its map file after a reboot.
    ///
    /// # Errors
    /// `Damaged` and `DataMissing` when the store does not have what was acknowledged; what the storage says.
    pub fn open(spec: DeltaSpec, footing: Footing) -> Result<Self, DeltaError> {
        let fail = |operation| DeltaError::io(operation);
        let data_name = data_name(spec.disk);
        let data = match footing.medium.open(&data_name, Open::Existing) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(fail("opening the data file")(e)),
        };
        let identity = match &data {
            Some(data) => data.identity().map_err(fail("opening the data file"))?,
            None => (0, 0),
        };
        let (journal, commit) = open_map_file(&spec, &footing)?;
        let live = footing.live.existing(spec.disk).map_err(fail("opening the live map"))?;
        let live = match live {
            Some(live) if is_ours(&live, &spec, identity)? => Some(live),
            _ => None,
        };
        live.as_ref().map_or(Ok(()), |live| check_live(live, &spec))?;
        let taken_over = live.is_some();
        let map = match live {
            Some(live) => LiveMap::new(live),
            None => {
                // Before the map is made: what does not fit takes no memory.
                check_data(journal.as_ref(), data.as_deref(), &data_name)?;
                replay(&spec, &footing, journal, identity)?
            }
        };
        let delta = Self {
            spec,
            map,
            data: RwLock::new(data),
            ranges: RangeLock::default(),
            commit: Mutex::new(commit),
            map_bytes: AtomicU64::new(0),
            gate: FlushGate::default(),
            lost: AtomicU64::new(0),
            redone: AtomicU64::new(0),
            unsynced: AtomicBool::new(true),
            unlisted: AtomicBool::new(true),
            failure: Mutex::new(None),
            footing,
        };
        if taken_over {
            delta.commit.lock().unproven = true;
            // A sync failed under an earlier worker, or it was killed in the middle of one: that may have failed too,
            // and the kernel reports a failure once, to whoever asked.
            let syncing = delta.word(LiveHeader::Syncing);
            let failed = delta.error_epoch() != 0;
            if failed || syncing & SYNCING_DATA != 0 {
                delta.lost.store(1, Ordering::Release);
            }
            if failed || syncing & SYNCING_MAP != 0 {
                // What the map file has in memory may not be on the medium.
                delta.commit.lock().rewrite = true;
            }
            let pending = delta.word(LiveHeader::PendingShrink);
            if pending != 0 {
                delta.redo_lost(Whole::Held)?;
                delta.complete_shrink(pending - 1)?;
            }
        } else {
            delta.footing.live.publish(delta.spec.disk).map_err(fail("making the live map"))?;
        }
        Ok(delta)
    }

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
        if lost == self.redone.load(Ordering::Acquire) || sabotaged(Sabotage::LostNotRedone) {
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
            sabotaged(Sabotage::NoteClearedFirst).then(|| self.unsynced.swap(false, Ordering::AcqRel));
        linger(Sabotage::NoteClearedFirst);
        let mut taken = Taken::of(self);
        // After the words and before the sync: no word is above the size, and what growth did to the file is synced.
        let now = || (self.size(), self.overlap());
        let extent = now();
        // After the words: a word is set after this flag, so the data of every word taken is synced below.
        let was_unsynced = early.unwrap_or_else(|| self.unsynced.swap(false, Ordering::AcqRel));
        let result = (|| {
            if sabotaged(Sabotage::MapBeforeData) {
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
        if !sabotaged(Sabotage::DataNotSynced)
            && let Some(data) = self.data.read().clone()
        {
            self.sync_data(&*data)?;
            self.list_data()?;
        }
        Ok(())
    }

    /// Makes the directory entry of a new data file durable, once.
    fn list_data(&self) -> Result<(), DeltaError> {
        if self.unlisted.swap(false, Ordering::AcqRel) && !sabotaged(Sabotage::EntryNotListed) {
            self.footing.medium.sync_dir("deltas").map_err(|e| {
                self.unlisted.store(true, Ordering::Release);
                self.poison("syncing the directory of the data file", e)
            })?;
        }
        Ok(())
    }

    fn poison(&self, operation: &'static str, source: io::Error) -> DeltaError {
        *self.failure.lock() = Some(format!("{operation}: {source}"));
        self.map.live().header(LiveHeader::ErrorEpoch).fetch_add(1, Ordering::AcqRel);
        tracing::error!(disk = self.spec.disk, operation, error = %source, "a flush failed; writes are refused until the disk is opened again");
        // A lack of space that shows only now has lost what was acknowledged: nobody may take it for one to wait out.
        let source = if is_full(&source) { io::Error::from_raw_os_error(libc::EIO) } else { source };
        DeltaError::Io { operation, source }
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

    /// Notes for the next worker that this one may die without having heard how a sync ended (D21).
    fn sync_begins(&self, what: u64) {
        self.map.live().header(LiveHeader::Syncing).fetch_or(what, Ordering::AcqRel);
    }

    /// It succeeded, or another file has what it was for.
    fn sync_ended(&self, what: u64) {
        self.map.live().header(LiveHeader::Syncing).fetch_and(!what, Ordering::AcqRel);
    }

    /// Nothing is journaled between a failed sync and [`Delta::redo_lost`].
    fn refuse_lost(&self) -> Result<(), DeltaError> {
        if self.lost.load(Ordering::Acquire) != self.redone.load(Ordering::Acquire)
            && !sabotaged(Sabotage::LostNotRedone)
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

    fn write_record(
        &self,
        commit: &mut Commit,
        target: &mut Target,
        (size, overlap): (u64, u64),
        piece: Piece,
    ) -> Result<(), DeltaError> {
        let record = Record { size, overlap, modified_ns: self.modified_ns(), runs: piece.into_runs() };
        match target {
            Target::Append => {
                self.append(commit, &record)?;
                commit.extent = (size, overlap);
                Ok(())
            }
            Target::New(file) => file.put(&record).map_err(DeltaError::io("writing a new map file")),
        }
    }

    fn append(&self, commit: &mut Commit, record: &Record) -> Result<(), DeltaError> {
        let Some(file) = commit.file.clone() else {
            return Err(DeltaError::io("appending to the map file")(io::ErrorKind::NotFound.into()));
        };
        let bytes = record.encode(commit.nonce, commit.seq);
        let end = commit.tail + bytes.len() as u64;
        if end > commit.filled {
            let zeros = vec![0; (end - commit.filled + limit(AHEAD, 2 << 10)) as usize];
            // Only a convenience: without space for it the record itself may still fit.
            if file.write_at(&zeros, commit.filled).is_ok() {
                commit.filled += zeros.len() as u64;
            }
        }
        if let Err(error) = file.write_at(&bytes, commit.tail) {
            // What is missing of it may be zeros that are there already: then it counts, though the caller is told
            // that it failed. A new file has only what is.
            commit.rewrite = true;
            return Err(DeltaError::io("appending to the map file")(error));
        }
        self.sync_map(commit, &file)?;
        commit.tail = end;
        commit.filled = commit.filled.max(end);
        commit.seq += 1;
        Ok(())
    }

    /// Syncs the records that an earlier worker wrote: they have been read, and nobody knows whether they are durable.
    fn prove(&self, commit: &mut Commit) -> Result<(), DeltaError> {
        match commit.file.clone() {
            Some(file) if commit.unproven => self.sync_map(commit, &file),
            _ => Ok(()),
        }
    }

    fn sync_map(&self, commit: &mut Commit, file: &Arc<dyn MediumFile>) -> Result<(), DeltaError> {
        // Until it succeeds, nobody knows what of the file is durable: a new one is written next time.
        commit.rewrite = true;
        if !sabotaged(Sabotage::JournalNotSynced) {
            self.sync_begins(SYNCING_MAP);
            file.sync_data().map_err(|error| self.poison("syncing the map file", error))?;
            self.sync_ended(SYNCING_MAP);
        }
        (commit.rewrite, commit.unproven) = (false, false);
        Ok(())
    }

    /// Begins a new map file.
    fn new_file(&self, commit: &mut Commit) -> Result<NewFile, DeltaError> {
        let generation = commit.tried.max(commit.root.generation) + 1;
        // Also after a failure: nobody knows which record is durable, so no file is written twice.
        commit.tried = generation;
        let header = MapHeader { disk: self.spec.disk, generation, nonce: random() };
        NewFile::begin(self.footing.medium.clone(), header).map_err(DeltaError::io("writing a new map file"))
    }

    /// Makes a new map file, which has everything, durable and the root.
    fn commit_file(
        &self,
        commit: &mut Commit,
        mut new: NewFile,
        extent: (u64, u64),
    ) -> Result<(), DeltaError> {
        let (disk, medium) = (self.spec.disk, &self.footing.medium);
        let (header, len, next_seq) = (new.header, new.len, new.next_seq);
        let file = new.keep().map_err(DeltaError::io("writing a new map file"))?;
        let root = MapRoot { generation: header.generation, floor: len };
        let durable = || {
            file.sync_data()?;
            medium.sync_dir("deltas")?;
            self.footing.roots.commit_sized(root, new.modified_ns, extent.0)
        };
        // Until all of it succeeds, nobody knows which file a power cut leaves: neither is appended to.
        commit.rewrite = true;
        match durable() {
            Err(e) if is_full(&e) => {
                return Err(DeltaError::io("writing the disk's record")(e));
            }
            other => other.map_err(|e| self.poison("making a new map file durable", e))?,
        }
        self.sync_ended(SYNCING_MAP);
        // With those of rewrites that failed in between. A left-over is harmless; `plyfs check` names it.
        for before in commit.root.generation.max(1)..header.generation {
            let _ = medium.remove(&map_name(disk, before));
        }
        *commit = Commit {
            root,
            tried: header.generation,
            file: Some(file),
            nonce: header.nonce,
            tail: len,
            filled: len,
            first: len,
            patience: 0,
            seq: next_seq,
            rewrite: false,
            unproven: false,
            extent,
            retired: false,
        };
        Ok(())
    }

    /// Its files are about to be removed: waits for a flush that runs, and has all later ones fail.
    pub fn retire(&self) {
        self.commit.lock().retired = true;
    }

    /// Flushes, and notes how long the map file is, so that damage is noticed when it is opened again. The live map
    /// goes; nobody may use the delta afterwards.
    ///
    /// # Errors
    /// As [`Delta::flush`]; the live map stays then, for a next start before a reboot.
    pub fn close(&self) -> Result<(), DeltaError> {
        self.flush()?;
        let mut commit = self.commit.lock();
        let root = MapRoot { generation: commit.root.generation, floor: commit.tail };
        let modified = self.modified_ns();
        if root != commit.root || modified != self.spec.modified_ns || commit.extent.0 != self.spec.size {
            let done = self.footing.roots.commit_sized(root, modified, commit.extent.0);
            done.map_err(DeltaError::io("writing the disk's record"))?;
            commit.root = root;
        }
        self.footing.live.remove(self.spec.disk).map_err(DeltaError::io("removing the live map"))
    }
}
