//! What a store says about its pools, and the changes of its list of pools.

use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path};
use std::sync::Arc;

use super::{AbsentMedium, DEFAULT, Pool, PoolEntry, Trouble, no_pool};
use crate::format::layout::{POOL_IDENTITY, POOLS, RESERVE};
use crate::format::pools::{DEFAULT_POOL, LONGEST_POOL_IDENTITY, MOST_POOLS, PoolIdentity, encode};
use crate::format::valid_name;
use crate::io::{Medium, Space, replace, sys};
use crate::source::{Source, SourceErrorKind};
use crate::store::reserve::ReserveState;
use crate::store::{DiskNode, Store, StoreError};

/// A pool as a client sees it.
#[derive(Debug, Clone)]
pub struct PoolView {
    /// Its number; 0 of the default one.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: String,
    /// Why it cannot be used.
    pub trouble: Option<String>,
    /// Space of its filesystem, when it can be used.
    pub space: Option<Space>,
    /// Its reserve, when it can be used.
    pub reserve: Option<ReserveState>,
}

/// The directory of a pool.
pub struct PoolDir {
    /// Number of the pool.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// The directory, without the reserve.
    pub medium: Arc<dyn Medium>,
}

/// What of a disk lies in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolUse {
    /// Name of the disk, or the last one it had.
    pub disk: String,
    /// Whether its own delta lies there, and not only layers that it needs.
    pub has_delta: bool,
}

/// Whether the drive of a pool never comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// It may.
    No,
    /// It does not: the files that removed disks have there are forgotten.
    Yes,
}

impl Store {
    /// Number of the pool in which the delta of a disk lies.
    pub fn pool_of(&self, node: &DiskNode) -> u64 {
        self.pools.home(node.delta_number())
    }

    /// Names of the pools that a disk needs: that of its delta, and those of its layers.
    pub fn pools_of(&self, node: &DiskNode) -> (String, Vec<String>) {
        let lineage = node.lineage();
        let all: BTreeSet<u64> = lineage.deltas().map(|delta| self.pools.home(delta)).collect();
        let names = all.into_iter().map(|pool| self.pools.name(pool)).collect();
        (self.pools.name(self.pools.home(lineage.delta)), names)
    }

    /// Numbers of the pools, the default one first.
    pub fn pool_numbers(&self) -> Vec<u64> {
        std::iter::once(DEFAULT).chain(self.pools.pools.read().keys().copied()).collect()
    }

    /// All pools, the default one first.
    pub fn pools(&self) -> Vec<PoolView> {
        let default = PoolView {
            number: DEFAULT,
            name: DEFAULT_POOL.to_owned(),
            dir: self.pools.default.root().display().to_string(),
            trouble: None,
            space: self.pools.default.space().ok(),
            reserve: Some(self.pools.default.state()),
        };
        let pools: Vec<_> = self.pools.pools.read().values().cloned().collect();
        let view = |pool: Arc<Pool>| PoolView {
            number: pool.entry.number,
            name: pool.entry.name.clone(),
            dir: pool.entry.dir.clone(),
            trouble: pool.trouble.as_ref().map(|trouble| trouble.why.clone()),
            space: self.pools.space(&pool),
            reserve: pool.reserve.as_ref().map(|reserve| reserve.state()),
        };
        std::iter::once(default).chain(pools.into_iter().map(view)).collect()
    }

    /// The pools that can be used and are not the default one. The media spend nothing of a reserve.
    pub fn pool_dirs(&self) -> Vec<PoolDir> {
        let pools = self.pools.pools.read();
        let usable = pools.values().filter(|pool| pool.trouble.is_none());
        usable
            .filter_map(|pool| {
                let PoolEntry { number, name, .. } = &pool.entry;
                Some(PoolDir { number: *number, name: name.clone(), medium: pool.dir.clone()? })
            })
            .collect()
    }

    /// Names of the pools that cannot be used. Waits for nothing.
    pub fn unavailable_pools(&self) -> Vec<String> {
        let pools = self.pools.pools.read();
        let gone = pools.values().filter(|pool| pool.trouble.is_some());
        gone.map(|pool| pool.entry.name.clone()).collect()
    }

