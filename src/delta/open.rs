//! Opens and closes a delta.
//!
//! What must hold: the live map of this boot is authoritative when there is one; otherwise the map file is. Everything
//! that the authoritative one says was acknowledged is present, or the delta does not open.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::carry::WrittenBlocks;
use super::commit::{SYNCING_DATA, SYNCING_MAP};
use super::flush::WholeRange;
use super::gate::FlushGate;
use super::kept::KeptBlocks;
use super::map::LiveMap;
use super::ranges::RangeLock;
use super::recovery::{check_live, epochs_of_given_up, is_ours, open_map_file, replay};
use super::space::Space;
use super::{Delta, DeltaError, DeltaIo, DeltaSpec};
use crate::crypt::Cipher;
use crate::format::layout::data_path;
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, Open};
use crate::mutant::Mutant;

const GIVEN_UP: &str = "its pool was gone; what was not flushed before is lost";

impl Delta {
    /// Opens the delta of a disk: from its live map after the death of a worker, from its map file after a reboot.
    ///
    /// # Errors
    /// `Damaged` and `DataMissing` when the store lacks what was acknowledged; errors of the storage.
    pub fn open(spec: DeltaSpec, delta_io: DeltaIo) -> Result<Self, DeltaError> {
        Self::open_with(spec, delta_io, Cipher::Plain)
    }

