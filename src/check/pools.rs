//! The pools of a store: invariant 15, and where the files of deltas are.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::Check;
use crate::format::layout::{DELTAS, DeltaFile, POOLS};
use crate::format::record::{DiskRecord, Superblock};
use crate::io::{Medium, MediumFile, Open, Space, Stamp};
use crate::store::pools::{HostPools, OpenPools, read_list};

/// A pool other than the directory of the store.
struct Pool {
    name: String,
    dir: PathBuf,
    /// Or why it cannot be used.
    medium: Result<Arc<dyn Medium>, String>,
    /// The names in its `deltas/`, sorted.
    files: Vec<String>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Pools {
    pools: BTreeMap<u64, Pool>,
    /// The pool of each delta that is not in the directory of the store.
    homes: HashMap<u64, u64>,
}

impl Pools {
    fn pool_of(&self, delta: u64) -> Option<Result<&Pool, String>> {
        let number = self.homes.get(&delta)?;
        let unlisted = || format!("pool number {number} is not in the list of pools");
        Some(self.pools.get(number).ok_or_else(unlisted))
    }

    /// Whether a delta does not lie in the directory of the store.
    pub(super) fn is_elsewhere(&self, delta: u64) -> bool {
        self.homes.contains_key(&delta)
    }

    /// Why the files of a delta cannot be examined.
    pub(super) fn trouble(&self, delta: u64) -> Option<String> {
        match self.pool_of(delta)? {
            Ok(pool) => pool.medium.as_ref().err().cloned(),
            Err(why) => Some(why),
        }
    }

    /// The directory of the pool of the delta whose file a path names; `None`: the directory of the store.
    pub(super) fn dir_of(&self, path: &str) -> io::Result<Option<PathBuf>> {
        let Some(delta) = DeltaFile::number_in(path) else { return Ok(None) };
        match (self.pool_of(delta), self.trouble(delta)) {
            (_, Some(why)) => Err(io::Error::other(why)),
            (Some(Ok(pool)), None) => Ok(Some(pool.dir.clone())),
            _ => Ok(None),
        }
    }

    /// The directories of the pools that can be used, and their media.
    pub(super) fn usable(&self) -> impl Iterator<Item = (PathBuf, Arc<dyn Medium>)> {
        self.pools.values().filter_map(|pool| Some((pool.dir.clone(), pool.medium.clone().ok()?)))
    }

    /// The names of files in the `deltas/` of all pools that can be read.
    pub(super) fn files(&self) -> impl Iterator<Item = &String> {
        self.pools.values().flat_map(|pool| &pool.files)
    }

    /// The numbers of the pools, as names of files.
    pub(super) fn numbers(&self) -> impl Iterator<Item = String> {
        self.pools.keys().map(|number| format!("{number}.pool"))
    }
}

impl Check<'_> {
    /// Invariant 15.
    pub(super) fn find_pools(&mut self, superblock: Option<&Superblock>) {
        let entries = match read_list(self.medium) {
            Ok(entries) => entries,
            Err(why) => {
                let message =
                    format!("{why}; restore it from a backup: disks in pools are not served without it");
                self.find(15, POOLS, message);
                Vec::new()
            }
        };
        let opener = HostPools::default();
        let mut pools = BTreeMap::new();
        for entry in entries {
            let opened = match superblock {
                Some(superblock) => opener.open(&entry, &superblock.uuid).map_err(|trouble| trouble.why),
                None => Err("the superblock, which it belongs to, cannot be read".to_owned()),
            };
            let listed = opened.and_then(|medium| {
                let files = medium.list(DELTAS).map_err(|error| format!("reading its {DELTAS}/: {error}"))?;
                Ok((medium, files))
            });
            let (medium, mut files) = match listed {
                Ok((medium, files)) => (Ok(medium), files),
                Err(why) => {
                    let message = format!("{}: {why}; its disks were not checked", entry.dir);
                    self.find(15, format!("pool {}", entry.name), message);
                    (Err(format!("pool {} is not available: {why}", entry.name)), Vec::new())
                }
            };
            files.sort_unstable();
            let (name, dir) = (entry.name, PathBuf::from(entry.dir));
            pools.insert(entry.number, Pool { name, dir, medium, files });
        }
        let homes: HashMap<u64, u64> =
            self.disks.values().flat_map(|record| record.features.pools.iter().copied()).collect();
        let unlisted: Vec<&DiskRecord> = self
            .disks
            .values()
            .filter(|record| record.features.pools.iter().any(|(_, pool)| !pools.contains_key(pool)))
            .collect();
        let names: Vec<String> = unlisted.iter().map(|record| record.name.clone()).collect();
        for name in names {
            self.find(
                15,
                format!("disk {name}"),
                "a pool that it needs is not in the list of pools; restore that list",
            );
        }
        self.pools = Pools { pools, homes };
    }

    /// Files in the `deltas/` of pools that no record puts there. None of them is removed: no crash leaves them.
    pub(super) fn strays_in_pools(&mut self) {
        let mut found = Vec::new();
        for (number, pool) in &self.pools.pools {
            for name in &pool.files {
                let delta = DeltaFile::of(name).map(DeltaFile::delta);
                if delta.is_none_or(|delta| self.pools.homes.get(&delta) != Some(number)) {
                    let path = pool.dir.join(DELTAS).join(name).display().to_string();
                    found.push((path, pool.name.clone()));
                }
            }
        }
        for (path, pool) in found {
            let why = format!("no record that can be read has a delta of that number in pool {pool}; kept");
            self.find(11, path, why);
        }
    }
}

/// The medium of a check with pools, for repairs: each file of a delta is in the pool of the delta.
pub(super) struct Routed<'a> {
    pub store: &'a dyn Medium,
    pub pools: &'a Pools,
}

impl Routed<'_> {
    fn of(&self, path: &str) -> io::Result<&dyn Medium> {
        let delta = DeltaFile::number_in(path);
        match delta.and_then(|delta| self.pools.pool_of(delta)) {
            None => Ok(self.store),
            Some(pool) => {
                let medium = pool.and_then(|pool| pool.medium.as_deref().map_err(Clone::clone));
                medium.map_err(io::Error::other)
            }
        }
    }
}

impl Medium for Routed<'_> {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        self.of(name)?.open(name, how)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.of(to)?.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.of(name)?.remove(name)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.store.sync_dir(dir)?;
        let pools = self.pools.pools.values().filter(|_| dir == DELTAS);
        pools.filter_map(|pool| pool.medium.as_ref().ok()).try_for_each(|medium| medium.sync_dir(dir))
    }
    fn stamp(&self, name: &str) -> io::Result<Option<Stamp>> {
        self.of(name)?.stamp(name)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.store.list(dir)
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.store.make_dir(dir)
    }
    fn never_waits(&self) -> bool {
        false
    }
    fn space(&self) -> io::Result<Space> {
        self.store.space()
    }
    fn root(&self) -> PathBuf {
        self.store.root()
    }
}

/// Opens a regular file to read it.
pub(super) fn open_file(path: PathBuf) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}
