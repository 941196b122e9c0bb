//! Changes of the catalogue: creation, removal and renaming of disks, and removal of bases.
//!
//! What must hold: a change is durable when it returns. Each is one rename of one record. The disks of one call are
//! created all or none. Steps that may take long, above all opening the file of a base, run before the change claims
//! anything ([`super::claims`]).

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::node::NewEncryption;
use super::pools::DEFAULT;
use super::records::{RECORD_LIMIT, RECORD_ROOM};
use super::{
    AT_A_TIME, BaseNode, DiskNode, InheritedLiveMap, NewDisk, Replace, Store, StoreError, check_name,
};
use crate::format::encryption::KeySource;
use crate::format::features::Features;
use crate::format::lineage::Lineage;
use crate::format::record::{Backing, DiskRecord, MapRoot, MountRequest, Request, Token};
use crate::format::{MAX_DISK_SIZE, layout};
use crate::io::{stage, sys};
use crate::mutant::Mutant;

/// Threads that write the records of one call. Their syncs share commits of the filesystem's journal.
const WRITERS: usize = 8;
/// Records for each of these threads.
const WRITER_SHARE: usize = 16;

/// A disk that is being created.
pub(super) struct Draft {
    pub new: NewDisk,
    pub base: Option<Arc<BaseNode>>,
    pub size: u64,
    /// What it is a clone of.
    pub fork: Option<Fork>,
    /// Number of the pool of its delta.
    pub pool: u64,
    /// How it is encrypted, if it is; without the key of its delta.
    pub encryption: Option<NewEncryption>,
}

/// What a clone takes from its origin.
pub(super) struct Fork {
    pub backing: Option<Backing>,
    pub overlap: u64,
    /// Without the number of its own delta.
    pub lineage: Lineage,
}

/// Snapshots are not lost with one word.
pub(super) fn refuse_with_snapshots(disk: &DiskNode) -> Result<(), StoreError> {
    let snapshots = disk.lineage().snapshots;
    if snapshots.is_empty() {
        return Ok(());
    }
    let mut users: Vec<String> =
        snapshots.iter().take(10).map(|snapshot| format!("snapshot {}", snapshot.name)).collect();
    if snapshots.len() > users.len() {
        users.push(format!("{} more", snapshots.len() - users.len()));
    }
    Err(StoreError::InUse { object: format!("disk {}", disk.name()), users: users.join(", ") })
}