    /// As [`Delta::open`]; `cipher` says how the bytes of the data file are stored.
    ///
    /// # Errors
    /// As [`Delta::open`].
    pub fn open_with(spec: DeltaSpec, delta_io: DeltaIo, cipher: Cipher) -> Result<Self, DeltaError> {
        let fail = |operation| DeltaError::io(operation);
        let data_name = data_path(spec.disk);
        let data = match delta_io.medium.open(&data_name, Open::Existing) {
            Ok(file) => Some(cipher.over(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(fail("opening the data file")(e)),
        };
        let identity = match &data {
            Some(data) => data.identity().map_err(fail("opening the data file"))?,
            None => (0, 0),
        };
        let (journal, commit) = open_map_file::<()>(&spec, &*delta_io.medium)?;
        let last_record = journal.as_ref().map(|journal| journal.last);
        // Without a live map too: all processes may have been killed, and the live maps be gone with their container, while
        // the page cache has a record that is not on the medium. Records below the floor are.
        let is_unsure = journal.as_ref().is_some_and(|journal| journal.end > spec.root.floor);
        let live = delta_io.live.existing(spec.disk).map_err(fail("opening the live map"))?;
        let mut given_up = None;
        let live = match live {
            Some(live) if is_ours(&live, &spec, identity)? => Some(live),
            Some(live) => {
                given_up = epochs_of_given_up(&live, &spec);
                None
            }
            None => None,
        };
        live.as_ref().map_or(Ok(()), |live| check_live(live, &spec))?;
        let taken_over = live.is_some();
        let map = match live {
            Some(live) => LiveMap::new(live),
            None => {
                let durable = journal.as_ref().zip(commit.file.as_deref());
                replay(&spec, &delta_io, durable, data.as_deref(), identity).inspect_err(|_| {
                    // Files that do not fit take no memory.
                    let _ = delta_io.live.abandon(spec.disk);
                })?
            }
        };
        let delta = Self {
            spec,
            map,
            cipher,
            data: RwLock::new(data),
            ranges: RangeLock::default(),
            commit: Mutex::new(commit),
            map_bytes: AtomicU64::new(0),
            gate: FlushGate::default(),
            lost: AtomicU64::new(0),
            redone: AtomicU64::new(0),
            unsynced: AtomicBool::new(true),
            written: WrittenBlocks::unknown(),
            kept: KeptBlocks::default(),
            unlisted: AtomicBool::new(true),
            failure: Mutex::new(None),
            space: Space::default(),
            delta_io,
        };
        delta.commit.lock().maybe_unsynced = taken_over || is_unsure;
        if taken_over {
            // A sync failed under an earlier worker, or that worker was killed during a sync. Such a sync may have
            // failed too: the kernel reports a failure once, to one caller of fsync(2).
            let syncing = delta.word(LiveHeader::Syncing);
            let failed = delta.error_epoch() != 0;
            if failed || syncing & SYNCING_DATA != 0 {
                delta.lost.store(1, Ordering::Release);
            }
            if failed {
                // The records that were read may be in the page cache only.
                delta.commit.lock().rewrite = true;
            } else if syncing & SYNCING_MAP != 0 {
                // Each record is synced before the next one is written: only the last one may be there.
                delta.commit.lock().redo_from = last_record;
            }
            delta.put_back_carried(journal.as_ref())?;
            let pending = delta.word(LiveHeader::PendingShrink);
            if pending != 0 {
                delta.rewrite_lost_data(WholeRange::Held)?;
                delta.complete_shrink(pending - 1)?;
            }
        } else {
            if let Some((failed, opened)) = given_up {
                // As after a failed flush: a client that has the disk open learns that its writes may be lost.
                delta.set_word(LiveHeader::ErrorEpoch, failed + 1);
                delta.set_word(LiveHeader::OpenedEpoch, opened);
                *delta.failure.lock() = Some(GIVEN_UP.into());
            }
            // They were put into the data file just now.
            delta.keep_placed(journal.as_ref());
            delta.delta_io.live.publish(delta.spec.disk).map_err(fail("creating the live map"))?;
        }
        Ok(delta)
    }

    /// Prepares for the removal of the files: waits for a running flush, and makes all later ones fail.
    pub fn retire(&self) {
        self.commit.lock().retired = true;
    }

    /// Whether nothing was ever written, discarded or resized: it shows what lies below, and has no files that anything
    /// needs.
    pub fn is_untouched(&self) -> bool {
        let (spec, commit) = (&self.spec, self.commit.lock());
        commit.root.generation == 0
            && (self.size(), self.overlap()) == (spec.size, spec.overlap)
            && self.map.pages().next().is_none()
    }

    /// Takes over from the delta below, which is being sealed, what a client has seen of the disk: its times, its
    /// errors, and the last resize.
    pub fn inherit(&self, sealed: &Self) {
        for word in
            [LiveHeader::ErrorEpoch, LiveHeader::OpenedEpoch, LiveHeader::Modified, LiveHeader::Resized]
        {
            self.set_word(word, sealed.word(word));
        }
        *self.failure.lock() = sealed.failure.lock().clone();
    }

    /// As [`Delta::inherit`], when the worker died in between: handles stay valid, and an epoch never falls.
    pub fn catch_up(&self, sealed: &Self) {
        if self.error_epoch() < sealed.error_epoch() {
            let modified = self.modified_ns().max(sealed.modified_ns());
            self.inherit(sealed);
            self.set_modified_ns(modified);
        }
    }

    /// Makes the delta a sealed layer: flushes it, and changes its files never again. The caller lets no client change it
    /// any more.
    /// Returns what a record says about it. Another call returns the same.
    ///
    /// # Errors
    /// As [`Delta::flush`].
    pub fn seal(&self) -> Result<DeltaSpec, DeltaError> {
        if !Mutant::LayerNotFlushed.is_active() {
            self.flush()?;
        }
        let mut commit = self.commit.lock();
        commit.refuse_retired()?;
        if !commit.sealed {
            self.settle(&mut commit)?;
        }
        commit.sealed = true;
        let root = MapRoot { generation: commit.root.generation, floor: commit.tail };
        let (size, overlap) = commit.bounds;
        Ok(DeltaSpec {
            disk: self.spec.disk,
            size,
            overlap,
            rises: self.spec.rises,
            modified_ns: self.modified_ns(),
            root,
        })
    }

    /// Flushes, and notes the length of the map file, so that the next open notices damage. Removes the live map. No
    /// caller may use the delta afterwards.
    ///
    /// # Errors
    /// As [`Delta::flush`]. The live map then stays, for the next start of this boot.
    pub fn close(&self) -> Result<(), DeltaError> {
        self.flush()?;
        let mut commit = self.commit.lock();
        if !commit.sealed {
            self.settle(&mut commit)?;
        }
        let root = MapRoot { generation: commit.root.generation, floor: commit.tail };
        let modified = self.modified_ns();
        if root != commit.root || modified != self.spec.modified_ns || commit.bounds.0 != self.spec.size {
            let done = self.delta_io.roots.commit_sized(root, modified, commit.bounds.0);
            done.map_err(DeltaError::io("writing the disk's record"))?;
            commit.root = root;
        }
        self.delta_io.live.remove(self.spec.disk).map_err(DeltaError::io("removing the live map"))
    }
}
