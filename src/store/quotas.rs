//! What counts against the quotas of disks: the layers that one disk alone needs.
//!
//! Which disks need a layer changes with other disks, too. So all quotas are counted together, at the start and every
//! second, and at once after a change that frees space.

use std::collections::HashMap;
use std::sync::Arc;

use super::{DiskNode, Store};
use crate::limits;

impl Store {
    /// Counts the layers of the disks with quotas.
    pub fn count_quotas(&self) {
        let disks = self.all_disks();
        let is_limited = |disk: &&Arc<DiskNode>| disk.limiter().quota.is_set();
        let limited: Vec<_> = disks.iter().filter(is_limited).cloned().collect();
        if limited.is_empty() {
            return;
        }
        let mut needs = HashMap::new();
        for disk in disks.iter().filter(|disk| !disk.is_retired()) {
            disk.each_delta(|delta| *needs.entry(delta).or_default() += 1);
        }
        for disk in limited {
            disk.count_layers(&needs, |layer| self.layer_bytes(layer));
        }
    }

    /// The disks that have no room for what their clients wrote last.
    pub fn disks_at_quota(&self) -> Vec<Arc<DiskNode>> {
        let is_at_quota = |disk: &Arc<DiskNode>| disk.limiter().quota.is_reached() && !disk.is_unlinked();
        self.all_disks().into_iter().filter(is_at_quota).collect()
    }

    /// Requests that were refused because of quotas since the worker began.
    pub fn quota_refusals(&self) -> u64 {
        limits::refusals()
    }

    /// Requests that passed a limit because too many waited, since the worker began.
    pub fn limits_exceeded(&self) -> u64 {
        limits::exceeded()
    }
}
