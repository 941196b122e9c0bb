//! The limits of a disk: in its record, and in force.

use std::collections::HashMap;

use super::{DiskNode, StoreError};
use crate::format::layout::data_path;
use crate::format::limits::Limits;
use crate::limits::Limiter;

impl DiskNode {
    /// The limits in force.
    pub fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// The limits of its record.
    pub fn limits(&self) -> Limits {
        self.writer.record.lock().features.limits()
    }

    /// Changes the limits, durably, and puts them in force. Requests that wait go by them once the service knows
    /// (`Service::limits_changed`).
    ///
    /// # Errors
    /// Limits out of their bounds; errors of the storage. Nothing has changed then.
    pub fn change_limits(&self, change: impl FnOnce(&mut Limits)) -> Result<Limits, StoreError> {
        // Two changes at once put the later one in force.
        let limiting = self.limiting.lock();
        let before = self.limits();
        let mut next = before;
        change(&mut next);
        if let Some(problem) = next.problem() {
            return Err(StoreError::invalid(format!("disk {}", self.name()), problem));
        }
        if next != before {
            self.update(|record| record.features.limits = next.boxed())?;
            self.limiter.set(&next);
        }
        drop(limiting);
        if let Some(disk) = self.peek() {
            disk.below().pending.iter().chain([disk.delta()]).for_each(|delta| delta.count_if_wanted());
        }
        Ok(next)
    }

    /// Bytes of the disk that count against its quota; `None` without a quota.
    pub fn quota_used(&self) -> Option<u64> {
        let quota = self.limiter.quota_if_set()?;
        match self.peek() {
            Some(_) => Some(quota.used()),
            None => {
                let delta = self.writer.record.lock().lineage.delta;
                let own = self.shared.medium.allocated(&data_path(delta)).ok().flatten().unwrap_or(0);
                Some(own.saturating_add(quota.below()))
            }
        }
    }

    /// Counts the sealed layers that this disk alone needs. `needs` has how many disks need each layer, and `bytes_of`
    /// says what one takes. Does nothing while the layers change, and returns false: the next call counts them.
    pub(in crate::store) fn count_layers(
        &self,
        needs: &HashMap<u64, u64>,
        bytes_of: impl Fn(u64) -> u64,
    ) -> bool {
        let Some(_sealing) = self.sealing.try_lock() else { return false };
        let lineage = self.lineage();
        // A pending layer counts as a delta.
        let own = lineage.layers.iter().filter(|layer| !layer.is_pending());
        let own = own.filter(|layer| needs.get(&layer.number).copied().unwrap_or(1) <= 1);
        self.limiter.quota().set_below(own.map(|layer| bytes_of(layer.number)).sum());
        true
    }
}
