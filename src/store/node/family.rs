//! What the record of a disk says about its owner, its deltas and its snapshots.

use super::DiskNode;
use crate::format::lineage::{Lineage, SnapshotEntry};

impl DiskNode {
    /// User, group and permission bits.
    pub fn owner(&self) -> (u32, u32, u32) {
        let record = self.writer.record.lock();
        (record.uid, record.gid, record.mode)
    }

    /// Numbers of the bases that it needs: its own, and the one that it is being put on.
    pub(in crate::store) fn bases(&self) -> Vec<u64> {
        self.writer.record.lock().bases().collect()
    }

    /// Its deltas and snapshots.
    pub fn lineage(&self) -> Lineage {
        self.writer.record.lock().lineage.clone()
    }

    /// Its first snapshot of which `is_it` is true.
    pub(in crate::store) fn find_snapshot(
        &self,
        is_it: impl Fn(&SnapshotEntry) -> bool,
    ) -> Option<SnapshotEntry> {
        self.writer.record.lock().lineage.snapshots.iter().find(|snapshot| is_it(snapshot)).cloned()
    }

    /// Calls `each` for each of its snapshots.
    pub(in crate::store) fn each_snapshot(&self, each: impl FnMut(&SnapshotEntry)) {
        self.writer.record.lock().lineage.snapshots.iter().for_each(each);
    }

    /// The number of its own delta.
    pub(in crate::store) fn delta_number(&self) -> u64 {
        self.writer.record.lock().lineage.delta
    }

    /// The numbers of all deltas whose files are its own, or that it needs.
    pub(in crate::store) fn numbers(&self) -> Vec<u64> {
        let record = self.writer.record.lock();
        record.lineage.deltas().chain(record.lineage.dropped.iter().copied()).collect()
    }

    /// Calls `each` for the number of each of its deltas.
    pub(in crate::store) fn each_delta(&self, each: impl FnMut(u64)) {
        self.writer.record.lock().lineage.deltas().for_each(each);
    }

    /// Calls `each` for the number of each of its deltas, with the generation of its map file.
    pub(in crate::store) fn each_delta_root(&self, mut each: impl FnMut(u64, u64)) {
        let record = self.record();
        each(record.lineage.delta, record.map.generation);
        record.lineage.layers.iter().for_each(|layer| each(layer.number, layer.map.generation));
    }
}
