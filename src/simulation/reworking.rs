//! Changes of what a disk stands on. The bytes stay, whatever happens; the base changes in one step.

use super::model::DiskModel;
use super::operation::Stand;
use super::sim_store::{Outcome, SimStore};
use crate::format::rework::Purpose;
use crate::store::{Change, StoreError};

/// Parts between two flushes of a layer that is being made.
const PARTS: u32 = 3;

/// What became of a change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    /// The disk stands as it did.
    Nothing,
    /// It stands as it is to.
    Stands,
    /// And its delta was sealed for that.
    Sealed,
}

impl SimStore {
    /// Runs the whole of a change, or goes on with it.
    pub(super) fn rework(&self, disk: &str, on: &Stand) -> Result<Outcome, String> {
        let mark = self.model(disk, |m| m.mark());
        let epoch = self.disk(disk, |d| {
            d.delta().opened();
            d.delta().error_epoch()
        })?;
        let before = self.hook.model.lock().names.clone();
        let mut after = before.clone();
        match on {
            Stand::Merged => {}
            Stand::Alone => after.disk(disk).base = None,
            Stand::On(base) => after.disk(disk).base = Some(base.clone()),
        }
        self.hook.model.lock().alternatives = vec![after.clone()];
        let done = self.rework_store(disk, on);
        let error_epoch = self.disk(disk, |d| d.delta().error_epoch())?;
        let outcome = match done {
            Ok(done) => {
                let mut model = self.hook.model.lock();
                model.names = if done == Done::Nothing { before } else { after };
                model.alternatives.clear();
                drop(model);
                if done == Done::Sealed {
                    self.model(disk, |m| m.flushed(&mark));
                }
                Outcome::Done
            }
            Err(error) => Outcome::Failed(error.to_string()),
        };
        if let Outcome::Failed(_) = outcome
            && epoch != error_epoch
        {
            self.model(disk, DiskModel::doubt);
            self.hook.model.lock().doubt();
        }
        Ok(outcome)
    }

    fn rework_store(&self, disk: &str, on: &Stand) -> Result<Done, StoreError> {
        let store = self.store();
        let node = store.disk(disk)?;
        let change = match on {
            Stand::Merged => Change::Compact,
            Stand::Alone => Change::Flatten,
            Stand::On(base) => Change::Rebase(base.clone()),
        };
        if let Some(rework) = node.rework() {
            let same_base = match (&rework.purpose, on) {
                (Purpose::Rebase { to: Some(to), .. }, Stand::On(base)) => {
                    store.base(base).is_ok_and(|base| base.id() == to.base)
                }
                _ => true,
            };
            if Change::of(&rework.purpose) != change.name() || !same_base {
                store.drop_rework(&node)?;
            }
        }
        if !store.begin_rework(disk, &change, 0)? {
            return Ok(Done::Stands);
        }
        let sealed = node.rework().map(|rework| rework.purpose);
        let done = match sealed {
            Some(Purpose::Rebase { top: Some(_), .. }) => Done::Sealed,
            _ => Done::Stands,
        };
        let making = store.open_rework(&node)?;
        let failed = |source| StoreError::Disk { object: format!("disk {disk}"), source };
        let (mut at, mut parts) = (node.rework().map_or(0, |rework| rework.done), 0);
        while at < making.size() {
            at = making.step(at).map_err(failed)?.next;
            parts += 1;
            if parts % PARTS == 0 {
                making.flush().map_err(failed)?;
                node.note_rework(at, 0)?;
            }
        }
        Ok(if store.finish_rework(&node, making)? { done } else { Done::Nothing })
    }
}
