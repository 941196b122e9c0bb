//! The trash: removed disks that can be restored for a time.
//!
//! What must hold (D82): the replacement of one record puts a disk into the trash, restores it, or takes it out to be
//! removed; so no crash leaves it between. Until its time, or the word of an operator, nothing of a trashed disk is
//! removed, whatever the configuration says by then and however full the store is. It counts as a user of its base and
//! of its layers, as every disk that has a record does.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::index::Has;
use super::{DiskNode, Store, StoreError, check_name};
use crate::format::features::Trashed;
use crate::format::layout;
use crate::io::sys;

/// How removed disks are kept, and what was found of them last.
#[derive(Debug, Default)]
pub(super) struct Trash {
    /// Nanoseconds that a removed disk can be restored; 0: it is removed at once.
    grace_ns: AtomicI64,
    /// Bytes by the last [`Store::trash`].
    measured: Mutex<u64>,
}

impl Trash {
    /// What a disk gets that loses its name now. `None` without a trash.
    pub fn stamp(&self) -> Option<Trashed> {
        let grace = self.grace_ns.load(Ordering::Relaxed);
        let removed_ns = sys::now_ns();
        (grace > 0).then(|| Trashed { removed_ns, purge_ns: removed_ns.saturating_add(grace) })
    }
}

/// How a disk is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removal {
    /// A disk with snapshots too.
    pub snapshots: bool,
    /// At once, whatever the trash is for.
    pub now: bool,
}

/// A disk in the trash.
#[derive(Clone)]
pub struct TrashedDisk {
    /// The disk.
    pub node: Arc<DiskNode>,
    /// When it was removed, and its time.
    pub trashed: Trashed,
    /// Bytes in the store that only this disk needs: those that its removal frees.
    pub bytes: u64,
}

impl Store {
    /// From now on disks that lose their name are kept for this time; zero: they are removed. Disks that are in the trash
    /// keep their time.
    pub fn keep_removed_for(&self, grace: Duration) {
        let grace = i64::try_from(grace.as_nanos()).unwrap_or(i64::MAX);
        self.trash.grace_ns.store(grace, Ordering::Relaxed);
    }

    /// Removes a disk by its name: puts it into the trash, or leaves it to [`Store::purge`].
    ///
    /// # Errors
    /// `NotFound`; `InUse` for a disk with snapshots, unless they go too; errors of the storage.
    pub fn remove_disk(&self, name: &str, removal: Removal) -> Result<Arc<DiskNode>, StoreError> {
        if !removal.snapshots && !removal.now {
            return self.unlink(name);
        }
        let node = self.disk(name)?;
        let _claim = self.claims.lineage(name, node.id());
        self.check_present(name, &node)?;
        if !removal.snapshots {
            super::change::refuse_with_snapshots(&node)?;
        }
        let trash = self.trash.stamp().filter(|_| !removal.now);
        node.update(|record| {
            (record.unlinked, record.features.trash) = (true, trash);
            // Snapshots are restored with their disk.
            if trash.is_none() {
                record.lineage.snapshots.clear();
            }
        })?;
        self.names.write().disk_names.remove(name);
        Ok(node)
    }

    /// As [`Store::unlink`], for a disk that may have snapshots.
    ///
    /// # Errors
    /// As [`Store::unlink`].
    pub fn unlink_with_snapshots(&self, name: &str) -> Result<Arc<DiskNode>, StoreError> {
        self.remove_disk(name, Removal { snapshots: true, now: false })
    }

    /// The disks in the trash, those first that were removed first.
    pub fn trashed(&self) -> Vec<Arc<DiskNode>> {
        let disks = self.disks_with(Has::NoName);
        // The clock ticks some hundred times a second. Of two disks that had one name, the one that had it first was removed
        // first.
        let with_time = |node: Arc<DiskNode>| Some(((node.trashed()?.removed_ns, node.name_seq()), node));
        let mut found: Vec<_> = disks.into_iter().filter_map(with_time).collect();
        found.sort_by_key(|(order, _)| *order);
        found.into_iter().map(|(_, node)| node).collect()
    }

