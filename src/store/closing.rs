//! Closes a store: makes everything durable, and removes what an unclean end left.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::records::RecordKind;
use super::{DiskNode, Store, StoreError, records};
use crate::format::layout::{self, DeltaFile};
use crate::io::Medium;

/// Closed disks, and disks that could not be closed.
#[derive(Default)]
struct Closed {
    failed: Vec<String>,
    doubtful: HashSet<u64>,
}

/// The files in `deltas/` of one disk number.
#[derive(Debug, Default)]
struct Files {
    maps: Vec<u64>,
    has_data: bool,
}

impl Store {
    /// Flushes and closes every disk. The store may not be used afterwards.
    ///
    /// # Errors
    /// Names all disks that could not be closed. The others are closed.
    pub fn close(&self) -> Result<(), StoreError> {
        self.closing.store(true, Ordering::Release);
        if let Some(tracer) = self.tracer() {
            tracer.close();
        }
        self.bases().iter().for_each(|base| base.forget_token());
        let disks = self.all_disks();
        let mut of_pools: BTreeMap<u64, Vec<Arc<DiskNode>>> = BTreeMap::new();
        for disk in disks {
            of_pools.entry(self.pool_of(&disk)).or_default().push(disk);
        }
        // A drive that hangs keeps no disk of another one from being closed durably.
        let last = of_pools.pop_first().map(|(_, disks)| disks).unwrap_or_default();
        let Closed { mut failed, doubtful } = std::thread::scope(|scope| {
            let others: Vec<_> =
                of_pools.into_values().map(|disks| scope.spawn(move || self.close_all(disks))).collect();
            let mut closed = self.close_all(last);
            for other in others {
                let Ok(other) = other.join() else { continue };
                closed.failed.extend(other.failed);
                closed.doubtful.extend(other.doubtful);
            }
            closed
        });
        for (pool, medium) in self.pools.usable() {
            if let Err(error) = self.remove_strays(pool, &*medium, &doubtful) {
                let pool = self.pools.name(pool);
                tracing::error!(%error, pool, "files that an unclean end left in deltas/ cannot be removed; they stay");
                failed.push(format!("files that an unclean end left in deltas/ of pool {pool}: {error}"));
            }
        }
        // A record's write that failed may have left its file where the storage failed to remove it too.
        let mut kept = self.unavailable.files();
        kept.extend(doubtful.iter().map(|disk| layout::disk_path(*disk)));
        let unfinished = [RecordKind::Base, RecordKind::Disk].map(|kind| kind.unfinished(&*self.medium));
        records::remove_unfinished(&*self.medium, unfinished.concat(), &kept);
        // No later change of a record comes.
        self.write_names(i64::MAX);
        self.write_uses();
        if failed.is_empty() { Ok(()) } else { Err(StoreError::NotClosed { disks: failed }) }
    }

    fn close_all(&self, disks: Vec<Arc<DiskNode>>) -> Closed {
        let mut closed = Closed::default();
        for disk in disks {
            // No client can have it open any more. A worker may have died between the last close and the removal.
            let done = if disk.is_unlinked() && disk.trashed().is_none() {
                self.purge(disk.id())
            } else {
                disk.close().and_then(|()| self.remove_dropped(&disk))
            };
            if let Err(error) = done {
                tracing::error!(%error, "closing a disk failed");
                closed.failed.push(error.to_string());
                closed.doubtful.insert(disk.id());
            }
        }
        closed
    }

    /// Removes the map files of failed or interrupted flushes: those that no record names, where the map file that the
    /// record names is sound. Skips disks in `doubtful`, of which it is unknown which file a power cut leaves. Also
    /// removes unfinished indexes and, unless the record of a disk cannot be read, files without data of deltas that no
    /// record names. All other files may be the last copy of an object.
    fn remove_strays(&self, pool: u64, medium: &dyn Medium, doubtful: &HashSet<u64>) -> std::io::Result<()> {
        let mut files: HashMap<u64, Files> = HashMap::new();
        let (mut removed, all_known) = (false, !self.unavailable.has_unavailable_disk());
        for name in medium.list(layout::DELTAS)? {
            let unfinished = name.strip_suffix(layout::STAGED_SUFFIX).and_then(DeltaFile::of);
            if let Some(DeltaFile::Index(_)) = unfinished {
                medium.remove(&format!("{}/{name}", layout::DELTAS))?;
                removed = true;
            }
            match DeltaFile::of(&name) {
                Some(DeltaFile::Data(id)) => files.entry(id).or_default().has_data = true,
                Some(DeltaFile::Map { delta, generation }) => {
                    files.entry(delta).or_default().maps.push(generation);
                }
                // Of a layer, or of what is removed with its other files.
                Some(DeltaFile::Index(_)) => {}
                None => {}
            }
        }
        let disks = self.all_disks();
        let mut owners = HashMap::new();
        for node in &disks {
            node.each_delta(|delta| {
                if self.pools.home(delta) == pool {
                    owners.insert(delta, node);
                }
            });
        }
        for (id, Files { maps, has_data }) in files {
            let node = owners.get(&id).copied();
            if node.is_some_and(|node| doubtful.contains(&node.id())) {
                continue;
            }
            let strays: Vec<u64> = match node {
                Some(node) => maps.into_iter().filter(|map| *map != node.generation(id)).collect(),
                None if !all_known => continue,
                None => maps,
            };
            let data = layout::data_path(id);
            let may_go = match node {
                Some(node) => !strays.is_empty() && node.has_sound_map(id),
                None => medium.allocated(&data)?.unwrap_or(0) == 0,
            };
            if !may_go {
                continue;
            }
            for generation in strays {
                medium.remove(&layout::map_path(id, generation))?;
                removed = true;
            }
            if node.is_none() && has_data {
                medium.remove(&data)?;
                removed = true;
            }
        }
        if removed { medium.sync_dir(layout::DELTAS) } else { Ok(()) }
    }
}
