//! Making a delta durable: the map file, flushes that join, and recovery.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::gate::FlushGate;
use super::guard::scopeguard;
use super::map::{Captured, LiveMap, Take};
use super::ranges::RangeLock;
use super::{Delta, DeltaError, DeltaSpec, Footing, data_name, map_name};
use crate::format::journal::{Expected, HEADER, Journal, MapHeader, ReadError, Record};
use crate::format::record::MapRoot;
use crate::format::{BLOCK, FormatError, Kind, MAX_DISK_SIZE};
use crate::io::{LiveArena, LiveFile, LiveHeader, MediumFile, Open, is_full, sys};
use crate::sabotage::{Sabotage, limit, linger, sabotaged};

const LIVE_MAGIC: u64 = 0x0001_4556_494c_594c; // "LYLIVE", layout 1
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
}

/// State of the map file; who has it may append.
#[derive(Default)]
pub(super) struct Commit {
    root: MapRoot,
    /// Highest generation that a file was written for.
    tried: u64,
    file: Option<Arc<dyn MediumFile>>,
    nonce: u64,
    tail: u64,
    /// The file has zeros up to here.
    filled: u64,
    first: u64,
    /// The file may grow to this, because there was no space for a new one.
    patience: u64,
    seq: u64,
    /// The next flush writes a new map file.
    rewrite: bool,
    /// An earlier worker may have written records that it did not sync.
    unproven: bool,
    /// Size and overlap as the file has them.
    extent: (u64, u64),
    /// The disk was removed: no file of it is made any more.
    retired: bool,
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
struct Taken<'a> {
    delta: &'a Delta,
    captured: Captured,
    durable: bool,
}