    /// A disk by name, for an operator: the error says when a disk of that name is in the trash.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn disk_or_trashed(&self, name: &str) -> Result<Arc<DiskNode>, StoreError> {
        self.disk(name).map_err(|error| match self.trashed().iter().rev().find(|node| node.name() == name) {
            Some(node) => StoreError::Trashed { name: name.to_owned(), number: node.id() },
            None => error,
        })
    }

    /// The disks in the trash with their bytes. Looks at their files.
    pub fn trash(&self) -> Vec<TrashedDisk> {
        // How many disks need a delta, and how many of them have a name or are open. Those in the trash, and those that may
        // share deltas with them.
        let mut needs: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut disks = self.disks_with(Has::Lineage);
        disks.extend(self.disks_with(Has::NoName));
        disks.sort_unstable_by_key(|disk| disk.id());
        disks.dedup_by_key(|disk| disk.id());
        for disk in &disks {
            let stays = u64::from(disk.trashed().is_none());
            disk.each_delta(|delta| {
                let (all, kept) = needs.entry(delta).or_default();
                *all += 1;
                *kept += stays;
            });
        }
        let mut sizes: HashMap<u64, u64> = HashMap::new();
        let mut out = Vec::new();
        for node in self.trashed() {
            let Some(trashed) = node.trashed() else { continue };
            let mut bytes = 0;
            node.each_delta_root(|delta, generation| {
                let (all, kept) = needs.get(&delta).copied().unwrap_or_default();
                if kept == 0 {
                    let size = *sizes.entry(delta).or_insert_with(|| self.delta_bytes(delta, generation));
                    bytes += if all == 1 { size } else { 0 };
                }
            });
            out.push(TrashedDisk { node, trashed, bytes });
        }
        *self.trash.measured.lock() = sizes.values().sum();
        out
    }

    /// Bytes that are free once the trash is empty, by the last [`Store::trash`].
    pub fn trash_bytes(&self) -> u64 {
        *self.trash.measured.lock()
    }

    /// Bytes that the files of a delta take.
    fn delta_bytes(&self, delta: u64, generation: u64) -> u64 {
        let of = |path: String| self.medium.allocated(&path).ok().flatten().unwrap_or(0);
        let map = if generation == 0 { 0 } else { of(layout::map_path(delta, generation)) };
        of(layout::data_path(delta)) + map
    }

    /// The disks in the trash whose time is over, those first that were removed first.
    pub fn expired(&self, now_ns: i64) -> Vec<u64> {
        let is_over =
            |node: &&Arc<DiskNode>| node.trashed().is_some_and(|trashed| trashed.purge_ns <= now_ns);
        self.trashed().iter().filter(is_over).map(|node| node.id()).collect()
    }

    fn in_trash(&self, number: u64) -> Result<Arc<DiskNode>, StoreError> {
        let node = self.disk_by_id(number).filter(|node| node.trashed().is_some());
        node.ok_or(StoreError::NotInTrash { number })
    }

    /// Gives a trashed disk its name back, or another one, durably. Its snapshots come with it.
    ///
    /// # Errors
    /// `NotInTrash`; `Taken` and a bad name; errors of the storage. The disk then stays in the trash.
    pub fn restore(&self, number: u64, name: Option<&str>) -> Result<Arc<DiskNode>, StoreError> {
        let node = self.in_trash(number)?;
        let name = name.map_or_else(|| node.name(), str::to_owned);
        check_name("disk", &name)?;
        let _claim = self.claims.lineage(&name, number);
        if node.trashed().is_none() {
            return Err(StoreError::NotInTrash { number });
        }
        self.unavailable.check_disk_name(&name)?;
        if self.names.read().disk_names.contains_key(&name) {
            return Err(StoreError::Taken { object: format!("disk {name}"), number });
        }
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        node.update(|record| {
            (record.name, record.name_seq) = (name.clone(), seq);
            (record.unlinked, record.features.trash) = (false, None);
        })?;
        node.set_linked_in_memory();
        self.names.write().disk_names.insert(name, number);
        Ok(node)
    }

    /// Takes a disk out of the trash, durably, to be removed: [`Store::purge`] removes its files once it is closed.
    ///
    /// # Errors
    /// `NotInTrash`; errors of the storage. The disk then stays in the trash.
    pub fn discard(&self, number: u64) -> Result<Arc<DiskNode>, StoreError> {
        let node = self.in_trash(number)?;
        let _claim = self.claims.purge(number, node.base_id());
        if node.trashed().is_none() {
            return Err(StoreError::NotInTrash { number });
        }
        node.update(|record| record.features.trash = None)?;
        Ok(node)
    }
}
