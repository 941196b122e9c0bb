//! What counts against the quotas of disks: the layers that one disk alone needs.
//!
//! Which disks need a layer changes with other disks, too. So all quotas are counted together: at the start, at once after
//! a change that frees space, and within a second after any other change of a lineage. The counts look only at disks
//! that have a lineage, and for most disks that is none.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::index::Has;
use super::{DiskNode, Store};
use crate::limits;

/// When the layers are counted again although nothing changed: their sizes could not be read, perhaps.
const AGAIN: Duration = Duration::from_secs(60);

/// Which changes of lineages and quotas the last complete count has seen, and when it was.
pub(super) type Counted = Option<(u64, Instant)>;

impl Store {
    /// Counts the layers of the disks with quotas.
    pub fn count_quotas(&self) {
        let seen = self.context.index.changes();
        let mut is_complete = true;
        let limited: Vec<_> = self.disks_with_both(Has::Quota, Has::Lineage);
        if !limited.is_empty() {
            let mut needs = HashMap::new();
            for disk in self.disks_with(Has::Lineage).iter().filter(|disk| !disk.is_retired()) {
                disk.each_delta(|delta| *needs.entry(delta).or_default() += 1);
            }
            for disk in limited {
                is_complete &= disk.count_layers(&needs, |layer| self.layer_bytes(layer));
            }
        }
        *self.counted.lock() = is_complete.then(|| (seen, Instant::now()));
    }

    /// As [`Store::count_quotas`], unless nothing changed. To be called about every second.
    pub(super) fn count_changed_quotas(&self) {
        let counted = *self.counted.lock();
        let seen = self.context.index.changes();
        if counted.is_none_or(|(known, at)| known != seen || at.elapsed() >= AGAIN) {
            self.count_quotas();
        }
    }

    /// The disks that have no room for what their clients wrote last.
    pub fn disks_at_quota(&self) -> Vec<Arc<DiskNode>> {
        let is_at_quota = |disk: &Arc<DiskNode>| {
            disk.limiter().quota_if_set().is_some_and(|quota| quota.is_reached()) && !disk.is_unlinked()
        };
        self.disks_with(Has::Quota).into_iter().filter(is_at_quota).collect()
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
