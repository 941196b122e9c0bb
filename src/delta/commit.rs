//! Writes the map file: appends records, and replaces the file.
//!
//! What must hold: a record is synced before the next record is appended. After a failure that leaves it unknown what
//! is durable, nothing is appended to the file. A new file is written instead; it counts once the disk's record names
//! it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::carry::CarryState;
use super::record_builder::{NewMapFile, RecordBuilder};
use super::{Delta, DeltaError};
use crate::format::journal::{MapHeader, Record};
use crate::format::layout::{DELTAS, map_path};
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, MediumFile, is_full, sys};
use crate::mutant::{Mutant, limit};

/// Zeros written ahead of the journal's end, so that an append changes no metadata of the filesystem.
const AHEAD: u64 = 16 << 10;
/// Bytes that are read and written again at a time.
const REDO: usize = 256 << 10;
/// The same of a map file whose records carry blocks.
const AHEAD_OF_CARRIED: u64 = 256 << 10;
/// Free space of the filesystem that a flush leaves when it carries blocks.
const LEFT_FREE: u64 = 64 << 20;
/// Bits of [`LiveHeader::Syncing`].
pub(super) const SYNCING_DATA: u64 = 1;
pub(super) const SYNCING_MAP: u64 = 2;

/// Keeps the root of a disk's durable map.
pub trait RootStore: Send + Sync {
    /// Durably replaces the root.
    fn commit(&self, root: MapRoot, modified_ns: i64) -> io::Result<()>;

    /// As [`RootStore::commit`]. `_size` is the size of the disk at the root's floor of the map file.
    ///
    /// # Errors
    /// As [`RootStore::commit`].
    fn commit_sized(&self, root: MapRoot, modified_ns: i64, _size: u64) -> io::Result<()> {
        self.commit(root, modified_ns)
    }
}

/// State of the map file. The holder of its lock may append.
#[derive(Default)]
pub(super) struct MapFileState {
    pub(super) root: MapRoot,
    /// Highest generation for which a file was started.
    pub(super) last_started: u64,
    pub(super) file: Option<Arc<dyn MediumFile>>,
    pub(super) nonce: u64,
    pub(super) tail: u64,
    /// The file is zeroed_to with zeros up to this offset.
    pub(super) zeroed_to: u64,
    /// Length of the file when it was last rewritten; after a restart, the length that a rewrite would have.
    pub(super) base_len: u64,
    /// The file may grow to this many bytes before it is rewritten, because there was no space for a new file.
    pub(super) size_allowance: u64,
    pub(super) seq: u64,
    /// The next flush writes a new map file.
    pub(super) rewrite: bool,
    /// An earlier worker may have written the last record without syncing it. No record is appended before that is done.
    pub(super) maybe_unsynced: bool,
    /// A sync of an earlier worker may have failed: the next one finds clean the bytes from here on, which are not on the
    /// medium, so they are written again before it (D21).
    pub(super) redo_from: Option<u64>,
    /// Size and overlap in the last record of the file.
    pub(super) bounds: (u64, u64),
    /// What the file carries.
    pub(super) carry: CarryState,
    /// The disk was removed: no file of it may be created any more.
    pub(super) retired: bool,
    /// The delta is a sealed layer: everything is durable, and its files never change again.
    pub(super) sealed: bool,
}

impl MapFileState {
    pub(super) fn allocated(&self) -> u64 {
        self.file.as_ref().and_then(|f| f.allocated().ok()).unwrap_or(0)
    }

    pub(super) fn refuse_retired(&self) -> Result<(), DeltaError> {
        let removed = || io::Error::new(io::ErrorKind::NotFound, "the disk was removed");
        if self.retired { Err(DeltaError::io("flush")(removed())) } else { Ok(()) }
    }
}

/// Where a flush writes its records.
pub(super) enum Target {
    /// To the end of the map file. Each record is synced before the next one is written: of two unsynced records a
    /// power cut may leave only the later one, which would read as damage.
    Append,
    /// To a new file, which counts once its root is committed.
    New(NewMapFile),
}

/// Writes the bytes of a file from `from` on in place, so that the kernel counts them as not written.
fn write_again(file: &dyn MediumFile, from: u64) -> io::Result<()> {
    let mut bytes = vec![0; REDO];
    let mut at = from;
    loop {
        let got = file.read_at(&mut bytes, at)?;
        if got == 0 {
            return Ok(());
        }
        file.write_at(&bytes[..got], at)?;
        at += got as u64;
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the clock must do: the nonce guards against stale bytes, not against attackers.
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => sys::now_ns() as u64,
    }
}

