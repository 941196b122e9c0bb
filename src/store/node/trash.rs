//! A disk that is in the trash.

use std::sync::atomic::Ordering;

use super::DiskNode;
use crate::format::features::Trashed;

impl DiskNode {
    /// Since when the disk is in the trash, if it is.
    pub fn trashed(&self) -> Option<Trashed> {
        if self.is_unlinked() { self.writer.record.lock().features.trash } else { None }
    }

    /// The disk as messages name it.
    pub(in crate::store) fn described(&self) -> String {
        let name = self.name();
        match self.trashed() {
            Some(_) => format!("trashed disk {name} (plyfs trash purge {})", self.id()),
            None if self.is_unlinked() => format!("removed disk {name}, which a client has open"),
            None => format!("disk {name}"),
        }
    }

    /// Notes in memory that the disk has a name again, as its record says.
    pub(in crate::store) fn set_linked_in_memory(&self) {
        let record = self.writer.record.lock();
        self.unlinked.fetch_and(record.unlinked, Ordering::AcqRel);
        self.shared.index.note_name(self.id(), !self.is_unlinked());
    }

    /// Removes what a rename over the disk that did not happen left in its record. It means nothing while the disk has
    /// its name, but an older plyfs cannot read it.
    pub(in crate::store) fn forget_trash(&self) {
        let is_left = {
            let record = self.writer.record.lock();
            !record.unlinked && record.features.trash.is_some()
        };
        if is_left
            && !self.is_unlinked()
            && let Err(error) = self.writer.update(|record| record.features.trash = None)
        {
            tracing::warn!(disk = self.name(), %error, "the note of a rename stays in the disk's record, which an older plyfs then cannot read");
        }
    }
}
