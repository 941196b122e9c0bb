//! Which disks have what periodic work, status and changes of layers look for.
//!
//! A store may list 100,000 disks of which few have any of it, so none of these looks at all disks. What must hold: a
//! disk whose record in memory has it is in the set. The set changes under the lock of that record, and readers look at
//! the record again.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{AT_A_TIME, DiskNode, Store};
use crate::format::record::DiskRecord;

/// What a disk may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Has {
    /// Deltas that are to be removed.
    Dropped,
    /// A quota.
    Quota,
    /// No name.
    NoName,
    /// Layers, snapshots, a layer that is being made, or a delta with another number than its own: another disk may
    /// share deltas with it. The number of a disk is used once, so a disk without any of this shares nothing.
    Lineage,
}

#[derive(Debug, Default)]
struct State {
    /// The numbers of the disks, by [`Has`].
    sets: [BTreeSet<u64>; 4],
    /// How many disks need each base.
    users: HashMap<u64, u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Index {
    state: Mutex<State>,
    /// Number of changes of lineages and quotas.
    changes: AtomicU64,
    /// Disks that were looked at because a set had them.
    #[cfg(test)]
    pub visited: AtomicU64,
}

impl State {
    fn leave_bases(&mut self, record: &DiskRecord) {
        for base in record.bases() {
            if let Some(users) = self.users.get_mut(&base) {
                *users -= 1;
            }
        }
    }
}

fn put(set: &mut BTreeSet<u64>, disk: u64, has: bool) {
    if has {
        set.insert(disk);
    } else {
        set.remove(&disk);
    }
}

impl Index {
    /// Notes what a record has that is about to replace `before`. The caller holds its lock.
    pub fn note(&self, before: Option<&DiskRecord>, record: &DiskRecord) {
        let is_same = |before: &DiskRecord| {
            before.lineage == record.lineage
                && before.features.limits == record.features.limits
                && before.backing == record.backing
        };
        if before.is_some_and(is_same) {
            return;
        }
        let quota = record.features.limits.as_ref().is_some_and(|limits| limits.quota.is_some());
        let mut state = self.state.lock();
        before.into_iter().for_each(|before| state.leave_bases(before));
        for base in record.bases() {
            *state.users.entry(base).or_default() += 1;
        }
        let sets = &mut state.sets;
        put(&mut sets[Has::Dropped as usize], record.id, !record.lineage.dropped.is_empty());
        put(&mut sets[Has::Quota as usize], record.id, quota);
        put(&mut sets[Has::Lineage as usize], record.id, !record.lineage.is_default(record.id));
        drop(state);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Number of changes of lineages and quotas so far. What it counts is visible to a reader of the records.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Notes that a disk needs its layers no more.
    pub fn note_end(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Notes whether a disk has a name.
    pub fn note_name(&self, disk: u64, has_name: bool) {
        put(&mut self.state.lock().sets[Has::NoName as usize], disk, !has_name);
    }

    /// Forgets a disk that is gone.
    pub fn forget(&self, record: &DiskRecord) {
        let mut state = self.state.lock();
        state.leave_bases(record);
        for set in &mut state.sets {
            set.remove(&record.id);
        }
        drop(state);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The numbers of the disks that have something.
    pub fn numbers(&self, has: Has) -> Vec<u64> {
        self.state.lock().sets[has as usize].iter().copied().collect()
    }

    fn numbers_of_both(&self, one: Has, other: Has) -> Vec<u64> {
        let state = self.state.lock();
        let [one, other] = [one, other].map(|has| &state.sets[has as usize]);
        one.intersection(other).copied().collect()
    }
}

impl Store {
    /// The disks that have something, by number. Lookups and changes go on in between.
    pub(super) fn disks_with(&self, has: Has) -> Vec<Arc<DiskNode>> {
        self.disks_of(&self.context.index.numbers(has))
    }

    /// The disks that have both.
    pub(super) fn disks_with_both(&self, one: Has, other: Has) -> Vec<Arc<DiskNode>> {
        self.disks_of(&self.context.index.numbers_of_both(one, other))
    }

    fn disks_of(&self, numbers: &[u64]) -> Vec<Arc<DiskNode>> {
        let mut found = Vec::with_capacity(numbers.len());
        for part in numbers.chunks(AT_A_TIME) {
            let names = self.names.read();
            found.extend(part.iter().filter_map(|number| names.disks.get(number).cloned()));
        }
        #[cfg(test)]
        self.context.index.visited.fetch_add(found.len() as u64, Ordering::Relaxed);
        found
    }

    /// How many disks need each base, by the base's number: those of [`Store::users`]. Looks at none of them.
    pub fn user_counts(&self) -> HashMap<u64, u64> {
        let state = self.context.index.state.lock();
        state.users.iter().filter(|(_, count)| **count > 0).map(|(base, count)| (*base, *count)).collect()
    }

    /// How many disks have a name. Looks at none of them.
    pub fn disk_count(&self) -> usize {
        self.names.read().disk_names.len()
    }
}
