//! Files that nothing needs, and files that plyfs did not make.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use super::{Check, CheckError};
use crate::format::layout::{
    BASES, DELTAS, DISKS, DeltaFile, STAGED_SUFFIX, base_record, data_path, disk_path, disk_record, number,
};
use crate::format::record::DiskRecord;
use crate::io::{Medium, replace};

/// What the records say about a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// The map file of a delta has this generation.
    Needed { disk: u64, generation: u64, is_layer: bool },
    /// Its files are to be removed.
    Dropped,
}

/// Removes the files of deltas.
fn remove_files(medium: &dyn Medium, files: &[String]) -> io::Result<()> {
    for file in files {
        match medium.remove(&format!("{DELTAS}/{file}")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    medium.sync_dir(DELTAS)
}

/// Those files that belong to one of these deltas.
fn files_of(deltas: &[String], numbers: &BTreeSet<u64>) -> Vec<String> {
    let is_of = |name: &&String| DeltaFile::of(name).is_some_and(|file| numbers.contains(&file.delta()));
    deltas.iter().filter(is_of).cloned().collect()
}

impl Check<'_> {
    /// Invariant 11.
    pub(super) fn strays(
        &mut self,
        superblock: bool,
        bases: &[String],
        disks: &[String],
        deltas: &[String],
    ) -> Result<(), CheckError> {
        let root = self.list(".")?;
        let named = self.named();
        for (dir, names) in [(".", root.as_slice()), (BASES, bases), (DISKS, disks), (DELTAS, deltas)] {
            for name in names {
                let path = if dir == "." { name.clone() } else { format!("{dir}/{name}") };
                let record = name.split_once('.').and_then(|(id, rest)| Some((number(id)?, rest)));
                if name.ends_with(STAGED_SUFFIX) {
                    let owner = record.map(|(id, _)| id).filter(|_| dir == DISKS);
                    let last_copy = match dir {
                        "." => !superblock,
                        DISKS => owner.is_some_and(|id| self.broken.contains(&id)),
                        _ => false,
                    };
                    if last_copy {
                        self.find(
                            11,
                            path,
                            "left by an unclean stop; kept, because the file that it should replace is damaged",
                        );
                    } else {
                        self.stray(dir, name, owner, "left by an unclean stop");
                    }
                    continue;
                }
                match dir {
                    BASES if record.is_none_or(|(id, _)| *name != base_record(id)) => self.foreign(path),
                    DISKS if record.is_none_or(|(id, _)| *name != disk_record(id)) => self.foreign(path),
                    DELTAS => self.stray_delta(name, disks, &named),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    pub(super) fn foreign(&mut self, path: String) {
        self.find(11, path, "plyfs creates no file of this name; move it elsewhere");
    }

    pub(super) fn stray(&mut self, dir: &str, name: &str, disk: Option<u64>, why: &str) {
        let path = if dir == "." { name.to_owned() } else { format!("{dir}/{name}") };
        let file = path.clone();
        self.repairable(11, path, why, disk, |medium| {
            match medium.remove(&file) {
                // An earlier repair of this run may have renamed it into place.
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            medium.sync_dir(dir)
        });
    }

    /// What the records say about each delta.
    fn named(&self) -> BTreeMap<u64, Named> {
        let mut named = BTreeMap::new();
        for (disk, record) in &self.disks {
            let (disk, lineage) = (*disk, &record.lineage);
            for number in &lineage.dropped {
                named.entry(*number).or_insert(Named::Dropped);
            }
            for layer in &lineage.layers {
                let generation = layer.map.generation;
                named.insert(layer.number, Named::Needed { disk, generation, is_layer: true });
            }
            if let Some(rework) = &lineage.rework {
                let generation = rework.layer.map.generation;
                named.insert(rework.layer.number, Named::Needed { disk, generation, is_layer: false });
            }
            let generation = record.map.generation;
            named.insert(lineage.delta, Named::Needed { disk, generation, is_layer: false });
        }
        named
    }

    fn stray_delta(&mut self, name: &str, disks: &[String], named: &BTreeMap<u64, Named>) {
        let path = format!("{DELTAS}/{name}");
        let Some(file) = DeltaFile::of(name) else { return self.foreign(path) };
        let id = file.delta();
        if self.pools.is_elsewhere(id) {
            return self.find(11, path, "its disk has that delta in a pool; kept: move the file elsewhere");
        }
        let Some(owner) = named.get(&id) else { return self.unnamed(name, id, disks) };
        let (disk, is_layer, needed) = match *owner {
            Named::Dropped => return,
            Named::Needed { disk, generation, is_layer } => (disk, is_layer, generation),
        };
        match file {
            DeltaFile::Map { generation, .. } if generation != needed => {
                let why = format!("the map of the disk has generation {needed}");
                if self.broken.contains(&disk) || self.broken_deltas.contains(&id) {
                    self.find(11, path, format!("{why}; kept, because the disk has other findings"));
                } else {
                    self.stray(DELTAS, name, Some(id), &why);
                }
            }
            DeltaFile::Index(_) if !is_layer => {
                self.stray(DELTAS, name, Some(id), "only a sealed layer has an index");
            }
            _ => {}
        }
    }

    /// A file of a delta that no record names.
    fn unnamed(&mut self, name: &str, id: u64, disks: &[String]) {
        let path = format!("{DELTAS}/{name}");
        if disks.binary_search(&disk_record(id)).is_ok() {
            // The record is damaged, and has its finding.
            return;
        }
        let record = disk_path(id);
        // No crash leaves data without a record, so the record was lost.
        let has_data =
            fs::symlink_metadata(self.store.join(data_path(id))).is_ok_and(|meta| meta.blocks() > 0);
        let all_read =
            disks.iter().filter(|name| number_of_record(name).is_some()).count() == self.disks.len();
        if has_data {
            self.find(
                11,
                path,
                format!("there is no {record}; kept, because it has data: restore that record, or remove this file"),
            );
        } else if !all_read {
            let why = "no record that can be read names it; kept, because a damaged record may need it";
            self.find(11, path, why);
        } else {
            self.stray(DELTAS, name, Some(id), &format!("there is no {record}"));
        }
    }

    /// The deltas of a disk that no other disk needs.
    fn own_deltas(&self, id: u64, record: &DiskRecord) -> BTreeSet<u64> {
        let lineage = &record.lineage;
        let mut own: BTreeSet<u64> = lineage.deltas().chain(lineage.dropped.iter().copied()).collect();
        for (_, other) in self.disks.iter().filter(|(other, _)| **other != id) {
            other.lineage.deltas().for_each(|delta| {
                own.remove(&delta);
            });
        }
        own
    }

    /// Invariant 12.
    pub(super) fn unlinked(&mut self, deltas: &[String]) {
        for (id, record) in self.disks.clone() {
            if !record.is_removed() || self.broken.contains(&id) || self.losers.contains(&id) {
                continue;
            }
            let mut message = format!("number {id} was removed, but its files are still there");
            if !record.lineage.layers.is_empty() && self.has_unknown_needs() {
                message.push_str("; kept, because a disk whose record is damaged may need its layers");
                self.find(12, format!("disk {}", record.name), message);
                continue;
            }
            let own = self.own_deltas(id, &record);
            if let Some(why) = own.iter().find_map(|delta| self.pools.trouble(*delta)) {
                message.push_str(&format!("; kept, because {why}"));
                self.find(12, format!("disk {}", record.name), message);
                continue;
            }
            let files = files_of(deltas, &own);
            let done = self.repairable(12, format!("disk {}", record.name), message, Some(id), |medium| {
                // The record is removed last, as in the store.
                remove_files(medium, &files)?;
                medium.remove(&disk_path(id))?;
                medium.sync_dir(DISKS)
            });
            if done {
                // Layers that it shared with another removed disk belong to that one alone now.
                self.disks.remove(&id);
            }
        }
    }

    /// Invariant 12: deltas that a disk does not need any more.
    pub(super) fn dropped(&mut self, deltas: &[String]) {
        for (id, mut record) in self.disks.clone() {
            if record.is_removed() || record.lineage.dropped.is_empty() || self.broken.contains(&id) {
                continue;
            }
            let mut dropped: BTreeSet<u64> =
                std::mem::take(&mut record.lineage.dropped).into_iter().collect();
            let message = "the files of old layers that it does not need are still there";
            if self.has_unknown_needs() {
                let message =
                    format!("{message}; kept, because a disk whose record is damaged may need them");
                self.find(12, format!("disk {}", record.name), message);
                continue;
            }
            // The record of a change that failed may have come back by a crash.
            for other in self.disks.values() {
                other.lineage.deltas().for_each(|delta| {
                    dropped.remove(&delta);
                });
            }
            if let Some(why) = dropped.iter().find_map(|delta| self.pools.trouble(*delta)) {
                let message = format!("{message}; kept, because {why}");
                self.find(12, format!("disk {}", record.name), message);
                continue;
            }
            let files = files_of(deltas, &dropped);
            self.repairable(12, format!("disk {}", record.name), message, Some(id), |medium| {
                remove_files(medium, &files)?;
                replace(medium, DISKS, &disk_record(id), &record.encode())
            });
        }
    }
}

fn number_of_record(name: &str) -> Option<u64> {
    number(name.split_once('.')?.0).filter(|id| *name == disk_record(*id))
}