impl Delta {
    pub(super) fn write_record(
        &self,
        commit: &mut MapFileState,
        target: &mut Target,
        (size, overlap): (u64, u64),
        builder: RecordBuilder,
    ) -> Result<(), DeltaError> {
        let (modified_ns, runs) = (self.modified_ns(), builder.into_runs());
        let record = Record { size, overlap, modified_ns, runs, carried: None };
        match target {
            Target::Append => {
                self.append(commit, &record.encode(commit.nonce, commit.seq))?;
                commit.bounds = (size, overlap);
                commit.carry.settle();
                self.kept.settle();
                Ok(())
            }
            Target::New(file) => file.append(&record).map_err(DeltaError::io("writing a new map file")),
        }
    }

    /// Writes zeros ahead for a record of `len` bytes that carries blocks. Returns false when there is too little space: the record must
    /// not take what a flush without it needs.
    ///
    /// # Errors
    /// Errors of the storage.
    pub(super) fn write_zeros_ahead(
        &self,
        commit: &mut MapFileState,
        len: usize,
    ) -> Result<bool, DeltaError> {
        let fail = DeltaError::io("writing zeros to the map file");
        let Some(file) = commit.file.clone() else { return Ok(false) };
        let end = commit.tail + len as u64;
        if end <= commit.zeroed_to {
            return Ok(true);
        }
        let ahead = limit(AHEAD_OF_CARRIED, 8 << 10);
        let space = self.delta_io.medium.space();
        if space.map_or(true, |space| space.available < limit(LEFT_FREE, 0) + ahead) {
            return Ok(false);
        }
        let zeros = vec![0; (end - commit.zeroed_to + ahead) as usize];
        match file.write_at(&zeros, commit.zeroed_to) {
            Ok(()) => commit.zeroed_to += zeros.len() as u64,
            Err(error) if is_full(&error) => return Ok(false),
            Err(error) => return Err(fail(error)),
        }
        Ok(true)
    }

    /// Appends the bytes of a record, and makes them durable.
    pub(super) fn append(&self, commit: &mut MapFileState, bytes: &[u8]) -> Result<(), DeltaError> {
        let Some(file) = commit.file.clone() else {
            return Err(DeltaError::io("appending to the map file")(io::ErrorKind::NotFound.into()));
        };
        // Of two unsynced records a power cut may leave only the later one, which would read as damage (D98).
        self.sync_inherited(commit)?;
        let end = commit.tail + bytes.len() as u64;
        if end > commit.zeroed_to {
            let zeros = vec![0; (end - commit.zeroed_to + limit(AHEAD, 2 << 10)) as usize];
            // An optimisation only: without space for the zeros, the record itself may still fit.
            if file.write_at(&zeros, commit.zeroed_to).is_ok() {
                commit.zeroed_to += zeros.len() as u64;
            }
        }
        if let Err(error) = file.write_at(bytes, commit.tail) {
            // The missing bytes of the record may be zeros, which are in the file already. The record would then count,
            // although the caller is told that it failed. A new file does not contain it.
            commit.rewrite = true;
            return Err(DeltaError::io("appending to the map file")(error));
        }
        self.sync_map(commit, &file)?;
        commit.tail = end;
        commit.zeroed_to = commit.zeroed_to.max(end);
        commit.seq += 1;
        Ok(())
    }

    /// Syncs the records that an earlier worker wrote. They were read, but may not be durable.
    pub(super) fn sync_inherited(&self, commit: &mut MapFileState) -> Result<(), DeltaError> {
        match commit.file.clone() {
            Some(file) if commit.maybe_unsynced => self.sync_map(commit, &file),
            _ => Ok(()),
        }
    }

    fn sync_map(&self, commit: &mut MapFileState, file: &Arc<dyn MediumFile>) -> Result<(), DeltaError> {
        // Until the sync succeeds it is unknown what of the file is durable, so the next flush writes a new file.
        commit.rewrite = true;
        if let Some(from) = commit.redo_from {
            let failed = DeltaError::io("writing again what a sync of the map file may have lost");
            write_again(&**file, from).map_err(failed)?;
        }
        if !Mutant::JournalNotSynced.is_active() {
            self.sync_begins(SYNCING_MAP);
            file.sync_data().map_err(|error| self.poison("syncing the map file", error))?;
            self.sync_ended(SYNCING_MAP);
        }
        (commit.rewrite, commit.maybe_unsynced, commit.redo_from) = (false, false, None);
        Ok(())
    }

