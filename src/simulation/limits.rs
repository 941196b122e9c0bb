//! Limits of disks: the record keeps them, and what counts against a quota is what the map says.

use super::model::DiskModel;
use super::sim_store::{Outcome, SimStore, text};

impl SimStore {
    /// Sets or removes the quota of a disk. No quota is ever reached here.
    pub(super) fn limit(&self, disk: &str, quota: Option<u64>) -> Result<Outcome, String> {
        self.model(disk, |model| model.begin_quota(quota));
        let node = self.store().disk(disk).map_err(text)?;
        let done = Outcome::of(node.change_limits(|limits| limits.quota = quota));
        if let Outcome::Done = done {
            self.model(disk, DiskModel::finish_mode);
            self.store().count_quotas();
        }
        Ok(done)
    }

    /// Checks the counts of all disks in use.
    pub(super) fn check_counts(&self) -> Result<(), String> {
        for node in self.store().attached() {
            let Some(disk) = node.peek() else { continue };
            let wrong = disk.delta().miscount();
            if let Some((counted, there)) = wrong {
                let name = node.name();
                return Err(format!("disk {name}: {counted} bytes are counted, and there are {there}"));
            }
        }
        Ok(())
    }
}
