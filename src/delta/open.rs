//! Opening a delta, and the end of its use.
//!
//! What must hold: the live map of this boot is authoritative when there is one, else the map file is; what the one that is
//! used says was acknowledged is there, or the delta does not open.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::commit::{SYNCING_DATA, SYNCING_MAP};
use super::flush::Whole;
use super::gate::FlushGate;
use super::map::LiveMap;
use super::ranges::RangeLock;
use super::recovery::{check_data, check_live, is_ours, open_map_file, replay};
use super::{Delta, DeltaError, DeltaSpec, Footing};
use crate::format::layout::data_path;
use crate::format::record::MapRoot;
use crate::io::{LiveHeader, Open};

impl Delta {
    /// Opens the delta of a disk: by its live map after a crash of the worker, by its map file after a reboot.
    ///
    /// # Errors
    /// `Damaged` and `DataMissing` when the store does not have what was acknowledged; what the storage says.
    pub fn open(spec: DeltaSpec, footing: Footing) -> Result<Self, DeltaError> {
        let fail = |operation| DeltaError::io(operation);
        let data_name = data_path(spec.disk);
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
            // and the kernel reports a failure once, to one caller of fsync(2).
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

    /// Its files are about to be removed: waits for a flush that runs, and has all later ones fail.
    pub fn retire(&self) {
        self.commit.lock().retired = true;
    }

    /// Flushes, and notes how long the map file is, so that damage is noticed when it is opened again. The live map
    /// goes; no caller may use the delta afterwards.
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