    /// Starts a new map file.
    pub(super) fn new_file(
        &self,
        commit: &mut MapFileState,
        carries: bool,
    ) -> Result<NewMapFile, DeltaError> {
        let generation = commit.last_started.max(commit.root.generation) + 1;
        // A generation is used once, also after a failure: it is unknown which record is durable.
        commit.last_started = generation;
        let header = MapHeader { disk: self.spec.disk, generation, nonce: random(), carries };
        NewMapFile::start(self.delta_io.medium.clone(), header)
            .map_err(DeltaError::io("writing a new map file"))
    }

    /// Makes a complete new map file durable, then its root.
    pub(super) fn commit_file(
        &self,
        commit: &mut MapFileState,
        mut new: NewMapFile,
        bounds: (u64, u64),
    ) -> Result<(), DeltaError> {
        let (disk, medium) = (self.spec.disk, &self.delta_io.medium);
        let (header, len, next_seq) = (new.header, new.len, new.next_seq);
        let file = new.keep().map_err(DeltaError::io("writing a new map file"))?;
        let root = MapRoot { generation: header.generation, floor: len };
        let durable = || {
            file.sync_data()?;
            medium.sync_dir(DELTAS)?;
            self.delta_io.roots.commit_sized(root, new.modified_ns, bounds.0)
        };
        // Until all steps succeed it is unknown which file a power cut leaves, so nothing is appended to either.
        commit.rewrite = true;
        match durable() {
            Err(e) if is_full(&e) => {
                return Err(DeltaError::io("writing the disk's record")(e));
            }
            other => other.map_err(|e| self.poison("making a new map file durable", e))?,
        }
        self.sync_ended(SYNCING_MAP);
        // Also removes the files of failed rewrites in between. A leftover is harmless; `plyfs check` names it.
        for before in commit.root.generation.max(1)..header.generation {
            let _ = medium.remove(&map_path(disk, before));
        }
        self.kept.settle();
        *commit = MapFileState {
            root,
            last_started: header.generation,
            file: Some(file),
            nonce: header.nonce,
            tail: len,
            zeroed_to: len,
            base_len: len,
            size_allowance: 0,
            seq: next_seq,
            rewrite: false,
            maybe_unsynced: false,
            redo_from: None,
            bounds,
            carry: CarryState::new(header.carries),
            retired: false,
            sealed: false,
        };
        Ok(())
    }

    /// Notes that writes of this disk were lost with `pending`, the delta below whose sealing is under way, if a flush of
    /// that failed since its epoch was `before`: a handle that was opened before may not write. A flush that began before
    /// the sealing may have failed earlier.
    pub fn fail_with(&self, pending: &Self, before: u64) {
        let epoch = pending.error_epoch();
        if epoch != before || epoch > self.error_epoch() {
            *self.failure.lock() = pending.failure.lock().clone();
            self.map.live().header(LiveHeader::ErrorEpoch).fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The disk's record may not be on the medium as it is in memory: the next flush writes a new map file, and with it
    /// the record.
    pub fn write_map_anew(&self) {
        self.commit.lock().rewrite = true;
    }

    pub(super) fn poison(&self, operation: &'static str, source: io::Error) -> DeltaError {
        *self.failure.lock() = Some(format!("{operation}: {source}"));
        self.map.live().header(LiveHeader::ErrorEpoch).fetch_add(1, Ordering::AcqRel);
        tracing::error!(disk = self.spec.disk, operation, error = %source, "a flush failed; writes are refused until the disk is opened again");
        // ENOSPC from a sync means that acknowledged writes are lost. The caller must not take it for an ENOSPC that
        // passes.
        let source = if is_full(&source) { io::Error::from_raw_os_error(libc::EIO) } else { source };
        DeltaError::Io { operation, source }
    }

    /// Notes for the next worker that this worker may die before it learns the result of a sync (D21).
    pub(super) fn sync_begins(&self, what: u64) {
        self.map.live().header(LiveHeader::Syncing).fetch_or(what, Ordering::AcqRel);
    }

    /// The sync succeeded, or another file holds what it would have made durable.
    pub(super) fn sync_ended(&self, what: u64) {
        self.map.live().header(LiveHeader::Syncing).fetch_and(!what, Ordering::AcqRel);
    }
}