impl Store {
    /// Creates disks, all or none.
    ///
    /// # Errors
    /// A bad or taken name, an unknown base, a size that is 0, too large or smaller than the base.
    pub fn create_disks(&self, wanted: &[NewDisk]) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.create(wanted, None, (None, None))
    }

    /// As [`Store::create_disks`], for a client that may repeat the request (D63). A disk that has its name and was
    /// created for the same token counts as created; the others are created.
    ///
    /// # Errors
    /// As [`Store::create_disks`].
    pub fn create_disks_once(
        &self,
        wanted: &[NewDisk],
        token: Token,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.create(wanted, Some(Request::Client(token)), (None, None))
    }

    /// As [`Store::create_disks`], in a pool (`None`: in the default one), and encrypted, with the secret at `key`.
    ///
    /// # Errors
    /// As [`Store::create_disks`], in a pool; `None`: in the default one.
    ///
    /// # Errors
    /// As [`Store::create_disks`]; a pool that is not known or not available.
    pub fn create_disks_in(
        &self,
        pool: Option<&str>,
        wanted: &[NewDisk],
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.create(wanted, token.map(Request::Client), (pool, None))
    }

    /// As [`Store::create_disks_in`], encrypted with the secret at `key` if there is one.
    ///
    /// # Errors
    /// Also when the secret cannot be read.
    pub fn create_disks_with(
        &self,
        (pool, key): (Option<&str>, Option<&KeySource>),
        wanted: &[NewDisk],
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.create(wanted, token.map(Request::Client), (pool, key))
    }

    /// As [`Store::create_disks`], for a request that the kernel may send again.
    ///
    /// # Errors
    /// As [`Store::create_disks`].
    pub fn create_disks_for(
        &self,
        wanted: &[NewDisk],
        request: Option<MountRequest>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.create(wanted, request.map(Request::Mount), (None, None))
    }

    fn create(
        &self,
        wanted: &[NewDisk],
        request: Option<Request>,
        (pool, key): (Option<&str>, Option<&KeySource>),
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.check_new_names(wanted)?;
        // Checked again below. The early check avoids opening a base for nothing.
        let missing = self.missing_disks(wanted, request)?;
        // Opening a base's file may hang: nothing is claimed yet.
        let mut drafts = self.drafts(&missing)?;
        if !missing.is_empty() {
            let pool = self.pools.to_place_in(pool)?;
            drafts.iter_mut().for_each(|draft| draft.pool = pool);
        }
        let encryption = self.new_encryption(key, drafts.len(), "new disks")?;
        drafts.iter_mut().zip(encryption).for_each(|(draft, new)| draft.encryption = new);
        let users: BTreeSet<u64> = drafts.iter().filter_map(|d| d.base.as_ref().map(|b| b.id())).collect();
        let names = wanted.iter().map(|new| new.name.clone()).collect();
        let _claim = self.claims.disks(names, users.iter().copied().collect());
        // An earlier attempt of the same client may have completed in between.
        let missing: HashSet<String> =
            self.missing_disks(wanted, request)?.into_iter().map(|new| new.name).collect();
        drafts.retain(|draft| missing.contains(&draft.new.name));
        for base in drafts.iter().filter_map(|draft| draft.base.as_ref()) {
            // The base may have been removed, and registered anew, meanwhile.
            if self.base_by_id(base.id()).is_none() {
                return Err(StoreError::NotFound {
                    object: format!("base {}", base.record().name),
                    noun: "base",
                });
            }
        }
        self.write_and_admit(drafts, request)?;
        let mut all = Vec::with_capacity(wanted.len());
        for part in wanted.chunks(AT_A_TIME) {
            let names = self.names.read();
            let made =
                part.iter().map(|new| names.disk_names.get(&new.name).and_then(|id| names.disks.get(id)));
            all.extend(made.flatten().cloned());
        }
        Ok(all)
    }

    /// Checks that the names can be names, and that no two are the same.
    pub(super) fn check_new_names(&self, wanted: &[NewDisk]) -> Result<(), StoreError> {
        let mut taken = HashSet::new();
        for new in wanted {
            check_name("disk", &new.name)?;
            if let Some(problem) = new.limits.problem() {
                return Err(StoreError::invalid(format!("disk {}", new.name), problem));
            }
            if !taken.insert(&new.name) {
                return Err(StoreError::Exists { object: format!("disk {}", new.name) });
            }
        }
        Ok(())
    }

    /// Writes the records of new disks, and lists them.
    pub(super) fn write_and_admit(
        &self,
        drafts: Vec<Draft>,
        request: Option<Request>,
    ) -> Result<(), StoreError> {
        // Held through syncs in the store's directory only: no drive of another pool is waited for.
        let _placing = self.pools.placing.read();
        drafts.iter().try_for_each(|draft| self.pools.check_usable(draft.pool))?;
        let nodes = self.write_records(drafts, request)?;
        self.admit(&nodes);
        Ok(())
    }

    /// Lists new disks. Lookups of other disks go on in between.
    fn admit(&self, nodes: &[Arc<DiskNode>]) {
        for part in nodes.chunks(AT_A_TIME) {
            part.iter().for_each(|node| node.note_in_index());
            let named: Vec<_> = part.iter().map(|node| (node.name(), node.clone())).collect();
            let mut names = self.names.write();
            for (name, node) in named {
                names.disk_names.insert(name, node.id());
                names.disks.insert(node.id(), node);
            }
        }
    }

    /// Checks the size of a new disk. `floor`: bytes of what it is made of, which is `what`.
    pub(super) fn check_size(&self, name: &str, size: u64, floor: u64, what: &str) -> Result<(), StoreError> {
        let object = format!("disk {name}");
        if size < floor {
            let why = format!(
                "the size {size} is smaller than {what}, which has {floor} bytes; give at least that"
            );
            return Err(StoreError::invalid(object, why));
        }
        if size > MAX_DISK_SIZE {
            return Err(StoreError::invalid(object, format!("the size {size} is above 64 TiB")));
        }
        Ok(())
    }

    /// The wanted disks that the same request has not created yet. Their names are free.
    pub(super) fn missing_disks(
        &self,
        wanted: &[NewDisk],
        request: Option<Request>,
    ) -> Result<Vec<NewDisk>, StoreError> {
        let mut missing = Vec::with_capacity(wanted.len());
        for new in wanted {
            let made = match request {
                Some(Request::Client(_)) => {
                    self.disk(&new.name).is_ok_and(|disk| disk.was_changed_by(request))
                }
                Some(Request::Mount(_)) | None => false,
            };
            if !made {
                self.check_name_is_free(&new.name)?;
                missing.push(new.clone());
            }
        }
        Ok(missing)
    }

    /// Checks that a disk may get this name.
    fn check_name_is_free(&self, name: &str) -> Result<(), StoreError> {
        self.unavailable.check_disk_name(name)?;
        if self.names.read().disk_names.contains_key(name) {
            return Err(StoreError::Exists { object: format!("disk {name}") });
        }
        Ok(())
    }

    fn drafts(&self, wanted: &[NewDisk]) -> Result<Vec<Draft>, StoreError> {
        let mut seen: Vec<(&str, Arc<BaseNode>)> = Vec::new();
        let mut drafts = Vec::with_capacity(wanted.len());
        for new in wanted {
            let object = format!("disk {}", new.name);
            let base = match new.base.as_deref() {
                None => None,
                Some(name) => Some(match seen.iter().find(|(other, _)| *other == name) {
                    Some((_, base)) => base.clone(),
                    None => {
                        let base = self.base(name)?;
                        base.attach()?;
                        seen.push((name, base.clone()));
                        base
                    }
                }),
            };
            let floor = base.as_ref().map_or(0, |b| b.record().size());
            let Some(size) = new.size.or(base.as_ref().map(|_| floor)) else {
                return Err(StoreError::invalid(object, "a blank disk needs a size; give --size"));
            };
            self.check_size(&new.name, size, floor, "its base")?;
            drafts.push(Draft { new: new.clone(), base, size, fork: None, pool: DEFAULT, encryption: None });
        }
        Ok(drafts)
    }

    /// Writes the records of new disks durably, all or none.
    fn write_records(
        &self,
        drafts: Vec<Draft>,
        request: Option<Request>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        let mut nodes = Vec::with_capacity(drafts.len());
        let first = self.new_ids(drafts.len() as u64)?;
        let now = sys::now_ns();
        for (Draft { new, base, size, fork, pool, mut encryption }, id) in drafts.into_iter().zip(first..) {
            if let Some(encryption) = &mut encryption {
                encryption.add_new(id, "new disks")?;
            }
            let Fork { backing, overlap, lineage } = fork.unwrap_or_else(|| {
                let backing = base.as_ref().map(|base| base.backing());
                let overlap = base.as_ref().map_or(0, |base| base.record().size());
                Fork { backing, overlap, lineage: Lineage::of(id) }
            });
            self.pools.place(id, pool);
            let lineage = Lineage { delta: id, ..lineage };
            let pools = self.pools.listed_in(&lineage);
            let recorded = encryption.as_ref().map(|new| Box::new(new.record()));
            let features = Features { trash: None, limits: new.limits.boxed(), encryption: recorded, pools };
            let record = DiskRecord {
                id,
                name: new.name,
                name_seq: self.next_seq.fetch_add(1, Ordering::Relaxed),
                unlinked: false,
                backing,
                size,
                size_is_current: true,
                overlap,
                mode: new.mode & 0o7777,
                uid: new.uid,
                gid: new.gid,
                created_ns: now,
                changed_ns: now,
                modified_ns: now,
                map: MapRoot::default(),
                request,
                lineage,
                features,
            };
            if record.lineage.entries() > 0 && record.encode().len() as u64 + RECORD_ROOM > RECORD_LIMIT {
                let why =
                    "its origin has as many layers as a record can hold; copy the origin into a new disk";
                return Err(StoreError::invalid(format!("disk {}", record.name), why));
            }
            let node = self.disk_node(record, InheritedLiveMap::No);
            if let Some(encryption) = encryption {
                node.set_keys(encryption);
            }
            nodes.push(node);
        }
        let written = self.stage_all(&nodes).and_then(|()| {
            self.medium.sync_dir(layout::DISKS).map_err(StoreError::io("new disks", "syncing their records"))
        });
        if let Err(error) = written {
            for node in nodes {
                let record = layout::disk_path(node.id());
                let _ = self.medium.remove(&record);
                let _ = self.medium.remove(&layout::staged(&record));
            }
            return Err(error);
        }
        Ok(nodes)
    }

    fn stage_all(&self, nodes: &[Arc<DiskNode>]) -> Result<(), StoreError> {
        let stage_one = |node: &DiskNode| {
            let (id, object) = (node.id(), format!("disk {}", node.name()));
            stage(&*self.medium, layout::DISKS, &layout::disk_record(id), &node.encode())
                .map_err(StoreError::io(object, "writing its record"))
        };
        let writers = nodes.len().div_ceil(WRITER_SHARE).min(WRITERS);
        if writers <= 1 {
            return nodes.iter().try_for_each(|node| stage_one(node));
        }
        let (failed, stop) = (Mutex::new(None), AtomicBool::new(false));
        let stage_share = |share: &[Arc<DiskNode>]| {
            for node in share {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = stage_one(node) {
                    stop.store(true, Ordering::Relaxed);
                    failed.lock().get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for share in nodes.chunks(nodes.len().div_ceil(writers)) {
                let stage_share = &stage_share;
                scope.spawn(move || stage_share(share));
            }
        });
        failed.into_inner().map_or(Ok(()), Err)
    }

    /// The disk that a request created, named or unlinked, if it did. The worker that ran the request may have died
    /// before it answered, and names may have changed since (D27).
    ///
    /// The kernel keeps the inodes of a request until the request is answered, so none of them is purged meanwhile.
    pub fn done_by(&self, request: MountRequest) -> Option<Arc<DiskNode>> {
        let disks = self.all_disks();
        disks.into_iter().find(|disk| disk.was_changed_by(Some(Request::Mount(request))))
    }

    /// Removes a disk's name. Its contents live until [`Store::purge`].
    ///
    /// # Errors
    /// `NotFound`; errors of the storage.
    pub fn unlink(&self, name: &str) -> Result<Arc<DiskNode>, StoreError> {
        self.unlink_for(name, None)
    }

    /// As [`Store::unlink`], for a request that the kernel may send again.
    ///
    /// # Errors
    /// As [`Store::unlink`].
    pub fn unlink_for(&self, name: &str, request: Option<MountRequest>) -> Result<Arc<DiskNode>, StoreError> {
        let _claim = self.claims.disks(vec![name.to_owned()], Vec::new());
        let node = self.disk(name)?;
        refuse_with_snapshots(&node)?;
        let trash = self.trash.stamp();
        node.update(|record| {
            (record.unlinked, record.features.trash) = (true, trash);
            record.request = request.map(Request::Mount).or(record.request);
        })?;
        self.names.write().disk_names.remove(name);
        Ok(node)
    }

    /// Renames a disk. A disk that has the new name loses it and is returned.
    ///
    /// # Errors
    /// `NotFound`; a bad name; `Exists` when the new name may not be replaced.
    pub fn rename(&self, from: &str, to: &str, over: Replace) -> Result<Option<Arc<DiskNode>>, StoreError> {
        self.rename_for(from, to, over, None)
    }

    /// As [`Store::rename`], for a request that the kernel may send again.
    ///
    /// # Errors
    /// As [`Store::rename`].
    pub fn rename_for(
        &self,
        from: &str,
        to: &str,
        over: Replace,
        request: Option<MountRequest>,
    ) -> Result<Option<Arc<DiskNode>>, StoreError> {
        check_name("disk", to)?;
        let mut claimed = vec![from.to_owned(), to.to_owned()];
        claimed.dedup();
        let _claim = self.claims.disks(claimed, Vec::new());
        self.unavailable.check_disk_name(to)?;
        let node = self.disk(from)?;
        let loser = self.disk(to).ok();
        if loser.is_some() && over == Replace::No {
            return Err(StoreError::Exists { object: format!("disk {to}") });
        }
        if from == to {
            return Ok(None);
        }
        loser.as_ref().map_or(Ok(()), |loser| refuse_with_snapshots(loser))?;
        let trash = self.trash.stamp();
        let notes_first = trash.is_some() && !Mutant::TrashNotedLate.is_active();
        if let Some(loser) = loser.as_ref().filter(|_| notes_first) {
            // Before the commit: after a crash behind it the loser is in the trash, and nothing of it is removed (D82).
            loser.update(|record| record.features.trash = trash)?;
        }
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        // This write is the commit: the higher number gives the name to this disk.
        let renamed = node.update(|record| {
            record.name = to.into();
            record.name_seq = seq;
            record.request = request.map(Request::Mount).or(record.request);
        });
        if let Err(error) = renamed {
            loser.iter().for_each(|loser| loser.forget_trash());
            return Err(error);
        }
        {
            let mut names = self.names.write();
            names.disk_names.remove(from);
            names.disk_names.insert(to.into(), node.id());
        }
        if let Some(loser) = &loser {
            loser.set_unlinked_in_memory();
            loser.update(|record| (record.unlinked, record.features.trash) = (true, trash))?;
        }
        Ok(loser)
    }

    /// Removes the files of an unlinked disk, which no process has open any more, and keeps those of a disk in the trash. The
    /// kernel may forget the disk while a command removes it: also the second caller returns only when the space is free.
    ///
    /// # Errors
    /// Errors of the storage. Another call continues, and so does the next start of the daemon.
    pub fn purge(&self, id: u64) -> Result<(), StoreError> {
        let is_to_go = |node: &Arc<DiskNode>| node.is_unlinked() && node.trashed().is_none();
        let Some(node) = self.disk_by_id(id).filter(is_to_go) else { return Ok(()) };
        // Held until the record is gone.
        let _claim = self.claims.purge(id, node.base_id());
        if !is_to_go(&node) {
            return Ok(());
        }
        let _purging = node.purging.lock();
        if !self.names.read().disks.contains_key(&id) {
            return Ok(());
        }
        let object = format!("removed disk {}", node.name());
        if let Some(why) = self.pools.trouble_of(node.numbers()) {
            tracing::warn!(
                disk = node.name(),
                why,
                "the files of a removed disk stay until their pool is back"
            );
            node.give_up_live_maps();
            return Ok(());
        }
        node.retire();
        // Which disks need a layer changes with a disk that has layers only.
        let frees_layers = !node.lineage().layers.is_empty();
        let purge = || {
            if Mutant::RecordRemovedFirst.is_active() {
                self.medium.remove(&layout::disk_path(id))?;
                self.medium.sync_dir(layout::DISKS)?;
            }
            // The record is removed last: while it exists, the next start knows what to remove.
            self.purge_files(&node)
        };
        purge().map_err(StoreError::io(object, "removing its files"))?;
        self.names.write().disks.remove(&id);
        self.context.index.forget(&node.record());
        if frees_layers {
            self.count_quotas();
        }
        Ok(())
    }

    /// Removes a base. Its source is not touched, but for an image in the store itself.
    ///
    /// # Errors
    /// `InUse` with the names of the disks that need it.
    pub fn remove_base(&self, name: &str) -> Result<(), StoreError> {
        let base = self.base(name)?;
        let _claim = self.claims.removal(name, base.id());
        if self.base_by_id(base.id()).is_none() {
            // Another removal was first.
            return Err(StoreError::NotFound { object: format!("base {name}"), noun: "base" });
        }
        let object = format!("base {name}");
        if let Some(mut users) = self.users().remove(&base.id()) {
            let more = users.len().saturating_sub(10);
            users.truncate(10);
            let mut users = users.join(", ");
            if more > 0 {
                users.push_str(&format!(" and {more} more"));
            }
            return Err(StoreError::InUse { object, users });
        }
        self.unavailable.check_base_removal(name, base.id())?;
        let remove = || {
            self.medium.remove(&layout::base_path(base.id()))?;
            self.medium.sync_dir(layout::BASES)
        };
        remove().map_err(StoreError::io(object, "removing its record"))?;
        if let Some(Err(error)) = self.tracer().map(|tracer| tracer.remove(base.id())) {
            // The next start retries.
            tracing::warn!(base = name, %error, "its trace cannot be removed");
        }
        {
            let mut names = self.names.write();
            names.base_names.remove(name);
            names.bases.remove(&base.id());
        }
        if let Err(error) = self.remove_images(&base) {
            // `plyfs check` names what stays.
            tracing::warn!(base = name, %error, "its image in the store cannot be removed");
        }
        Ok(())
    }
}
