//! Snapshots, clones and rollback: what disks share, and when it goes.
//!
//! What must hold: each change is one replacement of one record. Which disks need a layer follows from their records,
//! never from a count. A layer's files are removed only when a durable record says that nothing needs them: the record
//! lists their numbers until they are gone (D80). While a clone of a disk is made, nothing of that disk is removed.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::change::{Draft, Fork};
use super::index::Has;
use super::node::Moment;
use super::{DiskNode, NewDisk, Store, StoreError, check_name};
use crate::delta::Delta;
use crate::disk::Frozen;
use crate::format::encryption::KeySource;
use crate::format::layout;
use crate::format::lineage::SnapshotEntry;
use crate::format::record::{Request, Token};
use crate::io::sys;
use crate::mutant::Mutant;

/// How long a change waits for requests that still read what it drops. After that, a later tick removes the files.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a clone is made of: a disk as it is now, or one of its snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Name of the disk.
    pub disk: String,
    /// Name of the snapshot; `None`: the disk as it is now.
    pub snapshot: Option<String>,
}

impl Origin {
    /// `DISK` or `DISK@SNAPSHOT`.
    pub fn parse(text: &str) -> Self {
        match text.split_once('@') {
            Some((disk, snapshot)) => Self { disk: disk.into(), snapshot: Some(snapshot.into()) },
            None => Self { disk: text.into(), snapshot: None },
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.disk),
            None => f.write_str(&self.disk),
        }
    }
}

fn no_snapshot(disk: &str, snapshot: &str) -> StoreError {
    StoreError::NotFound { object: format!("snapshot {disk}@{snapshot}"), noun: "snapshot" }
}

impl Store {
    /// Takes a snapshot of a disk, durably: all writes that were completed before the call are in it.
    ///
    /// A snapshot of that name that was taken for the same token counts as taken.
    ///
    /// # Errors
    /// A bad or taken name, an unknown disk, a disk that refuses writes; errors of the storage.
    pub fn snapshot(
        &self,
        disk: &str,
        name: &str,
        token: Option<Token>,
    ) -> Result<SnapshotEntry, StoreError> {
        check_name("snapshot", name)?;
        let node = self.disk(disk)?;
        // Opening a base may hang: nothing is claimed yet. The reference keeps the disk attached.
        let _attached = node.attach()?;
        let _claim = self.claims.lineage(disk, node.id());
        self.check_present(disk, &node)?;
        if let Some(taken) = node.lineage().snapshot(name) {
            if token.is_some() && taken.token == token {
                return Ok(taken.clone());
            }
            return Err(StoreError::Exists { object: format!("snapshot {disk}@{name}") });
        }
        let number = self.new_id()?;
        let Moment { layer, size, overlap } = node.seal(|| self.new_id())?;
        let snapshot = SnapshotEntry {
            number,
            name: name.into(),
            layer,
            size,
            overlap,
            created_ns: sys::now_ns(),
            token,
        };
        let entry = snapshot.clone();
        node.update(|record| record.lineage.snapshots.push(entry))?;
        Ok(snapshot)
    }

    /// Opens a snapshot for reading.
    ///
    /// # Errors
    /// An unknown disk or snapshot; a base or a layer that cannot be opened.
    pub fn open_snapshot(&self, disk: &str, name: &str) -> Result<Frozen, StoreError> {
        let node = self.disk(disk)?;
        let number = node.lineage().snapshot(name).map(|snapshot| snapshot.number);
        let opened = number.map_or(Ok(None), |number| node.open_snapshot(number))?;
        opened.ok_or_else(|| no_snapshot(disk, name))
    }

    /// Removes a snapshot, and the space that nothing else needs.
    ///
    /// # Errors
    /// An unknown disk or snapshot; errors of the storage.
    pub fn remove_snapshot(&self, disk: &str, name: &str) -> Result<(), StoreError> {
        let node = self.disk(disk)?;
        let _claim = self.claims.lineage(disk, node.id());
        self.check_present(disk, &node)?;
        if node.lineage().snapshot(name).is_none() {
            return Err(no_snapshot(disk, name));
        }
        self.check_needs_are_known(|| format!("snapshot {disk}@{name}"))?;
        let number = node.find_snapshot(|snapshot| snapshot.name == name).map(|snapshot| snapshot.number);
        let done =
            self.drop_layers(&node, |lineage| lineage.snapshots.retain(|snapshot| snapshot.name != name));
        number.into_iter().for_each(|number| self.snapshots.removed(number));
        done?;
        // The open snapshot kept its layers until now.
        let removed = self.remove_dropped(&node);
        self.count_quotas();
        removed
    }