impl Taken<'_> {
    fn end(mut self, result: Result<(), DeltaError>) -> Result<(), DeltaError> {
        self.durable = result.is_ok();
        result
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.durable {
            self.delta.map.done(&self.captured);
            return;
        }
        self.delta.unsynced.store(true, Ordering::Release);
        if !sabotaged(Sabotage::WordsNotGivenBack) {
            self.delta.map.failed(&self.captured);
        }
    }
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
            for (first, end) in self.map.unflushed_data() {
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
        let take = if full { Take::All } else { Take::Changed };
        let early =
            sabotaged(Sabotage::NoteClearedFirst).then(|| self.unsynced.swap(false, Ordering::AcqRel));
        linger(Sabotage::NoteClearedFirst);
        let (captured, extent) = self.map.take(take, || (self.size(), self.overlap()));
        // After the words: a word is set after this flag, so the data of every word taken is synced below.
        let was_unsynced = early.unwrap_or_else(|| self.unsynced.swap(false, Ordering::AcqRel));
        let taken = Taken { delta: self, captured, durable: false };
        let captured = &taken.captured;
        let result = (|| {
            if sabotaged(Sabotage::MapBeforeData) {
                self.journal(commit, extent, captured, full)?;
            }
            if was_unsynced
                && !sabotaged(Sabotage::DataNotSynced)
                && let Some(data) = self.data.read().clone()
            {
                self.sync_data(&*data)?;
                self.list_data()?;
            }
            if captured.runs.is_empty() && extent == commit.extent && !commit.rewrite {
                return self.prove(commit);
            }
            self.journal(commit, extent, captured, full)
        })();
        taken.end(result)
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
            let (captured, ()) = self.map.take(Take::All, || ());
            let taken = Taken { delta: self, captured, durable: false };
            let result = self.sync_for_rewrite();
            let result = result.and_then(|()| self.journal(commit, (size, overlap), &taken.captured, true));
            return taken.end(result);
        }
        if size > commit.extent.0 {
            // A cut after growth that was not flushed: the file was cut to the old end for it, and that has to be
            // durable before a record says that there is more.
            self.sync_for_rewrite()?;
        }
        self.journal(commit, (size, overlap), &Captured::default(), false)
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

    /// Notes for the next worker that this one may die without having heard how a sync ended.
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

    fn journal(
        &self,
        commit: &mut Commit,
        extent: (u64, u64),
        captured: &Captured,
        full: bool,
    ) -> Result<(), DeltaError> {
        let (size, overlap) = extent;
        let record = Record { size, overlap, modified_ns: self.modified_ns(), runs: captured.runs.clone() };
        if full {
            self.rewrite(commit, &record)?
        } else {
            self.append(commit, &record)?
        }
        commit.extent = extent;
        Ok(())
    }

    fn append(&self, commit: &mut Commit, record: &Record) -> Result<(), DeltaError> {
        let Some(file) = commit.file.clone() else { return self.rewrite(commit, record) };
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

    /// Writes a new map file that says what `record` says, and makes it the root.
    fn rewrite(&self, commit: &mut Commit, record: &Record) -> Result<(), DeltaError> {
        let (disk, medium) = (self.spec.disk, &self.footing.medium);
        let header =
            MapHeader { disk, generation: commit.tried.max(commit.root.generation) + 1, nonce: random() };
        // Also after a failure: nobody knows which record is durable, so no file is written twice.
        commit.tried = header.generation;
        let mut bytes = header.encode();
        bytes.extend(record.encode(header.nonce, 1));
        let write = || {
            let file = medium.open(&map_name(disk, header.generation), Open::Create)?;
            file.set_len(0)?;
            file.write_at(&bytes, 0)?;
            Ok(file)
        };
        let file = write().map_err(|e| {
            // It was never named by a record, and takes space that may be what is missing.
            let _ = medium.remove(&map_name(disk, header.generation));
            DeltaError::io("writing a new map file")(e)
        })?;
        let root = MapRoot { generation: header.generation, floor: bytes.len() as u64 };
        let durable = || {
            file.sync_data()?;
            medium.sync_dir("deltas")?;
            self.footing.roots.commit(root, record.modified_ns)
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
        let len = bytes.len() as u64;
        *commit = Commit {
            root,
            tried: header.generation,
            file: Some(file),
            nonce: header.nonce,
            tail: len,
            filled: len,
            first: len,
            patience: 0,
            seq: 2,
            rewrite: false,
            unproven: false,
            extent: (record.size, record.overlap),
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
        if root != commit.root || modified != self.spec.modified_ns {
            let done = self.footing.roots.commit(root, modified);
            done.map_err(DeltaError::io("writing the disk's record"))?;
            commit.root = root;
        }
        self.footing.live.remove(self.spec.disk).map_err(DeltaError::io("removing the live map"))
    }
}

/// The data file has the blocks that the map file says it has.
fn check_data(
    journal: Option<&Journal>,
    data: Option<&dyn MediumFile>,
    file: &str,
) -> Result<(), DeltaError> {
    let end = journal.map_or(0, |journal| journal.map.data_end());
    if end == 0 {
        return Ok(());
    }
    let has = data.map_or(Ok(0), MediumFile::len).map_err(DeltaError::io("opening the data file"))?;
    let needs = (end - 1) * BLOCK;
    if has > needs { Ok(()) } else { Err(DeltaError::DataMissing { file: file.into(), has, needs }) }
}

/// A live map has no checksum; but numbers that are not possible would end in a map file that nobody can read.
fn check_live(live: &LiveFile, spec: &DeltaSpec) -> Result<(), DeltaError> {
    let word = |word| live.header(word).load(Ordering::Acquire);
    let (size, overlap, pending) =
        (word(LiveHeader::Size), word(LiveHeader::Overlap), word(LiveHeader::PendingShrink));
    let pages = live.pages(0).last().map_or(0, |last| last + 1);
    let why = if size > MAX_DISK_SIZE || overlap > size.min(spec.overlap) || pending > size + 1 {
        format!("size {size}, overlap {overlap}, size to cut to {}", pending.wrapping_sub(1))
    } else if pages > LiveMap::PAGES_OF_LARGEST_DISK {
        format!("page {} is behind the largest disk", pages - 1)
    } else {
        return Ok(());
    };
    let source = FormatError { kind: Kind::Value, structure: "live map", detail: why };
    Err(DeltaError::Damaged { file: format!("{}.live", spec.disk), source })
}

/// Whether a worker of this version can take over a live map with this magic; the layout is in the upper 16 bits.
pub(super) fn check_layout(disk: u64, magic: u64) -> Result<(), DeltaError> {
    const NAME: u64 = (1 << 48) - 1;
    if magic & NAME == LIVE_MAGIC & NAME && magic != LIVE_MAGIC {
        let (has, knows) = (magic >> 48, LIVE_MAGIC >> 48);
        return Err(DeltaError::LiveLayout { disk, has, knows });
    }
    Ok(())
}

fn is_ours(live: &LiveFile, spec: &DeltaSpec, data: (u64, u64)) -> Result<bool, DeltaError> {
    let word = |word| live.header(word).load(Ordering::Acquire);
    check_layout(spec.disk, word(LiveHeader::Magic))?;
    let inode = (word(LiveHeader::Device), word(LiveHeader::Inode));
    let ours = word(LiveHeader::Magic) == LIVE_MAGIC
        && word(LiveHeader::Disk) == spec.disk
        && word(LiveHeader::Boot) == sys::boot_number()
        && (inode == data || inode.1 == 0);
    if !ours {
        tracing::warn!(
            disk = spec.disk,
            "a live map belongs to other files than the store's and is not used"
        );
    }
    Ok(ours)
}

impl Delta {
    /// Whether this version can take over the live maps of an arena, which another worker may be using.
    ///
    /// # Errors
    /// `LiveLayout` when one has another layout; what the storage says.
    pub fn probe_arena(arena: &File) -> Result<(), DeltaError> {
        let maps = LiveArena::list(arena).map_err(DeltaError::io("reading the arena of live maps"))?;
        maps.into_iter().try_for_each(|(disk, magic)| check_layout(disk, magic))
    }

    /// Whether this version can take over the live maps in `dir`, which another worker may be using.
    ///
    /// # Errors
    /// `LiveLayout` when one has another layout; what the storage says.
    pub fn probe_live(dir: &Path) -> Result<(), DeltaError> {
        let fail = || DeltaError::io("reading a live map");
        let entries = match std::fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(fail())?,
        };
        for entry in entries {
            let name = entry.map_err(fail())?.file_name();
            let disk = name.to_str().and_then(|n| n.strip_suffix(".live")).and_then(|n| n.parse().ok());
            let Some(disk) = disk else { continue };
            let mut magic = [0; 8];
            match std::fs::File::open(dir.join(&name)).and_then(|mut file| file.read_exact(&mut magic)) {
                // It was removed in this moment.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(fail())?,
            }
            check_layout(disk, u64::from_le_bytes(magic))?;
        }
        Ok(())
    }
}

fn open_map_file(spec: &DeltaSpec, footing: &Footing) -> Result<(Option<Journal>, Commit), DeltaError> {
    let root = spec.root;
    if root.generation == 0 {
        let extent = (spec.size, spec.overlap);
        return Ok((None, Commit { rewrite: true, extent, ..Commit::default() }));
    }
    let name = map_name(spec.disk, root.generation);
    let fail = || DeltaError::io("opening the map file");
    let file = footing.medium.open(&name, Open::Existing).map_err(fail())?;
    let len = file.len().map_err(fail())?;
    let expected = Expected {
        disk: spec.disk,
        generation: root.generation,
        floor: root.floor,
        size: spec.size,
        overlap: spec.overlap,
        modified_ns: spec.modified_ns,
    };
    let journal = Journal::read(|buf, at| file.read_at(buf, at), len, &expected).and_then(|journal| {
        let why = match journal.raised {
            // What was cut off would show the base again.
            Some(raised) => format!("record {} has a larger overlap than the one before", raised.seq),
            None if journal.records == 0 => "it has no record".to_owned(),
            None => return Ok(journal),
        };
        Err(FormatError { kind: Kind::Value, structure: "map file", detail: why }.into())
    });
    let journal = match journal {
        Ok(journal) => journal,
        Err(ReadError::Format(source)) => return Err(DeltaError::Damaged { file: name, source }),
        Err(ReadError::Source(error)) => return Err(DeltaError::io("reading the map file")(error)),
    };
    let extent = (journal.size, journal.overlap);
    let commit = Commit {
        root,
        tried: root.generation,
        file: Some(file),
        nonce: journal.header.nonce,
        tail: journal.end,
        filled: if journal.torn { journal.end } else { len },
        first: HEADER as u64,
        patience: 0,
        seq: journal.next_seq,
        rewrite: journal.torn,
        unproven: false,
        extent,
        retired: false,
    };
    Ok((Some(journal), commit))
}

/// Makes a live map of what is durable.
fn replay(
    spec: &DeltaSpec,
    footing: &Footing,
    journal: Option<Journal>,
    data: (u64, u64),
) -> Result<LiveMap, DeltaError> {
    let fail = || DeltaError::io("making the live map");
    let map = LiveMap::new(footing.live.fresh(spec.disk).map_err(fail())?);
    let (mut size, mut overlap, mut modified) = (spec.size, spec.overlap, spec.modified_ns);
    if let Some(mut journal) = journal {
        (size, overlap, modified) = (journal.size, journal.overlap, journal.modified_ns);
        let forget = if sabotaged(Sabotage::ZeroForgotten) { 0 } else { overlap };
        journal.map.forget_zeros_above(forget);
        map.load(&journal.map).map_err(fail())?;
    }
    let set = |word, value| map.live().header(word).store(value, Ordering::Release);
    set(LiveHeader::Disk, spec.disk);
    set(LiveHeader::Device, data.0);
    set(LiveHeader::Inode, data.1);
    set(LiveHeader::Size, size);
    set(LiveHeader::Overlap, overlap);
    set(LiveHeader::Modified, modified as u64);
    set(LiveHeader::Boot, sys::boot_number());
    set(LiveHeader::Magic, LIVE_MAGIC);
    Ok(map)
}
