//! Operations on the trash.

use std::sync::Arc;

use super::model::{DiskModel, Names};
use super::sim_store::SimStore;
use crate::store::{DiskNode, StoreError};

impl SimStore {
    /// Changes the model of a disk with a name, or of one in the trash. `None` for a disk that is to be purged.
    pub(super) fn model_of<T>(&self, node: &DiskNode, act: impl FnOnce(&mut DiskModel) -> T) -> Option<T> {
        if !node.is_unlinked() {
            return Some(self.model(&node.name(), act));
        }
        node.trashed()?;
        let name = node.name();
        let nth = self.trashed_as(&name).iter().position(|other| other.id() == node.id())?;
        let trash = &mut self.hook.model.lock().names.trash;
        let (_, disk) = trash.iter_mut().filter(|(other, _)| *other == name).nth(nth)?;
        Some(act(Arc::make_mut(disk)))
    }

    /// The trashed disks that had a name, in the order of their removal.
    fn trashed_as(&self, name: &str) -> Vec<Arc<DiskNode>> {
        self.store().trashed().into_iter().filter(|node| node.name() == name).collect()
    }

    /// Number of a disk in the trash of the model.
    fn trashed_number(&self, index: usize, names: &Names) -> u64 {
        let name = &names.trash[index].0;
        let nth = names.trash[..index].iter().filter(|(other, _)| other == name).count();
        self.trashed_as(name)[nth].id()
    }

    /// Restores a disk, and notes it in `after`.
    pub(super) fn restore_trashed(
        &self,
        index: usize,
        to: &str,
        after: &mut Names,
    ) -> Result<(), StoreError> {
        let number = self.trashed_number(index, after);
        let (_, disk) = after.trash.remove(index);
        if !after.disks.contains_key(to) {
            after.disks.insert(to.to_owned(), disk);
            self.hook.model.lock().alternatives = vec![after.clone()];
        }
        self.store().restore(number, Some(to)).map(drop)
    }

    /// Takes a disk out of the trash, and notes it in `after`.
    pub(super) fn discard_trashed(&self, index: usize, after: &mut Names) -> Result<(), StoreError> {
        let number = self.trashed_number(index, after);
        after.trash.remove(index);
        self.hook.model.lock().alternatives = vec![after.clone()];
        self.store().discard(number).map(drop)
    }
}