    /// Returns a disk to a snapshot: what was written since is lost. Handles that are open show the snapshot's bytes. A
    /// request with the token of the last rollback was carried out.
    ///
    /// # Errors
    /// An unknown disk or snapshot; errors of the storage. The disk is then as before.
    pub fn rollback(&self, disk: &str, name: &str, token: Option<Token>) -> Result<(), StoreError> {
        let node = self.disk(disk)?;
        let attached = node.attach()?;
        let _claim = self.claims.lineage(disk, node.id());
        self.check_present(disk, &node)?;
        let lineage = node.lineage();
        if token.is_some() && lineage.rolled_back == token {
            return Ok(());
        }
        self.check_needs_are_known(|| format!("disk {disk}"))?;
        let Some(snapshot) = lineage.snapshot(name) else { return Err(no_snapshot(disk, name)) };
        let number = self.new_id()?;
        let unneeded = |numbers| self.to_drop(&node, numbers);
        let old = node.roll_back(snapshot, (number, token), unneeded, &self.dropping)?;
        // Only requests that began before still hold the old disk.
        drop(attached);
        let end = Instant::now() + PATIENCE;
        while old.strong_count() > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.count_quotas();
        self.remove_dropped(&node)
    }

    /// Creates disks that show what a disk or a snapshot shows, all or none. Nothing is copied. `wanted` names no base;
    /// a disk without a size gets that of the origin.
    ///
    /// A disk that has its name and was created for the same token counts as created.
    ///
    /// # Errors
    /// A bad or taken name, an unknown origin, a size that is smaller than the origin's; errors of the storage.
    pub fn clone_disks(
        &self,
        origin: &Origin,
        wanted: &[NewDisk],
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.clone_disks_in(None, origin, wanted, token)
    }

    /// As [`Store::clone_disks`]; `pool` is the pool of the new deltas, by default that of the origin. The layers stay
    /// where they are. The new deltas are encrypted with the secret at `key`.
    ///
    /// # Errors
    /// As [`Store::clone_disks`]; `pool` is the pool of the new deltas, by default that of the origin. The layers stay
    /// where they are.
    ///
    /// # Errors
    /// As [`Store::clone_disks`]; a pool that is not known or not available.
    pub fn clone_disks_in(
        &self,
        pool: Option<&str>,
        origin: &Origin,
        wanted: &[NewDisk],
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.clone_disks_with((pool, None), origin, wanted, token)
    }

    /// As [`Store::clone_disks_in`], encrypted with the secret at `key` if there is one.
    ///
    /// # Errors
    /// Also when a secret cannot be read.
    pub fn clone_disks_with(
        &self,
        (pool, key): (Option<&str>, Option<&KeySource>),
        origin: &Origin,
        wanted: &[NewDisk],
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        let request = token.map(Request::Client);
        self.check_new_names(wanted)?;
        if self.missing_disks(wanted, request)?.is_empty() {
            return wanted.iter().map(|new| self.disk(&new.name)).collect();
        }
        let node = self.disk(&origin.disk)?;
        // Opening a base may hang: nothing is claimed yet. The reference keeps the disk attached.
        let _attached = if origin.snapshot.is_none() { Some(node.attach()?) } else { None };
        if node.is_encrypted() {
            if key.is_none() {
                let why = format!(
                    "its origin {origin} is encrypted, so it must be too; name its secret (--encrypt with --key-file or \
                     --key-command)"
                );
                return Err(StoreError::invalid(format!("disk {}", wanted[0].name), why));
            }
            node.unlock()?;
        }
        let mut encryption = self.new_encryption(key, wanted.len(), "new disks")?.into_iter();
        let users = node.base_id().into_iter().chain([node.id()]).collect();
        let names = wanted.iter().map(|new| new.name.clone()).collect();
        let _claim = self.claims.disks(names, users);
        self.check_present(&origin.disk, &node)?;
        // An earlier attempt of the same client may have completed in between.
        let missing = self.missing_disks(wanted, request)?;
        let pool = match pool {
            Some(name) => self.pools.to_place_in(Some(name))?,
            None => self.pool_of(&node),
        };
        self.pools.check_usable(pool)?;
        let moment = match &origin.snapshot {
            Some(name) => {
                let lineage = node.lineage();
                let snapshot = lineage.snapshot(name).ok_or_else(|| no_snapshot(&origin.disk, name))?;
                Moment { layer: snapshot.layer, size: snapshot.size, overlap: snapshot.overlap }
            }
            None => node.seal(|| self.new_id())?,
        };
        let record = node.record();
        let base = node.base();
        let mut drafts = Vec::with_capacity(missing.len());
        for new in missing {
            let size = new.size.unwrap_or(moment.size);
            self.check_size(&new.name, size, moment.size, &format!("its origin {origin}"))?;
            let fork = Fork {
                backing: record.backing.clone(),
                overlap: moment.overlap,
                lineage: record.lineage.fork(0, moment.layer),
            };
            let mut encryption = encryption.next().flatten();
            if let Some(encryption) = &mut encryption {
                let layers = fork.lineage.layers.iter().map(|layer| layer.number);
                node.keys_of(layers)?.into_iter().for_each(|(layer, key)| encryption.add(layer, key));
            }
            drafts.push(Draft { new, base: base.clone(), size, fork: Some(fork), pool, encryption });
        }
        self.write_and_admit(drafts, request)?;
        wanted.iter().map(|new| self.disk(&new.name)).collect()
    }