    /// A pool by name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn pool(&self, name: &str) -> Result<PoolView, StoreError> {
        self.pools().into_iter().find(|pool| pool.name == name).ok_or_else(|| no_pool(name))
    }

    /// Which disks have deltas or layers in a pool, removed ones too, by name.
    pub fn pool_uses(&self, number: u64) -> Vec<PoolUse> {
        let disks = self.all_disks();
        let mut uses = Vec::new();
        for node in disks {
            let lineage = node.lineage();
            let has_delta = self.pools.home(lineage.delta) == number;
            let all = lineage.deltas().chain(lineage.dropped.iter().copied());
            let is_used = has_delta || all.into_iter().any(|delta| self.pools.home(delta) == number);
            if is_used {
                uses.push(PoolUse { disk: node.name(), has_delta });
            }
        }
        uses.sort_unstable_by(|a, b| a.disk.cmp(&b.disk));
        uses
    }

    /// Lists a directory as a pool. The next worker uses it. A pool of that name with that directory counts as added.
    ///
    /// # Errors
    /// A bad or taken name; a directory that is not an absolute path, lies in the store or the mount, is a pool already,
    /// or was not prepared for this store; errors of the storage.
    pub fn add_pool(&self, name: &str, dir: &str, mount: &Path) -> Result<PoolView, StoreError> {
        let object = format!("pool {name}");
        let refuse = |why: String| Err(StoreError::invalid(object.clone(), why));
        if !valid_name(name) {
            let why = "a name has 1 to 128 letters, digits, dots, underscores and hyphens, and begins with a letter or \
                       digit";
            return refuse(why.into());
        }
        let path = Path::new(dir);
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            return refuse(format!("{dir:?} is not an absolute path without `..`; give one"));
        }
        if dir.len() > 4096 || dir.contains('\0') {
            return refuse("the path of its directory has more than 4096 bytes or a zero byte".into());
        }
        for (other, what) in
            [(self.pools.default.root(), "the directory of the store"), (mount.into(), "the mount")]
        {
            if super::is_inside(path, &other) {
                let other = other.display();
                return refuse(format!(
                    "{dir} and {what}, {other}, lie one in the other; choose another directory"
                ));
            }
        }
        let dir: String = path.components().collect::<std::path::PathBuf>().display().to_string();
        let uuid = self.identity_at(&object, &dir)?;
        let _listing = self.pools.listing.lock();
        if let Err(why) = &self.pools.listed {
            return refuse(format!(
                "the list of pools cannot be read: {why}; restore the file `pools` of the store"
            ));
        }
        let mut entries: Vec<PoolEntry> = self.entries();
        if let Some(known) = entries.iter().find(|pool| pool.uuid == uuid) {
            if known.name == name && known.dir == dir {
                return self.pool(name);
            }
            return refuse(format!("{dir} is pool {} already", known.name));
        }
        if name == DEFAULT_POOL || entries.iter().any(|pool| pool.name == name) {
            return Err(StoreError::Exists { object });
        }
        if let Some(near) =
            entries.iter().find(|pool| super::is_inside(Path::new(&pool.dir), Path::new(&dir)))
        {
            return refuse(format!(
                "{dir} and the directory of pool {}, {}, lie one in the other",
                near.name, near.dir
            ));
        }
        if entries.len() >= MOST_POOLS {
            return refuse(format!(
                "the store has {MOST_POOLS} pools, the most that it can have; remove one first"
            ));
        }
        let number = self.new_id()?;
        let entry = PoolEntry { number, name: name.into(), dir, uuid, added_ns: sys::now_ns() };
        entries.push(entry.clone());
        self.write_list(&object, &entries)?;
        let trouble = Trouble { why: "this worker started before the pool was there".into(), is_gone: false };
        let medium = Arc::new(AbsentMedium::new(&entry, &trouble.why));
        let pool = Pool { entry, medium, dir: None, reserve: None, trouble: Some(trouble), is_lost: false };
        self.pools.pools.write().insert(number, Arc::new(pool));
        self.pool(name)
    }

    /// Takes a pool off the list, and its identity from its directory. Another store may use the directory then.
    ///
    /// # Errors
    /// `InUse` with the names of the disks that have a delta or a layer there; an unknown pool; errors of the storage.
    pub fn remove_pool(&self, name: &str, lost: Lost) -> Result<(), StoreError> {
        let object = format!("pool {name}");
        let _listing = self.pools.listing.lock();
        let before = match lost {
            Lost::Yes => Some(self.forget_files(&self.pool(name)?)?),
            Lost::No => None,
        };
        self.unlist(name, object).inspect_err(|_| {
            if let Some(before) = before {
                self.pools.pools.write().insert(before.entry.number, before);
            }
        })
    }

    /// Removes what removed disks have in a pool that is lost. Returns the pool as it was.
    fn forget_files(&self, view: &PoolView) -> Result<Arc<Pool>, StoreError> {
        let object = format!("pool {}", view.name);
        let Some(before) = self.pools.pool(view.number).filter(|pool| pool.trouble.is_some()) else {
            let why = "it is available; leave out --lost, and remove its disks as usual";
            return Err(StoreError::invalid(object, why));
        };
        let lost = Pool {
            entry: before.entry.clone(),
            medium: Arc::new(AbsentMedium::lost(&before.entry)),
            dir: None,
            reserve: None,
            trouble: None,
            is_lost: true,
        };
        self.pools.pools.write().insert(view.number, Arc::new(lost));
        let disks = self.all_disks();
        for node in disks {
            let is_there = |delta: &u64| self.pools.home(*delta) == view.number;
            let done = match node.is_unlinked() && node.numbers().iter().any(is_there) {
                true => self.purge(node.id()),
                false if node.lineage().dropped.iter().any(is_there) => self.remove_dropped(&node),
                false => Ok(()),
            };
            if let Err(error) = done {
                self.pools.pools.write().insert(view.number, before);
                return Err(error);
            }
        }
        Ok(before)
    }

    /// The caller holds `listing`.
    fn unlist(&self, name: &str, object: String) -> Result<(), StoreError> {
        // No disk is placed in it meanwhile.
        let Some(_placing) = self.pools.placing.try_write() else {
            return Err(StoreError::InUse { object, users: "a disk that is being made or moved".into() });
        };
        let view = self.pool(name)?;
        if view.number == DEFAULT {
            return Err(StoreError::invalid(object, "it is the directory of the store, which always stays"));
        }
        let uses = self.pool_uses(view.number);
        if !uses.is_empty() {
            let more = uses.len().saturating_sub(10);
            let named: Vec<_> = uses.iter().take(10).map(|used| format!("disk {}", used.disk)).collect();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            return Err(StoreError::InUse { object, users: named.join(", ") + &more });
        }
        self.check_needs_are_known(|| object.clone())?;
        let entries: Vec<_> = self.entries().into_iter().filter(|pool| pool.number != view.number).collect();
        self.write_list(&object, &entries)?;
        let Some(pool) = self.pools.pools.write().remove(&view.number) else { return Ok(()) };
        if pool.trouble.is_none() && !pool.is_lost {
            for file in [RESERVE, POOL_IDENTITY] {
                if let Err(error) = pool.medium.remove(file)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, pool = name, file, "a file stays in the directory of a pool that was removed; it does no harm");
                }
            }
        }
        Ok(())
    }

    fn entries(&self) -> Vec<PoolEntry> {
        self.pools.pools.read().values().map(|pool| pool.entry.clone()).collect()
    }

    fn write_list(&self, object: &str, entries: &[PoolEntry]) -> Result<(), StoreError> {
        replace(&*self.medium, ".", POOLS, &encode(entries))
            .map_err(StoreError::io(object, "writing the list of pools"))
    }

    /// The number of the pool that a directory says it is.
    fn identity_at(&self, object: &str, dir: &str) -> Result<[u8; 16], StoreError> {
        let refuse = |why: String| StoreError::invalid(object, why);
        let prepare = "prepare it with: plyfs pool add";
        let file =
            self.sources.file(&Path::new(dir).join(POOL_IDENTITY)).map_err(|error| match error.kind() {
                SourceErrorKind::NotFound => refuse(format!(
                    "{dir} has no {POOL_IDENTITY}, by which it shows that it is a pool; {prepare}"
                )),
                SourceErrorKind::Outside => {
                    refuse(format!("{dir} lies outside of [security] base_dirs; add the directory there"))
                }
                _ => StoreError::Source { object: object.to_owned(), source: error },
            })?;
        let mut bytes = vec![0; file.size().min(LONGEST_POOL_IDENTITY) as usize];
        let got = file.read_at(&mut bytes, 0);
        let got = got.map_err(|source| StoreError::Source { object: object.to_owned(), source })?;
        let identity = PoolIdentity::decode(&bytes[..got])
            .map_err(|error| refuse(format!("{dir}/{POOL_IDENTITY}: {error}; {prepare}")))?;
        if identity.store != self.superblock.lock().uuid {
            return Err(refuse(format!("{dir} is the pool of another store; choose another directory")));
        }
        Ok(identity.uuid)
    }
}
