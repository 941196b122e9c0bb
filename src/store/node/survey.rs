//! The map of a disk, attached or not.

use std::sync::atomic::Ordering;

use super::DiskNode;
use crate::delta::Delta;
use crate::disk::Below;
use crate::disk::changes::{self, Changes, View};
use crate::disk::map::{self, BaseView, Map};
use crate::format::lineage::SnapshotEntry;
use crate::format::record::DiskRecord;
use crate::store::StoreError;

impl DiskNode {
    /// What differs between two moments from byte `start` on: at most `most` runs. `since` names a snapshot; `None` is
    /// the base, or nothing. `until` names a snapshot; `None` is the disk as it is now.
    ///
    /// # Errors
    /// An unknown snapshot, or one that the later moment does not stand on; as [`DiskNode::attach`].
    pub fn changes(
        &self,
        since: Option<&str>,
        until: Option<&str>,
        start: u64,
        most: usize,
    ) -> Result<Changes, StoreError> {
        // Attaching, when it is needed, may wait for the base.
        let disk = match until {
            None => Some(self.peek().map_or_else(|| self.attach(), Ok)?),
            Some(_) => None,
        };
        let record = self.writer.record.lock().clone();
        self.check_base(&record)?;
        let base_size = self.base().map_or(0, |base| base.record().image.disk_size);
        let later = match (until, &disk) {
            (Some(name), _) => self.view(&record, self.snapshot_of(&record, name)?, base_size)?,
            (None, Some(disk)) => View::now(disk, base_size),
            (None, None) => View::now(&*self.attach()?, base_size),
        };
        let earlier = match since {
            None => View::base(base_size),
            Some(name) => {
                let snapshot = self.snapshot_of(&record, name)?;
                let layer = snapshot.layer.and_then(|place| record.lineage.layers.get(place));
                if layer.is_some_and(|layer| !later.stands_on(layer.number)) {
                    return Err(no_ancestor(&record.name, name, until));
                }
                self.view(&record, snapshot, base_size)?
            }
        };
        changes::between(&earlier, &later, start, most).map_err(|error| self.failed(error))
    }

    fn snapshot_of<'a>(&self, record: &'a DiskRecord, name: &str) -> Result<&'a SnapshotEntry, StoreError> {
        let object = || format!("snapshot {}@{name}", record.name);
        record
            .lineage
            .snapshot(name)
            .ok_or_else(|| StoreError::NotFound { object: object(), noun: "snapshot" })
    }

    fn view(
        &self,
        record: &DiskRecord,
        snapshot: &SnapshotEntry,
        base_size: u64,
    ) -> Result<View, StoreError> {
        let below = Below { chain: self.chain(record, snapshot.layer)?, ..Below::default() };
        Ok(View::frozen(below, snapshot.size, snapshot.overlap, base_size))
    }

    /// Where the bytes of the disk are, in so many cells at most; and whether the disk is attached. A detached disk
    /// stays detached: its durable map has the answer. A disk of which an earlier worker left a live map is attached.
    ///
    /// # Errors
    /// When the map is damaged; errors of the storage.
    pub fn map(&self, cells: usize) -> Result<(Map, bool), StoreError> {
        // Not a use of the disk: a client that looks at maps keeps no disk attached.
        if let Some(disk) = self.peek() {
            return Ok((disk.map(cells), true));
        }
        if self.inherited_live_map.load(Ordering::Acquire) && self.has_live_map()? {
            return Ok((self.attach()?.map(cells), true));
        }
        let record = self.writer.record.lock().clone();
        let base = match self.base() {
            Some(base) if self.check_base(&record).is_ok() => base.attach().ok(),
            _ => None,
        };
        let view = match &base {
            Some(base) => BaseView::of(base),
            None if record.backing.is_none() => BaseView::Blank,
            None => BaseView::Unknown,
        };
        let layers = Below { chain: self.chain(&record, record.lineage.below)?, ..Below::default() };
        match Delta::survey_durable(&Self::spec(&record), &*self.shared.pools.medium(record.lineage.delta)) {
            Ok(survey) => Ok((map::of_survey(&survey, &view, &layers, cells), false)),
            // A request may have attached it meanwhile and replaced its map file.
            Err(error) => match self.peek() {
                Some(disk) => Ok((disk.map(cells), true)),
                None => {
                    let object = format!("disk {}", record.name);
                    Err(StoreError::Disk { object, source: error.into() })
                }
            },
        }
    }
}

/// The error for a start that the end does not stand on.
fn no_ancestor(disk: &str, since: &str, until: Option<&str>) -> StoreError {
    let object = format!("snapshot {disk}@{since}");
    let why = match until {
        Some(until) => format!(
            "{disk}@{until} was not made from it: it is the later one, or the disk was rolled back in between; name the \
             earlier one first, or compare with the base"
        ),
        None => format!(
            "the disk was rolled back to an earlier state since; name a snapshot on which disk {disk} stands, or compare \
             with the base"
        ),
    };
    StoreError::invalid(object, why)
}