    /// Checks that a disk still has its name.
    pub(super) fn check_present(&self, name: &str, node: &Arc<DiskNode>) -> Result<(), StoreError> {
        match self.disk(name) {
            Ok(now) if Arc::ptr_eq(&now, node) => Ok(()),
            _ => Err(StoreError::NotFound { object: format!("disk {name}"), noun: "disk" }),
        }
    }

    /// Refuses the removal of layers while it is unknown what a disk needs.
    pub(super) fn check_needs_are_known(&self, object: impl FnOnce() -> String) -> Result<(), StoreError> {
        if !self.unavailable.has_unavailable_disk() {
            return Ok(());
        }
        let why = "the record of another disk cannot be read, and that disk may need its layers; restore or remove that \
                   record, see `plyfs status`";
        Err(StoreError::Unread { object: object(), why: why.to_owned() })
    }

    /// Those of these deltas of a disk that no other disk needs. The caller holds `dropping`.
    pub(super) fn needed_by_none(&self, node: &DiskNode, numbers: Vec<u64>) -> Vec<u64> {
        let mut left: HashSet<u64> = numbers.iter().copied().collect();
        if !left.is_empty() && !Mutant::SharedLayerRemoved.is_active() {
            let others = self.disks_with(Has::Lineage);
            for other in others.iter().filter(|other| other.id() != node.id() && !other.is_retired()) {
                other.each_delta(|delta| {
                    left.remove(&delta);
                });
            }
        }
        numbers.into_iter().filter(|number| left.contains(number)).collect()
    }

    /// The layers of a disk whose files are being removed that no other disk needs.
    pub(super) fn own_layers(&self, node: &DiskNode) -> Vec<u64> {
        let _dropping = self.dropping.lock();
        let lineage = node.lineage();
        let layers = lineage.layers.iter().map(|layer| layer.number).collect();
        let mut own = self.needed_by_none(node, layers);
        own.extend(lineage.dropped);
        own.extend(lineage.rework.map(|rework| rework.layer.number));
        own
    }

    /// Bytes that the data of a layer takes in the store.
    pub fn layer_bytes(&self, layer: u64) -> u64 {
        self.medium.allocated(&layout::data_path(layer)).ok().flatten().unwrap_or(0)
    }

    /// Bytes in the store that only this snapshot needs.
    pub fn bytes_of_snapshot_only(&self, node: &DiskNode, name: &str) -> u64 {
        let mut lineage = node.lineage();
        lineage.snapshots.retain(|snapshot| snapshot.name != name);
        let own = self.needed_by_none(node, lineage.remove_unneeded());
        own.into_iter().map(|layer| self.layer_bytes(layer)).sum()
    }

    /// How many other disks need each of the layers of a disk, by the layer's number.
    pub fn layer_uses(&self, node: &DiskNode) -> HashMap<u64, u64> {
        let own: HashSet<u64> = node.lineage().layers.iter().map(|layer| layer.number).collect();
        let others = self.disks_with(Has::Lineage);
        let mut uses = HashMap::new();
        for other in others.iter().filter(|other| other.id() != node.id()) {
            other.each_delta(|delta| {
                if own.contains(&delta) {
                    *uses.entry(delta).or_default() += 1;
                }
            });
        }
        uses
    }

