//! Finds the live maps of a store: a disk with a live map has a newer state than its durable map.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io};

use super::Check;
use crate::format::layout::{LIVE_RECORD, number};
use crate::format::live::LiveRecord;
use crate::format::record::Superblock;
use crate::io::{ArenaIdentity, LiveArena, sys};

impl Check<'_> {
    /// Finds the disks that have a live map, in the arena that the store's record names, or in files that a version
    /// without an arena left. The name of the directory of such files has the store's uuid, device and inode.
    pub(super) fn find_live_maps(&mut self, runtime_dir: &Path, superblock: Option<&Superblock>) {
        let Ok(meta) = fs::metadata(self.store) else { return };
        self.find_arena(&meta);
        let uuid = superblock.map(|s| hex::encode(&s.uuid[..4]));
        let (prefix, suffix) = match uuid {
            Some(uuid) => (format!("plyfs-{uuid}-"), format!("{}-{}", meta.dev(), meta.ino())),
            // Without the superblock, only the directory's device and inode are known.
            None => ("plyfs-".to_owned(), format!("-{}-{}", meta.dev(), meta.ino())),
        };
        let ours = |name: &str| {
            name.strip_prefix(&prefix).is_some_and(|rest| {
                if superblock.is_some() { rest == suffix } else { rest.ends_with(&suffix) }
            })
        };
        for entry in fs::read_dir(runtime_dir).into_iter().flatten().flatten() {
            if !ours(&entry.file_name().to_string_lossy()) {
                continue;
            }
            for live in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                self.live.extend(live.file_name().to_string_lossy().strip_suffix(".live").and_then(number));
            }
        }
    }

    fn find_arena(&mut self, store: &fs::Metadata) {
        let record = fs::read(self.store.join(LIVE_RECORD)).ok().and_then(|b| LiveRecord::decode(&b).ok());
        let place = (store.dev(), store.ino());
        let is_ours = |r: &LiveRecord| r.boot == sys::boot_number() && (r.device, r.inode) == place;
        let Some(record) = record.filter(is_ours) else { return };
        let identity = ArenaIdentity { id: record.id, device: record.device, inode: record.inode };
        let listed = fs::File::open(&record.path).and_then(|arena| match LiveArena::identity(&arena)? {
            Some(found) if found == identity => LiveArena::list(&arena),
            _ => Err(io::ErrorKind::NotFound.into()),
        });
        match listed {
            Ok(maps) => self.live.extend(maps.into_iter().map(|(disk, _)| disk)),
            // The service manager's descriptor store may still have the maps.
            Err(_) => self.live_unknown = true,
        }
    }
}
