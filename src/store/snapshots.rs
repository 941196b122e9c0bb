//! Snapshots as files: finds one by its number, and keeps those open that are being read.
//!
//! What must hold: an open snapshot keeps files open, and the memory of its index, only while it is in use.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::index::Has;
use super::{DiskNode, Store, StoreError};
use crate::disk::Frozen;
use crate::format::lineage::SnapshotEntry;

/// How long a snapshot stays open without a read.
const IDLE: Duration = Duration::from_secs(60);

struct Opened {
    frozen: Arc<Frozen>,
    used: Instant,
}

/// Numbers of snapshots in order, with their disks.
type Numbers = Vec<(u64, Weak<DiskNode>)>;

/// A listing, for its later parts.
#[derive(Clone)]
struct Listed {
    numbers: Arc<Numbers>,
    at: Instant,
}

/// See the module.
#[derive(Default)]
pub(super) struct Snapshots {
    /// Where a snapshot was found last.
    disks: Mutex<HashMap<u64, Weak<DiskNode>>>,
    opened: Mutex<HashMap<u64, Opened>>,
    listed: Mutex<Option<Listed>>,
}

impl Snapshots {
    /// Closes a snapshot that is being removed.
    pub fn removed(&self, number: u64) {
        self.disks.lock().remove(&number);
        self.opened.lock().remove(&number);
    }
}

fn entry_of(node: &DiskNode, number: u64) -> Option<SnapshotEntry> {
    node.find_snapshot(|snapshot| snapshot.number == number)
}

impl Store {
    /// Finds a snapshot of a disk by its name.
    pub fn snapshot_of(&self, disk: &str, name: &str) -> Option<(Arc<DiskNode>, SnapshotEntry)> {
        let node = self.disk(disk).ok()?;
        let entry = node.find_snapshot(|snapshot| snapshot.name == name)?;
        self.snapshots.disks.lock().insert(entry.number, Arc::downgrade(&node));
        Some((node, entry))
    }

    /// The named disks that may have snapshots, by number.
    fn disks_with_snapshots(&self) -> Vec<Arc<DiskNode>> {
        self.disks_with(Has::Lineage).into_iter().filter(|node| !node.is_unlinked()).collect()
    }

    /// Finds a snapshot by its number.
    pub fn snapshot_by_number(&self, number: u64) -> Option<(Arc<DiskNode>, SnapshotEntry)> {
        let known = self.snapshots.disks.lock().get(&number).and_then(Weak::upgrade);
        if let Some(node) = known.filter(|node| !node.is_unlinked())
            && let Some(entry) = entry_of(&node, number)
        {
            return Some((node, entry));
        }
        let nodes = self.disks_with_snapshots();
        let found = nodes.into_iter().find_map(|node| entry_of(&node, number).map(|entry| (node, entry)))?;
        self.snapshots.disks.lock().insert(number, Arc::downgrade(&found.0));
        Some(found)
    }

    /// Calls `each` for the snapshots with numbers above `after`, by number, with the name of the disk, until it returns
    /// false. A listing in several parts begins with 0: that looks at all disks, and the other parts at their snapshots
    /// only. Those that were taken since the beginning may be missing.
    pub fn each_snapshot_after(&self, after: u64, mut each: impl FnMut(&str, &SnapshotEntry) -> bool) {
        let numbers = self.listing(after);
        let first = numbers.partition_point(|(number, _)| *number <= after);
        for (number, node) in &numbers[first..] {
            let Some(node) = node.upgrade().filter(|node| !node.is_unlinked()) else { continue };
            let Some(entry) = entry_of(&node, *number) else { continue };
            if !each(&node.name(), &entry) {
                return;
            }
        }
    }

    /// The numbers of all snapshots in order, and their disks: as of the last listing that began.
    fn listing(&self, after: u64) -> Arc<Numbers> {
        let known = self.snapshots.listed.lock().clone();
        if let Some(Listed { numbers, .. }) = known.filter(|_| after > 0) {
            return numbers;
        }
        let mut numbers = Vec::new();
        for node in self.disks_with_snapshots() {
            let weak = Arc::downgrade(&node);
            node.each_snapshot(|snapshot| numbers.push((snapshot.number, weak.clone())));
        }
        numbers.sort_unstable_by_key(|(number, _)| *number);
        let numbers = Arc::new(numbers);
        *self.snapshots.listed.lock() = Some(Listed { numbers: numbers.clone(), at: Instant::now() });
        numbers
    }

    /// The snapshots with names that `is_wanted` accepts, each with the name of its disk before its own.
    pub fn snapshots_named(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for node in self.disks_with_snapshots() {
            node.each_snapshot(|snapshot| {
                if is_wanted(&snapshot.name) {
                    found.push((String::new(), snapshot.name.clone()));
                }
            });
            let unnamed = found.iter_mut().rev().take_while(|(disk, _)| disk.is_empty());
            unnamed.for_each(|(disk, _)| *disk = node.name());
        }
        found
    }

    /// A snapshot that is open. Does not wait.
    pub fn opened_snapshot(&self, number: u64) -> Option<Arc<Frozen>> {
        let mut opened = self.snapshots.opened.lock();
        let found = opened.get_mut(&number)?;
        found.used = Instant::now();
        Some(found.frozen.clone())
    }

    /// Opens a snapshot for reading, unless it is open.
    ///
    /// # Errors
    /// An unknown snapshot; a base or a layer that cannot be opened.
    pub fn attach_snapshot(&self, number: u64) -> Result<Arc<Frozen>, StoreError> {
        if let Some(frozen) = self.opened_snapshot(number) {
            return Ok(frozen);
        }
        let unknown =
            || StoreError::NotFound { object: format!("snapshot number {number}"), noun: "snapshot" };
        let (node, _) = self.snapshot_by_number(number).ok_or_else(unknown)?;
        let frozen = Arc::new(node.open_snapshot(number)?.ok_or_else(unknown)?);
        let mut opened = self.snapshots.opened.lock();
        // A removal takes it from the record first, and then from here.
        if entry_of(&node, number).is_none() {
            return Err(unknown());
        }
        let entry = opened.entry(number).or_insert(Opened { frozen, used: Instant::now() });
        Ok(entry.frozen.clone())
    }

    /// Closes snapshots that were not read for a while, and forgets an old listing.
    pub(super) fn close_idle_snapshots(&self) {
        self.snapshots.listed.lock().take_if(|listed| listed.at.elapsed() >= IDLE);
        let mut closed = Vec::new();
        self.snapshots.opened.lock().retain(|_, opened| {
            let stays = opened.used.elapsed() < IDLE;
            if !stays {
                closed.push(opened.frozen.clone());
            }
            stays
        });
        // Closing files may wait; no reader waits for that.
        drop(closed);
    }
}