    /// Those of these deltas of a disk that its record is about to list as dropped. The caller holds `dropping`.
    pub(super) fn to_drop(&self, node: &DiskNode, numbers: Vec<u64>) -> Vec<u64> {
        let unneeded = self.needed_by_none(node, numbers);
        if Mutant::DroppedTooEarly.is_active() {
            let purge = |number: &u64| Delta::purge(&*self.pools.medium(*number), &*self.live, *number);
            let _ = unneeded.iter().try_for_each(purge);
        }
        unneeded
    }

    /// Changes what a disk needs, and removes the layers that nothing needs any more.
    fn drop_layers(
        &self,
        node: &DiskNode,
        change: impl FnOnce(&mut crate::format::lineage::Lineage),
    ) -> Result<(), StoreError> {
        node.drop_layers(change, |numbers| self.to_drop(node, numbers), &self.dropping)?;
        self.remove_dropped(node)
    }

    /// Removes the files of the deltas that a disk's record lists as dropped, then the list. A later call does it for those
    /// that requests still read. Those that another disk needs after all stay: the change that dropped them failed, and
    /// its record came back by a crash.
    ///
    /// # Errors
    /// Errors of the storage. Another call continues, and so does the next start of the daemon.
    pub(super) fn remove_dropped(&self, node: &DiskNode) -> Result<(), StoreError> {
        let dropped = node.lineage().dropped;
        if dropped.is_empty() || !node.is_quiet() || self.unavailable.has_unavailable_disk() {
            return Ok(());
        }
        let stays = |number: &u64| self.layers.is_open(*number) || self.pools.trouble_of([*number]).is_some();
        let free: Vec<u64> = dropped.into_iter().filter(|number| !stays(number)).collect();
        if free.is_empty() {
            return Ok(());
        }
        let purge = |number: &u64| Delta::purge(&*self.pools.medium(*number), &*self.live, *number);
        let purged = self.needed_by_none(node, free.clone()).iter().try_for_each(purge);
        purged.map_err(StoreError::io(format!("disk {}", node.name()), "removing its old layers"))?;
        // Only these: more may have been dropped meanwhile.
        node.update(|record| record.lineage.dropped.retain(|number| !free.contains(number)))
    }

    /// Removes what earlier changes dropped. To be called when the store is open. A failure is tried again later.
    pub fn remove_all_dropped(&self) {
        self.remove_dropped_at(Instant::now());
    }

    /// As [`Store::remove_all_dropped`]. Where it failed before, it waits until it is due again.
    pub(super) fn remove_dropped_at(&self, now: Instant) {
        self.pool_numbers().into_iter().for_each(|pool| self.remove_dropped_in(pool, now));
    }

    /// As [`Store::remove_dropped_at`], of the disks in one pool.
    pub(super) fn remove_dropped_in(&self, pool: u64, now: Instant) {
        let disks = self.disks_with(Has::Dropped);
        let is_due = |disk: &Arc<DiskNode>| {
            disk.has_dropped() && self.pool_of(disk) == pool && disk.rare().removal_retry.is_due(now)
        };
        for disk in disks.iter().filter(|disk| is_due(disk)) {
            let retry = &disk.rare().removal_retry;
            match self.remove_dropped(disk) {
                Ok(()) => retry.succeeded(),
                Err(error) => {
                    let pause = retry.failed(now).as_secs();
                    tracing::warn!(%error, "files that nothing needs cannot be removed; it is tried again in {pause} s");
                }
            }
        }
    }

    /// Removes the files of a disk and of the layers that it alone needs.
    ///
    /// # Errors
    /// While it is unknown what another disk needs; errors of the storage. Another call continues.
    pub(super) fn purge_files(&self, node: &DiskNode) -> io::Result<()> {
        if !node.lineage().layers.is_empty() {
            let known = self.check_needs_are_known(|| format!("removed disk {}", node.name()));
            known.map_err(io::Error::other)?;
        }
        for layer in self.own_layers(node) {
            Delta::purge(&*self.pools.medium(layer), &*self.live, layer)?;
        }
        let delta = node.lineage().delta;
        Delta::purge(&*self.pools.medium(delta), &*self.live, delta)?;
        match self.medium.remove(&layout::disk_path(node.id())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => self.medium.sync_dir(layout::DISKS),
        }
    }
}
