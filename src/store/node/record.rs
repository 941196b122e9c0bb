//! The record of a disk, and the roots of its deltas in it.
//!
//! What must hold: the record in memory is the durable one, and a reader of it never waits for a sync. A disk whose files
//! are being removed gets no new record.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::NodeContext;
use crate::delta::RootStore;
use crate::format::layout;
use crate::format::record::{DiskRecord, MapRoot};
use crate::io::{MediumFile, Open, replace_or_restore};
use crate::store::records::{RECORD_LIMIT, RECORD_ROOM};

/// Writes the record of one disk. Each caller changes a part of it.
pub(super) struct RecordWriter {
    shared: Arc<NodeContext>,
    /// The durable record. Never locked through a system call, so no reader waits for a sync.
    pub(super) record: Mutex<DiskRecord>,
    /// Held while the record is replaced.
    pub(super) replacing: Mutex<()>,
    /// The disk's files are being removed, or are gone. Set while `replacing` is held.
    pub(super) retired: AtomicBool,
}

pub(super) fn removed() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the disk was removed")
}

impl RecordWriter {
    pub(super) fn new(record: DiskRecord, shared: Arc<NodeContext>) -> Self {
        Self {
            shared,
            record: Mutex::new(record),
            replacing: Mutex::new(()),
            retired: AtomicBool::new(false),
        }
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut DiskRecord)) -> io::Result<()> {
        let _replacing = self.replacing.lock();
        if self.retired.load(Ordering::Acquire) {
            return Err(removed());
        }
        let before = self.record.lock().clone();
        let mut next = before.clone();
        change(&mut next);
        // Whatever changed the lineage: the record says where each of its deltas lies.
        next.features.pools = self.shared.pools.listed_in(&next.lineage);
        next.forget_unneeded_keys();
        let bytes = next.encode();
        let room = if next.lineage.entries() > before.lineage.entries() { RECORD_ROOM } else { 0 };
        if bytes.len() as u64 + room > RECORD_LIMIT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it has as many snapshots and layers as its record can hold; remove snapshots first",
            ));
        }
        // A record that cannot be read again takes the disk away.
        DiskRecord::decode(&bytes).map_err(io::Error::other)?;
        let name = layout::disk_record(next.id);
        // The file that is replaced has wrapped keys, which must not stay in free space (D87).
        let old = before
            .features
            .encryption
            .as_ref()
            .map(|_| self.shared.medium.open(&format!("{}/{name}", layout::DISKS), Open::Existing));
        replace_or_restore(&*self.shared.medium, layout::DISKS, &name, &bytes, || before.encode())?;
        if let Some(old) = old
            && let Err(error) = old.and_then(|file| wipe(&*file))
        {
            tracing::warn!(disk = next.name, %error, "the old record of an encrypted disk is not overwritten; its wrapped keys may stay in free space");
        }
        let mut record = self.record.lock();
        self.shared.index.note(Some(&before), &next);
        *record = next;
        Ok(())
    }
}

/// Overwrites a file that has no name any more.
fn wipe(file: &dyn MediumFile) -> io::Result<()> {
    let len = file.len()?;
    file.write_at(&vec![0; usize::try_from(len).map_err(io::Error::other)?], 0)?;
    file.sync_data()
}

/// Keeps the root of one delta: that of the disk, or one whose sealing is under way.
pub(super) struct DeltaRoots {
    pub(super) writer: Arc<RecordWriter>,
    pub(super) delta: u64,
    /// Bytes from the start that fell through when the delta was made.
    pub(super) overlap: u64,
}

impl DeltaRoots {
    fn set(&self, root: MapRoot, modified_ns: i64, size: Option<u64>) -> io::Result<()> {
        let mut is_known = true;
        let change = |record: &mut DiskRecord| {
            // The size of a disk that was cut below its overlap is not recorded: the record keeps its original size and
            // overlap, and no more of the base may show.
            let current = size.filter(|size| *size >= self.overlap);
            if record.lineage.delta == self.delta {
                record.map = root;
                record.modified_ns = modified_ns;
                record.size_is_current = current.is_some();
                record.overlap = self.overlap;
                record.size = current.unwrap_or_else(|| record.size.max(self.overlap));
            } else if let Some(layer) = record.lineage.layers.iter_mut().find(|l| l.number == self.delta) {
                layer.map = root;
                layer.modified_ns = modified_ns;
                layer.size = current.unwrap_or(layer.size);
            } else if let Some(made) = record.lineage.rework.as_mut().filter(|r| r.layer.number == self.delta)
            {
                (made.layer.map, made.layer.modified_ns) = (root, modified_ns);
            } else {
                is_known = false;
            }
        };
        self.writer.update(change)?;
        if is_known { Ok(()) } else { Err(removed()) }
    }
}

impl RootStore for DeltaRoots {
    fn commit(&self, root: MapRoot, modified_ns: i64) -> io::Result<()> {
        self.set(root, modified_ns, None)
    }

    fn commit_sized(&self, root: MapRoot, modified_ns: i64, size: u64) -> io::Result<()> {
        self.set(root, modified_ns, Some(size))
    }
}
