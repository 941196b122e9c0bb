//! The end of a store: everything is made durable, and what an unclean end before left is put right.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use super::{Store, StoreError};
use crate::format::layout::{self, DeltaFile};

/// Files in `deltas/` of one number.
#[derive(Debug, Default)]
struct Files {
    maps: Vec<u64>,
    has_data: bool,
}

impl Store {
    /// Flushes and closes every disk. The store is not used afterwards.
    ///
    /// # Errors
    /// Names all disks that could not be closed; the others are closed.
    pub fn close(&self) -> Result<(), StoreError> {
        self.closing.store(true, Ordering::Release);
        if let Some(tracer) = self.tracer() {
            tracer.close();
        }
        self.bases().iter().for_each(|base| base.forget_token());
        let disks: Vec<_> = self.names.read().disks.values().cloned().collect();
        let (mut failed, mut doubtful) = (Vec::new(), HashSet::new());
        for disk in disks {
            // Nobody can have it open any more. A worker may have died between its last close and its removal.
            let closed = if disk.is_unlinked() { self.purge(disk.id()) } else { disk.close() };
            if let Err(error) = closed {
                tracing::error!(%error, "closing a disk failed");
                failed.push(error.to_string());
                doubtful.insert(disk.id());
            }
        }
        if let Err(error) = self.remove_strays(&doubtful) {
            tracing::error!(%error, "what unclean ends before left in deltas/ stays");
            failed.push(format!("what unclean ends before left in deltas/: {error}"));
        }
        if failed.is_empty() { Ok(()) } else { Err(StoreError::NotClosed { disks: failed }) }
    }

    /// Removes map files that no record names, of flushes that failed or were cut off, where the one that the record
    /// names is sound, and not in `doubtful`: of those it is not known which file a power cut leaves. And empty files of
    /// numbers that have no record. All else may be the last copy of something.
    fn remove_strays(&self, doubtful: &HashSet<u64>) -> std::io::Result<()> {
        let mut files: HashMap<u64, Files> = HashMap::new();
        for name in self.medium.list(layout::DELTAS)? {
            match DeltaFile::of(&name) {
                Some(DeltaFile::Data(id)) => files.entry(id).or_default().has_data = true,
                Some(DeltaFile::Map { disk, generation }) => {
                    files.entry(disk).or_default().maps.push(generation);
                }
                None => {}
            }
        }
        let missing = self.missing.files();
        let mut removed = false;
        for (id, Files { maps, has_data }) in files {
            if doubtful.contains(&id) {
                continue;
            }
            let node = self.names.read().disks.get(&id).cloned();
            let strays: Vec<u64> = match &node {
                Some(node) => maps.into_iter().filter(|map| *map != node.generation()).collect(),
                None if missing.contains(&layout::disk_path(id)) => continue,
                None => maps,
            };
            let data = layout::data_path(id);
            let may_go = match &node {
                Some(node) => !strays.is_empty() && node.has_sound_map(),
                None => self.medium.allocated(&data)?.unwrap_or(0) == 0,
            };
            if !may_go {
                continue;
            }
            for generation in strays {
                self.medium.remove(&layout::map_path(id, generation))?;
                removed = true;
            }
            if node.is_none() && has_data {
                self.medium.remove(&data)?;
                removed = true;
            }
        }
        if removed { self.medium.sync_dir(layout::DELTAS) } else { Ok(()) }
    }
}
