//! The map of a disk, attached or not.

use std::sync::atomic::Ordering;

use super::DiskNode;
use crate::delta::Delta;
use crate::disk::Below;
use crate::disk::map::{self, BaseView, Map};
use crate::store::StoreError;

impl DiskNode {
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
        match Delta::survey_durable(&Self::spec(&record), &*self.medium) {
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
