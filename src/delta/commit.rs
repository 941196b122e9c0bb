//! The map file: appending records to it, and putting a new one in its place.
//!
//! What must hold: one record is synced before the next is appended. After a failure that leaves open what is durable, the
//! file is not appended to again; a new one is written, which counts when the disk's record names it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::pieces::{NewFile, Piece};
use super::{Delta, DeltaError};
use crate::format::journal::{MapHeader, Record};
use crate::format::layout::{DELTAS, map_path};
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, MediumFile, is_full, sys};
use crate::mutant::{Mutant, limit};

/// Zeros written ahead of the journal's end, so that an append changes no metadata of the filesystem.
const AHEAD: u64 = 16 << 10;
/// Bits of [`LiveHeader::Syncing`].
pub(super) const SYNCING_DATA: u64 = 1;
pub(super) const SYNCING_MAP: u64 = 2;

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

    pub(super) fn refuse_retired(&self) -> Result<(), DeltaError> {
        let removed = || io::Error::new(io::ErrorKind::NotFound, "the disk was removed");
        if self.retired { Err(DeltaError::io("flush")(removed())) } else { Ok(()) }
    }
}

/// Where the records of a flush go.
pub(super) enum Target {
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
    pub(super) fn write_record(
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

    /// Syncs the records that an earlier worker wrote: they have been read, and whether they are durable is not known.
    pub(super) fn prove(&self, commit: &mut Commit) -> Result<(), DeltaError> {
        match commit.file.clone() {
            Some(file) if commit.unproven => self.sync_map(commit, &file),
            _ => Ok(()),
        }
    }

    fn sync_map(&self, commit: &mut Commit, file: &Arc<dyn MediumFile>) -> Result<(), DeltaError> {
        // Until it succeeds, what of the file is durable is not known: a new one is written next time.
        commit.rewrite = true;
        if !Mutant::JournalNotSynced.is_active() {
            self.sync_begins(SYNCING_MAP);
            file.sync_data().map_err(|error| self.poison("syncing the map file", error))?;
            self.sync_ended(SYNCING_MAP);
        }
        (commit.rewrite, commit.unproven) = (false, false);
        Ok(())
    }

    /// Begins a new map file.
    pub(super) fn new_file(&self, commit: &mut Commit) -> Result<NewFile, DeltaError> {
        let generation = commit.tried.max(commit.root.generation) + 1;
        // Also after a failure: which record is durable is not known, so no file is written twice.
        commit.tried = generation;
        let header = MapHeader { disk: self.spec.disk, generation, nonce: random() };
        NewFile::begin(self.footing.medium.clone(), header).map_err(DeltaError::io("writing a new map file"))
    }

    /// Makes a new map file, which has everything, durable and the root.
    pub(super) fn commit_file(
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
            medium.sync_dir(DELTAS)?;
            self.footing.roots.commit_sized(root, new.modified_ns, extent.0)
        };
        // Until all of it succeeds, which file a power cut leaves is not known: neither is appended to.
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
            let _ = medium.remove(&map_path(disk, before));
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

    pub(super) fn poison(&self, operation: &'static str, source: io::Error) -> DeltaError {
        *self.failure.lock() = Some(format!("{operation}: {source}"));
        self.map.live().header(LiveHeader::ErrorEpoch).fetch_add(1, Ordering::AcqRel);
        tracing::error!(disk = self.spec.disk, operation, error = %source, "a flush failed; writes are refused until the disk is opened again");
        // A lack of space that shows only now has lost what was acknowledged: no caller may take it for one to wait out.
        let source = if is_full(&source) { io::Error::from_raw_os_error(libc::EIO) } else { source };
        DeltaError::Io { operation, source }
    }

    /// Notes for the next worker that this one may die without having heard how a sync ended (D21).
    pub(super) fn sync_begins(&self, what: u64) {
        self.map.live().header(LiveHeader::Syncing).fetch_or(what, Ordering::AcqRel);
    }

    /// It succeeded, or another file has what it was for.
    pub(super) fn sync_ended(&self, what: u64) {
        self.map.live().header(LiveHeader::Syncing).fetch_and(!what, Ordering::AcqRel);
    }
}
